package fs

// turns bounds how many requests are in a lower read or write at a time. The
// kernel hands over up to MaxBackground (1,024) WRITEs at once when it flushes,
// and each that waits for the disk has a thread of its own, which Go's runtime
// keeps for good: 983 threads were counted after a flush of scattered pages,
// where a pod is often allowed 1,024, and a thread refused ends the process.
// Whoever waits for a turn waits without a thread.
type turns chan struct{}

// maxTurns keeps the queue of any disk full (NVMe reaches its rate at 32), and
// with it the threads of the daemon below 100.
const maxTurns = 64

func newTurns() turns { return make(turns, maxTurns) }

func (t turns) take() { t <- struct{}{} }
func (t turns) give() { <-t }
