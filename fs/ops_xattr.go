package fs

import (
	"bytes"
	"errors"
	"strings"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Extended attributes: user.* are kept with sealed values; their names, and
// that they exist, are visible below. All other namespaces are refused:
// security.* and trusted.* would act on the lower files, and POSIX ACLs would
// have to be enforced by the kernel, which is not told of them.

const (
	userPrefix = "user."
	ownPrefix  = "user.byokd." // ours, not the application's
)

// servedAttribute says whether a name may be read or set by the application.
func servedAttribute(name string) bool {
	return strings.HasPrefix(name, userPrefix) && !strings.HasPrefix(name, ownPrefix)
}

// attributeOwner returns the path by which an inode's attributes are reached,
// and the id their values are bound to.
// With give, what has none gets one.
func (c *call) attributeOwner(node uint64, give bool) (string, seal.FileID, error) {
	n := c.use(node)
	fd, err := c.descriptor(n)
	if err != nil {
		return "", seal.FileID{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", seal.FileID{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG && c.fs.sealsOwners() {
		id, err := c.directoryID(n, fd, give)
		return procFD(fd), id, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return procFD(fd), seal.FileID{}, nil // directories have no id; the name and the kind are bound
	}
	if err := c.share(n); err != nil {
		return "", seal.FileID{}, err
	}
	defer n.content.RUnlock()
	return procFD(fd), n.fileID, nil
}

func (c *call) GetXAttr(_ <-chan struct{}, header *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if !servedAttribute(name) {
		return 0, c.fail(unix.ENODATA)
	}
	path, id, err := c.attributeOwner(header.NodeId, false)
	if err != nil {
		return 0, c.fail(err)
	}
	sealed, err := readAttribute(path, name)
	if err != nil {
		return 0, c.fail(err)
	}
	var plain []byte
	root := c.root()
	seal.Do(func() {
		var opened []byte
		if opened, err = root.OpenXattr(id, name, sealed); err == nil {
			plain = append(make([]byte, 0, len(opened)), opened...)
		}
	})
	if err != nil {
		return 0, c.fail(err)
	}
	return c.giveBytes(plain, dest)
}

// giveBytes answers a call that asks for a size first.
func (c *call) giveBytes(b, dest []byte) (uint32, fuse.Status) {
	if len(dest) < len(b) {
		return uint32(len(b)), fuse.ERANGE
	}
	return uint32(copy(dest, b)), fuse.OK
}

// readAttribute reads a whole attribute, however large.
func readAttribute(path, name string) ([]byte, error) {
	for {
		size, err := unix.Getxattr(path, name, nil)
		if err != nil {
			return nil, err
		}
		b := make([]byte, size)
		got, err := unix.Getxattr(path, name, b)
		if errors.Is(err, unix.ERANGE) {
			continue // grew between
		}
		return b[:max(got, 0)], err
	}
}

func (c *call) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	if !servedAttribute(name) {
		return c.fail(unix.EOPNOTSUPP)
	}
	path, id, err := c.attributeOwner(in.NodeId, true)
	if err != nil {
		return c.fail(err)
	}
	var sealed []byte
	root := c.root()
	seal.Do(func() { sealed, err = root.SealXattr(id, name, value) })
	if err != nil {
		return c.fail(err)
	}
	flags := int(in.Flags)
	if isResent(&c.header) {
		flags = 0 // it may have been set, and XATTR_CREATE would fail
	}
	had := c.hadAttribute(path, name, in.Flags != 0, false)
	err = unix.Setxattr(path, name, sealed, flags)
	if !had && c.madeBefore(err) {
		err = nil
	}
	return c.fail(err)
}

func (c *call) RemoveXAttr(_ <-chan struct{}, header *fuse.InHeader, name string) fuse.Status {
	if !servedAttribute(name) {
		return c.fail(unix.EOPNOTSUPP)
	}
	path, _, err := c.attributeOwner(header.NodeId, false)
	if err != nil {
		return c.fail(err)
	}
	had := c.hadAttribute(path, name, true, true)
	if err = unix.Removexattr(path, name); had && c.goneBefore(err) {
		err = nil
	}
	return c.fail(err)
}

func (c *call) ListXAttr(_ <-chan struct{}, header *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	fd, err := c.descriptor(c.use(header.NodeId))
	if err != nil {
		return 0, c.fail(err)
	}
	var names []byte
	for {
		size, err := unix.Listxattr(procFD(fd), nil)
		if err != nil {
			return 0, c.fail(err)
		}
		names = make([]byte, size)
		got, err := unix.Listxattr(procFD(fd), names)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return 0, c.fail(err)
		}
		names = names[:got]
		break
	}
	var served []byte
	for _, name := range bytes.Split(names, []byte{0}) {
		if servedAttribute(string(name)) {
			served = append(append(served, name...), 0)
		}
	}
	return c.giveBytes(served, dest)
}
