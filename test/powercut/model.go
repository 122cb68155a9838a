//go:build linux

package powercut

import (
	"bytes"
	"fmt"
	"sync"
)

// model is what one file has to hold: every operation on it in order, and which
// of them were acknowledged when. It may be told of operations by several
// threads.
type model struct {
	mu   sync.Mutex
	ops  []fileOp // guarded by mu
	done int      // guarded by mu; ops[:done] have returned
	acks []ack    // guarded by mu

	// What comes of ops[:replayed], so that cuts in ascending order cost no more
	// than one of them.
	replayed int
	content  []byte
}

// fileOp is one operation on a file.
type fileOp struct {
	kind   fileOpKind
	begin  int   // place in the log
	off, n int64 // of write and zero; n alone is the size of resize
	tag    uint64
}

type fileOpKind uint8

const (
	opWrite fileOpKind = iota
	opResize
	opZero // within the file
)

// ack says that the first ops were durable at a place in the log.
type ack struct{ at, ops int }

// begin notes an operation that is about to be made; one at a time.
func (m *model) begin(o fileOp) {
	m.mu.Lock()
	m.ops = append(m.ops, o)
	m.mu.Unlock()
}

func (m *model) end() {
	m.mu.Lock()
	m.done = len(m.ops)
	m.mu.Unlock()
}

// returned is what an fsync that begins now covers.
func (m *model) returned() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.done
}

// acknowledge notes that the first ops are durable. Of two syncs side by side
// the one that covers less may come later.
func (m *model) acknowledge(at, ops int) {
	m.mu.Lock()
	m.acks = append(m.acks, ack{at, ops})
	m.mu.Unlock()
}

// at returns the content that was acknowledged at a cut and the operations that
// had begun after it; ok is false when the file itself was not acknowledged.
func (m *model) at(cut int) (content []byte, later []fileOp, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	acked := -1
	for _, a := range m.acks {
		if a.at <= cut {
			acked = max(acked, a.ops)
		}
	}
	if acked < m.replayed {
		m.replayed, m.content = 0, nil
	}
	for ; m.replayed < acked; m.replayed++ {
		m.content = m.ops[m.replayed].apply(m.content)
	}
	for _, o := range m.ops[m.replayed:] {
		if o.begin >= cut {
			break
		}
		later = append(later, o)
	}
	return m.content, later, acked >= 0
}

func (o fileOp) apply(content []byte) []byte {
	switch o.kind {
	case opWrite:
		content = resize(content, max(int64(len(content)), o.off+o.n))
		pattern(content[o.off:o.off+o.n], o.tag, o.off)
	case opResize:
		content = resize(content, o.n)
	case opZero:
		clear(content[min(o.off, int64(len(content))):min(o.off+o.n, int64(len(content)))])
	}
	return content
}

func resize(content []byte, n int64) []byte {
	if n <= int64(len(content)) {
		return content[:n]
	}
	return append(content, make([]byte, n-int64(len(content)))...)
}

// pattern fills b with the bytes that a write with this tag leaves at off. No
// two tags agree in long runs, and no byte is zero.
func pattern(b []byte, tag uint64, off int64) {
	for i := range b {
		x := (tag*0x9e3779b97f4a7c15 + uint64(off) + uint64(i)) * 0xbf58476d1ce4e5b9
		b[i] = byte(x>>56) | 1
	}
}

// compare returns an error when got cannot come from the acknowledged content
// and the operations begun later, each of which may have happened in part.
func compare(got, acked []byte, later []fileOp) error {
	if bytes.Equal(got, acked) {
		return nil
	}
	if n := int64(len(got)); !possibleSize(n, int64(len(acked)), later) {
		return fmt.Errorf("%d bytes; %d were acknowledged, and none of %d operations later leads there: %+v", n, len(acked), len(later), later)
	}
	fine := explained(got, int64(len(acked)), later)
	for at := range got {
		if at < len(acked) && got[at] == acked[at] || at >= len(acked) && got[at] == 0 || fine[at] {
			continue
		}
		return fmt.Errorf("at %d of %d: %#02x, which is neither what was acknowledged nor of the %d operations later", at, len(got), got[at], len(later))
	}
	return nil
}

// possibleSize tells whether a file of this size can be what operations begun
// after an acknowledgement have left of one of size acked. A file that grows may
// have any size between; on a byokd volume it may end with the block. One that
// shrinks has the old size or the new one.
func possibleSize(n, acked int64, later []fileOp) bool {
	possible := n == acked
	for size := acked; len(later) > 0; later = later[1:] {
		next := size
		switch o := later[0]; o.kind {
		case opWrite:
			next = max(size, o.off+o.n)
		case opResize:
			next = o.n
		}
		possible = possible || n == next || size < next && size <= n && n <= next+sector
		size = next
	}
	return possible
}

// explained says for each byte whether it can be of one of these operations.
func explained(got []byte, size int64, later []fileOp) []bool {
	fine := make([]bool, len(got))
	end := int64(len(got))
	zeros := func(from, to int64) {
		for at := from; at < min(to, end); at++ {
			fine[at] = fine[at] || got[at] == 0
		}
	}
	for _, o := range later {
		switch o.kind {
		case opWrite:
			zeros(size, o.off) // what a write beyond the end leaves out
			image := make([]byte, o.n)
			pattern(image, o.tag, o.off)
			for at := o.off; at < min(o.off+o.n, end); at++ {
				fine[at] = fine[at] || got[at] == image[at-o.off]
			}
			size = max(size, o.off+o.n)
		case opZero:
			zeros(o.off, o.off+o.n)
		case opResize:
			zeros(min(size, o.n), end)
			size = o.n
		}
	}
	return fine
}
