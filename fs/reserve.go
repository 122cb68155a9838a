package fs

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// reserve is lower space set aside so that what the kernel's cache has accepted
// can be flushed though the disk is full: with the writeback cache, and with
// shared mappings in any mode, write(2) has long succeeded when the blocks are
// asked for. It is a preallocated file without a name, so it is gone with the
// process and statfs of the lower filesystem has subtracted it already.
//
// Only a flush draws on it, in steps. While it is short the disk counts as full:
// new data is refused at write(2) (call.refusedByFullDisk), and whatever space
// comes free fills the reserve first.
type reserve struct {
	fd   int   // -1 where the lower filesystem has no preallocation
	want int64 // bytes

	short     atomic.Bool   // held < want
	lacks     atomic.Int64  // want - held
	shortages atomic.Uint32 // how often it became so

	mu   sync.Mutex
	held int64 // guarded by mu
}

const (
	// reservePerDirtyByte: a dirty page that lies alone in a hole takes two lower
	// blocks, for pages straddle blocks; and writers overshoot the budget before
	// they are stopped.
	reservePerDirtyByte = 4

	// reserveShare bounds the reserve of a small disk to 1/16 of it; the dirty
	// budget follows.
	reserveShare = 16

	// reserveSteps is in how many steps the reserve is given up: others of this
	// mount may take what a flush was given before it does.
	reserveSteps = 32

	// refillEvery is how often a short reserve looks for space by itself; a write
	// that is about to be refused looks, too.
	refillEvery = time.Second
)

// newReserve sets space aside in the lower directory for a dirty budget of
// dirty bytes. What the disk cannot give now is left short.
func newReserve(root int, dirty int64) (*reserve, error) {
	r := &reserve{fd: -1}
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err != nil {
		return r, err
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(root), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return r, err
	}
	want := min(dirty*reservePerDirtyByte, int64(st.Blocks)*st.Frsize/reserveShare)
	r.fd, r.want = fd, want-want%block
	r.mu.Lock()
	defer r.mu.Unlock()
	err = r.fill()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		unix.Close(fd)
		r.fd, r.want = -1, 0
		r.short.Store(false)
		r.lacks.Store(0)
		return r, err
	}
	return r, nil
}

// dirtyBudget is the most that may be dirty for the reserve, as it is, to
// suffice; otherwise where there is none.
func (r *reserve) dirtyBudget(otherwise int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 {
		return otherwise
	}
	return min(otherwise, r.held/reservePerDirtyByte)
}

// fill takes what is missing, if the disk has it to give; mu is held.
func (r *reserve) fill() error {
	err := error(unix.ENOSPC)
	var st unix.Statfs_t
	// Asked for in vain, ext4 commits its journal three times over to find space.
	if unix.Fstatfs(r.fd, &st) == nil && int64(st.Bavail)*st.Frsize >= r.want-r.held {
		_, err = ignoringEINTR(func() (int, error) { return 0, unix.Fallocate(r.fd, 0, 0, r.want) })
	}
	r.measure()
	return err
}

// measure sees what is held: an allocation that failed may have given a part.
func (r *reserve) measure() {
	var st unix.Stat_t
	if unix.Fstat(r.fd, &st) == nil {
		r.held = min(st.Blocks*512, r.want)
	}
	r.setShort()
}

// setShort tells those who do not hold mu, which is held.
func (r *reserve) setShort() {
	short := r.held < r.want
	if short && !r.short.Load() {
		r.shortages.Add(1)
	}
	r.short.Store(short)
	r.lacks.Store(r.want - r.held)
}

// shortage is the number of the shortage that there is, 0 for none.
func (r *reserve) shortage() uint32 {
	if !r.short.Load() {
		return 0
	}
	return r.shortages.Load()
}

// refilled reports whether the reserve is whole, after trying to make it so.
func (r *reserve) refilled() bool {
	if !r.short.Load() {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.short.Load() {
		_ = r.fill() // what came of it is measured
	}
	return !r.short.Load()
}

// yield gives up a step of the reserve, at least need bytes of it where there
// are as many. It reports whether there was anything left to give, and whether
// a shortage began with it.
func (r *reserve) yield(need int64) (given, began bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 || r.held == 0 {
		return false, false
	}
	left := r.held - max(r.want/reserveSteps, need)
	left = max(left-left%block, 0)
	if _, err := ignoringEINTR(func() (int, error) { return 0, unix.Ftruncate(r.fd, left) }); err != nil {
		return false, false
	}
	began = !r.short.Load()
	r.held = left
	r.setShort()
	return true, began
}

// missing is what the reserve will take of space that comes free. It does not wait
// for a disk that hangs.
func (r *reserve) missing() int64 { return r.lacks.Load() }

func (r *reserve) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}

// diskFull says of an error that the lower filesystem has no space for us: of
// its own, or within the quota of the directory.
func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// openReserve sets the reserve aside when the volume is opened.
func (f *Filesystem) openReserve() {
	r, err := newReserve(f.root, f.options.DirtyLimit)
	f.reserve = r
	if err != nil {
		f.log.Warn("no space can be set aside below: on a full disk, writes that the kernel has accepted may fail at fsync",
			zap.Error(err))
	}
	if r.short.Load() {
		f.diskIsFull()
	}
}

// yieldReserve gives a flush that met a full disk (err) more space, and reports
// whether it should be tried again.
func (f *Filesystem) yieldReserve(err error, length int) bool {
	if !diskFull(err) {
		return false
	}
	given, began := f.reserve.yield(2 * int64(length))
	if began {
		go f.diskIsFull()
	}
	return given
}

// diskIsFull is called when a shortage begins. It has the kernel ask before each
// write(2) until the reserve is whole again, and keeps what mappings make dirty
// within what is left of it.
func (f *Filesystem) diskIsFull() {
	f.log.Warn("the disk below is full: what the kernel has accepted is flushed from the reserve, new data is refused with ENOSPC until space is free",
		zap.Int64("missing from the reserve, bytes", f.reserve.missing()))
	f.askBeforeWrites()
	if f.refilling.CompareAndSwap(false, true) {
		go f.refill()
	}
}

// refill waits for the end of the shortage, and of those that begin meanwhile.
func (f *Filesystem) refill() {
	ticker := time.NewTicker(refillEvery)
	defer ticker.Stop()
	for again := true; again; again = f.reserve.short.Load() && f.refilling.CompareAndSwap(false, true) {
		for !f.reserve.refilled() {
			f.setDirtyBudget()
			select {
			case <-f.serving.Done():
				return
			case <-ticker.C:
			}
		}
		f.setDirtyBudget()
		f.log.Info("the disk below has space again")
		f.refilling.Store(false)
	}
}

func (f *Filesystem) setDirtyBudget() {
	if err := f.bdi.Load().setBudget(f.reserve.dirtyBudget(f.options.DirtyLimit)); err != nil {
		f.log.Warn("the mount's dirty pages could not be bounded by the reserve", zap.Error(err))
	}
}

// askBeforeWrites makes the kernel forget the attributes of open files, for
// which it asks at the beginning of a write(2) to its cache, and of no read(2). It
// waits for inodes that are just being given up and flushed, so it is done apart.
func (f *Filesystem) askBeforeWrites() {
	l := f.loop.Load()
	if l == nil {
		return
	}
	nodes := f.nodes.all()
	f.apart(l.dev, func(dev int) {
		for _, n := range nodes {
			if n.opens.Load() > 0 {
				_ = invalidate(dev, n.id, -1, 0) // ENOENT: the kernel does not know it any more
			}
		}
	})
}

// refusedByFullDisk answers a GETATTR while the reserve is short. With the
// writeback cache the kernel sends one at the beginning of each write(2)
// (fs/fuse/file.c, fuse_cache_write_iter), with the handle, and hands an error
// of ours to the writer: the one place where it can be told in time. A read(2)
// asks for nothing that we have made the kernel forget.
//
// Data that will replace what is there needs no space. Where the write will be
// is not said, so what the file's last one did decides.
func (c *call) refusedByFullDisk(n *node, fh uint64, asksForWrite bool) bool {
	if !c.fs.reserve.short.Load() || c.fs.reserve.refilled() {
		return false
	}
	c.askAgain(n)
	if !asksForWrite {
		return false
	}
	h := c.fs.handles.get(fh)
	return h != nil && h.writes && !c.replaces(n)
}

// askAgain sees to it that the kernel asks before the next write(2) to a file
// although a reply is about to give it the attributes: these do not become valid
// where it was told to forget them while it waited. With attributes only, and an
// inode that the waiting caller keeps, this notification waits for nobody, so a
// handler may send it.
func (c *call) askAgain(n *node) {
	if l := c.fs.loop.Load(); l != nil && c.fs.reserve.short.Load() {
		_ = invalidate(l.dev, n.id, -1, 0)
	}
}

// replaces says whether a write to the file can be expected to find its blocks
// in place: it has all of them, and has not grown since the disk became full.
func (c *call) replaces(n *node) bool {
	if n.grew.Load() == c.fs.reserve.shortage() || c.share(n) != nil {
		return false
	}
	defer n.content.RUnlock()
	var st unix.Stat_t
	return n.lower > 0 && unix.Fstat(n.file.buffered(), &st) == nil && st.Blocks*512 >= n.lower
}
