package fs

import (
	"errors"
	"os"
	"slices"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// nameIndex finds lower inodes by their numbers, where they cannot be opened by
// handle: the kernel may know them from a predecessor of this process, which held
// them open. It is made by one walk over the lower directory, which reads names and
// no inodes (about 1 µs each), and again when something was renamed meanwhile.
type nameIndex struct {
	root  int
	names map[uint64]placed
	met   func(dir int, name string) // instead of names, if not nil: is told of each
}

// placed is one name of an inode.
type placed struct {
	dir  uint64 // inode number of its directory; 0 for the root
	name string
}

func newNameIndex(root int) (*nameIndex, error) {
	x := &nameIndex{root: root}
	return x, x.walk()
}

func (x *nameIndex) walk() error {
	x.names = map[uint64]placed{}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(x.root), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	return x.directory(fd, 0)
}

// directory takes in a directory and what is below; fd becomes its own.
func (x *nameIndex) directory(fd int, ino uint64) error {
	dir := os.NewFile(uintptr(fd), "lower directory")
	defer dir.Close()
	buf := make([]byte, direntBytes)
	for {
		n, err := ignoringEINTR(func() (int, error) { return unix.Getdents(fd, buf) })
		if err != nil || n == 0 {
			return err
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			if e.Name == "." || e.Name == ".." {
				continue
			}
			if x.met != nil {
				x.met(fd, e.Name)
			} else {
				x.names[e.Ino] = placed{ino, e.Name}
			}
			if err := x.below(fd, e); err != nil {
				return err
			}
		}
	}
}

// below takes in what is below an entry of a directory.
func (x *nameIndex) below(dir int, e fuse.DirEntry) error {
	if kind := e.Mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != 0 { // 0: the filesystem does not tell
		return nil
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(dir, e.Name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EACCES): // EACCES: lost+found, which is root's
		return nil
	case err != nil:
		return err
	}
	return x.directory(fd, e.Ino)
}

// find opens an inode with O_PATH; ESTALE when it has no name.
func (x *nameIndex) find(ino uint64) (int, error) {
	if fd, err := x.open(ino); err == nil {
		return fd, nil
	}
	if err := x.walk(); err != nil {
		return -1, err
	}
	return x.open(ino)
}

func (x *nameIndex) open(ino uint64) (int, error) {
	path := x.path(ino)
	if len(path) == 0 {
		return -1, unix.ESTALE
	}
	fd := x.root
	for _, name := range path { // one by one: together they may be longer than a path may be
		next, err := ignoringEINTR(func() (int, error) {
			return unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		})
		if fd != x.root {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Ino != ino {
		unix.Close(fd)
		return -1, unix.ESTALE
	}
	return fd, nil
}

// path returns the names that led to an inode when the index was made, from the
// root on; none when it was not there.
func (x *nameIndex) path(ino uint64) []string {
	var path []string
	for ino != 0 {
		at, ok := x.names[ino]
		if !ok || len(path) > len(x.names) {
			return nil
		}
		path = append(path, at.name)
		ino = at.dir
	}
	slices.Reverse(path)
	return path
}
