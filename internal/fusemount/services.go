package fusemount

import (
	"context"

	"golang.org/x/sys/unix"
)

// LimitDirty bounds what the kernel may hold dirty of the mount, in bytes.
func (m Mounted) LimitDirty(bytes int64) error { return LimitDirty(m.Device, bytes) }

// Flush has the kernel write back what it holds dirty of the mount; since Linux 6.16
// it only begins. Whoever serves the mount must answer meanwhile. It does not outlast
// ctx, but the thread that waits for the kernel does, until the mount is served again
// or ended.
func (m Mounted) Flush(ctx context.Context) error {
	return within(ctx, func() error {
		fd, err := unix.Open(m.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Syncfs(fd)
	})
}

// Stir has the kernel ask whoever serves the mount for its STATFS. It does not
// outlast ctx, as Flush does not.
func (m Mounted) Stir(ctx context.Context) error {
	return within(ctx, func() error { return unix.Statfs(m.Dir, &unix.Statfs_t{}) })
}

// Killed returns those of the threads that are being killed, or are gone.
func (m Mounted) Killed(threads []uint32) []uint32 { return Killed(threads) }

// Killed returns those of the threads, of this process's PID namespace, that are
// being killed, or are gone.
func Killed(threads []uint32) []uint32 {
	var killed []uint32
	for _, tid := range threads {
		if BeingKilled(tid) {
			killed = append(killed, tid)
		}
	}
	return killed
}

// within leaves a call behind when ctx ends before it.
func within(ctx context.Context, call func() error) error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
