package fs

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUndrained is returned by Settled when a freeze could not take everything
// away from the kernel: what it holds dirty is not on the lower disk.
var ErrUndrained = errors.New("fs: the kernel could not give back every page in time")

// Flush has the kernel give back what it holds dirty, and the lower filesystem
// put on its disk what has come of it, while the volume serves on: since Linux
// 6.16 the kernel only begins. It makes the drain of a freeze that follows short
// and promises nothing. The error is ctx's or that of the lower disk.
func (f *Filesystem) Flush(ctx context.Context) error {
	f.flush(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return f.syncLower()
}

// Settled makes a frozen volume's lower directory consistent for a snapshot: what
// every write(2) wrote that had returned before the freeze, synced or not, is on
// the lower disk when it returns nil; of one that the freeze met under way, a part
// may be in the kernel until the thaw. It returns ErrUndrained when the freeze left something in
// the kernel: thaw, and freeze again. Call it while frozen.
func (f *Filesystem) Settled() error {
	if left := f.leftover.Load(); left > 0 {
		return fmt.Errorf("%w: of %d files", ErrUndrained, left)
	}
	return f.syncLower()
}

// syncLower writes everything of the lower filesystem to its disk.
func (f *Filesystem) syncLower() error {
	if err := unix.Syncfs(f.root); err != nil {
		return os.NewSyscallError("syncfs of the lower directory", err)
	}
	return nil
}
