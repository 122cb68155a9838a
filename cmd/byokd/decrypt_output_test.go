package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/byokd/byokd/objstore"
)

// TestOutputFollowsNoSymlink: whoever may write to the directory of a restore plants
// symlinks under the names that byokd is going to use. What they point to stays as it is.
func TestOutputFollowsNoSymlink(t *testing.T) {
	begin := map[string]func(dir string) (*outputFile, error){
		"file": func(dir string) (*outputFile, error) { return newOutputFile(filepath.Join(dir, "a")) },
		"tree": func(dir string) (*outputFile, error) {
			tree, err := newOutputTree(dir, "", false)
			if err != nil {
				return nil, err
			}
			t.Cleanup(tree.Close)
			return tree.target(objstore.Entry{Key: "a"})
		},
	}
	for kind, begin := range begin {
		// A victim inside of the tree is one that os.Root alone would not protect.
		for _, victim := range []string{"victim", "../victim"} {
			t.Run(kind+" "+strings.ReplaceAll(victim, "/", " "), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "out")
				must(t, os.Mkdir(dir, 0o700))
				must(t, os.WriteFile(filepath.Join(dir, victim), []byte("mine"), 0o600))
				must(t, os.Symlink(victim, filepath.Join(dir, "a"+partialSuffix)))
				must(t, os.Symlink(victim, filepath.Join(dir, "a"+metadataSuffix+partialSuffix)))
				out, err := begin(dir)
				must(t, err)
				out.beside = func() ([]byte, error) { return []byte("beside"), nil }
				_, err = out.Write([]byte("plain"))
				must(t, err)
				must(t, out.Commit())
				for name, want := range map[string]string{victim: "mine", "a": "plain", "a" + metadataSuffix: "beside"} {
					info, err := os.Lstat(filepath.Join(dir, name))
					must(t, err)
					if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want || !info.Mode().IsRegular() {
						t.Errorf("%s: %q %v %v, want a file with %q", name, got, info.Mode(), err, want)
					}
				}
			})
		}
	}
}

// TestOutputBesideReplacesNothing: what has the name of the file of metadata stays, and
// the object's own file does not come without its metadata.
func TestOutputBesideReplacesNothing(t *testing.T) {
	const beside = "a" + metadataSuffix
	for name, c := range map[string]struct {
		plant func(dir string) error
		want  string // what is there afterwards
		ok    bool
	}{
		"another file":     {plant: func(dir string) error { return os.WriteFile(filepath.Join(dir, beside), []byte("mine"), 0o600) }, want: "mine"},
		"what it would be": {plant: func(dir string) error { return os.WriteFile(filepath.Join(dir, beside), []byte("beside"), 0o600) }, want: "beside", ok: true},
		"a symlink to what it would be": {plant: func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "there"), []byte("beside"), 0o600), os.Symlink("there", filepath.Join(dir, beside)))
		}, want: "beside"},
		"half of it, by a run that died": {plant: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, beside+partialSuffix), []byte("bes"), 0o600)
		}, want: "beside", ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, c.plant(dir))
			out, err := newOutputFile(filepath.Join(dir, "a"))
			must(t, err)
			out.beside = func() ([]byte, error) { return []byte("beside"), nil }
			if err := out.Commit(); (err == nil) != c.ok {
				t.Errorf("it ends with %v", err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, beside)); err != nil || string(got) != c.want {
				t.Errorf("%q is there, %v", got, err)
			}
			if _, err := os.Lstat(filepath.Join(dir, "a")); (err == nil) != c.ok {
				t.Errorf("the file of the object: %v", err)
			}
			if left, err := filepath.Glob(filepath.Join(dir, "*"+partialSuffix)); err != nil || len(left) > 0 {
				t.Errorf("%v is left, %v", left, err)
			}
		})
	}
}

// TestTreeRefusesKeys: keys that cannot be files below the directory fail, each for
// itself, and leave nothing outside of it.
func TestTreeRefusesKeys(t *testing.T) {
	outside := t.TempDir()
	dir := filepath.Join(outside, "out")
	tree, err := newOutputTree(dir, "", false)
	must(t, err)
	defer tree.Close()
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "directory"), 0o700))
	must(t, os.Symlink("..", filepath.Join(dir, "up")))
	for _, key := range []string{"../x", "../../x", "a/../../x", "/x", "//x", "a//x", "./x", "a/./x", "x\x00y", "..", ".", "", "up/x", "file/x", "directory", "file"} {
		if out, err := tree.target(objstore.Entry{Key: key}); err == nil {
			out.Abort()
			t.Errorf("%q is written as a file", key)
		}
	}
	// The file of an object that others are below, in either order.
	mustWrite := func(key string) {
		out, err := tree.target(objstore.Entry{Key: key})
		must(t, err)
		must(t, out.Commit())
	}
	mustWrite("before/below")
	if _, err := tree.target(objstore.Entry{Key: "before"}); err == nil {
		t.Error("a file took the place of a directory")
	}
	entries, err := os.ReadDir(outside)
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("outside of the directory: %v", entries)
	}
	if _, err := os.Stat(filepath.Join(dir, "file")); errors.Is(err, os.ErrNotExist) {
		t.Error("the file that was there is gone")
	}
}
