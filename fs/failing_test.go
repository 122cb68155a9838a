package fs

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLowerSyncFails: a disk that loses data says so at fsync, and each open
// file is told once, as the kernel does for its own filesystems. The disk's image
// has no room for what is written to it.
func TestLowerSyncFails(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		for _, where := range []string{"plain", "mount"} {
			dir := newDisk(t, 256, 24, "-O ^has_journal -E lazy_itable_init=0", ",errors=continue")
			if where == "mount" {
				dir = newVolumeIn(t, dir, o).mount
			}
			p := newVictim(t, "failing-sync", dir, dir+"/lost")
			p.start()
			word := p.finishes(60 * time.Second)
			t.Logf("%s: %s", where, word)
			if want := "first: true, second: true, then false"; word != want {
				t.Errorf("%s: %s; want %s", where, word, want)
			}
		}
	})
}

// failingSync writes more than the disk can keep, and syncs through two
// descriptors, until each has been told all of it.
func failingSync(_, file string) (func() (string, error), error) {
	return func() (string, error) {
		first, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT, 0o644)
		second, serr := unix.Open(file, unix.O_RDWR, 0)
		_, werr := unix.Pwrite(first, make40MiB(), 0)
		if err = errors.Join(err, serr, werr); err != nil {
			return "", err
		}
		failed := func(fd int) bool {
			err := unix.Fsync(fd)
			return errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOSPC) // the loop device passes its ENOSPC on
		}
		told := fmt.Sprintf("first: %v, second: %v", failed(first), failed(second))
		for range 20 { // as long as the disk goes on failing
			if !failed(first) && !failed(second) {
				return told + ", then false", nil
			}
		}
		return told + ", for ever", nil
	}, nil
}

func make40MiB() []byte {
	b := make([]byte, 40<<20)
	for i := range b {
		b[i] = byte(i%253) + 1
	}
	return b
}
