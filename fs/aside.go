package fs

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A call that waits at the gate waits without a slot: there may be as many of them
// as the machine has threads, and a slot is 3 MiB of address space, two mappings, of
// which a process has 65,530, and some 30 KiB of memory. What waits is a copy of the
// request, in the journal where there is one, and a goroutine; when the gate opens
// it takes a slot again.
//
// WRITEs keep theirs, whose size is their data's: there are as many as were under way
// when the gate closed, since what begins later waits with its first question. So does
// what was begun by an earlier process, of which the slot's record tells more.

const (
	// asideRoom is what is set aside: all requests but WRITEs and the setting of
	// long attributes and symlinks. Two names of 255 bytes fit.
	asideRoom = 1024 - 16

	// resumeAtOnce is how many calls that waited are served at a time when the gate
	// has opened: each has a slot then.
	resumeAtOnce = 64
)

// asideEntry is a request that waits, in the journal. It counts while length is not
// 0, and no slot has a request of the same number, to which it has been copied.
type asideEntry struct {
	length  atomic.Uint32
	class   uint32 // keyguard.Class
	_       uint64
	request [asideRoom]byte
}

const asidesPerChunk = entryChunk / int(unsafe.Sizeof(asideEntry{}))

// asides are the entries of the journal for requests that wait.
type asides struct {
	mu      sync.Mutex
	chunks  [][]asideEntry // guarded by mu
	offsets []int64        // guarded by mu; of the chunks in the journal
	free    []*asideEntry  // guarded by mu
	used    int            // guarded by mu
}

func asidesOf(memory []byte) []asideEntry {
	return unsafe.Slice((*asideEntry)(unsafe.Pointer(&memory[0])), asidesPerChunk)
}

// setAside puts a copy of a request into the journal.
func (j *journal) setAside(request []byte, class keyguard.Class) (*asideEntry, error) {
	a := &j.asides
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		offset, memory, err := j.extend(asideChunk, entryChunk)
		if err != nil {
			return nil, err
		}
		a.add(offset, memory)
	}
	e := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.used++
	copy(e.request[:], request)
	e.class = uint32(class)
	e.length.Store(uint32(len(request)))
	return e, nil
}

// add takes in a chunk: a new one, or one of an earlier process.
func (a *asides) add(offset int64, memory []byte) {
	chunk := asidesOf(memory)
	a.chunks, a.offsets = append(a.chunks, chunk), append(a.offsets, offset)
	for i := range chunk {
		if chunk[i].length.Load() == 0 {
			a.free = append(a.free, &chunk[i])
		} else {
			a.used++
		}
	}
}

// dropAside forgets a request that waited. With the last one goes the memory of all.
func (j *journal) dropAside(e *asideEntry) {
	a := &j.asides
	a.mu.Lock()
	defer a.mu.Unlock()
	n := min(e.length.Swap(0), asideRoom)
	clear(e.request[:n])
	a.free = append(a.free, e)
	if a.used--; a.used == 0 {
		for _, offset := range a.offsets {
			j.punch(offset, entryChunk)
		}
	}
}

// keptAside returns the requests that waited when an earlier process ended. What it
// had copied to a slot is there.
func (j *journal) keptAside() (kept []*asideEntry) {
	served := map[uint64]bool{}
	for _, s := range j.slots {
		if request := s.pending(); request != nil {
			served[headerOf(request).Unique] = true
		}
	}
	for _, chunk := range j.asides.chunks {
		for i := range chunk {
			e := &chunk[i]
			n := e.length.Load()
			switch {
			case n == 0:
			case n < inHeaderSize || n > asideRoom || served[headerOf(e.request[:]).Unique]:
				j.dropAside(e)
			default:
				kept = append(kept, e)
			}
		}
	}
	return kept
}

// waiter is a call that was set aside.
type waiter struct {
	parkedCall
	class   keyguard.Class
	began   time.Time
	request []byte
	entry   *asideEntry // where request is; nil without a journal
	ctx     context.Context
}

// setAside has a request that is in a slot wait without it. It reports whether it
// could: where there is no room in the journal, the slot is kept.
func (l *loop) setAside(s *slot, request []byte, class keyguard.Class) bool {
	c := &s.call
	if len(request) > asideRoom || c.header.Opcode == opWrite || c.again || c.record != nil && c.record.phase.Load() != phaseIdle {
		return false
	}
	w := &waiter{class: class, began: c.began}
	if l.journal == nil {
		w.request = append([]byte(nil), request...)
	} else {
		e, err := l.journal.setAside(request, class)
		if err != nil {
			return false
		}
		w.entry, w.request = e, e.request[:len(request)]
	}
	l.wait(w)
	return true
}

// wait lets a call wait that was set aside.
func (l *loop) wait(w *waiter) {
	header := headerOf(w.request)
	w.pid, w.node = header.Pid, header.NodeId
	w.off, w.size = heldPages(header.Opcode, w.request)
	w.ctx, w.leave = context.WithCancel(l.fs.serving)
	l.fs.parking.add(&w.parkedCall)
	l.serving.Add(1)
	go l.resume(w)
}

// resume serves a call that was set aside when the gate admits it.
func (l *loop) resume(w *waiter) {
	defer l.serving.Done()
	err := l.fs.awaitGate(w.ctx, w.class, uint32(w.node))
	if err == nil {
		select {
		case l.resuming <- struct{}{}:
			defer func() { <-l.resuming }()
		case <-w.ctx.Done():
			err = w.ctx.Err()
		}
	}
	l.fs.parking.remove(&w.parkedCall)
	w.leave()
	if err != nil {
		if !l.mute.Load() {
			l.refuse(headerOf(w.request).Unique, errnoOf(err))
		}
		l.drop(w)
		return
	}
	s := l.take()
	n := len(w.request)
	copy(s.in[4:n], w.request[4:])
	(*atomic.Uint32)(unsafe.Pointer(&s.in[0])).Store(uint32(n)) // last: now it is the slot's, see journalSlot.length
	l.fs.options.Keep.after(stepRead)
	l.drop(w)
	s.call.began = w.began
	l.answer(s, s.in[:n])
	l.settle(s, n)
	l.give(s)
}

// drop forgets the copy.
func (l *loop) drop(w *waiter) {
	if w.entry != nil {
		l.journal.dropAside(w.entry)
	} else {
		clear(w.request)
	}
	w.request, w.entry = nil, nil
}

// refuse answers a request that has no slot with an errno.
func (l *loop) refuse(unique uint64, errno unix.Errno) {
	var s slot
	s.out = make([]byte, outHeaderSize)
	l.reply(&s, l.failure(&s, unique, errno))
}

// awaitGate waits until the gate admits a class, without entering.
func (f *Filesystem) awaitGate(ctx context.Context, class keyguard.Class, lane uint32) error {
	select {
	case <-f.unlocked:
	case <-ctx.Done():
		return ctx.Err()
	}
	pass, err := f.guard.Enter(ctx, class, lane)
	if err == nil {
		pass.Exit()
	}
	return err
}

// lackSlots says that requests are not read for want of memory for them.
func (l *loop) lackSlots(err error) {
	l.mu.Lock()
	told, n := l.lacking, l.taken
	l.lacking = true
	l.mu.Unlock()
	if !told {
		l.log.Error("no room for another request: calls on the mount are taken up as those before them end", zap.Int("in hand", n), zap.Error(err))
	}
}
