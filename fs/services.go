package fs

import (
	"context"

	"github.com/byokd/byokd/internal/fusemount"
	"golang.org/x/sys/unix"
)

// Services are what the filesystem needs done by who mounted it, with the rights
// and in the namespaces of the mounter: the numbers of callers in requests are of
// the mounter's PID namespace. A filesystem that mounts itself does them itself.
//
// The methods are called concurrently. Those with a context return when it ends,
// whatever becomes of what they began.
type Services interface {
	// LimitDirty bounds what the kernel may hold dirty of the mount, in bytes.
	LimitDirty(bytes int64) error
	// Flush has the kernel begin to write back what it holds dirty of the mount.
	Flush(ctx context.Context)
	// Stir has the kernel ask for the mount's STATFS, again and again while more
	// says so.
	Stir(ctx context.Context, more func() bool)
	// Killed returns those of the threads that are being killed, or are gone.
	Killed(threads []uint32) []uint32
	// Hold keeps a copy of a descriptor under a name until Release, also when this
	// process dies: the successor gets it (Passed.Held). Known names are replaced. Release
	// follows also where Hold failed.
	Hold(name string, fd int) error
	Release(name string)
}

// ownMount are the services of a mount that this process has made.
type ownMount struct {
	fs     *Filesystem
	dir    string
	device uint64 // st_dev of the mount; set before LimitDirty is called
}

func (m *ownMount) LimitDirty(bytes int64) error { return fusemount.LimitDirty(m.device, bytes) }

// Flush waits for the kernel apart, for the call may hang.
func (m *ownMount) Flush(ctx context.Context) {
	m.apart(ctx, func() {
		// Opening the root of the mount needs no key (rules.go).
		fd, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		// Since Linux 6.16 it starts the writeback of FUSE files without waiting
		// for its end; drop waits.
		_ = unix.Syncfs(fd)
	})
}

func (m *ownMount) Stir(ctx context.Context, more func() bool) {
	m.apart(ctx, func() {
		for more() {
			_ = unix.Statfs(m.dir, &unix.Statfs_t{})
		}
	})
}

// apart runs work on a thread of its own and leaves it behind when ctx ends.
func (m *ownMount) apart(ctx context.Context, work func()) {
	done := make(chan struct{})
	m.fs.apart(-1, func(int) {
		defer close(done)
		work()
	})
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func (m *ownMount) Killed(threads []uint32) []uint32 { return fusemount.Killed(threads) }

// Hold and Release: the device goes with the process, and so does the mount.
func (m *ownMount) Hold(string, int) error { return nil }
func (m *ownMount) Release(string)         {}
