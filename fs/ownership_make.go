package fs

import (
	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Making inodes in volumes with sealed ownership (ownership.go): with their id and
// attributes, where the lower filesystem can before they have a name.

// newborn are the attributes of an inode that the caller makes in a directory: the
// group comes from that where it has the set-group-id bit, and so does the bit for
// a directory (inode_init_owner in the kernel, fs/inode.c). The kernel has laid the
// caller's umask over mode, and taken from it what the caller may not set.
func (c *call) newborn(parent uint64, mode, rdev uint32, caller fuse.Owner) (seal.Attributes, error) {
	p := c.use(parent)
	p.owner.mu.Lock()
	defer p.owner.mu.Unlock()
	dir, err := c.ownedBy(p, true)
	if err != nil {
		return seal.Attributes{}, err
	}
	a := seal.Attributes{Mode: mode & (unix.S_IFMT | 0o7777), UID: caller.Uid, GID: caller.Gid}
	if a.IsDevice() {
		a.Rdev = rdev
	}
	if dir.Mode&unix.S_ISGID != 0 {
		a.GID = dir.GID
		if a.Mode&unix.S_IFMT == unix.S_IFDIR {
			a.Mode |= unix.S_ISGID
		}
	}
	return a, nil
}

func (c *call) sealOwnership(id seal.FileID, a seal.Attributes) (value []byte, err error) {
	root := c.root()
	seal.Do(func() { value, err = root.SealAttributes(id, a) })
	return value, err
}

// dressSealed gives a lower inode that was just made, and that fd is open on, its id
// and attributes.
func (c *call) dressSealed(fd int, id seal.FileID, a seal.Attributes) error {
	value, err := c.sealOwnership(id, a)
	if err != nil {
		return err
	}
	if err := unix.Fsetxattr(fd, seal.IDAttribute, value, 0); err != nil {
		return err
	}
	var mode uint32
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mode = lowerDirMode
	case unix.S_IFREG:
		mode = lowerMode
	default:
		return unix.Fchmod(fd, lowerMode|lowerSpecial)
	}
	if c.fs.umask&mode == 0 {
		return nil
	}
	return unix.Fchmod(fd, mode) // the umask of this process has no say
}

// makeDirectory makes a lower directory with attributes. Between the two a power cut
// leaves it unfinished.
func (c *call) makeDirectory(dir int, sealed string, a seal.Attributes) error {
	if err := unix.Mkdirat(dir, sealed, lowerDirMode); err != nil && !c.madeBefore(err) {
		return err
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(dir, sealed, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err == nil {
		err = c.dressSealed(fd, seal.NewID(), a)
		unix.Close(fd)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, sealed, unix.AT_REMOVEDIR)
	}
	return err
}

// makeSpecial makes a symlink, pipe, socket or device: below, a file that has its
// attributes before it has a name, so that it is never seen as something else.
func (c *call) makeSpecial(dir int, sealed string, a seal.Attributes, target string) error {
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(dir), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, lowerMode)
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	id := seal.NewID()
	if a.Mode&unix.S_IFMT == unix.S_IFLNK {
		if err := c.setTarget(fd, id, target); err != nil {
			return err
		}
	}
	if err := c.dressSealed(fd, id, a); err != nil {
		return err
	}
	err = unix.Linkat(unix.AT_FDCWD, procFD(fd), dir, sealed, unix.AT_SYMLINK_FOLLOW)
	if c.madeBefore(err) {
		return nil
	}
	return err
}

func (c *call) setTarget(fd int, id seal.FileID, target string) (err error) {
	if len(target) > seal.TargetMax {
		return unix.ENAMETOOLONG
	}
	var hidden []byte
	root := c.root()
	seal.Do(func() { hidden, err = root.SealXattr(id, seal.TargetAttribute, []byte(target)) })
	if err != nil {
		return err
	}
	return unix.Fsetxattr(fd, seal.TargetAttribute, hidden, 0)
}
