package fs

import "sync"

// seams are where WRITEs of the kernel's flush meet that follow each other in a
// growing file. The kernel parts them between its pages, in the midst of a block of
// ours: one has the beginning of the block, the next its rest. Stored by both, the
// block would be rewritten while it is dirty below (dirty.go): with O_DIRECT, which
// writes back what lies in the same folio, a megabyte often, and waits for the disk.
// So where both are at work the first leaves its part to the second, and is answered
// when that has stored it; where the second fails, the first stores it after all.
//
// Who waits here holds no lock. The first waits for the second only once that may go
// on, and the second for the first only before: each waits for one with a larger
// offset, or with a smaller one, that waits for nobody on this side.
type seams struct {
	mu      sync.Mutex
	changed sync.Cond // with mu
	at      map[seamPlace]*seam
	free    []*seam // for the next
}

// seamPlace is a plain offset of a file.
type seamPlace struct {
	node *node
	off  int64
}

// seam is guarded by seams.mu.
type seam struct {
	first, second bool   // at work: the one that ends here, the one that begins here
	followed      bool   // the second has looked at what is left
	passed        bool   // the first has stored all but what it leaves, or has failed
	left          []byte // what the first leaves, in its request; nothing once settled
	settled       bool   // the second has stored what was left, or never will
	stored        bool
}

// seamBytes is how long a write must be to have to do with seams: it reaches over the
// blocks at both its ends.
const seamBytes = (aheadBlocks + 2) * block

func newSeams() *seams {
	s := &seams{at: map[seamPlace]*seam{}}
	s.changed.L = &s.mu
	return s
}

// enter says that a write from off to end is at work, until exit.
func (s *seams) enter(n *node, off, end int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.meet(n, off).second = true
	s.meet(n, end).first = true
}

func (s *seams) meet(n *node, off int64) *seam {
	place := seamPlace{n, off}
	met := s.at[place]
	if met == nil {
		if last := len(s.free) - 1; last >= 0 {
			met, s.free = s.free[last], s.free[:last]
		} else {
			met = new(seam)
		}
		s.at[place] = met
	}
	return met
}

// exit ends what enter began: who waits for the write goes on.
func (s *seams) exit(n *node, off, end int64) {
	s.settle(n, off, false)
	s.pass(n, end)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.meet(n, off).second = false
	s.meet(n, end).first = false
	for _, place := range [2]seamPlace{{n, off}, {n, end}} {
		if met := s.at[place]; !met.first && !met.second {
			delete(s.at, place)
			*met = seam{}
			s.free = append(s.free, met)
		}
	}
}

// follow waits until whoever ends at off has stored, and returns what it has left to
// who begins there; nil for nothing. It may be read until settle.
func (s *seams) follow(n *node, off int64) (left []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	met := s.meet(n, off)
	for met.first && !met.passed {
		s.changed.Wait()
	}
	met.followed = true
	return met.left
}

// settle says that who begins at off has stored what was left to it, or, if it was
// not said before, that it will not.
func (s *seams) settle(n *node, off int64, stored bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	met := s.meet(n, off)
	if !met.settled {
		met.left, met.followed, met.settled, met.stored = nil, true, true, stored
	}
	s.changed.Broadcast()
}

// leave reports whether whoever begins at end takes over rest, which must stay as it
// is until settled returns.
func (s *seams) leave(n *node, end int64, rest []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	met := s.meet(n, end)
	if !met.second || met.followed {
		return false
	}
	met.left = rest
	return true
}

// pass lets whoever begins at end go on.
func (s *seams) pass(n *node, end int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.meet(n, end).passed = true
	s.changed.Broadcast()
}

// settled waits until whoever begins at end is done with what was left to it, and
// reports whether that is stored.
func (s *seams) settled(n *node, end int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	met := s.meet(n, end)
	for !met.settled {
		s.changed.Wait()
	}
	return met.stored
}
