package fs

import (
	"sync"
	"sync/atomic"

	"github.com/byokd/byokd/internal/seal"
)

// hotBlocks is a small cache of plaintext: the blocks at the edges of recent
// writes. A page of the kernel straddles two blocks, so a write of a page
// changes both in part, and so does the write of the page beside it, and an
// append changes the block of the one before; from here they need not be read
// and opened again.
//
// Who gets, puts or drops a block holds it alone (node.ranges, or node.content
// alone). A block is dropped before it is stored and put after, so what is here
// is what is below. Nothing is here while frozen.
type hotBlocks struct {
	off  atomic.Bool // frozen: nothing may be put
	sets [hotSets]hotSet
}

const (
	hotSets = 64
	hotWays = 4 // 1 MiB in all
)

type hotSet struct {
	mu   sync.Mutex
	turn uint8 // the way that goes next
	ways [hotWays]hotBlock
}

type hotBlock struct {
	node  uint64 // its serial; 0 where there is none
	index int64
	n     int    // plain bytes, the length of the block
	plain []byte // made at the first use
}

func (h *hotBlocks) set(node uint64, index int64) *hotSet {
	const golden = 0x9e3779b97f4a7c15
	return &h.sets[(node*golden+uint64(index)*golden)>>32%hotSets]
}

// get copies a block into dst and returns its length.
func (h *hotBlocks) get(node uint64, index int64, dst []byte) (n int, ok bool) {
	s := h.set(node, index)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.ways {
		if b := &s.ways[i]; b.node == node && b.index == index {
			return copy(dst, b.plain[:b.n]), true
		}
	}
	return 0, false
}

// put remembers a block that was just stored.
func (h *hotBlocks) put(node uint64, index int64, plain []byte) {
	s := h.set(node, index)
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.off.Load() {
		return
	}
	way := -1
	for i := range s.ways {
		if b := &s.ways[i]; b.node == node && b.index == index {
			way = i
		}
	}
	if way < 0 {
		way = int(s.turn) % hotWays
		s.turn++
	}
	b := &s.ways[way]
	if b.plain == nil {
		b.plain = make([]byte, seal.BlockPayload)
	}
	b.node, b.index, b.n = node, index, copy(b.plain, plain)
}

// drop forgets the blocks of a node from first to last.
func (h *hotBlocks) drop(node uint64, first, last int64) {
	if last-first < hotSets/hotWays {
		for i := first; i <= last; i++ {
			h.set(node, i).drop(node, i, i)
		}
		return
	}
	for i := range h.sets {
		h.sets[i].drop(node, first, last)
	}
}

func (s *hotSet) drop(node uint64, first, last int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.ways {
		if b := &s.ways[i]; b.node == node && first <= b.index && b.index <= last {
			b.node = 0
		}
	}
}

// freeze wipes every block; until thaw nothing is remembered.
func (h *hotBlocks) freeze() {
	h.off.Store(true)
	for i := range h.sets {
		s := &h.sets[i]
		s.mu.Lock()
		for w := range s.ways {
			clear(s.ways[w].plain)
			s.ways[w].node = 0
		}
		s.mu.Unlock()
	}
}

func (h *hotBlocks) thaw() { h.off.Store(false) }
