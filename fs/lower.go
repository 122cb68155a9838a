package fs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// lowerFile is an open lower file. Blocks whose pages are clean are written
// through the page cache; those whose pages may be dirty are rewritten with
// O_DIRECT, because a page that changes while it is under writeback reaches a
// device without stable pages as a mixture of two sealings, and the block then
// fails authentication though it was acknowledged (dirty.go, and
// docs/ARCHITECTURE.md, "Rewrites"). O_DIRECT waits for the writeback of the
// pages it replaces (mm/filemap.c, kiocb_invalidate_pages).
//
// Reads leave the lower atime as it is: it is the plain file's, which may have been
// set on purpose, and blocks are read for reasons of our own.
//
// The zero value is closed. Descriptors are opened and closed under node.meta;
// between, they may be used by any number of requests.
type lowerFile struct {
	fd     atomic.Int32 // descriptor + 1, 0 when closed
	direct atomic.Int32 // the same file with O_DIRECT, opened at the first rewrite; equals fd where rewrites may be buffered
	fault  faultBelow   // nil but in tests; fixed before the file is opened

	readOnly atomic.Bool // opened while the lower filesystem took no writes: what is there can still be read

	directs *atomic.Int32 // descriptors with O_DIRECT of the whole volume; nil where nobody counts
}

// maxDirects bounds the descriptors with O_DIRECT that are kept: beyond it a
// rewrite opens one for itself (about 3 µs), so that an open file costs one
// descriptor and not two.
const maxDirects = 1024

// faultBelow stands, in tests, before each operation on a lower file, of length
// bytes where it reads or writes: it may let it pass, fail it, or shorten it.
type faultBelow func(op string, length int) (allowed int, err error)

// allows asks fault, of which there is none.
func (f *lowerFile) allows(op string, length int) (int, error) {
	if f.readOnly.Load() && op != "read" && op != "sync" {
		return 0, unix.EROFS // not the EBADF or EINVAL of a descriptor for reading
	}
	if f.fault == nil {
		return length, nil
	}
	return f.fault(op, length)
}

func (f *lowerFile) isOpen() bool  { return f.fd.Load() != 0 }
func (f *lowerFile) buffered() int { return int(f.fd.Load()) - 1 }

// adopt makes fd, open for reading and writing, the file's descriptor.
func (f *lowerFile) adopt(fd int) { f.fd.Store(int32(fd) + 1) }

// open opens the file behind id, for reading only where the lower filesystem takes
// no writes.
func (f *lowerFile) open(ids lowerIDs, id uint64) error {
	fd, err := openWithoutAtime(ids, id, unix.O_RDWR)
	refused := errors.Is(err, unix.EROFS)
	if refused {
		fd, err = openWithoutAtime(ids, id, unix.O_RDONLY)
	}
	if err == nil {
		f.readOnly.Store(refused)
		f.adopt(fd)
	}
	return err
}

// openWithoutAtime opens the file behind id, and leaves its atime alone where that is ours to say.
func openWithoutAtime(ids lowerIDs, id uint64, access int) (int, error) {
	fd, err := ids.open(id, access|unix.O_NOFOLLOW|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) { // another owner's, and no CAP_FOWNER
		fd, err = ids.open(id, access|unix.O_NOFOLLOW)
	}
	return fd, err
}

// openDirect makes rewrites possible without opening the file for each, unless
// there are many such descriptors. stable says that pages under writeback do not
// change below, so that rewrites may be buffered.
func (f *lowerFile) openDirect(stable bool) error {
	if f.directs != nil && f.directs.Load() >= maxDirects && !stable {
		return nil
	}
	direct, err := f.directDescriptor(stable)
	if err != nil {
		return err
	}
	if direct != f.buffered() && f.directs != nil {
		f.directs.Add(1)
	}
	f.direct.Store(int32(direct) + 1)
	return nil
}

// directDescriptor opens the file anew with O_DIRECT, or returns the descriptor that
// there is where that is as good.
func (f *lowerFile) directDescriptor(stable bool) (int, error) {
	if stable {
		return f.buffered(), nil
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(f.buffered()), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	})
	if errors.Is(err, unix.EINVAL) { // tmpfs and others without writeback to a device
		return f.buffered(), nil
	}
	return fd, err
}

func (f *lowerFile) close() {
	fd, direct := f.take()
	descriptors{fd, direct}.close()
}

// take closes the file for its users and leaves its descriptors, + 1 each and 0
// for none, to the caller to close.
func (f *lowerFile) take() (fd, direct int32) {
	fd, direct = f.fd.Swap(0), f.direct.Swap(0)
	f.readOnly.Store(false)
	if direct == fd {
		direct = 0
	}
	if direct != 0 && f.directs != nil {
		f.directs.Add(-1)
	}
	return fd, direct
}

// readAt fills b from lower offset off; what lies beyond the end reads as
// zeros, which is how a hole reads.
func (f *lowerFile) readAt(b []byte, off int64) error {
	for done := 0; done < len(b); {
		part, err := f.allows("read", len(b)-done)
		if err != nil {
			return err
		}
		n, err := ignoringEINTR(func() (int, error) { return unix.Pread(f.buffered(), b[done:done+part], off+int64(done)) })
		if err != nil {
			return err
		}
		if n == 0 {
			clear(b[done:])
			return nil
		}
		done += n
	}
	return nil
}

// readCached reads b from lower offset off as far as that lies in the lower page
// cache, and fails with EAGAIN where the disk would have to be waited for.
func (f *lowerFile) readCached(b []byte, off int64) (int, error) {
	if f.fault != nil {
		return 0, nil
	}
	n, err := unix.Preadv2(f.buffered(), [][]byte{b}, off, unix.RWF_NOWAIT)
	return max(n, 0), err
}

// writeClean writes whole blocks whose pages are clean, or not there.
func (f *lowerFile) writeClean(b []byte, off int64) error {
	return f.writeAt(f.buffered(), b, off)
}

// rewrite replaces whole blocks whose pages may be dirty. b is aligned to 4096 bytes.
func (f *lowerFile) rewrite(b []byte, off int64) error {
	if fd := int(f.direct.Load()) - 1; fd >= 0 {
		return f.writeAt(fd, b, off)
	}
	fd, err := f.directDescriptor(false)
	if err != nil {
		return err
	}
	if fd != f.buffered() {
		defer unix.Close(fd)
	}
	return f.writeAt(fd, b, off)
}

// maxIdleWrites bounds the attempts to write a block of which the lower
// filesystem takes a part only, without saying why.
const maxIdleWrites = 8

func (f *lowerFile) writeAt(fd int, b []byte, off int64) error {
	for idle := 0; len(b) > 0; {
		part, err := f.allows("write", len(b))
		if err != nil {
			return err
		}
		n, err := ignoringEINTR(func() (int, error) { return unix.Pwrite(fd, b[:part], off) })
		if err != nil {
			return err
		}
		// A short write ends at a block, or it is made good by writing that block
		// again from its beginning: then the cause is told, or is gone.
		n -= n % seal.BlockSize
		if idle++; n > 0 {
			idle = 0
		} else if idle == maxIdleWrites {
			return unix.EIO
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

func (f *lowerFile) truncate(size int64) error {
	if _, err := f.allows("truncate", 0); err != nil {
		return err
	}
	_, err := ignoringEINTR(func() (int, error) { return 0, unix.Ftruncate(f.buffered(), size) })
	return err
}

func (f *lowerFile) fallocate(mode uint32, off, length int64) error {
	if _, err := f.allows("fallocate", 0); err != nil {
		return err
	}
	_, err := ignoringEINTR(func() (int, error) { return 0, unix.Fallocate(f.buffered(), mode, off, length) })
	return err
}

// sync makes the file durable; with dataOnly, its data and what is needed to
// find them.
func (f *lowerFile) sync(dataOnly bool) error {
	if _, err := f.allows("sync", 0); err != nil {
		return err
	}
	if dataOnly {
		return unix.Fdatasync(f.buffered())
	}
	return unix.Fsync(f.buffered())
}

// tracksBlocks reports whether the lower filesystem writes back of a page or
// folio only the blocks that are dirty, so that a clean block may change while
// its neighbours are under writeback: ext4 by buffer heads, XFS since Linux 6.6
// by the dirty bitmap of iomap (fs/iomap/buffered-io.c, struct iomap_folio_state).
func tracksBlocks(root int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC:
		return true
	case unix.XFS_SUPER_MAGIC:
		return kernelAtLeast(6, 6)
	}
	return false
}

func kernelAtLeast(major, minor int) bool {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return false
	}
	var x, y int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &x, &y); err != nil {
		return false
	}
	return x > major || x == major && y >= minor
}

// sync makes the lower file of a node durable; with dataOnly, its data and what is
// needed to find them. The kernel tells a failure once to a descriptor, and all share
// ours: so it is recorded for every handle, whoever asked, and a sync fails also by
// what another was told while it waited for that (settleLower). They come one at a
// time because XFS (Linux 6.18) loses sizes it has called durable where two threads
// sync a file that is cut short at times (docs/RELIABILITY.md).
func (f *Filesystem) sync(n *node, dataOnly bool) error {
	seen, _ := n.failures.since(0)
	n.settling.Lock()
	defer n.settling.Unlock()
	n.dirty.begin()
	err := n.file.sync(dataOnly)
	if err != nil {
		f.handles.record(n, err)
	} else {
		_, err = n.failures.since(seen)
	}
	n.dirty.end(err == nil)
	return err
}

// truncateLower sets the size of a node's lower file.
func (n *node) truncateLower(size int64) error {
	n.settling.Lock()
	defer n.settling.Unlock()
	return n.file.truncate(size)
}

// settleLower makes the lower file of a node durable, apart, so that it is known
// again what of it is clean.
func (f *Filesystem) settleLower(n *node) {
	n.using.Add(1)
	f.background.Go(func() {
		f.failures.note(f.sync(n, true)) // for the files open it is recorded
		f.nodes.done(n)
	})
}

// stablePages reports whether the device below st keeps a page unchanged while
// it is under writeback: Documentation/ABI/stable/sysfs-block, stable_writes.
func stablePages(st *unix.Stat_t) bool {
	dev := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	for _, queue := range []string{dev + "/queue/stable_writes", dev + "/../queue/stable_writes"} {
		if b, err := os.ReadFile(queue); err == nil {
			return strings.TrimSpace(string(b)) == "1"
		}
	}
	return false
}
