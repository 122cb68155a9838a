package volumeread

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// ErrBusy: a byokd serves the volume.
var ErrBusy = errors.New("a byokd serves this volume: stop it first, or use a snapshot of the disk")

// Keys runs f, inside seal.Do, with the root key of the volume. The root is
// valid only during the call.
type Keys func(f func(root *seal.Root) error) error

// Volume is the lower directory of a volume, open for reading. Close it.
type Volume struct {
	lower  string
	fd     int // of the directory, with a shared lock
	header seal.VolumeHeader
	keys   Keys
}

// Open opens the lower directory and reads its header, which is not authentic
// before Unlock has returned nil. Errors: ErrBusy, those of
// seal.ParseVolumeHeader, and a text that names the directory.
func Open(lower string) (*Volume, error) {
	fd, err := openAt(unix.AT_FDCWD, lower, unix.O_DIRECTORY)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: lower, Err: err}
	}
	v := &Volume{lower: lower, fd: fd}
	if err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); err != nil {
		v.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", lower, ErrBusy)
		}
		return nil, fmt.Errorf("lock %s: %w", lower, err)
	}
	path := filepath.Join(lower, seal.VolumeHeaderName)
	text, err := durable.ReadFile(path, seal.VolumeHeaderMax)
	if err == nil {
		v.header, err = seal.ParseVolumeHeader(text)
	}
	if err != nil {
		v.Close()
		return nil, fmt.Errorf("%s is no byokd volume: %s: %w", lower, seal.VolumeHeaderName, err)
	}
	return v, nil
}

// Header is the volume's header.
func (v *Volume) Header() seal.VolumeHeader { return v.header }

// Unlock gives the volume its keys and verifies the header with them.
func (v *Volume) Unlock(keys Keys) error {
	v.keys = keys
	err := keys(func(root *seal.Root) error { return root.VerifyVolumeHeader(v.header) })
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(v.lower, seal.VolumeHeaderName), err)
	}
	return nil
}

// Close gives the lock back.
func (v *Volume) Close() error { return unix.Close(v.fd) }

// openAt opens a name for reading: never through a symlink, never waiting on a
// pipe. Go's runtime interrupts its own threads, so EINTR is none.
func openAt(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}
