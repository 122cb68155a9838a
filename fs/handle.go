package fs

import (
	"sync"

	"golang.org/x/sys/unix"
)

// handle is an open file or directory of the kernel's.
type handle struct {
	node   *node
	writes bool // opened for writing

	seen uint64 // failures this handle was told of; guarded by handleTable.mu

	stream dirStream // of a directory
}

// handleTable holds the handles by number.
type handleTable struct {
	mu   sync.Mutex
	next uint64             // guarded by mu
	byFh map[uint64]*handle // guarded by mu
}

func newHandleTable() *handleTable { return &handleTable{byFh: map[uint64]*handle{}} }

func (t *handleTable) add(h *handle) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	h.seen, _ = h.node.failures.since(0)
	t.next++
	t.byFh[t.next] = h
	return t.next
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

// failed returns the failure below that the handle has not been told of.
func (t *handleTable) failed(fh uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.byFh[fh]
	if h == nil {
		return unix.EBADF
	}
	var err error
	h.seen, err = h.node.failures.since(h.seen)
	return err
}
