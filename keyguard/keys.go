package keyguard

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/byokd/byokd/internal/seal"
)

// maxUnpinned bounds the loaded data keys per epoch. A bucket makes one key an
// hour, so 256 cover ten days of objects read back at random; a Root is about
// a kilobyte plus its bounded memo of file ciphers.
const maxUnpinned = 256

// Keys are the roots of one epoch. They die with it. Safe for concurrent use;
// Root takes no lock.
type Keys struct {
	// roots is replaced as a whole under mu, so that readers need no lock. It
	// holds at most maxUnpinned unpinned entries: copying it is nothing beside
	// the KMS call that precedes every change.
	roots atomic.Pointer[map[seal.KeyID]*loaded]

	tick atomic.Uint64 // grows with each insertion: the clock of the eviction order

	mu      sync.Mutex
	closed  bool               // mu; set by erase, nothing is added after
	flights map[string]*flight // mu; KMS calls under way, by what they will load
}

// loaded is one root. It is never wiped while the epoch lasts, for a pass may
// hold it: an evicted root is only dropped, and the collector (which erases what
// was allocated inside seal.Do) takes it when the last pass has left.
type loaded struct {
	root   *seal.Root
	pinned bool
	used   atomic.Uint64 // tick of the last use
}

func newKeys() *Keys {
	k := &Keys{flights: make(map[string]*flight)}
	k.roots.Store(&map[seal.KeyID]*loaded{})
	return k
}

// Root gives a loaded root, or nil: then leave the pass, Load, and enter again.
// The root may be used until Exit of the pass that Keys came from.
func (k *Keys) Root(id seal.KeyID) *seal.Root {
	entry := (*k.roots.Load())[id]
	if entry == nil {
		return nil
	}
	// A load is shared between cores, a store is not: store only when it tells something.
	if now := k.tick.Load(); entry.used.Load() != now {
		entry.used.Store(now)
	}
	return entry.root
}

// Len tells how many roots are loaded.
func (k *Keys) Len() int { return len(*k.roots.Load()) }

func (k *Keys) has(id seal.KeyID) bool { return (*k.roots.Load())[id] != nil }

// add puts a root in and reports false if the epoch is over already; the root
// is then the caller's to wipe.
func (k *Keys) add(root *seal.Root, pinned bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false
	}
	next := k.copyLocked()
	if old := next[root.ID()]; old != nil {
		pinned = pinned || old.pinned
	}
	entry := &loaded{root: root, pinned: pinned}
	entry.used.Store(k.tick.Add(1))
	next[root.ID()] = entry
	k.evictLocked(next)
	k.roots.Store(&next)
	return true
}

// pin exempts a loaded root from eviction and reports whether it is loaded.
func (k *Keys) pin(id seal.KeyID) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	old := (*k.roots.Load())[id]
	if old == nil || k.closed {
		return false
	}
	if !old.pinned {
		next := k.copyLocked()
		next[id] = &loaded{root: old.root, pinned: true}
		k.roots.Store(&next)
	}
	return true
}

func (k *Keys) copyLocked() map[seal.KeyID]*loaded {
	current := *k.roots.Load()
	next := make(map[seal.KeyID]*loaded, len(current)+1)
	for id, entry := range current {
		next[id] = entry
	}
	return next
}

// evictLocked brings next back under its bound: the unpinned roots whose last use
// is the longest ago go, never the one just added (it has the newest tick).
func (k *Keys) evictLocked(next map[seal.KeyID]*loaded) {
	unpinned := 0
	for _, entry := range next {
		if !entry.pinned {
			unpinned++
		}
	}
	for ; unpinned > maxUnpinned; unpinned-- {
		var victim *loaded
		for _, entry := range next {
			if !entry.pinned && (victim == nil || entry.used.Load() < victim.used.Load()) {
				victim = entry
			}
		}
		delete(next, victim.root.ID())
	}
}

// erase wipes and forgets every root. Only when nobody holds a pass of the
// epoch any more.
func (k *Keys) erase() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for _, entry := range *k.roots.Load() {
		entry.root.Wipe()
	}
	k.roots.Store(&map[seal.KeyID]*loaded{})
}

// flight is one KMS call under way, shared by all who wait for its result.
type flight struct {
	done chan struct{}
	// set before done is closed
	id      seal.KeyID
	wrapped []byte
	err     error
}

// join returns the flight for what, and whether the caller has just started it
// and must call land. The caller holds a pass of the epoch.
func (k *Keys) join(what string) (f *flight, mine bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.flights[what]; f != nil {
		return f, false
	}
	f = &flight{done: make(chan struct{})}
	k.flights[what] = f
	return f, true
}

func (k *Keys) land(what string, f *flight) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.flights, what)
	close(f.done)
}

func (f *flight) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
