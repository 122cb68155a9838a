package fs

import "sync"

// blockRanges keeps those apart who touch the same blocks of a file while they
// share node.content: a lower block is replaced as a whole, and who reads it
// meanwhile could see half of it. The zero value is ready.
type blockRanges struct {
	mu      sync.Mutex
	free    *sync.Cond   // made at the first wait; guarded by mu
	waiting int          // guarded by mu
	held    []blockRange // guarded by mu; as many as requests at work on the file
}

type blockRange struct {
	first, last int64
	alone       bool
}

// lock waits until nobody holds a block of the range whom this excludes.
func (r *blockRanges) lock(first, last int64, alone bool) {
	r.mu.Lock()
	for r.taken(first, last, alone) {
		if r.free == nil {
			r.free = sync.NewCond(&r.mu)
		}
		r.waiting++
		r.free.Wait()
		r.waiting--
	}
	r.held = append(r.held, blockRange{first, last, alone})
	r.mu.Unlock()
}

func (r *blockRanges) taken(first, last int64, alone bool) bool {
	for _, h := range r.held {
		if first <= h.last && h.first <= last && (alone || h.alone) {
			return true
		}
	}
	return false
}

// unlock gives back what lock took with the same arguments.
func (r *blockRanges) unlock(first, last int64, alone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, h := range r.held {
		if h == (blockRange{first, last, alone}) {
			end := len(r.held) - 1
			r.held[i] = r.held[end]
			r.held = r.held[:end]
			if r.waiting > 0 {
				r.free.Broadcast()
			}
			return
		}
	}
	panic("fs: unlock of blocks that are not locked")
}
