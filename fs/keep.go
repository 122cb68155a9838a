package fs

import (
	"context"
	"fmt"
	"time"

	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Keep connects a Filesystem with a process that outlives this one, so that the
// mount does, too: the next process goes on where this one was killed, and those
// who use the mount notice nothing but a moment of waiting.
//
// The kernel ends a mount when the last descriptor of its device is closed, and an
// inode without a name when the last descriptor of it is: the keeper holds both,
// and the journal (journal.go).
type Keep struct {
	// Device and Journal are the descriptors of a mount to go on with, which become
	// the Filesystem's; both -1 for a new mount.
	Device, Journal int

	// Deposit hands the keeper the descriptors of a new mount, before the mount is
	// made. Hold hands it one of a lower inode; Release takes that back. They must
	// be safe for concurrent use. What was handed over is safe when they return: the
	// keeper need not have looked at it.
	Deposit func(device, journal int) error
	Hold    func(node uint64, fd int) error
	Release func(node uint64)
	// Held returns what the keeper holds, to go on with a mount; the descriptors become
	// the Filesystem's.
	Held func() (map[uint64]int, error)

	// Faulted says that the process before this one ended by a fault of its own. A
	// request that was being served then may be the cause.
	Faulted bool
	// Refused is told of a request that was given up because it ends the process
	// each time it is served.
	Refused func(op string)

	forgetful bool       // in tests: requests are done again as if nothing was known of them
	stall     func(step) // in tests: called between the steps of a request and of taking over
}

// step is a moment after which a death leaves another state than a moment before.
type step int

const (
	stepRead     step = iota // a request was handed over
	stepServing              // it may have effects
	stepDone                 // it has had them
	stepAnswered             // its reply is recorded
	stepReplied              // the kernel has the reply
	stepTakeOver             // something of a mount was taken over
	stepTransfer             // a count of references, or what belongs to it, has changed
)

func (k *Keep) after(s step) {
	if k != nil && k.stall != nil {
		k.stall(s)
	}
}

// resumes says that there is a mount to go on with.
func (k *Keep) resumes() bool { return k != nil && k.Device >= 0 && k.Journal >= 0 }

// coldAfter is how long after the start a process that goes on with a mount waits
// for its key before it takes away what the kernel has cached: with the 500 ms of
// the drain, within the promised second.
const coldAfter = 400 * time.Millisecond

// takeOver goes on with the mount that an earlier process served: the journal
// tells which nodes and handles the kernel knows, and which requests it waits for.
func (f *Filesystem) takeOver() (*loop, error) {
	k := f.options.Keep
	header, err := ReadHeader(f.lower)
	if err != nil {
		return nil, err
	}
	j, err := openJournal(k.Journal, header.Volume)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCannotTakeOver, err)
	}
	j.stall = k.after
	l := newLoop(f, k.Device, j)
	if request, reply := j.savedInit(); request != nil {
		if err := l.sameAgreement(request, reply); err != nil {
			return nil, err
		}
		l.agreed(request, reply)
	}
	k.after(stepTakeOver)
	if (f.nodes.byNumber() != nil) != (j.head.numbers.Load() == 1) {
		return nil, fmt.Errorf("%w: the kernel knows the inodes by lower file handles where byokd has CAP_DAC_READ_SEARCH, by numbers where not, and that has changed", ErrCannotTakeOver)
	}
	held, err := k.Held()
	if err != nil {
		return nil, fmt.Errorf("take over the inodes that the keeper holds: %w", err)
	}
	k.after(stepTakeOver)
	j.settleReplies(l.stillWaits)
	f.nodes.takeOver(j, held)
	k.after(stepTakeOver)
	l.forgetUnfinished()
	k.after(stepTakeOver)
	f.nodes.recover(j)
	k.after(stepTakeOver)
	f.handles.recover(j, f.nodes)
	k.after(stepTakeOver)
	f.nodes.letGo()
	return l, nil
}

// sameAgreement refuses to go on where this byokd would have agreed on something
// else with the kernel: it cannot be agreed on anew before the next mount.
func (l *loop) sameAgreement(request, reply []byte) error {
	s, err := l.buildSlot(nil)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(s.memory) }()
	n, code := s.server.HandleRequest([][]byte{request}, [][]byte{s.out})
	if !code.Ok() || string(s.out[:n]) != string(reply) {
		return fmt.Errorf("%w: it would agree on another protocol with the kernel", ErrCannotTakeOver)
	}
	return nil
}

// forgetUnfinished takes back the handles that requests without a recorded reply have
// given: they will be served again, and give them anew.
func (l *loop) forgetUnfinished() {
	for _, s := range l.journal.slots {
		r := s.record
		if s.pending() == nil || r.phase.Load() == phaseAnswered {
			continue
		}
		if fh := r.handle.Swap(0); fh != 0 {
			l.journal.dropHandle(fh)
		}
	}
}

// redo answers the requests that an earlier process has left. Each gets a
// goroutine, as it had one there: they may wait for each other.
func (l *loop) redo() {
	if l.journal == nil {
		return
	}
	for _, e := range l.journal.keptAside() {
		l.wait(&waiter{class: keyguard.Class(e.class & 1), began: time.Now(), entry: e, request: e.request[:e.length.Load()]})
	}
	kept := l.journal.slots
	l.journal.slots = nil
	for _, k := range kept {
		request := k.pending()
		if request == nil {
			k.settle(0)
			l.journal.retire(k)
			continue
		}
		s, err := l.buildSlot(k)
		if err != nil {
			panic("fs: no memory for a request that was left: " + err.Error()) // the next process may have it
		}
		l.mu.Lock()
		l.taken++
		s.span = l.span
		l.mu.Unlock()
		l.serving.Add(1)
		go func() {
			defer l.serving.Done()
			l.redoOne(s, request)
			k.settle(len(request))
			l.give(s)
		}()
	}
}

func (l *loop) redoOne(s *slot, request []byte) {
	s.call.begin(headerOf(request))
	s.call.began = time.Now()
	r, k := s.kept.record, l.fs.options.Keep
	if k.forgetful {
		r.phase.Store(phaseIdle)
	}
	switch r.phase.Load() {
	case phaseAnswered:
		if reply := r.replyOf(); reply != nil {
			l.reply(s, reply) // ENOENT where the kernel has it already
			k.after(stepReplied)
		}
		return
	case phaseServing:
		s.call.again = true
		if k.Faulted && r.attempts.Add(1) >= maxAttempts {
			l.log.Error("a request ends byokd each time it is served: it fails with EIO, please report it",
				zap.String("op", s.call.name()), zap.Uint64("inode", s.call.header.NodeId))
			if k.Refused != nil {
				k.Refused(s.call.name())
			}
			if answerable(&s.call.header) {
				l.reply(s, l.failure(s, s.call.header.Unique, unix.EIO))
			}
			return
		}
	}
	r.restoreRooms(request)
	l.answer(s, request)
	s.call.again = false
}

// awaitKeyOrDrop takes away what the kernel has cached of a mount that was taken
// over, unless the gate opens in time: the freeze may have come while nobody was
// there to carry it out. What is dirty stays, for nothing can be sealed; it is
// counted, as in a freeze that ran out of time.
func (f *Filesystem) awaitKeyOrDrop() {
	timer, stop := coldTimer()
	defer stop()
	if f.awaitKey(timer) || f.serving.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(f.serving, dropWithin)
	defer cancel()
	f.log.Info("the key cannot be used: what the kernel has cached of the mount is taken away")
	f.Draining(ctx, keyguard.Transition{}) // of no epoch: the first thaw takes it back, also when it comes meanwhile
	f.Frozen(ctx, keyguard.Transition{})
}

// dropWithin bounds that as a freeze does.
const dropWithin = 500 * time.Millisecond

// coldTimer fires when coldAfter is over.
func coldTimer() (over <-chan time.Time, stop func() bool) {
	timer := time.NewTimer(coldAfter)
	return timer.C, timer.Stop
}

// awaitKey waits until the gate is open, and reports whether it is: it may be over
// before, the key be refused, or the mount be given up. Without over (nil) a refusal is
// waited out.
func (f *Filesystem) awaitKey(over <-chan time.Time) bool {
	for {
		changed := f.guard.Changed() // before Status, so that no change falls between
		s := f.guard.Status()
		if s.Gate.Admits() {
			return true
		}
		if over != nil && s.Key != keyguard.Unknown && s.Key != keyguard.Enabled {
			return false
		}
		select {
		case <-changed:
		case <-over:
			return false
		case <-f.serving.Done():
			return false
		}
	}
}
