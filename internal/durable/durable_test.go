package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

var errInjected = errors.New("injected")

// faultySteps does the real thing, notes each step, and fails the step number
// failAt; late says whether that step still takes effect.
type faultySteps struct {
	log    []string
	failAt int
	late   bool
}

// do runs one step.
func (s *faultySteps) do(name string, step func() error) error {
	s.log = append(s.log, name)
	if len(s.log)-1 != s.failAt {
		return step()
	}
	if s.late {
		if err := step(); err != nil {
			return err
		}
	}
	return errInjected
}

func (s *faultySteps) create(path string, perm fs.FileMode) (f tempFile, err error) {
	var real tempFile
	err = s.do("create", func() error { real, err = osSteps{}.create(path, perm); return err })
	if err != nil {
		if real != nil {
			real.Close()
		}
		return nil, err
	}
	return &faultyFile{s, real}, nil
}

func (s *faultySteps) rename(from, to string) error {
	return s.do("rename", func() error { return osSteps{}.rename(from, to) })
}

func (s *faultySteps) remove(path string) error {
	return s.do("remove", func() error { return osSteps{}.remove(path) })
}

func (s *faultySteps) syncDir(path string) error {
	return s.do("sync directory", func() error { return osSteps{}.syncDir(path) })
}

type faultyFile struct {
	steps *faultySteps
	f     tempFile
}

func (f *faultyFile) Write(b []byte) (n int, err error) {
	err = f.steps.do("write", func() error { n, err = f.f.Write(b); return err })
	return n, err
}

func (f *faultyFile) Sync() error  { return f.steps.do("sync", f.f.Sync) }
func (f *faultyFile) Close() error { return f.steps.do("close", f.f.Close) }

func TestOrder(t *testing.T) {
	s := &faultySteps{failAt: -1}
	path := filepath.Join(t.TempDir(), "header")
	if err := replace(s, path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"create", "write", "sync", "close", "rename", "sync directory"}
	if !slices.Equal(s.log, want) {
		t.Fatalf("steps %v, want %v", s.log, want)
	}
}

// Whichever step fails, whether or not it took effect, the file is the old or
// the new one, an error is reported, and the next write succeeds.
func TestFailAtEveryStep(t *testing.T) {
	for _, late := range []bool{false, true} {
		for k := 0; ; k++ {
			path := filepath.Join(t.TempDir(), "header")
			if err := WriteFile(path, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			s := &faultySteps{failAt: k, late: late}
			err := replace(s, path, []byte("new"), 0o600)
			if len(s.log) <= k { // nothing was left to fail
				if err != nil || k < 6 {
					t.Fatalf("no fault in %d steps, yet %v", k, err)
				}
				break
			}
			what := fmt.Sprintf("%s (step %d, late %t)", s.log[k], k, late)
			if !errors.Is(err, errInjected) {
				t.Errorf("%s failed: %v", what, err)
			}
			got, readErr := os.ReadFile(path)
			if readErr != nil || string(got) != "old" && string(got) != "new" {
				t.Errorf("%s failed: the file holds %q, %v", what, got, readErr)
			}
			if before := slices.Index(s.log, "rename"); before < 0 && string(got) != "old" {
				t.Errorf("%s failed: replaced without a rename", what)
			}
			if err := WriteFile(path, []byte("again"), 0o600); err != nil {
				t.Errorf("after %s failed: %v", what, err)
			}
			if _, err := os.Lstat(TempName(path)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after %s failed and a second write: the temporary file is left", what)
			}
		}
	}
}

func TestTemporaryFileIsRemovedOnFailure(t *testing.T) {
	for step, name := range []string{1: "write", 2: "sync", 4: "rename"} {
		if name == "" {
			continue
		}
		path := filepath.Join(t.TempDir(), "header")
		if err := replace(&faultySteps{failAt: step}, path, []byte("new"), 0o600); !errors.Is(err, errInjected) {
			t.Fatalf("%s: %v", name, err)
		}
		if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 0 {
			t.Errorf("%s failed: %v left", name, entries)
		}
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "header")
	for _, want := range []string{"first", "", "third, and longer"} {
		if err := WriteFile(path, []byte(want), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := ReadFile(path, 100)
		if err != nil || string(got) != want {
			t.Fatalf("%q, %v", got, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if err := WriteFile(filepath.Join(path, "below"), nil, 0o600); err == nil {
		t.Error("wrote below a file")
	}
	if err := WriteFile(filepath.Join(t.TempDir(), "missing", "header"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a missing directory: %v", err)
	}
}

// What a crash or somebody else left under the temporary name is replaced, never
// written through.
func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	path, victim := filepath.Join(dir, "header"), filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, leave := range map[string]func() error{
		"half a file": func() error { return os.WriteFile(TempName(path), bytes.Repeat([]byte("x"), 5000), 0o777) },
		"symlink":     func() error { return os.Symlink(victim, TempName(path)) },
		"hard link":   func() error { return os.Link(victim, TempName(path)) },
	} {
		if err := leave(); err != nil {
			t.Fatal(err)
		}
		if err := WriteFile(path, []byte("new"), 0o600); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != "new" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if info, err := os.Lstat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
		if got, err := os.ReadFile(victim); err != nil || string(got) != "untouched" {
			t.Errorf("%s: the victim holds %q, %v", name, got, err)
		}
	}
}

func TestReadFileIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "header")
	if err := os.WriteFile(path, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadFile(path, 10); err != nil || len(got) != 10 {
		t.Errorf("at its limit: %q, %v", got, err)
	}
	if got, err := ReadFile(path, 9); !errors.Is(err, ErrTooLarge) || got != nil {
		t.Errorf("above its limit: %q, %v", got, err)
	}
	pipe := path + ".pipe"
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, filepath.Dir(path)} {
		if _, err := ReadFile(path, 9); !errors.Is(err, ErrNotRegular) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := ReadFile(path+"-", 9); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestSyncDir(t *testing.T) {
	if err := (osSteps{}).syncDir(t.TempDir()); err != nil {
		t.Error(err)
	}
	if err := (osSteps{}).syncDir(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
}
