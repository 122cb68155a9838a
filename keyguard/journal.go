package keyguard

import (
	"sync/atomic"

	"go.uber.org/zap"
)

// journalSize is how many audit records and log lines may wait. At a few lines
// per transition and ten unwraps a second this is minutes of a stuck disk.
const journalSize = 4096

// journal writes audit records or log lines in a goroutine of its own. A log
// pipe that nobody empties or a disk that hangs must not keep Run from freezing:
// it would hold the gate open. What does not fit is dropped, counted and told.
type journal struct {
	log     *zap.Logger
	lost    func(n int64) // writes how many records were lost; called by write
	queue   chan func()
	ended   chan struct{}
	dropped atomic.Int64
}

func newJournal(log *zap.Logger, lost func(n int64)) *journal {
	return &journal{log: log, lost: lost, queue: make(chan func(), journalSize), ended: make(chan struct{})}
}

// add never blocks.
func (j *journal) add(f func()) {
	select {
	case j.queue <- f:
	default:
		j.dropped.Add(1)
	}
}

// write runs until end was called and the queue is empty.
func (j *journal) write() {
	for {
		select {
		case f := <-j.queue:
			j.do(f)
		case <-j.ended:
			for {
				select {
				case f := <-j.queue:
					j.do(f)
				default:
					return
				}
			}
		}
	}
}

func (j *journal) do(f func()) {
	f()
	if n := j.dropped.Swap(0); n != 0 {
		j.log.Error("audit records or log lines were lost while writing was stuck", zap.Int64("lost", n))
		j.lost(n)
	}
}

// end lets write return. Called once.
func (j *journal) end() { close(j.ended) }
