package fs

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// slot is the memory and the state of one request at a time.
type slot struct {
	in, out []byte
	server  *fuse.ProtocolServer
	call    call
	memory  []byte // one mapping, in | out | sealed | block; with a journal without in
	span    uint32 // loop.span when it was taken
	clean   bool   // its request waits at the gate, and nothing else is in it; guarded by loop.mu
	cold    bool   // its memory was given back and not used since; guarded by loop.mu

	kept *journalSlot // where in and the record of its request are; nil without a journal

	// lone is set while this slot's goroutine serves a WRITE or a FORGET and nobody
	// reads the device meanwhile; late then fires after lateAfter.
	lone atomic.Bool
	late *time.Timer
}

// take returns a slot: a used one while there are any. Where there is no memory for
// another it waits for one that is given back.
func (l *loop) take() *slot {
	for {
		s, err := l.tryTake()
		if err == nil {
			return s
		}
		l.lackSlots(err)
		l.mu.Lock()
		if len(l.free) == 0 {
			l.given.Wait()
		}
		l.mu.Unlock()
	}
}

// tryTake is take without waiting.
func (l *loop) tryTake() (*slot, error) {
	l.mu.Lock()
	span := l.span
	if n := len(l.free); n > 0 {
		s := l.takeAt(n - 1)
		l.mu.Unlock()
		return s, nil
	}
	l.taken++
	l.mu.Unlock()
	s, err := l.newSlot()
	if err != nil {
		l.mu.Lock()
		l.taken--
		if span != l.span {
			l.stale--
		}
		l.mu.Unlock()
		return nil, err
	}
	s.span = span
	return s, nil
}

// takeAt takes a free slot; mu is held.
func (l *loop) takeAt(i int) *slot {
	s := l.free[i]
	l.free = slices.Delete(l.free, i, i+1)
	l.unused = min(l.unused, len(l.free))
	l.taken++
	s.span, s.cold = l.span, false
	return s
}

// give takes a slot back. Beyond what a busy volume uses, slots come from a
// freeze that parked many calls, and their memory is returned.
func (l *loop) give(s *slot) {
	l.mu.Lock()
	if l.frozen {
		s.wipe()
	}
	l.taken--
	switch {
	case s.clean:
		s.clean = false
		l.clean--
	case s.span != l.span:
		l.stale--
	}
	if len(l.free) < keepSlots {
		if s.cold {
			l.free = slices.Insert(l.free, 0, s)
		} else {
			l.free = append(l.free, s)
		}
		l.given.Signal()
		s = nil
	}
	l.mu.Unlock()
	if s != nil {
		s.call.wipe()
		_ = unix.Munmap(s.memory)
		if s.kept != nil {
			l.journal.retire(s.kept)
		}
	}
}

// trimEvery is how often the memory of slots that were not used meanwhile is given back:
// after a burst that is 2 MiB of each, 3 with a journal.
const trimEvery = 30 * time.Second

// keepTrim trims, and tells the kernel what files take, until the connection ends or is
// left to a successor.
func (l *loop) keepTrim() {
	ticker := time.NewTicker(trimEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			l.trim()
			l.fs.retellSpace(l)
		case <-l.ended:
			return
		case <-l.fs.serving.Done():
			return
		}
	}
}

// trim gives back the memory of the slots that were not used since it was called last.
// Those are the first ones. It takes each meanwhile, as a request would: a freeze waits for it, and
// nobody waits for the kernel with the lock.
func (l *loop) trim() {
	l.mu.Lock()
	defer l.mu.Unlock()
	unused := l.unused
	for range unused {
		i := slices.IndexFunc(l.free, func(s *slot) bool { return !s.cold })
		if i < 0 || i >= unused {
			break
		}
		s := l.takeAt(i)
		l.mu.Unlock()
		s.giveBack()
		s.cold = true
		l.give(s)
		l.mu.Lock()
	}
	l.unused = len(l.free)
}

// newSlot maps a slot's memory. A page is resident only once it was used.
func (l *loop) newSlot() (*slot, error) {
	if l.journal == nil {
		return l.buildSlot(nil)
	}
	kept, err := l.journal.newSlot()
	if err != nil {
		return nil, err
	}
	s, err := l.buildSlot(kept)
	if err != nil {
		l.journal.retire(kept)
	}
	return s, err
}

// buildSlot makes a slot, around the journal's part of it where there is one.
func (l *loop) buildSlot(kept *journalSlot) (*slot, error) {
	size := 2*bufferSize + scratchSize + block
	if kept != nil {
		size -= bufferSize
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map a request buffer: %w", err)
	}
	memory[0] = 0 // the first fault in a mapping needs more than the later ones
	s := &slot{memory: memory, kept: kept}
	if kept != nil {
		s.in = kept.in
		s.call.record, s.call.slot = kept.record, kept
	} else {
		s.in, memory = memory[:bufferSize], memory[bufferSize:]
	}
	s.out = memory[:bufferSize]
	s.call.init(l.fs, memory[bufferSize:])
	s.call.parks = func() { l.parks(s) }
	s.call.aside = func(request []byte, class keyguard.Class) bool { return l.setAside(s, request, class) }
	s.call.wipeBehind = func(n int) { l.wipeBehind(s, n) }
	s.late = time.AfterFunc(time.Hour, s.call.parks)
	s.late.Stop()
	s.server = fuse.NewProtocolServer(&s.call, l.fs.mountOptions())
	l.init.Lock()
	defer l.init.Unlock()
	s.tell(l.init.request)
	return s, nil
}

// wipe gives the memory of a slot that is not in use back to the kernel, and with
// it every byte of plaintext that passed through. What was read into the journal
// was cleared when the request was settled.
func (s *slot) wipe() {
	_ = unix.Madvise(s.memory, unix.MADV_DONTNEED) // cannot fail for a mapping of ours
	s.call.wipe()
}

// giveBack is wipe, and gives back the buffer in the journal, too.
func (s *slot) giveBack() {
	s.wipe()
	if s.kept != nil {
		s.kept.shrink(0)
	}
}

// wipeBehind wipes a slot but for the first n bytes of its request, which waits at
// the gate: what earlier requests left is not to stay as long as it does.
func (l *loop) wipeBehind(s *slot, n int) {
	if s.kept != nil {
		s.kept.shrink(n)
		_ = unix.Madvise(s.memory, unix.MADV_DONTNEED)
	} else {
		kept := (int64(n) + kernelPage - 1) &^ (kernelPage - 1)
		clear(s.memory[n:kept])
		_ = unix.Madvise(s.memory[kept:], unix.MADV_DONTNEED)
	}
	s.call.wipe()
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.clean {
		return
	}
	s.clean = true
	l.clean++
	if s.span != l.span {
		l.stale--
	}
}

// wipe wipes the slots that are not in use, and until thaw each that is when its
// request has been answered.
func (l *loop) wipe() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = true
	l.span++
	l.stale = l.taken - l.clean
	for _, s := range l.free {
		s.giveBack()
	}
}

// atWork counts the requests being served.
func (l *loop) atWork() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.taken - int(l.waiting.Load())
}

// crowded reports whether so many requests are at work that no more are to be read. Those
// that wait at the gate in their slot have no thread and do not count.
func (l *loop) crowded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.taken-l.clean-int(l.waiting.Load()) > atWorkMax
}

// staleSlots counts the slots that hold what was there when wipe was called.
func (l *loop) staleSlots() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stale
}

func (l *loop) thaw() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen, l.lacking = false, false
}
