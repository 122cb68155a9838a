package fs

import (
	"os"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// TestSpaceOfOpenFiles: a file that is being written is never shown without blocks, or
// `tar --sparse` takes all of it for a hole and archives zeros: neither before anything
// of it has come to the lower file, nor however long it stays open. No file is closed
// meanwhile, since with a close(2) the kernel asks anew.
func TestSpaceOfOpenFiles(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		for name, prepare := range map[string]func(path string) error{
			"new":   func(string) error { return nil },
			"empty": func(path string) error { return os.WriteFile(path, nil, 0o600) },
			"hole":  func(path string) error { return makeHole(path, seal.FirstPayload) },
		} {
			t.Run(name, func(t *testing.T) {
				path := v.path(name)
				if err := prepare(path); err != nil {
					t.Fatal(err)
				}
				_ = blocksOf(t, path) // the kernel remembers what it was told
				fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(fd)
				write := func(off int64) {
					t.Helper()
					if _, err := unix.Pwrite(fd, make([]byte, 1<<20), off); err != nil {
						t.Fatal(err)
					}
				}
				write(0)
				if got := blocksOf(t, path); got == 0 {
					t.Error("shown without blocks, though a MiB was written")
				}
				write(1 << 20)
				if err := unix.Fsync(fd); err != nil {
					t.Fatal(err)
				}
				if got := blocksOf(t, path); got == 0 {
					t.Error("shown without blocks, though two MiB are below")
				}
				v.fs.retellSpace(v.fs.loop.Load())
				if got := blocksOf(t, path); got < 2<<20/512 {
					t.Errorf("shown with %d blocks after the kernel was told to ask again", got)
				}
			})
		}
	})
}

// makeHole makes a file of which the lower file has no block.
func makeHole(path string, size int64) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Ftruncate(fd, size)
}

func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return st.Blocks
}

// TestSpaceOfEmptyFiles: files that nobody has open are shown with what they take.
func TestSpaceOfEmptyFiles(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		if err := os.WriteFile(v.path("empty"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		v.remount()
		if got := blocksOf(t, v.path("empty")); got != 0 {
			t.Errorf("an empty file is shown with %d blocks", got)
		}
	})
}
