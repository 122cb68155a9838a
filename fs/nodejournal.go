package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What of the tables of nodes and handles is in the journal.

// record puts a node into the journal before the kernel knows it; mu is held. What
// is there is found again by the next process, which has to know at a freeze of
// which inodes the kernel may hold pages, and how often it knows each (references.go).
func (t *nodeTable) record(n *node) error {
	if t.journal == nil || n.entry != 0 || n.id == fuse.FUSE_ROOT_ID {
		return nil
	}
	index, e, err := t.journal.nodes.reserve()
	if err != nil {
		return unix.ENFILE
	}
	e.state.Store(0)
	if ids := t.byNumber(); ids != nil {
		if err := t.keep.Hold(n.id, ids.held(n.id)); err != nil {
			t.journal.nodes.putBack(index)
			return unix.ENFILE
		}
		e.state.Store(nodeHeld)
	}
	e.key.Store(n.id)
	n.entry = index + 1
	return nil
}

// erase takes a node, by its id and node.entry, out of the journal and lets the keeper
// go of it; mu is held.
func (t *nodeTable) erase(id uint64, entry uint32) {
	if entry == 0 {
		return
	}
	held := t.journal.nodes.at(entry-1).state.Load()&nodeHeld != 0
	t.journal.nodes.remove(entry - 1)
	if held {
		t.keep.Release(id)
	}
}

// entrust hands the keeper a descriptor of a node whose last name is about to go.
func (t *nodeTable) entrust(n *node, fd int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.entry == 0 {
		return
	}
	if e := t.journal.nodes.at(n.entry - 1); e.state.Load()&nodeHeld == 0 && t.keep.Hold(n.id, fd) == nil {
		e.state.Or(nodeHeld)
	}
}

// distrust undoes entrust.
func (t *nodeTable) distrust(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.entry == 0 || t.byNumber() != nil { // those by number are held from the beginning on
		return
	}
	if e := t.journal.nodes.at(n.entry - 1); e.state.Load()&nodeHeld != 0 {
		e.state.And(^uint64(nodeHeld))
		t.keep.Release(n.id)
	}
}

// keepJournal has nodes recorded from now on.
func (t *nodeTable) keepJournal(j *journal) { t.journal = j }

// recover makes the nodes that the journal tells of. Where ids are handles, those that
// the keeper holds have lost their last name.
func (t *nodeTable) recover(j *journal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	byNumber := t.byNumber() != nil
	j.nodes.each(func(index uint32, e *entry) {
		id := e.key.Load()
		if byNumber || e.state.Load()&nodeHeld == 0 {
			t.addIdle(id, idleOf(e.count(), true, index+1))
			return
		}
		n := t.newNode(id)
		n.entry = index + 1
		n.lookups.Store(int64(e.count()))
		n.touched.Store(true)
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
