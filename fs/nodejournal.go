package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What of the tables of nodes and handles is in the journal.

// record puts a node into the journal before the kernel knows it; mu is held. What
// is there is found again by the next process, which has to know at a freeze of
// which inodes the kernel may hold pages. How often the kernel knows it is there
// only where that is counted (references.go): else a FORGET takes back all there is.
func (t *nodeTable) record(n *node) error {
	if t.journal == nil || n.entry != 0 || n.id == fuse.FUSE_ROOT_ID {
		return nil
	}
	index, e, err := t.journal.nodes.reserve()
	if err != nil {
		return unix.ENFILE
	}
	e.state.Store(0)
	if ids, counted := t.counted(); counted {
		if err := t.keep.Hold(n.id, ids.held(n.id)); err != nil {
			t.journal.nodes.putBack(index)
			return unix.ENFILE
		}
		n.held = true
	}
	e.key.Store(n.id)
	n.entry = index + 1
	return nil
}

// erase takes a node out of the journal and lets the keeper go of it; mu is held.
func (t *nodeTable) erase(n *node) {
	if n.entry != 0 {
		t.journal.nodes.remove(n.entry - 1)
		n.entry = 0
	}
	if n.held || n.maybe {
		n.held, n.maybe = false, false
		t.keep.Release(n.id)
	}
}

// entrust hands the keeper a descriptor of a node whose last name is about to go.
func (t *nodeTable) entrust(n *node, fd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.held || n.entry == 0 || t.keep.Hold(n.id, fd) != nil {
		return
	}
	n.held = true
	t.journal.nodes.at(n.entry - 1).state.Or(nodePinned | nodeHeld)
}

// keepJournal has nodes recorded from now on.
func (t *nodeTable) keepJournal(j *journal) { t.journal, t.entries = j, map[uint64]uint32{} }

// takeEntry gives a node that was idle its entry back; mu is held. Whether the keeper
// holds a descriptor of it was not kept.
func (t *nodeTable) takeEntry(n *node) {
	if t.journal != nil {
		n.entry, n.maybe = t.entries[n.id], true
		delete(t.entries, n.id)
	}
}

// recover makes the nodes that the journal tells of. Where the kernel's references are
// not counted, each node gets one, and the FORGET that gives all of them
// back takes that. If the kernel has met the inode again before that FORGET was
// read, it is taken off too early; then use puts it back, at the first request
// that could bring a page of it into the kernel.
func (t *nodeTable) recover(j *journal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keepJournal(j)
	_, counted := t.counted()
	j.nodes.each(func(index uint32, e *entry) {
		id, state := e.key.Load(), e.state.Load()
		if _, idle := t.idle[id]; idle || t.byID[id] != nil { // a request made it twice
			j.nodes.remove(index)
			return
		}
		if counted {
			t.idle[id] = idleNode{lookups: e.count(), touched: true}
			t.entries[id] = index + 1
			return
		}
		if state&nodePinned == 0 {
			t.idle[id] = idleNode{lookups: 1, touched: true}
			t.entries[id] = index + 1
			return
		}
		n := t.newNode(id)
		n.entry = index + 1
		n.maybe = true
		n.lookups.Store(1)
		n.touched.Store(true)
		n.held = state&nodeHeld != 0
		if _, err := t.pathFD(n); err == nil {
			n.pinned.Store(true)
		}
		t.byID[n.id] = n
	})
}

// recover opens the handles that the journal tells of.
func (t *handleTable) recover(j *journal, nodes *nodeTable) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.journal = j
	j.opened.each(func(index uint32, e *entry) {
		n := nodes.use(e.key.Load())
		nodes.opened(n)
		nodes.done(n)
		state := e.state.Load()
		h := &handle{node: n, writes: state&handleWrites != 0, untold: untold(state)}
		if state&handleDir != 0 {
			h.stream.opened, h.stream.fd = true, -1
			if fd, err := nodes.ids.open(n.id, unix.O_RDONLY|unix.O_DIRECTORY); err == nil {
				h.stream.fd = fd
			}
		}
		t.byFh[state>>32<<32|uint64(index+1)] = h
	})
}
