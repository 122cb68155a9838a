package objstore

import "sync"

// recent remembers what was put into it last, in two generations of maxRecent entries
// each. It is safe for concurrent use; the zero value is empty.
type recent[K comparable, V any] struct {
	mu       sync.Mutex
	now, old map[K]V // guarded by mu
}

// maxRecent bounds each generation; an entry takes about 0.2 KiB.
const maxRecent = 10000

func (r *recent[K, V]) put(key K, value V) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now == nil || len(r.now) >= maxRecent {
		r.now, r.old = map[K]V{}, r.now
	}
	r.now[key] = value
}

func (r *recent[K, V]) get(key K) (V, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if value, ok := r.now[key]; ok {
		return value, true
	}
	value, ok := r.old[key]
	return value, ok
}
