package volumeread

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// ownership puts owner, group and mode of an inode into its entry, where the volume
// keeps them sealed, and returns the inode's id. What is lost or not authentic is a
// Fault, and is taken for what the mount takes it for (docs/FORMAT.md).
func (w *walk) ownership(fd int, e *Entry) (seal.FileID, error) {
	if !w.volume.header.SealedOwnership {
		return seal.FileID{}, nil
	}
	dir := e.Is(unix.S_IFDIR)
	value, err := attribute(func(b []byte) (int, error) { return unix.Fgetxattr(fd, seal.IDAttribute, b) })
	var id seal.FileID
	var a seal.Attributes
	if err == nil {
		opening := w.volume.keys(func(root *seal.Root) error {
			id, a, err = root.OpenAttributes(value)
			return nil
		})
		if opening != nil {
			return id, opening
		}
		if err == nil && (a.Mode&unix.S_IFMT == unix.S_IFDIR) != dir {
			err = fmt.Errorf("%w: the attributes of another kind of inode", seal.ErrTampered)
		}
	}
	switch {
	case err == nil && e.Path == ".":
		w.root = a
	case err != nil && len(value) <= len(id): // as the mount shows it
		a = seal.Attributes{Mode: e.Stat.Mode&unix.S_IFMT | 0o600, UID: w.root.UID, GID: w.root.GID}
		if dir {
			a.Mode |= 0o700
		}
	case err != nil:
		a = seal.Attributes{Mode: e.Stat.Mode & unix.S_IFMT}
	}
	e.Stat.Mode, e.Stat.Uid, e.Stat.Gid, e.Stat.Rdev = a.Mode, a.UID, a.GID, uint64(a.Rdev)
	switch {
	case err == nil:
		return id, nil
	case w.volume.served != nil && errors.Is(err, unix.ENODATA): // it is just being made
		w.volume.changed++
		return id, nil
	default:
		return id, w.fault(e, NoOwner, fmt.Errorf("owner and mode: %w", err))
	}
}

// regular visits a regular lower file, which is something else above where its
// sealed mode says so.
func (w *walk) regular(fd int, e *Entry) error {
	id, err := w.ownership(fd, e)
	if err != nil {
		return err
	}
	if e.Is(unix.S_IFREG) {
		return w.file(fd, e)
	}
	if e.Is(unix.S_IFLNK) {
		if err := w.sealedTarget(fd, id, e); err != nil {
			return err
		}
	}
	return w.visit.Other(e)
}

// sealedTarget opens the target of a symlink.
func (w *walk) sealedTarget(fd int, id seal.FileID, e *Entry) error {
	hidden, err := attribute(func(b []byte) (int, error) { return unix.Fgetxattr(fd, seal.TargetAttribute, b) })
	if err != nil && !errors.Is(err, unix.ENODATA) {
		return w.fault(e, Unreadable, err)
	}
	var plain []byte
	var damage error
	err = w.volume.keys(func(root *seal.Root) error {
		var opened []byte
		opened, damage = root.OpenXattr(id, seal.TargetAttribute, hidden)
		plain = bytes.Clone(opened)
		return nil
	})
	if err == nil && damage != nil {
		return w.fault(e, Damaged, fmt.Errorf("the target of a symlink: %w", damage))
	}
	e.Target = string(plain)
	return err
}
