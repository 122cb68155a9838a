package volumeread

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// Entry is one inode by one of its names.
type Entry struct {
	Path   string      // plain, relative to the volume; "." is its root
	Lower  string      // lower path, relative to the lower directory
	Stat   unix.Stat_t // of the lower inode; type, permissions, owner, group and device as they are above
	Target string      // of a symlink; empty when a Fault was told instead
	Attrs  []Attr      // extended attributes that the application set, of files and directories
}

// Attr is a plain extended attribute.
type Attr struct {
	Name  string
	Value []byte
}

// Is tells the kind of an entry: a unix.S_IF constant.
func (e *Entry) Is(kind uint32) bool { return e.Stat.Mode&unix.S_IFMT == kind }

// A Visitor is told what is in a volume. An error of a method ends the walk.
type Visitor interface {
	// Enter comes before the entries of a directory, Leave after them.
	Enter(e *Entry) error
	Leave(e *Entry) error
	// File comes for each name of a regular file: the one with several names is
	// told several times. f is valid during the call.
	File(e *Entry, f *File) error
	// Other comes for symlinks, pipes, sockets and devices.
	Other(e *Entry) error
	// Fault comes for what cannot be read or is not authentic.
	Fault(f Fault) error
}

// Reason says in a word what is wrong; it is for programs, and stays as it is.
type Reason string

// The reasons of a Fault.
const (
	Damaged    Reason = "damaged"    // sealed bytes that do not authenticate
	NoFileID   Reason = "no_file_id" // both places of the id are lost: nothing of the file can be opened
	IDMismatch Reason = "id_mismatch"
	Foreign    Reason = "foreign"    // a name that byokd has not written
	Unreadable Reason = "unreadable" // the disk fails
	NoOwner    Reason = "no_owner"   // owner and mode are lost, or not authentic; the content is not
)

// Fault is one thing that is wrong. Offset and Length are plain bytes; Length 0
// is the whole of it.
type Fault struct {
	Path   string `json:"path"` // plain; the directory's where the name itself is foreign
	Lower  string `json:"lower"`
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Reason Reason `json:"reason"`
	Detail string `json:"detail"`
}

// Walk visits everything in the volume, names in lower order.
func (v *Volume) Walk(ctx context.Context, visit Visitor) error {
	w := &walk{volume: v, visit: visit, ctx: ctx}
	root := &Entry{Path: ".", Lower: "."}
	if err := unix.Fstat(v.fd, &root.Stat); err != nil {
		return err
	}
	fd, err := openAt(v.fd, ".", unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	return w.directory(fd, root)
}

// walk is one Walk.
type walk struct {
	volume *Volume
	visit  Visitor
	ctx    context.Context
	root   seal.Attributes // of the volume's root, with sealed ownership
}

// directory visits a directory, whose descriptor becomes its own.
func (w *walk) directory(fd int, e *Entry) error {
	dir := os.NewFile(uintptr(fd), e.Lower)
	defer dir.Close()
	id, err := w.ownership(fd, e)
	if err != nil {
		return err
	}
	if err := w.attributes(fd, e, id); err != nil {
		return err
	}
	if err := w.visit.Enter(e); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		// A directory that was removed after it was opened lists as ENOENT (getdents64(2)).
		if err := w.unreadable(e, err); err != nil {
			return err
		}
	}
	slices.Sort(names)
	for _, sealed := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.name(fd, e, sealed); err != nil {
			return err
		}
	}
	return w.visit.Leave(e)
}

// name visits one name of a directory.
func (w *walk) name(dir int, parent *Entry, sealed string) error {
	if parent.Path == "." && ownName(sealed) {
		return nil
	}
	child := &Entry{Lower: path.Join(parent.Lower, sealed)}
	var plain string
	err := w.volume.keys(func(root *seal.Root) (err error) {
		plain, err = root.OpenName(sealed)
		return err
	})
	if err != nil {
		return w.visit.Fault(Fault{Path: parent.Path, Lower: child.Lower, Reason: Foreign, Detail: err.Error()})
	}
	child.Path = path.Join(parent.Path, plain)
	if err := unix.Fstatat(dir, sealed, &child.Stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return w.unreadable(child, err)
	}
	kind := child.Stat.Mode & unix.S_IFMT
	if w.volume.header.SealedOwnership && kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return w.visit.Fault(Fault{Path: child.Path, Lower: child.Lower, Reason: Foreign, Detail: "neither a file nor a directory, and byokd makes nothing else in a volume with sealed ownership"})
	}
	switch kind {
	case unix.S_IFDIR:
		fd, err := openAt(dir, sealed, unix.O_DIRECTORY)
		if err != nil {
			return w.unreadable(child, err)
		}
		return w.directory(fd, child)
	case unix.S_IFREG:
		fd, err := openAt(dir, sealed, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Fstat(fd, &child.Stat) // the name may be another file's by now
		}
		if err != nil {
			return w.unreadable(child, err)
		}
		if !child.Is(unix.S_IFREG) {
			w.volume.changed++
			return nil
		}
		return w.regular(fd, child)
	case unix.S_IFLNK:
		if there, err := w.target(dir, sealed, child); err != nil || !there {
			return err
		}
	}
	return w.visit.Other(child)
}

// unreadable tells of a name that cannot be looked at, unless it has just gone.
func (w *walk) unreadable(e *Entry, err error) error {
	if w.volume.gone(err) {
		return nil
	}
	return w.fault(e, Unreadable, err)
}

// ownName tells what else is in the lower root.
func ownName(sealed string) bool {
	return sealed == "lost+found" || seal.IsOwnFile(sealed)
}

func (w *walk) fault(e *Entry, reason Reason, err error) error {
	return w.visit.Fault(Fault{Path: e.Path, Lower: e.Lower, Reason: reason, Detail: err.Error()})
}

// target opens the target of a symlink, and tells whether there still is one.
func (w *walk) target(dir int, sealed string, e *Entry) (there bool, err error) {
	var hidden [unix.PathMax]byte
	n, err := unix.Readlinkat(dir, sealed, hidden[:])
	if err != nil {
		if w.volume.gone(err) {
			return false, nil
		}
		return true, w.fault(e, Unreadable, err)
	}
	var plain []byte
	err = w.volume.keys(func(root *seal.Root) (err error) {
		opened, err := root.OpenTarget(hidden[:n])
		plain = bytes.Clone(opened)
		return err
	})
	if err != nil {
		return true, w.fault(e, Damaged, err)
	}
	e.Target = string(plain)
	return true, nil
}

const (
	idAttribute = seal.IDAttribute
	userPrefix  = "user."
	ownPrefix   = "user.byokd."
)

// attributes opens the extended attributes of an inode.
func (w *walk) attributes(fd int, e *Entry, id seal.FileID) error {
	names, err := attribute(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return w.fault(e, Unreadable, err)
	}
	for _, raw := range bytes.Split(names, []byte{0}) {
		name := string(raw)
		if !strings.HasPrefix(name, userPrefix) || strings.HasPrefix(name, ownPrefix) {
			continue
		}
		sealed, err := attribute(func(b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
		if w.volume.served != nil && errors.Is(err, unix.ENODATA) {
			continue // it was removed since they were listed
		}
		if err != nil {
			if err := w.fault(e, Unreadable, err); err != nil {
				return err
			}
			continue
		}
		var plain []byte
		err = w.volume.keys(func(root *seal.Root) (err error) {
			opened, err := root.OpenXattr(id, name, sealed)
			plain = bytes.Clone(opened)
			return err
		})
		if err == nil {
			e.Attrs = append(e.Attrs, Attr{name, plain})
			continue
		}
		fault := Fault{Path: e.Path, Lower: e.Lower, Reason: Damaged, Detail: "extended attribute " + name + ": " + err.Error()}
		if err := w.visit.Fault(fault); err != nil {
			return err
		}
	}
	return nil
}

// attribute reads a value whose length is asked first.
func attribute(get func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := get(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = get(b)
		if errors.Is(err, unix.ERANGE) {
			continue // it grew
		}
		return b[:max(n, 0)], err
	}
}
