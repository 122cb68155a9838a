package objstore

import (
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/byokd/byokd/keyguard"
)

const (
	// defaultStallTimeout is how long a request may wait for its client. It is longer than
	// what clients wait for us, and than a short stop of a container.
	defaultStallTimeout = 2 * time.Minute
	// leastProgress is how many bytes have to move within that time: a client that sends a
	// byte now and then holds a connection no longer than one that sends none.
	leastProgress = 64 << 10
)

// clientWaits measures how long a request has been waiting for its client, in either
// direction, since leastProgress moved last. While the bucket's key is frozen nothing
// counts: a client may well be frozen by the same key, and wait itself.
type clientWaits struct {
	limit  time.Duration
	taking clientWait // of the request's body
	giving clientWait // of the answer's

	mu    sync.Mutex
	guard *keyguard.Guard // guarded by mu; nil before the bucket is known
}

// stalled reports whether the limit is exceeded. It is asked every watchEvery.
func (w *clientWaits) stalled() bool {
	w.mu.Lock()
	guard := w.guard
	w.mu.Unlock()
	if guard != nil && frozen(guard) {
		w.taking.forgive()
		w.giving.forgive()
		return false
	}
	return w.taking.sum() > w.limit || w.giving.sum() > w.limit
}

// concerns says by which key the request is frozen.
func (w *clientWaits) concerns(g *keyguard.Guard) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.guard = g
}

// frozen reports whether the key of a guard may not be used now.
func frozen(g *keyguard.Guard) bool {
	pass, ok := g.TryEnter(keyguard.Work, 0)
	if ok {
		pass.Exit()
	}
	return !ok
}

// clientWait is one direction of a request.
type clientWait struct {
	mu     sync.Mutex
	since  time.Time     // guarded by mu; begin of the present wait, zero when there is none
	waited time.Duration // guarded by mu; in earlier waits since the last progress
	moved  int           // guarded by mu; bytes since then
}

func (w *clientWait) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Now()
}

func (w *clientWait) end(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waited += time.Since(w.since)
	w.since = time.Time{}
	if w.moved += n; w.moved >= leastProgress {
		w.waited, w.moved = 0, 0
	}
}

// sum is how long the client took for fewer than leastProgress bytes.
func (w *clientWait) sum() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		return w.waited
	}
	return w.waited + time.Since(w.since)
}

// forgive begins to count anew.
func (w *clientWait) forgive() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waited, w.moved = 0, 0
	if !w.since.IsZero() {
		w.since = time.Now()
	}
}

// awaited is a request body whose reads count as waiting for the client.
type awaited struct {
	src  io.Reader
	wait *clientWait
}

// Read implements io.Reader.
func (a awaited) Read(p []byte) (int, error) {
	a.wait.begin()
	n, err := a.src.Read(p)
	a.wait.end(n)
	return n, err
}

// lookAtWaits ends a request that has waited too long for its client.
func (c *call) lookAtWaits() {
	if !c.stalled.Load() && c.waits.stalled() {
		c.breakOff()
	}
}

// breakOff ends the reads and writes of a request whose client stalls. An upload is
// then answered; of a download nothing remains but to close the connection.
func (c *call) breakOff() {
	c.stalled.Store(true)
	past := time.Unix(1, 0)
	control := http.NewResponseController(c.w.w)
	// Best effort: without deadlines the client is waited for, as it was until now.
	_ = control.SetReadDeadline(past)
	if c.waits.giving.sum() > c.waits.limit {
		_ = control.SetWriteDeadline(past)
	}
}

// stallOf puts the reason in the place of what breakOff did to a transfer.
func (c *call) stallOf(err error) error {
	if err == nil || !c.stalled.Load() {
		return err
	}
	e := refuse(http.StatusBadRequest, "RequestTimeout", "Your socket connection to the server was not read from or written to within the timeout period. Idle connections will be closed.").
		hint("Fewer than %d KiB moved while byokd waited %v for the client (objects.stallTimeout).", leastProgress>>10, c.waits.limit)
	e.Cause = err
	return e
}
