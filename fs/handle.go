package fs

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// handle is an open file or directory of the kernel's.
type handle struct {
	node   *node
	writes bool // opened for writing

	untold unix.Errno // of a lower sync that failed, 0 for none; guarded by handleTable.mu

	stream dirStream // of a directory
}

// handleTable holds the handles by number.
type handleTable struct {
	mu   sync.Mutex
	next uint64             // guarded by mu
	byFh map[uint64]*handle // guarded by mu

	journal *journal // where open handles are recorded; nil without, fixed before the mount
	resumed bool     // the kernel may have handles from a predecessor; guarded by mu
}

func newHandleTable() *handleTable { return &handleTable{byFh: map[uint64]*handle{}} }

// resume has the numbers begin where no predecessor's are.
func (t *handleTable) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next, t.resumed = uint64(time.Now().UnixNano()), true
}

// getOf returns a handle of a node; one that a predecessor has given to the kernel
// is made anew with open, and given up with undo where another call was quicker.
func (t *handleTable) getOf(fh uint64, open func() (*handle, error), undo func(*handle)) (*handle, error) {
	t.mu.Lock()
	h, resumed := t.byFh[fh], t.resumed
	t.mu.Unlock()
	if h != nil {
		return h, nil
	}
	if !resumed {
		return nil, unix.EBADF
	}
	made, err := open()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	if h = t.byFh[fh]; h == nil {
		t.byFh[fh] = made
	}
	t.mu.Unlock()
	if h != nil {
		undo(made)
		return h, nil
	}
	return made, nil
}

// add opens a handle and returns its number. r is the record of the request that
// asks for it.
func (t *handleTable) add(h *handle, r *record) (uint64, error) {
	fh := uint64(0)
	if t.journal != nil {
		flags := uint64(0)
		if h.writes {
			flags |= handleWrites
		}
		if h.stream.opened {
			flags |= handleDir
		}
		var err error
		if fh, err = t.journal.addHandle(r, h.node.id, flags); err != nil {
			return 0, unix.ENFILE
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.journal == nil {
		t.next++
		fh = t.next
	}
	t.byFh[fh] = h
	if h.node.unseen {
		_, err := h.node.failures.since(0)
		h.untold = errnoOf(err)
		t.journal.markHandle(fh, h.untold)
	}
	return fh, nil
}

func (t *handleTable) get(fh uint64) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byFh[fh]
}

func (t *handleTable) remove(fh uint64) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.byFh[fh]
	delete(t.byFh, fh)
	if t.journal != nil {
		t.journal.dropHandle(fh)
	}
	return h
}

// close closes what the kernel had no time to release before the mount ended.
func (t *handleTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.byFh {
		h.stream.close()
	}
	clear(t.byFh)
}

// record has every handle of a node told once of a lower sync that failed, as the
// kernel does for its own filesystems (lib/errseq.c), also over our death; and until one
// was told those that are opened later, too: who writes, closes and leaves the sync to
// another (as PostgreSQL does) may have had nothing open when ours failed.
func (t *handleTable) record(n *node, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.failures.record(err)
	n.unseen = true
	for fh, h := range t.byFh {
		if h.node == n {
			h.untold = errnoOf(err)
			t.journal.markHandle(fh, h.untold)
		}
	}
}

// failed returns the failure below that the handle has not been told of. r is the
// record of the request in whose answer it will be.
func (t *handleTable) failed(fh uint64, r *record) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.byFh[fh]
	if h == nil {
		return unix.EBADF
	}
	if h.untold == 0 {
		return nil
	}
	err := h.untold
	if r != nil {
		r.before.Store(uint64(err) | beforeStored)
	}
	h.untold, h.node.unseen = 0, false
	t.journal.markHandle(fh, 0)
	return err
}
