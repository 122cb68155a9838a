package fs

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"
)

// Idle nodes. The kernel remembers inodes for as long as it has memory, a million
// of them on a large volume, and a node takes some 350 bytes. So of most inodes that
// nobody has open or works on there is but an entry without pointers: how often the
// kernel named it, and whether it may hold pages of it. All else is found again at
// the next use, as after a restart.
//
// No page of an idle inode can be reached without a call to us: nobody has it open
// or mapped, and to open it again is a request that a freeze holds. Taking such pages
// away is therefore not what a freeze waits for. Nor are its attributes, which are
// reached by who has it as working directory or open with O_PATH alone.

// maxNodes is how many nodes there are before the unused ones are made idle: 6 MiB of
// them, and a twentieth of a second of a freeze, which has to ask the kernel about each.
// To make a node of an idle inode again takes 1 to 3 µs of an open of 20.
const maxNodes = 1 << 14

// restTries is how many nodes are looked at when one comes beyond maxNodes. Some are
// in use.
const restTries = 8

// idleNode is what is left of a node.
type idleNode struct {
	references uint32 // of the kernel, and idleTouched
	entry      uint32 // in the journal, as node.entry
}

const idleTouched = 1 << 31

// idleOf packs an idle node.
func idleOf(lookups uint32, touched bool, entry uint32) idleNode {
	e := idleNode{references: min(lookups, idleTouched-1), entry: entry}
	if touched {
		e.references |= idleTouched
	}
	return e
}

func (e idleNode) lookups() uint32 { return e.references &^ idleTouched }
func (e idleNode) touched() bool   { return e.references&idleTouched != 0 }

// insert adds a node, and makes others idle where there are many; mu is held.
func (t *nodeTable) insert(n *node) {
	t.byID[n.id] = n
	if len(t.byID) <= t.most || t.held {
		return
	}
	tries := restTries
	for _, other := range t.byID { // from anywhere: the language does not say
		if other != n {
			t.rest(other)
		}
		if tries--; tries == 0 {
			return
		}
	}
}

// rest makes a node idle if nobody needs more of it; mu is held.
func (t *nodeTable) rest(n *node) {
	lookups := n.lookups.Load()
	if n.using.Load() > 0 || n.opens.Load() > 0 || n.file.isOpen() || n.path.Load() != 0 || n.pinned.Load() || lookups <= 0 || lookups >= idleTouched {
		return
	}
	delete(t.byID, n.id)
	t.addIdle(n.id, idleOf(uint32(lookups), n.touched.Load(), n.entry))
}

// addIdle adds an idle inode; mu is held.
func (t *nodeTable) addIdle(id uint64, e idleNode) {
	t.idle[id] = e
	t.mostIdle = max(t.mostIdle, len(t.idle))
}

// shrinkIdle gives back the memory of idle inodes that the kernel has forgotten, which a
// map keeps: the few that are left get another. mu is held.
func (t *nodeTable) shrinkIdle() {
	if t.mostIdle < maxNodes || len(t.idle) > t.mostIdle/16 {
		return
	}
	t.idle = maps.Collect(maps.All(t.idle))
	t.mostIdle = len(t.idle)
}

// wake makes a node of an id: of the idle one, or of one that is not known; mu is
// held.
func (t *nodeTable) wake(id uint64) *node {
	n := t.newNode(id)
	if e, ok := t.idle[id]; ok {
		n.lookups.Store(int64(e.lookups()))
		n.touched.Store(e.touched())
		n.entry = e.entry
		delete(t.idle, id)
	} else if t.resumed {
		n.lookups.Store(1) // some number: the kernel forgets all of them at once
	}
	t.insert(n)
	return n
}

// forgetIdle takes back references of the kernel to an idle inode; mu is held.
func (t *nodeTable) forgetIdle(id, count uint64) {
	e, ok := t.idle[id]
	if !ok {
		return
	}
	if count < uint64(e.lookups()) {
		e.references -= uint32(count)
		t.idle[id] = e
		return
	}
	delete(t.idle, id)
	t.shrinkIdle()
	t.ids.forget(id)
	t.erase(id, e.entry)
}

// freeze keeps nodes from becoming idle until thaw, and returns those there are,
// the open ones first: whoever marks them must find the marks again.
func (t *nodeTable) freeze() []*node {
	t.mu.Lock()
	t.held = true
	t.mu.Unlock()
	nodes, open := t.all(), 0
	for i, n := range nodes {
		if n.opens.Load() > 0 {
			nodes[open], nodes[i] = n, nodes[open]
			open++
		}
	}
	return nodes
}

func (t *nodeTable) thaw() {
	t.mu.Lock()
	t.held = false
	t.mu.Unlock()
}

// idleIDs returns the idle inodes; with touched, those of which the kernel may hold pages.
func (t *nodeTable) idleIDs(touched bool) []uint64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var ids []uint64
	for id, e := range t.idle {
		if e.touched() || !touched {
			ids = append(ids, id)
		}
	}
	return ids
}

// untouch says that the kernel's pages of an idle inode are gone.
func (t *nodeTable) untouch(id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.idle[id]; ok {
		e.references &^= idleTouched
		t.idle[id] = e
	}
}

// idleBatch bounds the memory that dropping idle inodes takes.
const idleBatch = 4096

// idleDrop is the dropping of what the kernel has of idle inodes, which goes on after the gate
// has closed. It ends before the thaw, and before the FUSE device is closed.
type idleDrop struct {
	mu     sync.Mutex
	cancel context.CancelFunc // guarded by mu; nil while there is none
	done   chan struct{}      // guarded by mu
}

// startIdleDrop takes attributes and pages of idle inodes away from the kernel, in the
// background.
func (f *Filesystem) startIdleDrop(l *loop) {
	f.stopIdleDrop()
	f.idleDrop.mu.Lock()
	defer f.idleDrop.mu.Unlock()
	ctx, cancel := context.WithCancel(f.serving)
	done := make(chan struct{})
	f.idleDrop.cancel, f.idleDrop.done = cancel, done
	f.background.Go(func() {
		defer close(done)
		f.dropIDs(ctx, l, f.nodes.idleIDs(true), f.nodes.untouch)
		for ids := range slices.Chunk(f.nodes.idleIDs(false), idleBatch) {
			if ctx.Err() != nil {
				return
			}
			f.forgetAttributes(ctx, l, ids)
		}
		for _, pause := range idleRounds {
			ids := f.nodes.idleIDs(true)
			if len(ids) == 0 {
				return
			}
			select {
			case <-time.After(pause):
				f.dropIDs(ctx, l, ids, f.nodes.untouch)
			case <-ctx.Done():
				return
			}
		}
	})
}

// idleRounds are the pauses before each time that the pages of idle inodes are dropped again:
// the kernel refuses a page that somebody looks at just then, reclaim for one.
var idleRounds = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second, 3 * time.Second}

// dropIDs removes the pages of inodes of which there is no node, and their attributes,
// and tells dropped of each. It ends with ctx, or where what is left hangs.
func (f *Filesystem) dropIDs(ctx context.Context, l *loop, ids []uint64, dropped func(id uint64)) {
	for len(ids) > 0 && ctx.Err() == nil {
		batch := ids[:min(len(ids), idleBatch)]
		ids = ids[len(batch):]
		nodes := make([]*node, len(batch))
		for i, id := range batch {
			nodes[i] = &node{id: id}
			nodes[i].touched.Store(true)
		}
		f.drop(ctx, l, nodes)
		for _, n := range nodes {
			if !n.touched.Load() {
				dropped(n.id)
			}
		}
	}
}

// stopIdleDrop ends it where it is.
func (f *Filesystem) stopIdleDrop() {
	f.idleDrop.mu.Lock()
	defer f.idleDrop.mu.Unlock()
	if f.idleDrop.cancel == nil {
		return
	}
	f.idleDrop.cancel()
	<-f.idleDrop.done
	f.idleDrop.cancel = nil
}
