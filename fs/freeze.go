package fs

import (
	"context"
	"math"
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// The freeze. Gate and keys are the guard's; what is done here is to take away
// from the kernel everything it could answer from without asking us, while it
// still can give its dirty pages back. The order matters, each step has its
// trap (docs/ARCHITECTURE.md, "Freeze"):
//
//  1. throttle writers in the kernel (bdi.go), or one big write() dirties
//     pages faster than they are flushed;
//  2. INC_EPOCH: every cached name is looked up again, which waits;
//  3. attributes: every read(), write() and stat() begins with GETATTR, which
//     waits;
//  4. data: syncfs, then dropping pages flushes the dirty ones through us, by
//     WRITE and SETATTR, which pass while the gate drains;
//  5. hold READs back, and drop once more what came in meanwhile, around the
//     pages that waiting READs hold locked;
//  6. the gate closes; what was touched by the last stragglers goes;
//  7. in the background: pages of inodes that nobody has open (idle.go).

// hungAfter is when a notification that has not returned is taken to hang
// behind a locked page: it is left behind and another goroutine goes on.
const hungAfter = 20 * time.Millisecond

// stalledAfter is when those that hang are given up: nothing was flushed for so
// long, so they do not wait for a flush but for a page that a waiting call holds.
// A flush makes progress request by request, 1 MiB each at most.
const stalledAfter = 100 * time.Millisecond

// readsFor is how long after the beginning of a drain READs are served at the
// most: well within the promised second. They need not be: a flush asks for none.
const readsFor = 350 * time.Millisecond

// during runs do while the epoch is still being frozen or is: a callback that was
// late is overtaken by the thaw, whose work it must not undo.
func (f *Filesystem) during(epoch uint64, do func()) {
	f.spanMu.Lock()
	defer f.spanMu.Unlock()
	if f.opened <= epoch {
		do()
	}
}

// Draining implements keyguard.Subscriber.
func (f *Filesystem) Draining(ctx context.Context, t keyguard.Transition) {
	f.ending.Store(t.Epoch)
	holdReads := func() { f.during(t.Epoch, func() { f.holdReads.Store(true) }) }
	f.during(t.Epoch, func() {
		f.closed.Store(true)
		f.frozenAt.Store(math.MaxInt64) // not yet
	})
	l := f.loop.Load()
	if l == nil {
		return
	}
	if err := f.bdi.Load().throttle(); err != nil {
		f.log.Warn("writers could not be throttled: the drain may take longer", zap.Error(err))
	}
	if err := incEpoch(l.dev); err != nil {
		f.log.Warn("kernel refused INC_EPOCH: cached names may be answered while frozen", zap.Error(err))
	}
	// However long the flush takes, READs are served no longer than this.
	late := time.AfterFunc(readsFor, holdReads)
	defer late.Stop()
	var nodes []*node
	f.during(t.Epoch, func() {
		nodes = f.nodes.freeze()
		f.leftover.Store(int64(len(nodes))) // all, until Frozen has looked
	})
	f.forgetAttributes(ctx, l, idsOf(nodes))
	f.flush(ctx)
	f.drop(ctx, l, nodes)
	f.dropInherited(ctx, l)
	holdReads()
	f.awaitReads(ctx)
	for range 3 { // what was read while the first pass ran; each round is shorter
		again := f.touched(f.nodes.all())
		if len(again) == 0 || ctx.Err() != nil {
			break
		}
		f.drop(ctx, l, again)
	}
}

// DrainLate implements keyguard.LateDrainer: on a machine without processors or
// disk to spare the flush goes on for as long as it makes progress. READs are held
// back by now.
func (f *Filesystem) DrainLate(ctx context.Context) {
	l := f.loop.Load()
	if l == nil {
		return
	}
	f.during(f.ending.Load(), func() { f.holdReads.Store(true) })
	for ctx.Err() == nil {
		left := f.touched(f.nodes.all())
		if len(left) == 0 {
			return
		}
		flushed := f.flushed.Load()
		f.drop(ctx, l, left)
		if f.flushed.Load() == flushed { // what is left hangs, or was clean
			return
		}
	}
}

// Frozen implements keyguard.Subscriber: the gate is closed.
func (f *Filesystem) Frozen(ctx context.Context, t keyguard.Transition) {
	f.during(t.Epoch, func() {
		f.frozenAt.Store(kernelsNow())
		f.hot.freeze() // first: what follows may take as long as ctx, and longer where a call of the kernel hangs
	})
	if l := f.loop.Load(); l != nil {
		f.drop(ctx, l, f.touched(f.nodes.all()))
		f.dropInherited(ctx, l)
		f.during(t.Epoch, func() {
			f.countLeft()
			l.wipe()
		})
		f.wakeReaders(ctx, l)
		f.during(t.Epoch, func() { f.startIdleDrop(l) })
	}
}

// countLeft notes of how many files the kernel may hold pages although frozen.
func (f *Filesystem) countLeft() {
	left := len(f.touched(f.nodes.all())) + f.inherited.count()
	f.leftover.Store(int64(left))
	if left > 0 {
		f.undrained.Add(uint64(left))
		f.log.Warn("the drain ran out of time: the kernel may hold pages of files until the thaw", zap.Int("files", left))
	}
}

// Thawed implements keyguard.Subscriber.
func (f *Filesystem) Thawed(t keyguard.Transition) {
	f.spanMu.Lock()
	defer f.spanMu.Unlock()
	f.opened = max(f.opened, t.Epoch)
	f.stopIdleDrop()
	f.nodes.thaw()
	if l := f.loop.Load(); l != nil {
		l.thaw()
	}
	f.hot.thaw()
	f.holdReads.Store(false)
	f.closed.Store(false)
	if err := f.bdi.Load().restore(); err != nil {
		f.log.Error("writers stay throttled: small writes will be slow", zap.Error(err))
	}
}

// forgetAttributes makes the kernel ask for the attributes of inodes. It waits
// for an inode that is just being given up and flushed, so it is done apart and
// left behind when ctx ends.
func (f *Filesystem) forgetAttributes(ctx context.Context, l *loop, ids []uint64) {
	done := make(chan struct{})
	f.apart(l.dev, func(dev int) {
		defer close(done)
		for _, id := range ids {
			_ = invalidate(dev, id, -1, 0) // ENOENT: the kernel does not know it any more
		}
	})
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// flush asks the kernel to write back what it holds dirty, in requests as large
// as they come: dropping a dirty page writes it back too, but page by page, at
// a tenth of the speed. It does not outlast ctx.
func (f *Filesystem) flush(ctx context.Context) {
	if s := f.mountServices(); s != nil {
		s.Flush(ctx)
	}
}

// wakeReaders has the goroutines that wait for a request give up the slots in
// which they wait, with what is left in them of the last one. Their memory cannot
// be wiped under them, for a request may have just been put there; so they are
// given requests that need no key. The kernel wakes them in turn.
func (f *Filesystem) wakeReaders(ctx context.Context, l *loop) {
	tries := 16 * idleReaders // one each is enough, unless one is late to wait
	if s := f.mountServices(); s != nil {
		s.Stir(ctx, func() bool { tries--; return tries >= 0 && l.staleSlots() > 0 })
	}
}

// awaitReads waits until the READs that were let in before reads were held back
// have given their pages to the kernel, or it would be too late to drop them.
func (f *Filesystem) awaitReads(ctx context.Context) {
	const look = time.Millisecond // a READ of 1 MiB takes about half of it
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for f.reading.Load() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// touched returns the nodes through which data passed since the last look.
func (f *Filesystem) touched(nodes []*node) []*node {
	kept := nodes[:0]
	for _, n := range nodes {
		if n.touched.Load() {
			kept = append(kept, n)
		}
	}
	return kept
}

// dropWorkers is how many nodes are dropped at a time: a drop waits for the
// flush of its file, or hangs, more than it computes.
const dropWorkers = 8

// drop removes the pages of the nodes from the kernel's cache, flushing what is
// dirty. It returns when that is done, when all that is left hangs, or when ctx
// ends.
func (f *Filesystem) drop(ctx context.Context, l *loop, nodes []*node) {
	queue := make(chan *node, len(nodes))
	for _, n := range nodes {
		queue <- n
	}
	close(queue)
	left := int64(len(nodes))
	if left == 0 {
		return
	}
	d := &dropper{fs: f, loop: l, queue: queue, done: make(chan struct{})}
	d.left.Store(left)
	for range min(dropWorkers, left) {
		if !d.work() {
			break
		}
	}
	watch := time.NewTicker(hungAfter / 2)
	defer watch.Stop()
	flushed, moved := f.flushed.Load(), time.Now()
	for {
		select {
		case <-d.done:
			return
		case <-ctx.Done():
			d.markUnfinished()
			return
		case <-watch.C:
			if !d.replaceHung() {
				moved = time.Now()
			} else if now := f.flushed.Load(); now != flushed {
				flushed, moved = now, time.Now()
			} else if time.Since(moved) > stalledAfter {
				return
			}
		}
	}
}

// dropper drops nodes one after the other, in as many goroutines as hang.
type dropper struct {
	fs    *Filesystem
	loop  *loop
	queue chan *node
	left  atomic.Int64
	done  chan struct{}

	mu      sync.Mutex
	workers []*dropWorker // guarded by mu
	owed    int           // workers that hang and could not be replaced; guarded by mu
}

type dropWorker struct {
	since atomic.Int64 // start of the notification in hand, nanoseconds; 0 between
	node  atomic.Pointer[node]
	ended atomic.Bool
	hung  bool // guarded by dropper.mu
}

// dropThreadsMax is how many threads drop nodes at a time, those that hang included, be
// it since an earlier freeze: each file of which a page is held for good would take
// one at each try, and Go ends a process that has 10,000. What is not dropped for
// that stays marked, is tried again, and is counted as undrained.
const dropThreadsMax = 256

// work starts a worker, if there may be another.
func (d *dropper) work() bool {
	if d.fs.dropping.Add(1) > dropThreadsMax {
		d.fs.dropping.Add(-1)
		return false
	}
	w := &dropWorker{}
	d.mu.Lock()
	d.workers = append(d.workers, w)
	d.mu.Unlock()
	d.fs.apart(d.loop.dev, func(dev int) {
		defer d.fs.dropping.Add(-1)
		defer w.ended.Store(true)
		for n := range d.queue {
			w.node.Store(n)
			w.since.Store(time.Now().UnixNano())
			d.dropNode(dev, n)
			w.since.Store(0)
			if d.left.Add(-1) == 0 {
				close(d.done)
			}
		}
	})
	return true
}

// replaceHung starts another worker for each that hangs, as far as there may be
// more, and reports whether all that is left hangs, or waits for those that do.
func (d *dropper) replaceHung() bool {
	d.mu.Lock()
	now, fresh, working := time.Now().UnixNano(), 0, 0
	for _, w := range d.workers {
		since := w.since.Load()
		if since != 0 && now-since > int64(hungAfter) {
			if !w.hung {
				w.hung = true
				w.node.Load().touched.Store(true) // to be tried again
				fresh++
			}
			continue
		}
		if !w.ended.Load() {
			working++
		}
	}
	d.owed += fresh
	owed := d.owed
	d.mu.Unlock()
	if len(d.queue) == 0 {
		return working == 0 && fresh == 0
	}
	for owed > 0 && d.work() {
		owed--
		working++
	}
	d.mu.Lock()
	d.owed = owed
	d.mu.Unlock()
	return working == 0
}

// markUnfinished has the nodes in hand tried again.
func (d *dropper) markUnfinished() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range d.workers {
		if w.since.Load() != 0 {
			w.node.Load().touched.Store(true)
		}
	}
}

// dropNode drops the pages of one node, range by range around the pages that
// parked READs and WRITEs hold: a walk stops at such a page, and what lies behind
// it would stay readable.
func (d *dropper) dropNode(dev int, n *node) {
	n.touched.Store(false)
	locked := d.fs.parking.held(n.id)
	if len(locked) == 0 {
		if err := invalidate(dev, n.id, 0, 0); err != nil && err != unix.ENOENT {
			n.touched.Store(true)
		}
		return
	}
	for _, s := range gaps(locked) {
		_ = invalidate(dev, n.id, s.from, s.to-s.from)
	}
}

// span is a range of plain bytes; to is exclusive, and 0 means the end.
type span struct{ from, to int64 }

// kernelPage is the size of its pages: 4096 bytes, or up to 64 KiB on arm64.
var kernelPage = int64(os.Getpagesize())

// gaps returns what lies between the spans, in whole pages, the last without
// end. The kernel may have rounded a READ out to its readahead window, so the
// locked span is taken as it was asked.
func gaps(locked []span) []span {
	sort.Slice(locked, func(i, j int) bool { return locked[i].from < locked[j].from })
	var open []span
	at := int64(0)
	for _, s := range locked {
		if from := s.from &^ (kernelPage - 1); from > at {
			open = append(open, span{at, from})
		}
		at = max(at, (s.to+kernelPage-1)&^(kernelPage-1))
	}
	return append(open, span{at, at}) // length 0: to the end
}
