package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A lowerID names a lower inode to the kernel: it is the FUSE node id.
// lowerIDs says how ids are made and how an inode is found again by its id.
type lowerIDs interface {
	// identify returns the id of the lower file that fd (which may be O_PATH)
	// or, with a name, that entry of directory fd refers to.
	identify(fd int, name string, st *unix.Stat_t) (uint64, error)
	// open opens the inode with these flags; ESTALE when it is gone.
	open(id uint64, flags int) (int, error)
	// forget tells that the kernel no longer knows the id.
	forget(id uint64)
	close()
}

// newLowerIDs takes file handles where the lower filesystem's are small enough
// to be node ids and this process may open them (CAP_DAC_READ_SEARCH), or are an
// inode number with a generation; else a table of O_PATH descriptors, as with table
// in any case. Generations are remembered by this process alone: with kept, it is the
// table for them, too.
func newLowerIDs(root int, table, kept bool) lowerIDs {
	h := &handleIDs{root: root}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err == nil {
		if id, err := h.identifyInode(root, ""); err == nil && !table {
			if fd, err := h.openInode(id, unix.O_PATH|unix.O_CLOEXEC); err == nil {
				unix.Close(fd)
				h.rootID = id
				return h
			}
		}
	}
	if !table && !kept {
		if g := newGenerationIDs(root); g != nil {
			return g
		}
	}
	return &tableIDs{root: root, rootStat: st, fds: map[uint64]int{}}
}

// OpensByHandle reports whether the inodes of a directory's filesystem are found again
// by their node ids, so that a keeper need not hold a descriptor of each that the kernel
// knows: their file handles are small enough, and this process may open them.
func OpensByHandle(dir string) bool {
	root, err := ignoringEINTR(func() (int, error) { return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return false
	}
	defer unix.Close(root)
	_, opens := newLowerIDs(root, false, true).(*handleIDs)
	return opens
}

// handleIDs makes ids of ext4's file handles: inode number and generation, 32
// bits each (FILEID_INO32_GEN, include/linux/exportfs.h). They need no table
// and stay true over a restart of the daemon.
type handleIDs struct {
	root   int
	rootID uint64
}

const fileidIno32Gen = 1

func (h *handleIDs) identify(fd int, name string, _ *unix.Stat_t) (uint64, error) {
	id, err := h.identifyInode(fd, name)
	if err == nil && id == h.rootID {
		return fuse.FUSE_ROOT_ID, nil
	}
	return id, err
}

func (h *handleIDs) identifyInode(fd int, name string) (uint64, error) {
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	handle, _, err := unix.NameToHandleAt(fd, name, flags)
	if err != nil {
		return 0, err
	}
	if handle.Type() != fileidIno32Gen || handle.Size() != 8 {
		return 0, fmt.Errorf("lower file handle of type %d and %d bytes", handle.Type(), handle.Size())
	}
	return binary.NativeEndian.Uint64(handle.Bytes()), nil
}

func (h *handleIDs) open(id uint64, flags int) (int, error) {
	if id == fuse.FUSE_ROOT_ID {
		id = h.rootID
	}
	return h.openInode(id, flags)
}

func (h *handleIDs) openInode(id uint64, flags int) (int, error) {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], id)
	return ignoringEINTR(func() (int, error) {
		return unix.OpenByHandleAt(h.root, unix.NewFileHandle(fileidIno32Gen, b[:]), flags|unix.O_CLOEXEC)
	})
}

func (h *handleIDs) forget(uint64) {}
func (h *handleIDs) close()        {}

// tableIDs makes ids of inode numbers, and holds an O_PATH descriptor on each inode
// for as long as the kernel knows it, so that the number cannot be given to another
// file meanwhile. It works on every filesystem and without privileges, at the price
// of one descriptor for each inode the kernel caches.
type tableIDs struct {
	root     int
	rootStat unix.Stat_t

	mu    sync.Mutex
	fds   map[uint64]int // guarded by mu
	names *nameIndex     // where inodes are that the kernel knows from a predecessor; guarded by mu, nil without one
}

// errOtherDevice: a filesystem is mounted within the lower directory, whose inode
// numbers could be those of other files.
var errOtherDevice = errors.New("another filesystem is mounted within the lower directory")

func (t *tableIDs) identify(fd int, name string, st *unix.Stat_t) (uint64, error) {
	if st.Dev != t.rootStat.Dev {
		return 0, errOtherDevice
	}
	if st.Ino == t.rootStat.Ino {
		return fuse.FUSE_ROOT_ID, nil
	}
	id := st.Ino
	if id == fuse.FUSE_ROOT_ID {
		return 0, fmt.Errorf("a lower inode has the number %d, which is the root's", id)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.fds[id]; ok {
		return id, nil
	}
	path, err := t.hold(fd, name)
	if err != nil {
		return 0, err
	}
	var now unix.Stat_t
	if err := unix.Fstat(path, &now); err != nil {
		unix.Close(path)
		return 0, err
	}
	if now.Ino != st.Ino || now.Dev != st.Dev { // replaced since the caller looked
		unix.Close(path)
		return 0, unix.ESTALE
	}
	t.fds[id] = path
	return id, nil
}

func (t *tableIDs) hold(fd int, name string) (int, error) {
	if name == "" {
		return ignoringEINTR(func() (int, error) {
			return unix.Open(procFD(fd), unix.O_PATH|unix.O_CLOEXEC, 0)
		})
	}
	return ignoringEINTR(func() (int, error) {
		return unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

func (t *tableIDs) open(id uint64, flags int) (int, error) {
	t.mu.Lock()
	fd, ok := t.fds[id]
	switch {
	case id == fuse.FUSE_ROOT_ID:
		fd, ok = t.root, true
	case !ok && t.names != nil:
		if path, err := t.names.find(id); err == nil {
			fd, ok = path, true
			t.fds[id] = path
		}
	}
	if ok { // a copy, so that a forget cannot close it under us
		var err error
		fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.mu.Unlock()
			return -1, err
		}
	}
	t.mu.Unlock()
	if !ok {
		return -1, unix.ESTALE
	}
	if flags&unix.O_PATH != 0 {
		return fd, nil
	}
	defer unix.Close(fd)
	return ignoringEINTR(func() (int, error) { // the link in /proc is the inode itself: it is followed, and nothing behind it
		return unix.Open(procFD(fd), flags&^unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

func (t *tableIDs) forget(id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fd, ok := t.fds[id]; ok {
		unix.Close(fd)
		delete(t.fds, id)
	}
}

func (t *tableIDs) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, fd := range t.fds {
		unix.Close(fd)
	}
	clear(t.fds)
}

// adopt makes the ids good that a predecessor gave to the kernel, of which there are
// descriptors.
func (t *tableIDs) adopt(held map[uint64]int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fds = held
}

// held returns the descriptor of an inode that was identified, -1 where there is none.
func (t *tableIDs) held(id uint64) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fd, ok := t.fds[id]; ok {
		return fd
	}
	return -1
}

// resume makes the ids good that a predecessor gave to the kernel; inodes are those
// without a name.
func (t *tableIDs) resume(inodes map[uint64]int) error {
	names, err := newNameIndex(t.root)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.names = names
	for id, fd := range inodes {
		t.fds[id] = fd
	}
	return nil
}

// procFD is the path by which the kernel opens a descriptor anew: the only way
// to read or write what an O_PATH descriptor of a file names.
func procFD(fd int) string { return fmt.Sprintf("/proc/thread-self/fd/%d", fd) }

// ignoringEINTR repeats a call that a signal interrupted: Go's runtime signals
// its own threads all the time.
func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
