package fs

import (
	"context"
	"errors"
	"syscall"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Errors of opening and mounting a volume.
var (
	ErrNotInitialised = errors.New("the lower directory is empty: it holds no byokd volume yet")
	ErrForeign        = errors.New("the lower directory holds files that byokd did not write")
	ErrBusy           = errors.New("the lower directory is in use by another byokd")
	ErrBlockSize      = errors.New("the lower filesystem's blocks are smaller than 4096 bytes: a power cut could tear a sealed block")
	ErrOldHeader      = errors.New("an older volume header was put back")
	ErrOtherKey       = errors.New("the volume is under another KMS key")
	ErrMoving         = errors.New("the volume is between two KMS keys already")
	ErrCannotTakeOver = errors.New("this byokd cannot go on with the mount of the one before")
	ErrNoFileID       = errors.New("the file's id is lost in block 0 and in its extended attribute: it cannot be opened")
)

// errnoOf is the one translation of errors into what a caller sees. An error
// it does not know is EIO: never success, and never something a database
// would take for a full disk.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno):
		return errno
	case errors.Is(err, seal.ErrNameTooLong), errors.Is(err, seal.ErrTooLong): // the latter: a symlink's target
		return syscall.ENAMETOOLONG
	case errors.Is(err, seal.ErrBadName):
		return syscall.EINVAL
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return syscall.EINTR
	case errors.Is(err, keyguard.ErrStopped):
		return syscall.ENOTCONN
	default: // seal.ErrTampered, ErrTruncated, ErrUnknownVersion, ErrNotSealed, ErrNoFileID
		return syscall.EIO
	}
}

func status(err error) fuse.Status { return fuse.Status(errnoOf(err)) }
