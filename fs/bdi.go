package fs

import "sync"

// bdi decides on the limit that the kernel keeps for the mount's dirty pages. Where
// it cannot be set, a freeze during heavy writing may not drain in time, which is
// logged.
type bdi struct {
	set func(bytes int64) error // Services.LimitDirty; nil without a mount

	mu        sync.Mutex
	budget    int64 // bytes; guarded by mu
	throttled bool  // guarded by mu
}

// DefaultDirtyLimit is the most the mount may hold dirty, and so what a freeze has
// to flush within its 500 ms: 8,192 scattered pages at 10 to 20 µs each. With
// 8 MiB, writers wait for the flush in the midst of it (sequential write 0.6
// of the rate, random 0.6). The reserve below (reserve.go) is made for it.
const DefaultDirtyLimit = 32 << 20

// throttleBytes is the most during a drain: less than a request, so that a
// writer in the middle of a large write() stops in balance_dirty_pages
// (drain 300 ms → 30 ms, measured).
const throttleBytes = 64 << 10

// newBDI sets the limits of a mount that may hold budget bytes dirty, through set.
func newBDI(set func(bytes int64) error, budget int64) (*bdi, error) {
	b := &bdi{set: set, budget: -1}
	return b, b.setBudget(budget)
}

// limit writes the bound in force; mu is held.
func (b *bdi) limit() error {
	bytes := max(b.budget, throttleBytes)
	if b.throttled {
		bytes = throttleBytes
	}
	if b.set == nil {
		return nil
	}
	return b.set(bytes)
}

// setBudget sets what the mount may hold dirty while it is not throttled.
func (b *bdi) setBudget(bytes int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.budget == bytes {
		return nil
	}
	b.budget = bytes
	return b.limit()
}

// throttle stops writers that are inside a write() until restore.
func (b *bdi) throttle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.throttled = true
	return b.limit()
}

func (b *bdi) restore() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.throttled = false
	return b.limit()
}
