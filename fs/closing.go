package fs

import "sync"

// closeWorkers is how many descriptors are closed at a time: the disk frees the blocks
// of large deleted files not much faster if it is asked for more.
const closeWorkers = 4

// closer closes descriptors of nodes that the kernel has forgotten. The last close of
// a deleted file gives its blocks back, which takes seconds where it was large, and
// FORGETs come by the hundred thousand: they are not to wait for each other's disk, nor
// each to have a reader started behind it. What waits is bounded by the limit of open
// files; a death closes all of it.
type closer struct {
	mu      sync.Mutex
	waiting []descriptors  // guarded by mu
	workers int            // guarded by mu
	done    sync.WaitGroup // workers
}

// close has descriptors closed soon.
func (c *closer) close(d descriptors) {
	if d == (descriptors{}) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, d)
	if c.workers < closeWorkers {
		c.workers++
		c.done.Go(c.work)
	}
}

func (c *closer) work() {
	for {
		c.mu.Lock()
		n := len(c.waiting)
		if n == 0 {
			c.waiting = nil // what a storm has made of it
			c.workers--
			c.mu.Unlock()
			return
		}
		d := c.waiting[n-1]
		c.waiting = c.waiting[:n-1]
		c.mu.Unlock()
		d.close()
	}
}

// wait returns when all is closed; no more comes.
func (c *closer) wait() { c.done.Wait() }
