package fs

import "github.com/byokd/byokd/internal/seal"

// edge is the first or the last block of a write that does not replace it whole:
// what was there, with the new bytes laid over it.
type edge struct {
	plain []byte // room for the block; nil where the data alone is the block
	n     int    // length of what was there, or of all once sealed
	open  bool   // what was there lies sealed in the block's place and is to be opened first
	full  bool   // it is the last block, where a hole counts as full
	at    int    // where the new bytes go
	data  []byte // the new bytes
}

// readEdges prepares the edges of a write: their sealed blocks are read into
// their places, where they are not at hand in the clear.
func (c *call) readEdges(n *node, data []byte, off, first, last int64, skip int) error {
	end := off + int64(len(data))
	c.edges = [2]edge{}
	head, tail := &c.edges[0], &c.edges[1]
	if skip > 0 || first == last && end < seal.BlockStart(first+1) {
		head.plain, head.at, head.data = c.head[:], skip, data[:min(len(data), seal.PayloadOf(first)-skip)]
		if len(c.left) == skip && skip > 0 { // with data it is the whole block
			head.n = copy(head.plain, c.left)
		} else {
			c.prepare(n, head, first)
		}
	}
	if inLast := int(end - seal.BlockStart(last)); first < last && inLast < seal.PayloadOf(last) {
		tail.plain, tail.data = c.plain[:], data[len(data)-inLast:]
		c.prepare(n, tail, last)
	}
	if head.open && tail.open && last == first+1 {
		return c.readLower(n, c.sealed[:2*block], first*block)
	}
	if head.open {
		if err := c.readLower(n, c.sealed[:block], first*block); err != nil {
			return err
		}
	}
	if tail.open {
		return c.readLower(n, c.sealed[(last-first)*block:][:block], last*block)
	}
	return nil
}

// prepare finds out how an edge comes by what was there.
func (c *call) prepare(n *node, e *edge, index int64) {
	if index*block >= n.lower {
		return // nothing
	}
	if length, ok := c.fs.hot.get(n.serial, index, e.plain); ok {
		e.n = length
		return
	}
	e.open, e.full = true, (index+1)*block == n.lower
}

// seal lays the new bytes of an edge over what was there and seals it into its
// place.
func (e *edge) seal(cipher seal.FileCipher, index int64, place []byte) error {
	payload := seal.PayloadOf(index)
	if e.open {
		switch {
		case !seal.IsHole(place):
			n, err := cipher.OpenBlock(e.plain, uint64(index), place)
			if err != nil {
				return err
			}
			e.n = n
		case e.full:
			e.n = payload
			clear(e.plain)
		default:
			e.n = 0
		}
	}
	clear(e.plain[e.n:])
	copy(e.plain[e.at:], e.data)
	e.n = max(e.n, e.at+len(e.data))
	cipher.SealBlock(place, uint64(index), e.plain[:e.n])
	return nil
}

// remember keeps the blocks at the edges of a small write at hand, and the last
// of a large one: the next write probably begins there.
func (c *call) remember(n *node, first, last int64) {
	head, tail := &c.edges[0], &c.edges[1]
	if tail.plain != nil {
		c.fs.hot.put(n.serial, last, tail.plain[:tail.n])
	}
	if head.plain != nil && last-first <= 1 {
		c.fs.hot.put(n.serial, first, head.plain[:head.n])
	}
}
