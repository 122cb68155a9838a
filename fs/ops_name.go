package fs

import (
	"bytes"
	"os"
	"strconv"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func (c *call) Lookup(_ <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, sealed, err := c.dir(header.NodeId, name)
	if err == nil {
		err = c.entry(dir, sealed, out)
		if f, in := c.fs, header.NodeId; c.loaded && f.lookahead.sighted(in, out.Attr.Ino, c.cold) {
			f.background.Go(func() { f.advance(in) })
		}
	}
	if err == unix.ENOENT { // cached too: nobody else creates names here
		*out = fuse.EntryOut{}
		out.SetEntryTimeout(cacheFor)
		return fuse.OK
	}
	return c.fail(err)
}

// entry names the lower inode at (dir, sealed) to the kernel.
func (c *call) entry(dir int, sealed string, out *fuse.EntryOut) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, sealed, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	_, err := c.introduce(dir, sealed, &st, out)
	return err
}

func (c *call) introduce(dir int, sealed string, st *unix.Stat_t, out *fuse.EntryOut) (*node, error) {
	n, err := c.fs.nodes.look(dir, sealed, st, c.slot)
	if err != nil {
		return nil, err
	}
	c.used = append(c.used, n)
	if err := c.fill(n, st, &out.Attr); err != nil {
		c.fs.nodes.takeBack(n.id, c.slot)
		return nil, err
	}
	c.looked = append(c.looked, n.id)
	out.NodeId = n.id
	out.Generation = 1
	out.SetEntryTimeout(cacheFor)
	out.SetAttrTimeout(cacheFor)
	return n, nil
}

// giveTo gives a new inode to the caller: the group comes from the directory
// where that has the set-group-id bit, as the lower filesystem has done already.
// The kernel has laid the caller's umask over mode; ours has no say.
func (c *call) giveTo(dir int, fd int, sealed string, caller fuse.Owner, mode uint32) error {
	if lost := mode & c.fs.umask; lost != 0 {
		if err := addMode(fd, sealed, lost); err != nil {
			return err
		}
	}
	if !c.fs.privileged || caller == c.fs.owner { // ours already
		return nil
	}
	var parent unix.Stat_t
	if err := unix.Fstat(dir, &parent); err != nil {
		return err
	}
	gid := int(caller.Gid)
	if parent.Mode&unix.S_ISGID != 0 {
		gid = -1
	}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if sealed == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if err := unix.Fchownat(fd, sealed, int(caller.Uid), gid, flags); err != nil {
		return err
	}
	if mode&(unix.S_ISUID|unix.S_ISGID) != 0 { // chown took them away
		return setMode(fd, sealed, mode&0o7777)
	}
	return nil
}

// addMode adds permissions to those of an inode: fd itself, or sealed in it.
func addMode(fd int, sealed string, permissions uint32) error {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, sealed, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return setMode(fd, sealed, st.Mode&0o7777|permissions)
}

// setMode sets the permissions of an inode: fd itself, or sealed in it.
func setMode(fd int, sealed string, permissions uint32) error {
	if sealed == "" {
		return unix.Fchmod(fd, permissions)
	}
	return unix.Fchmodat(fd, sealed, permissions, 0)
}

// processUmask reads the umask without changing it for a moment, as umask(2)
// would for every thread.
func processUmask() uint32 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777 // unknown: modes are looked at each time
	}
	_, rest, _ := bytes.Cut(status, []byte("\nUmask:\t"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	mask, err := strconv.ParseUint(string(line), 8, 32)
	if err != nil {
		return 0o777
	}
	return uint32(mask)
}

func (c *call) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, sealed, err := c.dir(in.NodeId, name)
	if err != nil {
		return c.fail(err)
	}
	if c.fs.sealsOwners() {
		a, err := c.newborn(in.NodeId, unix.S_IFDIR|in.Mode, 0, in.Owner)
		if err == nil {
			err = c.makeDirectory(dir, sealed, a)
		}
		if err != nil {
			return c.fail(err)
		}
	} else if err := unix.Mkdirat(dir, sealed, in.Mode&0o7777); err != nil && !c.madeBefore(err) {
		return c.fail(err)
	}
	return c.fail(c.present(dir, sealed, in.Owner, in.Mode, unix.AT_REMOVEDIR, out))
}

// present names an inode that was just made to the kernel, after its lower owner and
// mode are right. On error nothing is left; flags are those of its removal.
func (c *call) present(dir int, sealed string, owner fuse.Owner, mode uint32, flags int, out *fuse.EntryOut) (err error) {
	if !c.fs.sealsOwners() {
		err = c.giveTo(dir, dir, sealed, owner, mode)
	}
	if err == nil {
		err = c.entry(dir, sealed, out)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, sealed, flags)
	}
	return err
}

func (c *call) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, sealed, err := c.dir(in.NodeId, name)
	if err != nil {
		return c.fail(err)
	}
	if in.Mode&unix.S_IFMT == unix.S_IFREG {
		f, err := c.newFile(dir, sealed, &in.InHeader, in.Mode)
		if err != nil {
			return c.fail(err)
		}
		unix.Close(f.fd)
		if err = c.entry(dir, sealed, out); err != nil {
			_ = unix.Unlinkat(dir, sealed, 0)
		}
		return c.fail(err)
	}
	if c.fs.sealsOwners() {
		a, err := c.newborn(in.NodeId, in.Mode, in.Rdev, in.Owner)
		if err == nil {
			err = c.makeSpecial(dir, sealed, a, "")
		}
		if err != nil {
			return c.fail(err)
		}
	} else if err := unix.Mknodat(dir, sealed, in.Mode, int(in.Rdev)); err != nil && !c.madeBefore(err) {
		return c.fail(err)
	}
	return c.fail(c.present(dir, sealed, in.Owner, in.Mode, 0, out))
}

// newFile is a regular file that was just made.
type newFile struct {
	fd         int
	id         seal.FileID
	attributes seal.Attributes // with sealed ownership
}

// modeBelow is the mode with which the lower file of one of this mode is made.
func (c *call) modeBelow(mode uint32) uint32 {
	if c.fs.sealsOwners() {
		return lowerMode
	}
	return mode & 0o7777
}

// newFile makes an empty regular file with an id, in the directory and for the caller
// that the header names. On error nothing is left.
func (c *call) newFile(dir int, sealed string, header *fuse.InHeader, mode uint32) (newFile, error) {
	flags := unix.O_RDWR | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC
	if c.repeated() {
		flags &^= unix.O_EXCL // made before; who had it could not write to it yet
	}
	fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(dir, sealed, flags, c.modeBelow(mode)) })
	if err != nil {
		return newFile{}, err
	}
	f, err := c.dressFile(dir, fd, header, mode)
	if err != nil {
		unix.Close(fd)
		_ = unix.Unlinkat(dir, sealed, 0)
	}
	return f, err
}

// dressFile gives a file that was just made its id, owner and mode.
func (c *call) dressFile(dir, fd int, header *fuse.InHeader, mode uint32) (newFile, error) {
	f := newFile{fd: fd, id: seal.NewID()}
	if c.fs.sealsOwners() {
		var err error
		if f.attributes, err = c.newborn(header.NodeId, unix.S_IFREG|mode&0o7777, 0, header.Owner); err == nil {
			err = c.dressSealed(fd, f.id, f.attributes)
		}
		return f, err
	}
	if err := unix.Fsetxattr(fd, seal.IDAttribute, f.id[:], 0); err != nil {
		return f, err
	}
	return f, c.giveTo(dir, fd, "", header.Owner, mode)
}

func (c *call) Symlink(_ <-chan struct{}, header *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	dir, sealed, err := c.dir(header.NodeId, name)
	if err != nil {
		return c.fail(err)
	}
	if c.fs.sealsOwners() {
		a, err := c.newborn(header.NodeId, unix.S_IFLNK|0o777, 0, header.Owner)
		if err == nil {
			err = c.makeSpecial(dir, sealed, a, target)
		}
		if err != nil {
			return c.fail(err)
		}
		return c.fail(c.present(dir, sealed, header.Owner, 0, 0, out))
	}
	var hidden []byte
	root := c.root()
	seal.Do(func() { hidden, err = root.SealTarget([]byte(target)) })
	if err != nil {
		return c.fail(err)
	}
	if err := unix.Symlinkat(string(hidden), dir, sealed); err != nil && !c.madeBefore(err) {
		return c.fail(err)
	}
	return c.fail(c.present(dir, sealed, header.Owner, 0, 0, out))
}

func (c *call) Readlink(_ <-chan struct{}, header *fuse.InHeader) ([]byte, fuse.Status) {
	target, err := c.target(c.use(header.NodeId))
	return target, c.fail(err)
}

// target reads the plain target of a symlink.
func (c *call) target(n *node) ([]byte, error) {
	if c.fs.sealsOwners() {
		return c.sealedTarget(n)
	}
	fd, err := c.fs.nodes.pathFD(n)
	if err != nil {
		return nil, err
	}
	var hidden [unix.PathMax]byte
	length, err := unix.Readlinkat(fd, "", hidden[:])
	if err != nil {
		return nil, err
	}
	var plain []byte
	root := c.root()
	seal.Do(func() {
		var opened []byte
		if opened, err = root.OpenTarget(hidden[:length]); err == nil {
			plain = append(make([]byte, 0, len(opened)), opened...)
		}
	})
	return plain, err
}

func (c *call) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, sealed, err := c.dir(in.NodeId, name)
	if err != nil {
		return c.fail(err)
	}
	n := c.use(in.Oldnodeid)
	fd, err := c.fs.nodes.pathFD(n)
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, procFD(fd), dir, sealed, unix.AT_SYMLINK_FOLLOW)
	}
	if err == nil || c.madeBefore(err) {
		c.fs.nodes.unpin(n) // it may have been without a name
		err = c.entry(dir, sealed, out)
	}
	return c.fail(err)
}

// Forget takes back references that the kernel had by LOOKUP and the like: with
// the last one goes what we hold for an inode, and a deleted file's space.
func (c *call) Forget(id, count uint64) {
	c.forgets++
	c.fs.nodes.forget(id, count, c.slot, c.forgets)
}

func (c *call) Unlink(_ <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	return c.remove(header.NodeId, name, 0)
}

func (c *call) Rmdir(_ <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	return c.remove(header.NodeId, name, unix.AT_REMOVEDIR)
}

func (c *call) remove(parent uint64, name string, flags int) fuse.Status {
	dir, sealed, err := c.dir(parent, name)
	if err != nil {
		return c.fail(err)
	}
	held := c.keepInode(dir, sealed)
	if err = unix.Unlinkat(dir, sealed, flags); c.goneBefore(err) {
		err = nil
	}
	c.nameStays(held, err)
	return c.fail(err)
}

// keepInode holds the inode of a name that is about to go, so that those who
// have it open, mapped or as their working directory keep it. It returns the node, nil
// where there is none to hold.
func (c *call) keepInode(dir int, sealed string) *node {
	var st unix.Stat_t
	if unix.Fstatat(dir, sealed, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		return nil
	}
	n := c.fs.nodes.find(dir, sealed, &st)
	if n != nil {
		c.used = append(c.used, n)
		c.fs.nodes.pin(n, st.Mode&unix.S_IFMT == unix.S_IFDIR || n.opens.Load() > 0)
		c.fs.keepOrphan(n)
	}
	return n
}

// nameStays gives back what keepInode took where its name could not be removed.
func (c *call) nameStays(held *node, err error) {
	if err != nil {
		c.fs.nodes.unpin(held)
	}
}

func (c *call) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, sealedOld, err := c.dir(in.NodeId, oldName)
	if err != nil {
		return c.fail(err)
	}
	to, sealedNew, err := c.dir(in.Newdir, newName)
	if err != nil {
		return c.fail(err)
	}
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return c.fail(unix.EINVAL)
	}
	var held *node
	if in.Flags&unix.RENAME_EXCHANGE == 0 {
		held = c.keepInode(to, sealedNew)
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 && c.exchanged(from, sealedOld) {
		return fuse.OK
	}
	err = unix.Renameat2(from, sealedOld, to, sealedNew, uint(in.Flags))
	if c.renamedBefore(err, to, sealedNew) {
		err = nil
		c.fs.nodes.unpin(held) // it is what was moved there, not what was there before
	}
	c.nameStays(held, err)
	return c.fail(err)
}
