package fusemount

import "golang.org/x/sys/unix"

// LimitDirty bounds what the kernel may hold dirty of the mount, in bytes.
func (m Mounted) LimitDirty(bytes int64) error { return LimitDirty(m.Device, bytes) }

// Flush has the kernel write back what it holds dirty of the mount; since Linux 6.16
// it only begins. It waits, uninterruptibly, for whoever serves the mount, until it is
// ended.
func (m Mounted) Flush() error {
	fd, err := unix.Open(m.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// Stir has the kernel ask whoever serves the mount for its STATFS, and waits as Flush
// does.
func (m Mounted) Stir() error { return unix.Statfs(m.Dir, &unix.Statfs_t{}) }

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
