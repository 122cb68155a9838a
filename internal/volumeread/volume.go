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
	fd     int // of the directory, with a shared lock unless served
	header seal.VolumeHeader
	keys   Keys

	served  Server // nil where nobody serves the volume
	changed int64  // names left out because they were removed or replaced meanwhile
}

// Server is who serves a volume that is read meanwhile.
type Server interface {
	// Still runs read while nobody writes the blocks first to last of the lower
	// file that fd is open on, nor changes its size.
	Still(fd int, first, last int64, read func()) error
}

// Open opens the lower directory and reads its header, which is not authentic
// before Unlock has returned nil. Errors: ErrBusy, those of
// seal.ParseVolumeHeader, and a text that names the directory.
func Open(lower string) (*Volume, error) { return open(lower, nil) }

// OpenServed opens a volume for the process that serves it, without a lock. Blocks
// are read as they come; one that does not open is read again with s holding its
// writers off, and is a Fault only then. Names that go while they are looked at
// are no Fault. Plain bytes do not outlive the call of Keys that made them:
// File.Blocks yields zeros.
func OpenServed(lower string, s Server) (*Volume, error) { return open(lower, s) }

func open(lower string, served Server) (*Volume, error) {
	fd, err := openAt(unix.AT_FDCWD, lower, unix.O_DIRECTORY)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: lower, Err: err}
	}
	v := &Volume{lower: lower, fd: fd, served: served}
	if served == nil {
		if err := v.lock(); err != nil {
			v.Close()
			return nil, err
		}
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

// lock keeps a byokd from serving the volume meanwhile.
func (v *Volume) lock() error {
	err := unix.Flock(v.fd, unix.LOCK_SH|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("%s: %w", v.lower, ErrBusy)
	case err != nil:
		return fmt.Errorf("lock %s: %w", v.lower, err)
	}
	return nil
}

// Changed is how many names a Walk has left out because they were removed or
// replaced while it looked, in a volume that is served.
func (v *Volume) Changed() int64 { return v.changed }

// gone says of an error that a name was removed or replaced by something of
// another kind since it was read, and counts it.
func (v *Volume) gone(err error) bool {
	if v.served == nil {
		return false
	}
	for _, e := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EINVAL, unix.ENXIO} {
		if errors.Is(err, e) {
			v.changed++
			return true
		}
	}
	return false
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
