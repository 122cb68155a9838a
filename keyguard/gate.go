package keyguard

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Class says what may still pass while the gate drains.
type Class uint8

const (
	// Work waits from the moment the gate starts to drain.
	Work Class = iota
	// Drain is what the kernel must still do to get rid of its caches (READ,
	// cached WRITE, SETATTR); it passes during Draining and waits when frozen.
	Drain
)

// laneCount is a power of two, so that a mask picks the lane. 64 lanes of 128
// bytes are 8 KiB per epoch and 1 µs to look through; more lanes than the cores
// of any node we run on would not lessen sharing.
const laneCount = 64

// lane counts the passes in use of those who share it. 128 bytes, because the
// prefetcher of x86 fetches cache lines in pairs.
type lane struct {
	inUse atomic.Int64
	_     [120]byte
}

// epoch is one span of being open, with its own lanes: a straggler of an ended
// epoch is never mistaken for a pass of the next one.
type epoch struct {
	lanes [laneCount]lane // first, so that lanes keep the allocation's alignment
	keys  *Keys
	n     uint64
	ended context.Context // done when the gate closed on this epoch
	end   context.CancelFunc
}

func newEpoch(n uint64, keys *Keys) *epoch {
	e := &epoch{n: n, keys: keys}
	e.ended, e.end = context.WithCancel(context.Background())
	return e
}

// gate admits passes. Enter, Err and Exit are lock-free; opening and closing
// are done by Run alone. This file holds the only lock-free code in byokd.
//
// Why freeze and enter cannot miss each other: Enter adds to its lane and only
// then loads the admit pointer; close stores nil to the admit pointers and only
// then reads the lanes. Go's atomics are sequentially consistent, so either
// Enter sees nil (and takes its count back), or close sees the count.
type gate struct {
	// admit[class] is the epoch whose passes that class may have, or nil. It is
	// read by every Enter and Err and written only at transitions.
	admit [2]atomic.Pointer[epoch]
	_     [112]byte // keeps what follows out of the hot line

	waiting atomic.Int64 // calls parked in enterSlow

	mu      sync.Mutex
	opened  chan struct{} // mu; closed and replaced at each opening
	stopped chan struct{} // closed once by stop
}

func newGate() *gate {
	return &gate{opened: make(chan struct{}), stopped: make(chan struct{})}
}

// Pass is the permission to use keys for one bounded unit of work (a request, a
// segment), never across a network wait. It is a plain value; Exit is called
// exactly once, on every path.
type Pass struct {
	gate *gate
	e    *epoch
	lane uint32
}

// admitTo counts a pass of e in and looks again: an epoch that ended between its
// loading and the addition must not be used, for close may have seen no one.
func (g *gate) admitTo(e *epoch, class Class, laneHint uint32) bool {
	e.lanes[laneHint%laneCount].inUse.Add(1)
	if g.admit[class&1].Load() == e {
		return true
	}
	e.lanes[laneHint%laneCount].inUse.Add(-1)
	return false
}

// enter is the hot path: two locked additions are all that an Enter and its
// Exit cost, everything else is loads of lines that nobody writes.
func (g *gate) enter(ctx context.Context, class Class, laneHint uint32) (Pass, error) {
	if e := g.admit[class&1].Load(); e != nil && g.admitTo(e, class, laneHint) {
		return Pass{gate: g, e: e, lane: laneHint}, nil
	}
	return g.enterSlow(ctx, class, laneHint)
}

// tryEnter is enter without waiting.
func (g *gate) tryEnter(class Class, laneHint uint32) (Pass, bool) {
	if e := g.admit[class&1].Load(); e != nil && g.admitTo(e, class, laneHint) {
		return Pass{gate: g, e: e, lane: laneHint}, true
	}
	return Pass{}, false
}

// enterSlow parks until the gate opens. It takes the channel before it tries,
// so an opening in between is not missed.
func (g *gate) enterSlow(ctx context.Context, class Class, laneHint uint32) (Pass, error) {
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	for {
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		if p, ok := g.tryEnter(class, laneHint); ok {
			return p, nil
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return Pass{}, ctx.Err()
		case <-g.stopped:
			return Pass{}, ErrStopped
		}
	}
}

// Err is the last question before plaintext leaves: nil while the epoch of the
// pass lasts, ErrFrozen from the moment the gate closed on it, for ever.
func (p Pass) Err() error {
	if p.gate.admit[Drain].Load() == p.e {
		return nil
	}
	return ErrFrozen
}

// Keys are the keys of the pass's epoch. They may be used until Exit, even when
// Err has become ErrFrozen meanwhile; the result may then not leave.
func (p Pass) Keys() *Keys { return p.e.keys }

// Exit gives the pass back. After it neither Keys nor anything obtained from
// them may be used.
func (p Pass) Exit() { p.e.lanes[p.lane%laneCount].inUse.Add(-1) }

// open lets everything pass, in a new epoch.
func (g *gate) open(e *epoch) {
	g.admit[Drain].Store(e)
	g.admit[Work].Store(e)
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.opened)
	g.opened = make(chan struct{})
}

// drain stops class Work; passes in use stay good and class Drain still enters.
func (g *gate) drain() { g.admit[Work].Store(nil) }

// close ends the epoch, at once: from here on Err is ErrFrozen for every pass
// and nothing enters. It returns the ended epoch, or nil if the gate was closed.
func (g *gate) close() *epoch {
	g.admit[Work].Store(nil)
	e := g.admit[Drain].Swap(nil)
	if e != nil {
		e.end()
	}
	return e
}

// stop closes the gate and ends every wait with ErrStopped. Called once.
func (g *gate) stop() *epoch {
	e := g.close()
	close(g.stopped)
	return e
}

// stragglers counts passes in use. Only for a closed epoch is zero final.
func (e *epoch) stragglers() int {
	total := int64(0)
	for i := range e.lanes {
		n := e.lanes[i].inUse.Load()
		if n < 0 {
			panic("keyguard: a pass was given back twice")
		}
		total += n
	}
	return int(total)
}

// waitIdle waits until no pass of an ended epoch is in use. When it returns nil,
// nobody uses the epoch's keys and nobody ever will: each lane was seen at zero
// after the gate had closed, and a closed epoch admits no one (a late Enter
// takes its count back without touching the keys).
func (e *epoch) waitIdle(ctx context.Context) error {
	// A unit of work takes microseconds to a few milliseconds; Exit stays free
	// of signalling, so look again at growing distances, at most 5 ms.
	const first, last = 50 * time.Microsecond, 5 * time.Millisecond
	for pause := first; e.stragglers() != 0; pause = min(2*pause, last) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
	return nil
}
