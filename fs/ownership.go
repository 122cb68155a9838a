package fs

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Sealed ownership. A process without privileges can neither give a file to
// somebody else nor open one whose mode forbids it. So in a volume with sealed
// ownership (docs/FORMAT.md) every lower inode is ours, and owner, group, mode and
// type are an attribute of it, which is sealed together with its id. The kernel
// enforces what GETATTR says (default_permissions), as everywhere.
//
// The attributes are read when the kernel meets an inode, and kept with its node:
// also over a freeze, like the size. A caller learns them only from a reply, which
// waits.

// lowerMode is that of a lower file; with lowerSpecial, of what is none above.
const (
	lowerMode    = 0o600
	lowerDirMode = 0o700
	lowerSpecial = unix.S_ISVTX
)

// ownership is what a node knows of the sealed attributes of its inode.
type ownership struct {
	mu         sync.Mutex // after node.content, before node.meta
	known      bool
	attributes seal.Attributes
	id         seal.FileID // of what is no regular file; those have node.fileID
	hasID      bool
	damaged    bool  // the attributes did not open
	target     int64 // length of a symlink's target
}

// sealsOwners reports whether the volume has sealed ownership. It is asked by calls
// that are let in.
func (f *Filesystem) sealsOwners() bool { return f.header.SealedOwnership }

// fillSealed is fill for volumes with sealed ownership.
func (c *call) fillSealed(n *node, st *unix.Stat_t, out *fuse.Attr) error {
	var err error
	dir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if !dir {
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fmt.Errorf("%w: a lower inode of mode %o", seal.ErrNotSealed, st.Mode)
		}
		if out.Size, err = c.plainSize(n, st.Size); err != nil { // learns the attributes by the way
			return err
		}
	}
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	a, err := c.ownedBy(n, dir)
	if err != nil {
		return err
	}
	setOwnership(out, a)
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG:
	case unix.S_IFLNK:
		out.Size = uint64(n.owner.target)
	default:
		out.Size = 0
	}
	return nil
}

func setOwnership(out *fuse.Attr, a seal.Attributes) {
	out.Mode, out.Owner, out.Rdev = a.Mode, fuse.Owner{Uid: a.UID, Gid: a.GID}, a.Rdev
}

// ownedBy returns the attributes of a node's inode; n.owner.mu is held.
func (c *call) ownedBy(n *node, dir bool) (seal.Attributes, error) {
	if n.owner.known {
		return n.owner.attributes, nil
	}
	value, err := c.readOwnership(n)
	if err != nil {
		return seal.Attributes{}, err
	}
	if err := c.learn(n, value, dir); err != nil {
		return seal.Attributes{}, err
	}
	return n.owner.attributes, nil
}

// readOwnership reads the attribute as it is below, nil when there is none. One that
// is longer than any is zeros.
func (c *call) readOwnership(n *node) ([]byte, error) {
	fd, err := c.descriptor(n)
	if err != nil {
		return nil, err
	}
	return readOwnershipOf(fd)
}

func readOwnershipOf(fd int) ([]byte, error) {
	value := make([]byte, seal.AttributesMax)
	got, err := unix.Getxattr(procFD(fd), seal.IDAttribute, value)
	switch {
	case errors.Is(err, unix.ENODATA):
		return nil, nil
	case errors.Is(err, unix.ERANGE): // nothing was read, and zeros open to nothing
		return value, nil
	case err != nil:
		return nil, err
	}
	return value[:got], nil
}

// learn opens the attributes of an inode and keeps them; n.owner.mu is held.
func (c *call) learn(n *node, value []byte, dir bool) error {
	var id seal.FileID
	var a seal.Attributes
	var err error
	root := c.root()
	seal.Do(func() { id, a, err = root.OpenAttributes(value) })
	if err == nil && (a.Mode&unix.S_IFMT == unix.S_IFDIR) != dir {
		err = fmt.Errorf("%w: the attributes of another kind of inode", seal.ErrTampered)
	}
	o := ownership{attributes: a, id: id, hasID: len(value) >= len(id)}
	switch {
	case errors.Is(err, seal.ErrWiped):
		return err
	case err == nil:
		if a.Mode&unix.S_IFMT == unix.S_IFLNK {
			if o.target, err = c.targetSize(n); err != nil {
				return err
			}
		}
	case len(value) <= len(id):
		if o.attributes, err = c.unfinished(n, dir); err != nil {
			return err
		}
	default:
		o.damaged = true
		o.attributes = seal.Attributes{Mode: kindBelow(dir)}
		c.fs.damagedOwnership(n, err)
	}
	n.owner.known, n.owner.attributes, n.owner.id, n.owner.hasID = true, o.attributes, o.id, o.hasID
	n.owner.damaged, n.owner.target = o.damaged, o.target
	return nil
}

// learnRoot opens the attributes of the root and keeps them, so that they can be told
// in a freeze though nobody has asked before. What is wrong with them is told when
// somebody asks.
func (f *Filesystem) learnRoot(root *seal.Root) error {
	value, err := readOwnershipOf(f.root)
	if err != nil {
		return err
	}
	id, a, err := root.OpenAttributes(value)
	if err != nil || a.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	o := &f.nodes.root.owner
	o.mu.Lock()
	defer o.mu.Unlock()
	o.known, o.attributes, o.id, o.hasID = true, a, id, true
	return nil
}

// unfinished are the attributes of an inode that was being made when the machine
// stopped.
func (c *call) unfinished(n *node, dir bool) (seal.Attributes, error) {
	mode := kindBelow(dir) | lowerMode
	if dir {
		mode |= lowerDirMode
	}
	if n.id == fuse.FUSE_ROOT_ID { // made with the volume: somebody has taken it away
		c.fs.damagedOwnership(n, seal.ErrTruncated)
		return seal.Attributes{Mode: mode}, nil
	}
	c.fs.log.Warn("an inode has no owner and mode, as if the machine had stopped while it was made: it belongs to the owner of the root, and to nobody else", zap.Uint64("inode", n.id))
	root := c.fs.nodes.root
	root.owner.mu.Lock()
	defer root.owner.mu.Unlock()
	a, err := c.ownedBy(root, true)
	return seal.Attributes{Mode: mode, UID: a.UID, GID: a.GID}, err
}

func kindBelow(dir bool) uint32 {
	if dir {
		return unix.S_IFDIR
	}
	return unix.S_IFREG
}

// damagedOwnership tells of attributes that are not authentic.
func (f *Filesystem) damagedOwnership(n *node, err error) {
	f.damagedBlocks.Add(1)
	if f.options.Observer != nil {
		f.options.Observer.Damaged()
	}
	f.log.Error("damaged owner and mode: the inode belongs to root with mode 0000 until root gives it owner and mode anew",
		zap.Uint64("inode", n.id), zap.String("reason", err.Error()))
}

// openable refuses a file whose attributes are damaged, which the kernel lets root
// open.
func (c *call) openable(n *node) error {
	if !c.fs.sealsOwners() {
		return nil
	}
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	if _, err := c.ownedBy(n, false); err != nil {
		return err
	}
	if n.owner.damaged {
		return seal.ErrTampered
	}
	return nil
}

// targetSize is the length of a symlink's target.
func (c *call) targetSize(n *node) (int64, error) {
	fd, err := c.descriptor(n)
	if err != nil {
		return 0, err
	}
	size, err := unix.Getxattr(procFD(fd), seal.TargetAttribute, nil)
	if errors.Is(err, unix.ENODATA) {
		return 0, nil // reading it fails
	}
	return max(0, int64(size)-seal.XattrOverhead), err
}

// sealedTarget reads the target of a symlink.
func (c *call) sealedTarget(n *node) (target []byte, err error) {
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	a, err := c.ownedBy(n, false)
	if err != nil {
		return nil, err
	}
	if a.Mode&unix.S_IFMT != unix.S_IFLNK {
		return nil, unix.EINVAL
	}
	fd, err := c.descriptor(n)
	if err != nil {
		return nil, err
	}
	hidden, err := readAttribute(procFD(fd), seal.TargetAttribute)
	if errors.Is(err, unix.ENODATA) {
		return nil, fmt.Errorf("%w: a symlink without a target", seal.ErrTruncated)
	}
	if err != nil {
		return nil, err
	}
	root := c.root()
	seal.Do(func() {
		var opened []byte
		if opened, err = root.OpenXattr(n.owner.id, seal.TargetAttribute, hidden); err == nil {
			target = append(make([]byte, 0, len(opened)), opened...)
		}
	})
	return target, err
}

// changeOwnership does what a SETATTR asks of owner, group and mode.
func (c *call) changeOwnership(n *node, in *fuse.SetAttrIn) error {
	return c.rewriteOwnership(n, func(a *seal.Attributes) bool {
		uid, setUID := in.GetUID()
		gid, setGID := in.GetGID()
		mode, setMode := in.GetMode()
		group := a.GID
		if setUID {
			a.UID = uid
		}
		if setGID {
			a.GID = gid
		}
		// What asks for nothing is chown(-1, -1), which takes the set-id bits too.
		nothing := in.Valid&^fuseNothing == 0
		if setUID || setGID || nothing || in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			a.Mode = c.withoutSetID(a.Mode, group, setUID || setGID || nothing)
		}
		if setMode {
			a.Mode = a.Mode&unix.S_IFMT | mode&0o7777
		}
		return setUID || setGID || setMode || nothing
	})
}

// killSealedSetID is killSUIDGID.
func (c *call) killSealedSetID(n *node) error {
	return c.rewriteOwnership(n, func(a *seal.Attributes) bool {
		a.Mode = c.withoutSetID(a.Mode, a.GID, false)
		return false
	})
}

// withoutSetID is what the mode of an inode of a group becomes by a write or a chown of
// the caller: as in the kernel (setattr_should_drop_sgid, fs/attr.c) the set-group-id
// bit stays where group execution is missing and the caller is of the group, or is root
// where that counts. Of the caller's groups the kernel tells us the first. A directory's
// bits stay.
func (c *call) withoutSetID(mode, group uint32, rootMay bool) uint32 {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return mode
	}
	may := c.header.Gid == group || rootMay && c.header.Uid == 0
	if mode&unix.S_IXGRP != 0 || !may {
		mode &^= unix.S_ISGID
	}
	return mode &^ unix.S_ISUID
}

// rewriteOwnership changes the attributes of an inode. change says whether they are to
// be written where they stay the same: the ctime is to change.
func (c *call) rewriteOwnership(n *node, change func(a *seal.Attributes) (write bool)) error {
	fd, err := c.descriptor(n)
	if err != nil {
		return err
	}
	n.owner.mu.Lock()
	known := n.owner.known
	now := n.owner.attributes
	n.owner.mu.Unlock()
	if changed := now; known && !change(&changed) && changed == now {
		return nil
	}
	id, dir, err := c.inodeID(n, fd)
	if err != nil {
		return err
	}
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	a, err := c.ownedBy(n, dir)
	if err != nil {
		return err
	}
	before := a
	if !change(&a) && a == before {
		return nil
	}
	return c.writeOwnership(n, fd, id, a)
}

// writeOwnership seals the attributes of an inode; n.owner.mu is held.
func (c *call) writeOwnership(n *node, fd int, id seal.FileID, a seal.Attributes) error {
	value, err := c.sealOwnership(id, a)
	if err != nil {
		return err
	}
	if err := unix.Setxattr(procFD(fd), seal.IDAttribute, value, 0); err != nil {
		return err
	}
	n.owner.known, n.owner.damaged, n.owner.attributes, n.owner.id, n.owner.hasID = true, false, a, id, true
	return nil
}

// inodeID returns the id to which the attributes of an inode are bound, a new one
// where it has none, and whether it is a directory.
func (c *call) inodeID(n *node, fd int) (id seal.FileID, dir bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return id, false, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if err := c.share(n); err != nil {
			return id, false, err
		}
		defer n.content.RUnlock()
		return n.fileID, false, nil
	}
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	if _, err := c.ownedBy(n, true); err != nil {
		return id, true, err
	}
	if !n.owner.hasID {
		return seal.NewID(), true, nil
	}
	return n.owner.id, true, nil
}

// directoryID is the id to which the extended attributes of a directory are bound;
// with make, it is given to one that has none.
func (c *call) directoryID(n *node, fd int, give bool) (seal.FileID, error) {
	id, _, err := c.inodeID(n, fd)
	if err != nil || !give {
		return id, err
	}
	n.owner.mu.Lock()
	defer n.owner.mu.Unlock()
	if n.owner.hasID {
		return n.owner.id, nil
	}
	return id, c.writeOwnership(n, fd, id, n.owner.attributes)
}

// kindOf tells the type of an entry of a lower directory, as a listing shows it:
// that of a file is in its attributes where its mode says that it is none.
func (c *call) kindOf(dir int, sealed string, lower uint32) uint32 {
	if !c.fs.sealsOwners() || lower&unix.S_IFMT != unix.S_IFREG {
		return lower
	}
	var st unix.Stat_t
	if unix.Fstatat(dir, sealed, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&lowerSpecial == 0 {
		return lower
	}
	var value [seal.AttributesMax]byte
	got, err := unix.Lgetxattr(procFD(dir)+"/"+sealed, seal.IDAttribute, value[:])
	if err != nil {
		return lower
	}
	root := c.root()
	seal.Do(func() {
		var a seal.Attributes
		if _, a, err = root.OpenAttributes(value[:got]); err == nil {
			lower = a.Mode & unix.S_IFMT
		}
	})
	return lower
}

// sealRootOwnership gives the root of a new volume the owner and mode that the lower
// directory has.
func sealRootOwnership(root *seal.Root, lower string) error {
	var st unix.Stat_t
	if err := unix.Stat(lower, &st); err != nil {
		return &os.PathError{Op: "stat", Path: lower, Err: err}
	}
	value, err := root.SealAttributes(seal.NewID(), seal.Attributes{Mode: st.Mode & (unix.S_IFMT | 0o7777), UID: st.Uid, GID: st.Gid})
	if err != nil {
		return err
	}
	if err := unix.Setxattr(lower, seal.IDAttribute, value, 0); err != nil {
		return fmt.Errorf("keep owner and mode as an extended attribute of %s (volume.ownership: sealed): %w", lower, err)
	}
	return nil
}
