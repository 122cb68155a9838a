package fs

import (
	"bytes"
	"context"
	"errors"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
)

// tampered is a volume of two files, each with a version before the last, whose
// lower files can be changed while nothing is mounted.
type tampered struct {
	*volume
	plain map[string][]byte // as last written, by name
	older map[string][]byte // as written before
	lower map[string]string // path of the lower file
	now   map[string][]byte // sealed bytes of plain
	then  map[string][]byte // sealed bytes of older
}

const tamperedBlocks = 6

func newTampered(t *testing.T) *tampered {
	t.Helper()
	v := newVolume(t, Options{})
	s := &tampered{volume: v, plain: map[string][]byte{}, older: map[string][]byte{}, lower: map[string]string{}, now: map[string][]byte{}, then: map[string][]byte{}}
	size := seal.BlockStart(tamperedBlocks) - 100
	for _, name := range []string{"a", "b"} {
		known := v.lowerFiles()
		s.older[name] = bytes.Repeat([]byte("old "+name+" "), int(size))[:size]
		if err := os.WriteFile(v.path(name), s.older[name], 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range v.lowerFiles() {
			if !strings.Contains(strings.Join(known, "\n"), path) {
				s.lower[name] = path
			}
		}
	}
	read := func(into map[string][]byte) {
		for name, path := range s.lower {
			b, err := os.ReadFile(path)
			if err != nil || len(b) != tamperedBlocks*block {
				t.Fatalf("%d sealed bytes, %v", len(b), err)
			}
			into[name] = b
		}
	}
	v.unmount()
	read(s.then)
	v.open()
	for name, path := range s.lower {
		s.plain[name] = bytes.Repeat([]byte("new "+filepath.Base(path)), int(size))[:size]
		f, err := os.OpenFile(v.path(name), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(s.plain[name]); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	v.unmount()
	read(s.now)
	return s
}

// blockOf is one block of sealed bytes.
func blockOf(sealed []byte, i int) []byte { return sealed[i*block:][:block] }

// readBlocks reads a file block by block: the plain bytes, and which blocks
// are EIO.
func readBlocks(t *testing.T, path string) (content []byte, damaged []int) {
	t.Helper()
	f, err := os.Open(path)
	if errors.Is(err, syscall.EIO) {
		return nil, []int{-1}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// The kernel reads whole pages: without it, so that a sound block beside a
	// damaged one is read.
	for i := 0; ; i++ {
		b := make([]byte, seal.PayloadOf(int64(i)))
		n, err := directRead(f.Name(), b, seal.BlockStart(int64(i)))
		switch {
		case errors.Is(err, syscall.EIO):
			damaged = append(damaged, i)
			content = append(content, make([]byte, len(b))...)
			continue
		case err != nil && !errors.Is(err, io.EOF):
			t.Fatal(err)
		}
		content = append(content, b[:n]...)
		if n < len(b) {
			return content, damaged
		}
	}
}

// directRead reads around the kernel's cache.
func directRead(path string, b []byte, off int64) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.Pread(fd, b, off)
}

// TestTampering: whatever somebody does to the lower files either is an error
// where it was done, and nowhere else, or is in the list of what is not promised
// (docs/THREAT_MODEL.md), with exactly the effect that stands there.
func TestTampering(t *testing.T) {
	s := newTampered(t)
	with := func(content []byte, from, to int64, by []byte) []byte { // content with [from, to) replaced
		return append(append(bytes.Clone(content[:from]), by...), content[to:]...)
	}
	zeros := func(n int) []byte { return make([]byte, n) }
	a, b := s.plain["a"], s.plain["b"]
	third, fourth := seal.BlockStart(3), seal.BlockStart(4)
	full := append(bytes.Clone(a), zeros(100)...)
	for _, c := range []struct {
		name    string
		change  func(a, b []byte) (changedA, changedB []byte)
		damaged []int  // blocks of a that are EIO
		want    []byte // of a, with zeros where it is damaged
		other   []byte // of b; nil: as it was
	}{
		{"flip a bit", func(x, y []byte) ([]byte, []byte) { x[3*block+77] ^= 4; return x, y }, []int{3}, with(a, third, fourth, zeros(seal.BlockPayload)), nil},
		{"flip a bit of the header", func(x, y []byte) ([]byte, []byte) { x[20] ^= 4; return x, y }, []int{0}, with(a, 0, seal.FirstPayload, zeros(seal.FirstPayload)), nil},
		{"exchange two blocks", func(x, y []byte) ([]byte, []byte) {
			was := bytes.Clone(blockOf(x, 2))
			copy(blockOf(x, 2), blockOf(x, 3))
			copy(blockOf(x, 3), was)
			return x, y
		}, []int{2, 3}, with(a, seal.BlockStart(2), fourth, zeros(2*seal.BlockPayload)), nil},
		{"a block of another file", func(x, y []byte) ([]byte, []byte) { copy(blockOf(x, 3), blockOf(y, 3)); return x, y }, []int{3}, with(a, third, fourth, zeros(seal.BlockPayload)), nil},
		{"duplicate a block", func(x, y []byte) ([]byte, []byte) { copy(blockOf(x, 3), blockOf(x, 4)); return x, y }, []int{3}, with(a, third, fourth, zeros(seal.BlockPayload)), nil},
		{"append a block again", func(x, y []byte) ([]byte, []byte) { return append(x, blockOf(x, 5)...), y }, []int{6}, append(bytes.Clone(full), zeros(seal.BlockPayload)...), nil},
		{"append noise", func(x, y []byte) ([]byte, []byte) { return append(x, bytes.Repeat([]byte{7}, block)...), y }, []int{6}, append(bytes.Clone(full), zeros(seal.BlockPayload)...), nil},
		{"append less than a block", func(x, y []byte) ([]byte, []byte) { return append(x, 1, 2, 3), y }, nil, a, nil},

		{"not promised: append zeros", func(x, y []byte) ([]byte, []byte) { return append(x, zeros(2*block)...), y }, nil, append(bytes.Clone(full), zeros(2*seal.BlockPayload)...), nil},
		{"not promised: cut between blocks", func(x, y []byte) ([]byte, []byte) { return x[:4*block], y }, nil, a[:fourth], nil},
		{"not promised: cut within a block", func(x, y []byte) ([]byte, []byte) { return x[:4*block+500], y }, nil, a[:fourth], nil},
		{"not promised: zero a block", func(x, y []byte) ([]byte, []byte) { clear(blockOf(x, 3)); return x, y }, nil, with(a, third, fourth, zeros(seal.BlockPayload)), nil},
		{"not promised: roll a block back", func(x, y []byte) ([]byte, []byte) { copy(blockOf(x, 3), blockOf(s.then["a"], 3)); return x, y }, nil, with(a, third, fourth, s.older["a"][third:fourth]), nil},
		{"not promised: roll a file back", func(_, y []byte) ([]byte, []byte) { return bytes.Clone(s.then["a"]), y }, nil, s.older["a"], nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			changedA, changedB := c.change(bytes.Clone(s.now["a"]), bytes.Clone(s.now["b"]))
			rewrite(t, s.lower["a"], changedA)
			rewrite(t, s.lower["b"], changedB)
			s.open()
			got, damaged := readBlocks(t, s.path("a"))
			if len(damaged) != len(c.damaged) || len(damaged) > 0 && damaged[0] != c.damaged[0] {
				t.Errorf("blocks %v are errors, want %v", damaged, c.damaged)
			}
			if !bytes.Equal(got, c.want) {
				t.Errorf("%d bytes, want %d: not what is expected", len(got), len(c.want))
			}
			if other, damaged := readBlocks(t, s.path("b")); !bytes.Equal(other, b) || len(damaged) > 0 {
				t.Errorf("the other file: equal %v, errors %v", bytes.Equal(other, b), damaged)
			}
			if counted := s.fs.Stats().DamagedBlocks > 0; counted != (len(c.damaged) > 0) {
				t.Errorf("damage was counted: %v", counted)
			}
			s.unmount()
		})
	}
	t.Run("not promised: exchange files", func(t *testing.T) {
		rewrite(t, s.lower["a"], s.now["a"])
		rewrite(t, s.lower["b"], s.now["b"])
		exchange := func() {
			if err := unix.Renameat2(unix.AT_FDCWD, s.lower["a"], unix.AT_FDCWD, s.lower["b"], unix.RENAME_EXCHANGE); err != nil {
				t.Fatal(err)
			}
		}
		exchange()
		s.open()
		if got, _ := readBlocks(t, s.path("a")); !bytes.Equal(got, b) {
			t.Error("a does not hold what b held")
		}
		s.unmount()
		exchange()
	})
	t.Run("another file's id", func(t *testing.T) {
		id, err := readAttribute(s.lower["b"], seal.IDAttribute)
		if err == nil {
			err = unix.Setxattr(s.lower["a"], seal.IDAttribute, id, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		s.open()
		if got, damaged := readBlocks(t, s.path("a")); len(damaged) != tamperedBlocks || bytes.ContainsAny(got, "abn") {
			t.Errorf("blocks %v are errors, and %d bytes come", damaged, len(got))
		}
	})
}

// TestForeignHeader: the header of another volume opens nothing of this one. KMS
// refuses it where the two have a binding of their own, as byokd's have; here
// both have the same.
func TestForeignHeader(t *testing.T) {
	v := newVolume(t, Options{})
	writePattern(t, v.path("f"), 10_000)
	v.unmount()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	other := t.TempDir()
	if _, err := CreateVolume(ctx, other, v.guard, testBinding, OwnershipLower); err != nil {
		t.Fatal(err)
	}
	at := func(dir string) string { return filepath.Join(dir, seal.VolumeHeaderName) }
	own, err := os.ReadFile(at(v.lower))
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(at(other))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at(v.lower), foreign, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Open(ctx, v.lower, v.guard, v.option, testBinding)
	if err == nil { // the record of the newest generation may refuse it before
		if err := f.Mount(v.mount); err != nil {
			t.Fatal(err)
		}
		v.fs = f
		v.settlePoll()
		if names, err := os.ReadDir(v.mount); err != nil || len(names) > 0 {
			t.Errorf("%v, %v", names, err)
		}
		if v.fs.Stats().ForeignNames == 0 {
			t.Error("names of the other volume were not counted")
		}
		v.unmount()
	}
	if err := os.WriteFile(at(v.lower), own, 0o600); err != nil {
		t.Fatal(err)
	}
	v.open()
	if info, err := os.Stat(v.path("f")); err != nil || info.Size() != 10_000 {
		t.Errorf("with its own header again: %v", err)
	}
}

// TestNameTricks: a lower name that is ours and was made to be something else
// leads nowhere outside of the lower directory, and hangs nobody.
func TestNameTricks(t *testing.T) {
	v := newVolume(t, Options{})
	writePattern(t, v.path("file"), 10_000)
	if err := os.MkdirAll(v.path("dir/below"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := v.lowerFiles()[0]
	var dir string
	entries, err := os.ReadDir(v.lower)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			dir = filepath.Join(v.lower, e.Name())
		}
	}
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		plant func() error
		path  string
	}{
		{"symlink for a file", func() error { return os.Symlink(secret, file) }, "file"},
		{"symlink for a directory", func() error { return os.Symlink(outside, dir) }, "dir/secret"},
		{"symlink upwards", func() error { return os.Symlink("../../../../../../etc", dir) }, "dir/passwd"},
		{"hard link of a foreign file", func() error { return os.Link(secret, file) }, "file"},
		{"device", func() error { return unix.Mknod(file, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, "file"}, // /dev/zero
		{"directory for a file", func() error { return os.Mkdir(file, 0o755) }, "file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v.unmount()
			for _, path := range []string{file, dir} {
				if err := os.Rename(path, path+".away"); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.plant(); err != nil {
				t.Fatal(err)
			}
			v.open()
			if got, err := os.ReadFile(v.path(c.path)); err == nil {
				t.Errorf("%d bytes were read", len(got))
			}
			if f, err := os.OpenFile(v.path(c.path), os.O_WRONLY|os.O_CREATE, 0o600); err == nil {
				_, _ = f.WriteString("written")
				f.Close()
			}
			if _, err := os.ReadDir(v.mount); err != nil {
				t.Errorf("the directory around it: %v", err)
			}
			v.unmount()
			if got, err := os.ReadFile(secret); err != nil || !bytes.Equal(got, bytes.Repeat([]byte("secret"), 1000)) {
				t.Errorf("the file outside was changed: %v", err)
			}
			for _, path := range []string{file, dir} {
				if err := errors.Join(os.RemoveAll(path), os.Rename(path+".away", path)); err != nil {
					t.Fatal(err)
				}
			}
			v.open()
		})
	}
	if _, err := os.Stat(filepath.Join(outside, "below")); !errors.Is(err, iofs.ErrNotExist) {
		t.Error("something was made outside")
	}
}
