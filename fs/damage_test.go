package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// lowerFiles returns the regular files below the mount, the header apart.
func (v *volume) lowerFiles() []string {
	v.t.Helper()
	var files []string
	err := filepath.WalkDir(v.lower, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != seal.VolumeHeaderName && d.Name() != seal.VolumeMarkName {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return files
}

// damage changes the only lower file while the volume is not mounted.
func (v *volume) damage(change func(path string, sealed []byte)) {
	v.t.Helper()
	v.unmount()
	files := v.lowerFiles()
	if len(files) != 1 {
		v.t.Fatalf("%d lower files", len(files))
	}
	sealed, err := os.ReadFile(files[0])
	if err != nil {
		v.t.Fatal(err)
	}
	change(files[0], sealed)
	v.open()
}

func rewrite(t testing.TB, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0) // the inode stays, and its attributes
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(len(data))); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedBlock: a block that was changed below is EIO, counted and never
// returned; the blocks around it are served, and it can be written anew.
func TestDamagedBlock(t *testing.T) {
	v := newVolume(t, Options{})
	want := writePattern(t, v.path("f"), 10*seal.BlockPayload)
	const bad = 4
	from, to := int(seal.BlockStart(bad)), int(seal.BlockStart(bad+1))
	for name, change := range map[string]func(sealed []byte){
		"flipped":   func(s []byte) { s[bad*block+1000] ^= 1 },
		"selector":  func(s []byte) { s[bad*block] ^= 1 },
		"another":   func(s []byte) { copy(s[bad*block:], s[(bad+1)*block:][:block]) },
		"exchanged": func(s []byte) { copy(s[bad*block:], s[(bad+1)*block:][:block-1]) },
	} {
		t.Run(name, func(t *testing.T) {
			v.damage(func(path string, sealed []byte) { change(sealed); rewrite(t, path, sealed) })
			f, err := os.OpenFile(v.path("f"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			before := v.fs.Stats().DamagedBlocks
			for off := 0; off+pageSize <= len(want); off += pageSize {
				got := make([]byte, pageSize)
				_, err := f.ReadAt(got, int64(off))
				switch touches := off < to && off+pageSize > from; {
				case touches && !errors.Is(err, syscall.EIO):
					t.Errorf("at %d: %v", off, err)
				case !touches && (err != nil || !bytes.Equal(got, want[off:off+pageSize])):
					t.Errorf("at %d, beside the damage: equal %v, %v", off, bytes.Equal(got, want[off:off+pageSize]), err)
				}
			}
			if v.fs.Stats().DamagedBlocks == before {
				t.Error("the damage was not counted")
			}
		})
		// Start anew with a sound file.
		if err := os.Remove(v.path("f")); err != nil {
			t.Fatal(err)
		}
		want = writePattern(t, v.path("f"), 10*seal.BlockPayload)
	}
}

// TestHoleReadsAsZeros: a zeroed block is a hole; that a thief can make one is
// in docs/THREAT_MODEL.md.
func TestHoleReadsAsZeros(t *testing.T) {
	v := newVolume(t, Options{})
	want := writePattern(t, v.path("f"), 4*seal.BlockPayload)
	v.damage(func(path string, sealed []byte) {
		clear(sealed[2*block:][:block])
		rewrite(t, path, sealed)
	})
	clear(want[seal.BlockStart(2):seal.BlockStart(3)])
	got, err := os.ReadFile(v.path("f"))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("equal %v, %v", bytes.Equal(got, want), err)
	}
}

// TestFileID: block 0 or the attribute suffices to find the file's key; without
// both it is EIO, can be seen and can be removed.
func TestFileID(t *testing.T) {
	v := newVolume(t, Options{})
	want := writePattern(t, v.path("f"), 3*seal.BlockPayload)
	v.damage(func(path string, _ []byte) {
		if err := unix.Removexattr(path, seal.IDAttribute); err != nil {
			t.Fatal(err)
		}
	})
	if got, err := os.ReadFile(v.path("f")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("without the attribute: equal %v, %v", bytes.Equal(got, want), err)
	}
	v.damage(func(path string, sealed []byte) {
		clear(sealed[:seal.FileHeaderSize])
		rewrite(t, path, sealed)
	})
	if _, err := os.ReadFile(v.path("f")); !errors.Is(err, syscall.EIO) {
		t.Errorf("without both: %v", err)
	}
	if _, err := os.Stat(v.path("f")); err != nil {
		t.Errorf("stat: %v", err)
	}
	if err := os.Remove(v.path("f")); err != nil {
		t.Errorf("remove: %v", err)
	}
}

// TestForeignNames: what byokd did not write into the lower tree is not shown
// and leads nowhere.
func TestForeignNames(t *testing.T) {
	v := newVolume(t, Options{})
	writePattern(t, v.path("f"), 100)
	for _, name := range []string{seal.VolumeHeaderName, seal.VolumeMarkName} { // a crash may leave what was to replace them
		if err := os.WriteFile(durable.TempName(filepath.Join(v.lower, name)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.ReadDir(v.mount); err != nil || v.fs.Stats().ForeignNames != 0 {
		t.Errorf("%d of byokd's own files count as foreign, %v", v.fs.Stats().ForeignNames, err)
	}
	for _, name := range []string{"plain", "..evil", strings.Repeat("A", 200)} {
		if err := os.Symlink("/etc/passwd", filepath.Join(v.lower, name)); err != nil {
			t.Fatal(err)
		}
	}
	v.remount()
	entries, err := os.ReadDir(v.mount)
	if err != nil || len(entries) != 1 || entries[0].Name() != "f" {
		t.Errorf("%v, %v", entries, err)
	}
	if v.fs.Stats().ForeignNames == 0 {
		t.Error("foreign names were not counted")
	}
	if _, err := os.Stat(v.path("plain")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestForeignSymlink: a lower symlink put in the place of a sealed one is not
// followed by us and cannot be read by anyone.
func TestForeignSymlink(t *testing.T) {
	v := newVolume(t, Options{})
	if err := os.Symlink("target", v.path("link")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.Readlink(v.path("link")); err != nil || got != "target" {
		t.Fatal(got, err)
	}
	v.unmount()
	entries, err := os.ReadDir(v.lower)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink == 0 {
			continue
		}
		path := filepath.Join(v.lower, e.Name())
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/passwd", path); err != nil {
			t.Fatal(err)
		}
	}
	v.open()
	if got, err := os.Readlink(v.path("link")); err == nil {
		t.Errorf("readlink gives %q", got)
	}
	if _, err := os.ReadFile(v.path("link")); err == nil {
		t.Error("the foreign symlink was followed")
	}
	if err := os.Remove(v.path("link")); err != nil {
		t.Errorf("it cannot be removed: %v", err)
	}
}

// TestNothingPlainBelow: neither names nor contents nor targets nor attribute
// values stand below in clear.
func TestNothingPlainBelow(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		canary := []byte("canary-4f1d9a")
		if err := os.MkdirAll(v.path("dir-canary-4f1d9a"), 0o755); err != nil {
			t.Fatal(err)
		}
		name := v.path("dir-canary-4f1d9a/file-canary-4f1d9a")
		if err := os.WriteFile(name, bytes.Repeat(canary, 2000), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("canary-4f1d9a", v.path("link")); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(name, "user.note", canary, 0); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 64)
		if n, err := unix.Getxattr(name, "user.note", got); err != nil || !bytes.Equal(got[:n], canary) {
			t.Fatalf("%q, %v", got[:n], err)
		}
		v.unmount()
		defer v.open()
		looked := 0
		err := filepath.WalkDir(v.lower, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			looked++
			texts := [][]byte{[]byte(d.Name())}
			switch {
			case d.Type().IsRegular():
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				texts = append(texts, data)
				value, _ := readAttribute(path, "user.note")
				texts = append(texts, value)
			case d.Type()&fs.ModeSymlink != 0:
				target, err := os.Readlink(path)
				if err != nil {
					return err
				}
				texts = append(texts, []byte(target))
			}
			for _, text := range texts {
				if bytes.Contains(text, canary) {
					t.Errorf("the canary stands in %s", path)
				}
			}
			return nil
		})
		if err != nil || looked < 5 {
			t.Fatalf("%d looked at, %v", looked, err)
		}
	})
}

// TestRefusals: directories that are not ours to serve are refused in words.
func TestRefusals(t *testing.T) {
	v := newVolume(t, Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()

	if _, err := Open(ctx, v.lower, v.guard, v.option, testBinding); !errors.Is(err, ErrBusy) {
		t.Errorf("open twice: %v", err)
	}
	if err := v.fs.Mount(t.TempDir()); err == nil {
		t.Error("mounted twice")
	}
	if _, err := CreateVolume(ctx, v.lower, v.guard, testBinding, OwnershipLower); err == nil {
		t.Error("created over a volume")
	}

	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "accounts.db"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := CreateVolume(ctx, foreign, v.guard, testBinding, OwnershipLower)
	if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "accounts.db") {
		t.Errorf("foreign directory: %v", err)
	}
	empty := t.TempDir()
	if err := os.Mkdir(filepath.Join(empty, "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHeader(empty); !errors.Is(err, ErrNotInitialised) {
		t.Errorf("empty directory: %v", err)
	}
	if _, err := ReadHeader(filepath.Join(empty, "missing")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "is its disk mounted?") {
		t.Errorf("missing directory: %v", err)
	}
	if _, err := ReadHeader(filepath.Join(foreign, "accounts.db")); err == nil || !strings.HasSuffix(err.Error(), "accounts.db is not a directory") {
		t.Errorf("a file: %v", err)
	}

	path := filepath.Join(v.lower, seal.VolumeHeaderName)
	header, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	v.unmount()
	other := testBinding
	other.Cluster = "other"
	if _, err := Open(ctx, v.lower, v.guard, v.option, other); err == nil || !strings.Contains(err.Error(), "encryption context") {
		t.Errorf("another cluster's volume: %v", err)
	}
	for _, change := range []struct {
		old, new string
		want     error
	}{
		{testARN, strings.Replace(testARN, "1111", "2222", 1), ErrOtherKey}, // nobody is asked
		{"generation: 1\n", "generation: 9\n", seal.ErrTampered},
	} {
		changed := bytes.Replace(header, []byte(change.old), []byte(change.new), 1)
		if bytes.Equal(changed, header) {
			t.Fatalf("the header has no %q", change.old)
		}
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(ctx, v.lower, v.guard, v.option, testBinding); !errors.Is(err, change.want) {
			t.Errorf("%q changed by hand: %v, want %v", change.old, err, change.want)
		}
	}
	if err := os.WriteFile(path, header, 0o600); err != nil {
		t.Fatal(err)
	}
	v.open()

	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f := v.fs
	v.unmountOnly()
	if err := f.Mount(full); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("mounted over files: %v", err)
	}
	if err := f.Mount(v.mount); err != nil {
		t.Fatal(err)
	}
	v.settlePoll()
}

// TestLowerFull: a full disk is ENOSPC at fsync at the latest, and what was
// fsynced before stays.
func TestLowerFull(t *testing.T) {
	requireFUSE(t)
	cacheModes(t, func(t *testing.T, o Options) {
		dir := t.TempDir()
		if err := unix.Mount("byokd-test", dir, "tmpfs", 0, "size=24m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		v := newVolumeIn(t, dir, o)
		want := writePattern(t, v.path("before"), 8<<20)
		f, err := os.Create(v.path("too-much"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(make([]byte, 32<<20))
		if err == nil {
			err = f.Sync()
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a full disk says %v", err)
		}
		f.Close()
		if err := os.Remove(v.path("too-much")); err != nil {
			t.Error(err)
		}
		v.remount()
		if got, err := os.ReadFile(v.path("before")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("what was there before: equal %v, %v", bytes.Equal(got, want), err)
		}
		if err := os.WriteFile(v.path("after"), want[:1<<20], 0o644); err != nil {
			t.Errorf("with room again: %v", err)
		}
	})
}

func openIn(table *handleTable, n *node) uint64 {
	fh, err := table.add(&handle{node: n}, nil)
	if err != nil {
		panic(err) // without a journal there is nothing to fail
	}
	return fh
}

// TestFailureTold: a lower fsync that failed is told to every open handle, once, and to
// those that were opened before any was told (lib/errseq.c, errseq_sample).
func TestFailureTold(t *testing.T) {
	table := newHandleTable()
	n := &node{}
	early := openIn(table, n)
	table.record(n, syscall.EIO)
	late := openIn(table, n)
	for _, fh := range []uint64{early, late} {
		if err := table.failed(fh, nil); !errors.Is(err, syscall.EIO) {
			t.Errorf("handle %d, opened before any was told: %v", fh, err)
		}
		if err := table.failed(fh, nil); err != nil {
			t.Errorf("handle %d is told twice: %v", fh, err)
		}
	}
	latest := openIn(table, n)
	if err := table.failed(latest, nil); err != nil {
		t.Errorf("a handle opened after others were told: %v", err)
	}
	table.record(n, syscall.ENOSPC)
	for _, fh := range []uint64{early, late, latest} {
		if err := table.failed(fh, nil); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("handle %d: %v", fh, err)
		}
	}
	if err := table.failed(99, nil); !errors.Is(err, syscall.EBADF) {
		t.Error(err)
	}
}

func TestErrnoOf(t *testing.T) {
	for err, want := range map[error]bool{unix.ENOSPC: true, fmt.Errorf("x: %w", unix.EDQUOT): true, unix.EIO: false, nil: false} {
		if diskFull(err) != want {
			t.Errorf("%v means a full disk: %v", err, !want)
		}
	}
	for err, want := range map[error]syscall.Errno{
		nil:                                    0,
		unix.ENOSPC:                            unix.ENOSPC,
		fmt.Errorf("x: %w", unix.EDQUOT):       unix.EDQUOT,
		seal.ErrNameTooLong:                    unix.ENAMETOOLONG,
		seal.ErrTampered:                       unix.EIO,
		seal.ErrTruncated:                      unix.EIO,
		seal.ErrUnknownVersion:                 unix.EIO,
		seal.ErrNotSealed:                      unix.EIO,
		ErrNoFileID:                            unix.EIO,
		context.Canceled:                       unix.EINTR,
		errors.New("something not thought of"): unix.EIO,
	} {
		if got := errnoOf(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}
