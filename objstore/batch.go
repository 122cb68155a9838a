package objstore

import (
	"context"
	"fmt"
	"sync"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// batch is a run of segments of one part: as they were read, and opened. One
// goroutine at a time works on it; wipe may be called by any.
//
// The sealed bytes are kept as long as the opened ones, so that what a freeze takes
// away is there again after the thaw without asking the upstream.
type batch struct {
	o      *opening // what of it does not change
	buf    *buffers
	part   partSpan
	header seal.ObjectHeader // of part
	sealed []byte            // part of buf
	first  int64             // index of the first segment
	count  int               // segments
	lead   int               // opened bytes before those that are not handed on yet
	left   int               // opened bytes that are not handed on yet

	mu      sync.Mutex
	pass    keyguard.Pass // guarded by mu; of the epoch in which plain was opened
	opening bool          // guarded by mu: a pass is writing opened bytes
	from    int           // guarded by mu: buf.plain[from:to] is being handed on
	to      int           // guarded by mu
}

// newBatch takes buffers for as much as o has still to read, up to readSegments.
func (o *opening) newBatch() *batch {
	b := &batch{o: o, buf: o.pool.forReading(o.left + int64(o.skip))}
	o.bucket.opened.add(b)
	return b
}

// release gives the buffers back.
func (b *batch) release() {
	b.o.bucket.opened.remove(b)
	b.o.pool.put(b.buf)
}

// open opens the segments and returns how many bytes they hold. It waits while
// frozen, and begins again when the epoch ends under it.
func (b *batch) open(ctx context.Context) (n int, err error) {
	last := seal.SegmentCount(b.part.plainSize) - 1
	for {
		var opened []byte
		pass, err := b.o.bucket.withKey(ctx, b.o.lane, dataKeyOf(b.header), func(root *seal.Root) error {
			b.begin()
			cipher, err := root.OpenObject(b.header)
			if err != nil {
				return err
			}
			opened = b.buf.plain[:0]
			if b.o.lay.packed {
				opened, err = b.o.packer.openPacked(cipher, opened, b.sealed, b.first, b.part.plainSize)
				return err
			}
			for i := range b.count {
				piece := b.sealed[i*sealedSegment : min((i+1)*sealedSegment, len(b.sealed))]
				index := b.first + int64(i)
				if opened, err = cipher.OpenSegment(opened, piece, uint64(index), index == last); err != nil {
					return err
				}
			}
			return nil
		})
		b.end(pass, err == nil)
		if err == nil {
			return len(opened), nil
		}
		if !isFrozen(err) {
			return 0, fmt.Errorf("part %d, segments from %d: %w", b.part.index+1, b.first, err)
		}
	}
}

// begin keeps wipe off the plain bytes, inside the pass that writes them.
func (b *batch) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opening, b.from, b.to = true, 0, 0
}

// end takes note of a pass that opened the batch, or failed to. A freeze that came
// after its last question has wiped nothing; that is made up for here.
func (b *batch) end(pass keyguard.Pass, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opening, b.pass = false, pass
	if !ok || pass.Err() != nil {
		clear(b.buf.plain)
	}
}

// take hands on at most limit of the bytes that are left; they are the caller's until
// the next call. After a freeze it opens them again, and so waits for the thaw.
func (b *batch) take(ctx context.Context, limit int) ([]byte, error) {
	for !b.hold(min(limit, b.left)) {
		if _, err := b.open(ctx); err != nil {
			return nil, err
		}
	}
	n := b.to - b.from
	b.lead, b.left = b.lead+n, b.left-n
	return b.buf.plain[b.from:b.to], nil
}

// hold keeps wipe off the next n bytes, unless they may not be handed on any more.
func (b *batch) hold(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pass.Err() != nil {
		b.from, b.to = 0, 0
		return false
	}
	b.from, b.to = b.lead, b.lead+n
	return true
}

// wipe clears all plain bytes but those that are being handed on at this moment.
func (b *batch) wipe() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.opening { // else end does it
		clear(b.buf.plain[:b.from])
		clear(b.buf.plain[b.to:])
	}
}

// openBatches are the batches of a bucket that may hold plain bytes. It takes part
// in the freezes of the bucket's guard: a batch that waits for its slow client, or for
// the batch before it, does not keep them meanwhile.
type openBatches struct {
	mu  sync.Mutex
	all map[*batch]struct{} // guarded by mu
}

func (s *openBatches) add(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[*batch]struct{}{}
	}
	s.all[b] = struct{}{}
}

func (s *openBatches) remove(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, b)
}

// Draining implements keyguard.Subscriber.
func (*openBatches) Draining(context.Context, keyguard.Transition) {}

// Frozen implements keyguard.Subscriber: no pass of the epoch says yes any more.
func (s *openBatches) Frozen(context.Context, keyguard.Transition) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range s.all {
		b.wipe()
	}
}

// Thawed implements keyguard.Subscriber.
func (*openBatches) Thawed(keyguard.Transition) {}
