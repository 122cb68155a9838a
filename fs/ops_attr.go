package fs

import (
	"time"
	"unsafe"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func (c *call) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !c.inside { // the root, while the gate is closed
		return c.fail(c.fs.attrOfRoot(&out.Attr)) // true only for as long as it takes to say it
	}
	n := c.use(in.NodeId)
	if err := c.attr(n, &out.Attr); err != nil {
		return c.fail(err)
	}
	if out.Mode&unix.S_IFMT == unix.S_IFREG && c.refusedByFullDisk(n, in.Fh(), in.Flags()&fuse.FUSE_GETATTR_FH != 0) {
		return c.fail(unix.ENOSPC)
	}
	out.SetTimeout(cacheFor)
	return fuse.OK
}

// attrOfRoot reads the attributes of the root without a key. Where the volume has
// sealed ownership they are the lower directory's until Unlock has read the root's
// own.
func (f *Filesystem) attrOfRoot(out *fuse.Attr) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.root, &st); err != nil {
		return err
	}
	*out = lowerAttr(&st)
	n := f.nodes.root
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	if n.owner.known {
		setOwnership(out, n.owner.attributes)
	}
	return nil
}

// attr reads the attributes of a node's inode.
func (c *call) attr(n *node, out *fuse.Attr) error {
	var st unix.Stat_t
	if err := c.statLower(n, &st); err != nil {
		return err
	}
	return c.fill(n, &st, out)
}

// statLower reads the attributes of the lower file.
func (c *call) statLower(n *node, st *unix.Stat_t) error {
	fd, err := c.descriptor(n)
	if err != nil {
		return err
	}
	return unix.Fstat(fd, st)
}

// descriptor returns one of a node in use for its attributes: the open file's, so
// that it needs no other, or an O_PATH descriptor.
func (c *call) descriptor(n *node) (int, error) {
	if n.file.isOpen() {
		return n.file.buffered(), nil
	}
	return c.fs.nodes.pathFD(n)
}

func lowerAttr(st *unix.Stat_t) fuse.Attr {
	return fuse.Attr{
		Ino:    st.Ino,
		Blocks: uint64(st.Blocks),
		Atime:  uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
		Mode:    st.Mode,
		Nlink:   uint32(st.Nlink),
		Owner:   fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev:    uint32(st.Rdev),
		Blksize: block,
		Size:    uint64(st.Size),
	}
}

// fill makes plain attributes of lower ones: all are the same but the size, and with
// sealed ownership owner, mode and device.
func (c *call) fill(n *node, st *unix.Stat_t, out *fuse.Attr) error {
	*out = lowerAttr(st)
	if st.Mode&unix.S_IFMT == unix.S_IFREG && n.opens.Load() > 0 {
		c.fs.showLeast(out)
	}
	if c.fs.sealsOwners() {
		return c.fillSealed(n, st, out)
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		out.Size, err = c.plainSize(n, st.Size)
	case unix.S_IFLNK:
		out.Size = uint64(seal.TargetSize(st.Size)) // not by reading it: that would change the lower atime
	}
	return err
}

// plainSize returns the size of a regular file. A file whose id is lost has
// the size its blocks allow: it cannot be read, but it can be seen and removed.
func (c *call) plainSize(n *node, lower int64) (uint64, error) {
	n.content.RLock()
	if n.known { // the lower file need not be open
		defer n.content.RUnlock()
		return uint64(n.size), nil
	}
	n.content.RUnlock()
	err := c.share(n)
	if err == nil {
		defer n.content.RUnlock()
		return uint64(n.size), nil
	}
	if errnoOf(err) == unix.EIO {
		return uint64(seal.BlockStart(lower / block)), nil
	}
	return 0, err
}

// flushesTimes reports whether a SETATTR is what the kernel sends to write back the
// times of a file that it keeps with the writeback cache (fs/fuse/dir.c,
// fuse_flush_times). A caller who sets mtime alone differs in this: his never comes
// with a handle, and the kernel's does where the file is open for writing; else the
// kernel's is of a change that was made before the gate closed.
func (c *call) flushesTimes(request []byte) bool {
	in := (*fuse.SetAttrIn)(unsafe.Pointer(&request[0]))
	if c.fs.options.Cache != Writeback || len(request) < int(unsafe.Sizeof(*in)) ||
		in.Valid&^fuse.FATTR_FH != fuse.FATTR_MTIME|fuse.FATTR_CTIME {
		return false
	}
	changed := time.Unix(int64(in.Ctime), int64(in.Ctimensec)).UnixNano()
	return in.Valid&fuse.FATTR_FH != 0 || changed < c.fs.frozenAt.Load()
}

// kernelsNow is the time, in Unix nanoseconds, by the clock of which the kernel takes
// the times of files: it is some milliseconds behind.
func kernelsNow() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return time.Now().UnixNano() // a kernel without that clock, which there is not
	}
	return now.Nano()
}

// remembers reports whether attrFromMemory would do.
func (c *call) remembers(n *node) bool { return c.attrFromMemory(n, &fuse.Attr{}) == nil }

// attrFromMemory is attr for a regular file, without a key. Where that does not do the
// error is EINTR.
func (c *call) attrFromMemory(n *node, out *fuse.Attr) error {
	var st unix.Stat_t
	if err := c.statLower(n, &st); err != nil {
		return err
	}
	*out = lowerAttr(&st)
	n.content.RLock()
	size, known := n.size, n.known
	n.content.RUnlock()
	out.Size = uint64(size)
	if c.fs.sealsOwners() {
		n.owner.mu.Lock()
		setOwnership(out, n.owner.attributes)
		known = known && n.owner.known
		n.owner.mu.Unlock()
	}
	if !known || out.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EINTR
	}
	return nil
}

// flushTimes serves what flushesTimes has told of, while the gate is closed.
func (c *call) flushTimes(in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := c.use(in.NodeId)
	err := c.attrFromMemory(n, &out.Attr) // before anything is changed
	if err == nil {
		var fd int
		if fd, err = c.descriptor(n); err == nil {
			err = setTimes(fd, in)
		}
	}
	if err == nil {
		err = c.attrFromMemory(n, &out.Attr)
	}
	out.SetTimeout(0) // who asks for attributes while frozen waits
	return c.fail(err)
}

func (c *call) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !c.inside { // the gate is closed
		return c.flushTimes(in, out)
	}
	n := c.use(in.NodeId)
	if size, ok := in.GetSize(); ok {
		if err := c.resize(n, int64(size)); err != nil {
			return c.fail(err)
		}
	}
	fd, err := c.descriptor(n)
	if err == nil {
		err = c.setOwnerAndMode(n, fd, in)
	}
	if err == nil {
		err = setTimes(fd, in)
	}
	if err == nil {
		err = c.attr(n, &out.Attr)
	}
	c.askAgain(n)
	out.SetTimeout(cacheFor)
	return c.fail(err)
}

func (c *call) resize(n *node, size int64) error {
	if size < 0 || size > seal.MaxFileSize {
		return unix.EFBIG
	}
	if err := c.own(n); err != nil {
		return err
	}
	defer n.content.Unlock()
	return c.truncate(n, size)
}

func (c *call) setOwnerAndMode(n *node, fd int, in *fuse.SetAttrIn) error {
	if c.fs.sealsOwners() {
		return c.changeOwnership(n, in)
	}
	uid, setUID := in.GetUID()
	gid, setGID := in.GetGID()
	if setUID || setGID {
		u, g := -1, -1
		if setUID {
			u = int(uid)
		}
		if setGID {
			g = int(gid)
		}
		if err := unix.Fchownat(fd, "", u, g, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if mode, ok := in.GetMode(); ok {
		if err := unix.Chmod(procFD(fd), mode); err != nil {
			return err
		}
	}
	// What asks for nothing is chown(-1, -1), which takes the set-id bits too.
	if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 || in.Valid&^fuseNothing == 0 {
		return c.killSUIDGID(fd, setUID || setGID || in.Valid&^fuseNothing == 0)
	}
	return nil
}

// fuseNothing is what a SETATTR may say that asks for nothing.
const fuseNothing = fuse.FATTR_FH | fuse.FATTR_LOCKOWNER | fuse.FATTR_CTIME

// killSUIDGID does what a write by an unprivileged caller does to the set-id
// bits: the kernel leaves it to us (FUSE_HANDLE_KILLPRIV_V2).
func (c *call) killSUIDGID(fd int, rootMay bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mode := c.withoutSetID(st.Mode, st.Gid, rootMay)
	if mode == st.Mode {
		return nil
	}
	return unix.Chmod(procFD(fd), mode&0o7777)
}

// killSetID is killSUIDGID for a file that is open.
func (c *call) killSetID(n *node) error {
	if c.fs.sealsOwners() {
		return c.killSealedSetID(n)
	}
	return c.killSUIDGID(n.file.buffered(), false)
}

func setTimes(fd int, in *fuse.SetAttrIn) error {
	const times = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW
	if in.Valid&times == 0 {
		return nil // ctime alone cannot be set; the lower filesystem keeps it
	}
	ts := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	if t, ok := in.GetATime(); ok {
		ts[0] = timespec(t, in.Valid&fuse.FATTR_ATIME_NOW != 0)
	}
	if t, ok := in.GetMTime(); ok {
		ts[1] = timespec(t, in.Valid&fuse.FATTR_MTIME_NOW != 0)
	}
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
}

func timespec(t time.Time, now bool) unix.Timespec {
	if now {
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func (c *call) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = c.fs.statfs()
	return fuse.OK
}

func (c *call) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status {
	return fuse.ENOSYS // default_permissions: the kernel decides by itself
}
