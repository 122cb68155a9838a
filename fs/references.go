package fs

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How often the kernel knows an inode, kept over deaths.
//
// Where a node id is an inode number, the number must not be given to another file
// while the kernel knows it, and so the inode is held, by descriptors here and with the
// keeper. Where it is a handle, so are those inodes whose last name is gone while somebody
// has them open. When to let one go is told by the kernel's references: each reply that names
// an inode gives one, a FORGET takes some back. A count that a death has made wrong
// would let an inode go too early, after which its number may be another file's, or
// never, and its space with it. So it is kept exactly, in the journal:
//
//   - A node's entry has the count. A slot has the list of the references that its
//     reply gives, and how many of its FORGETs have been carried out.
//   - The two change together (transfer): what is about to change is put down before.
//     All of it happens under nodeTable.mu, so that a death finds one of them half
//     done at the most, and the count tells which half.
//   - Whether the kernel has taken the reply of a request that a predecessor has left
//     is asked of the kernel (stillWaits). If so, its references are given. If not,
//     they are taken back, and the request is served anew, or its recorded reply
//     written again, whose references stay.

// transfer is a change of a count, and of the number in a slot that goes with it. It is
// under way while begun is not 0.
type transfer struct {
	begun    atomic.Uint32
	entry    uint32 // of the node
	old, new uint32 // counts
	slot     int64  // its offset in the journal
	field    uint32 // given or forgotten
	then     uint32 // what that becomes
}

const (
	given uint32 = iota
	forgotten
)

// The list of references that a request gives is in its buffer, behind the longest
// request that gives any: SYMLINK's, with a name and a target.
const (
	givesAt  = 8192
	maxGives = (bufferSize - givesAt) / 4
)

func (s *journalSlot) gives() []uint32 {
	return unsafe.Slice((*uint32)(unsafe.Pointer(&s.in[givesAt])), maxGives)
}

func (r *record) field(f uint32) *atomic.Uint32 {
	if f == forgotten {
		return &r.forgotten
	}
	return &r.given
}

// Counts are in the upper half of an entry's state.
func (e *entry) count() uint32 { return uint32(e.state.Load() >> 32) }

func (e *entry) setCount(n uint32) {
	e.state.Store(e.state.Load()&(1<<32-1) | uint64(n)<<32)
}

// transfer sets a node's count, and with it a number of the slot, nil where no slot
// goes with it. Callers hold the lock of the nodes.
func (j *journal) transfer(index, count uint32, s *journalSlot, field, then uint32) {
	e := j.nodes.at(index)
	if s == nil {
		e.setCount(count)
		return
	}
	t := &j.head.transfer
	t.entry, t.old, t.new, t.slot, t.field, t.then = index, e.count(), count, s.offset, field, then
	t.begun.Store(1)
	j.stall(stepTransfer)
	e.setCount(count)
	j.stall(stepTransfer)
	s.record.field(field).Store(then)
	t.begun.Store(0)
}

// finishTransfer brings to its end what a predecessor had begun, or forgets it.
func (j *journal) finishTransfer() {
	t := &j.head.transfer
	if t.begun.Load() == 0 {
		return
	}
	e := j.nodes.at(t.entry)
	for _, s := range j.slots {
		if e != nil && s.offset == t.slot && e.count() == t.new {
			s.record.field(t.field).Store(t.then)
		}
	}
	t.begun.Store(0)
}

// give counts a reference that the reply in a slot gives.
func (j *journal) give(index uint32, s *journalSlot) error {
	if s == nil {
		j.transfer(index, j.nodes.at(index).count()+1, nil, given, 0)
		return nil
	}
	n := s.record.given.Load()
	if n >= maxGives {
		return unix.ENFILE
	}
	s.gives()[n] = index
	j.transfer(index, j.nodes.at(index).count()+1, s, given, n+1)
	return nil
}

// takeBack takes back the last reference that the reply in a slot would give, and
// returns the entry of the node; ok is false when there is none.
func (j *journal) takeBack(s *journalSlot) (index uint32, ok bool) {
	n := min(s.record.given.Load(), maxGives)
	if n == 0 {
		return 0, false
	}
	index = s.gives()[n-1]
	if e := j.nodes.at(index); e == nil {
		s.record.given.Store(n - 1) // damaged
	} else {
		j.transfer(index, max(e.count(), 1)-1, s, given, n-1)
	}
	return index, true
}

// settleReplies finds out which of the requests that a predecessor has left were
// answered, and takes back what the replies of the others would have given, for they
// are served anew.
func (j *journal) settleReplies(stillWaits func(unique uint64) bool) {
	j.finishTransfer()
	for _, s := range j.slots {
		request := s.pending()
		if request == nil || !answerable(headerOf(request)) {
			continue
		}
		if !stillWaits(headerOf(request).Unique) {
			s.settle(len(request))
			continue
		}
		if s.record.phase.Load() == phaseAnswered {
			continue
		}
		for ok := true; ok; {
			_, ok = j.takeBack(s)
		}
	}
}

// stillWaits asks the kernel whether it waits for the reply to a request: by one to an
// INTERRUPT of it that says nothing (fs/fuse/dev.c, fuse_dev_do_write).
func (l *loop) stillWaits(unique uint64) bool {
	const interruptBit = 1 // FUSE_INT_REQ_BIT
	var s slot
	s.out = make([]byte, outHeaderSize)
	for {
		_, err := unix.Write(l.dev, l.failure(&s, unique|interruptBit, 0))
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return err == nil
		}
	}
}

// byNumber returns the table of ids where they are inode numbers, and inodes held by
// descriptors, of which the keeper has copies; nil where they are handles.
func (t *nodeTable) byNumber() *tableIDs {
	ids, _ := t.ids.(*tableIDs)
	return ids
}

// give counts one more reference of the kernel to a node; mu is held.
func (t *nodeTable) give(n *node, s *journalSlot) error {
	if n.entry != 0 {
		if err := t.journal.give(n.entry-1, s); err != nil {
			return err
		}
	}
	n.lookups.Add(1)
	return nil
}

// takeBack takes back a reference that was given to a reply which does not leave, the
// last one.
func (t *nodeTable) takeBack(id uint64, s *journalSlot) {
	if s == nil {
		t.forget(id, 1, nil, 0)
		return
	}
	var left released
	t.mu.Lock()
	if index, ok := t.journal.takeBack(s); ok {
		left = t.uncount(t.journal.nodes.at(index).key.Load(), 1)
	}
	t.mu.Unlock()
	t.drop(left)
}

// countForget takes a FORGET, the nth of its request, off the count in the journal;
// mu is held. It reports false where that was done before.
func (t *nodeTable) countForget(id, count uint64, s *journalSlot, nth uint32) bool {
	if t.journal == nil {
		return true
	}
	if s != nil && nth <= s.record.forgotten.Load() {
		return false
	}
	entry := t.idle[id].entry
	if n := t.byID[id]; n != nil {
		entry = n.entry
	}
	if entry == 0 {
		return true
	}
	old := uint64(t.journal.nodes.at(entry - 1).count())
	t.journal.transfer(entry-1, uint32(old-min(old, count)), s, forgotten, nth)
	return true
}

// takeOver takes over the journal and the inodes that the keeper holds, and marks those
// as held. What the journal does not tell of was about to be named to the kernel, or was
// let go of.
func (t *nodeTable) takeOver(j *journal, held map[uint64]int) {
	t.keepJournal(j)
	ids := t.byNumber()
	known := map[uint64]bool{}
	j.nodes.each(func(index uint32, e *entry) {
		id := e.key.Load()
		_, isHeld := held[id]
		if known[id] || !isHeld && ids != nil {
			j.nodes.remove(index) // damaged
			return
		}
		known[id] = true
		e.state.And(^uint64(nodeHeld))
		if isHeld {
			e.state.Or(nodeHeld)
		}
	})
	for id, fd := range held {
		if !known[id] {
			t.keep.Release(id)
			t.closing.close(descriptors{int32(fd) + 1})
			delete(held, id)
		}
	}
	if ids != nil {
		ids.adopt(held)
		return
	}
	for _, fd := range held { // the keeper's keep the inodes, which open by their ids
		unix.Close(fd)
	}
}

// letGo gives up the inodes that the kernel does not know any more and nobody has open:
// a predecessor had no time to. Their callers wait, and are not to wait for the blocks of
// deleted files as well.
func (t *nodeTable) letGo() {
	var left []released
	t.mu.Lock()
	for id, e := range t.idle {
		if e.lookups() == 0 {
			t.forgetIdle(id, 0)
		}
	}
	for _, n := range t.byID {
		if n.lookups.Load() == 0 {
			left = append(left, t.settle(n))
		}
	}
	t.mu.Unlock()
	for _, r := range left {
		t.dropSoon(r)
	}
}
