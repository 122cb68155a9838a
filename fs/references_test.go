package fs

import (
	"errors"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// journalWithNode returns a journal with a slot, in which there is a request, and with
// one node, known to the kernel count times.
func journalWithNode(t *testing.T, opcode, count uint32) (*journal, *journalSlot, uint32) {
	t.Helper()
	j := newTestJournal(t)
	index, e, err := j.nodes.reserve()
	if err != nil {
		t.Fatal(err)
	}
	e.key.Store(77)
	e.setCount(count)
	s, err := j.newSlot()
	if err != nil {
		t.Fatal(err)
	}
	s.populate()
	*headerOf(s.in) = fuse.InHeader{Length: inHeaderSize, Opcode: opcode, Unique: 2}
	j.stall = func(step) {}
	return j, s, index
}

// TestTransferCutShort: a death at any moment of a change leaves the count of a node
// and the number in the slot that goes with it as they were, or both changed.
func TestTransferCutShort(t *testing.T) {
	const opLookup = 1
	for _, c := range []struct {
		name                   string
		change                 func(j *journal, s *journalSlot, index uint32)
		field                  uint32
		countThen, numberThen  uint32
		countFirst, numberFrom uint32
	}{
		{"given", func(j *journal, s *journalSlot, index uint32) { _ = j.give(index, s) }, given, 4, 2, 3, 1},
		{"taken back", func(j *journal, s *journalSlot, _ uint32) { j.takeBack(s) }, given, 2, 0, 3, 1},
		{"forgotten", func(j *journal, s *journalSlot, index uint32) { j.transfer(index, 0, s, forgotten, 1) }, forgotten, 0, 1, 3, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			for cut := range 3 {
				j, s, index := journalWithNode(t, opLookup, c.countFirst)
				if c.field == given {
					s.gives()[0] = index
				}
				s.record.field(c.field).Store(c.numberFrom)
				steps := 0
				j.stall = func(step) {
					if steps == cut {
						panic("dead")
					}
					steps++
				}
				func() {
					defer func() { _ = recover() }()
					c.change(j, s, index)
				}()
				next, err := reopened(t, j)
				if err != nil {
					t.Fatal(err)
				}
				next.finishTransfer()
				wantCount, wantNumber := c.countThen, c.numberThen
				if cut == 0 { // before the count
					wantCount, wantNumber = c.countFirst, c.numberFrom
				}
				count, number := next.nodes.at(index).count(), next.slots[0].record.field(c.field).Load()
				if count != wantCount || number != wantNumber || next.head.transfer.begun.Load() != 0 {
					t.Errorf("death at step %d: count %d and number %d, want %d and %d", cut, count, number, wantCount, wantNumber)
				}
			}
		})
	}
}

// TestRepliesSettled: what a predecessor has given is given if the kernel has the
// reply, or will have the one that is recorded; else it is taken back.
func TestRepliesSettled(t *testing.T) {
	const opLookup, opCreate = 1, 35
	for _, c := range []struct {
		name            string
		opcode          uint32
		answered, waits bool
		want            uint32 // count, of 5 with two given
		pending         bool   // it is served, or answered, again
	}{
		{"a lookup that the kernel has an answer to", opLookup, false, false, 5, false},
		{"a lookup without an answer", opLookup, false, true, 3, true},
		{"a call whose answer is recorded", opCreate, true, true, 5, true},
		{"a call whose recorded answer the kernel has", opCreate, true, false, 5, false},
		{"a FORGET, for which the kernel never waits", opForget, false, false, 5, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			j, s, index := journalWithNode(t, c.opcode, 3)
			if c.opcode == opForget {
				j.nodes.at(index).setCount(5)
			} else {
				for range 2 {
					if err := j.give(index, s); err != nil {
						t.Fatal(err)
					}
				}
			}
			s.record.serve()
			if c.answered {
				s.record.answer(make([]byte, outHeaderSize))
			}
			next, err := reopened(t, j)
			if err != nil {
				t.Fatal(err)
			}
			next.stall = func(step) {}
			next.settleReplies(func(unique uint64) bool {
				if unique != 2 {
					t.Errorf("asked for request %d", unique)
				}
				return c.waits
			})
			if got := next.nodes.at(index).count(); got != c.want {
				t.Errorf("the kernel is taken to know the node %d times, want %d", got, c.want)
			}
			if pending := next.slots[0].pending() != nil; pending != c.pending {
				t.Errorf("pending: %v", pending)
			}
		})
	}
}

// TestHandleOrNumber: a worker that has other rights than the one before does not take
// over what it would know by other ids.
func TestHandleOrNumber(t *testing.T) {
	k := newKeptVolume(t)
	for _, counted := range []bool{false, true} {
		o := Options{Keep: &Keep{Device: 0}, tableOfIDs: !counted}
		j, err := newJournal([16]byte{})
		if err != nil {
			t.Fatal(err)
		}
		if counted {
			j.head.numbers.Store(1)
		}
		header, err := ReadHeader(k.dir + "/lower")
		if err != nil {
			t.Fatal(err)
		}
		j.head.volume = header.Volume
		o.Keep.Journal = j.fd
		root, err := unix.Open(k.dir+"/lower", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(root)
		f := &Filesystem{lower: k.dir + "/lower", options: o, nodes: newNodeTable(newLowerIDs(root, o.tableOfIDs, true), root)}
		if _, err := f.takeOver(); !errors.Is(err, ErrCannotTakeOver) || !strings.Contains(err.Error(), "by lower file handles") {
			t.Errorf("counted before %v, now %v: %v", counted, o.tableOfIDs, err)
		}
	}
}

// TestOnlyWhatIsHeldIsReleased: the keeper is not told of each of a million inodes that
// the kernel forgets, but of those that it holds.
func TestOnlyWhatIsHeldIsReleased(t *testing.T) {
	for _, held := range []bool{false, true} {
		j, _, index := journalWithNode(t, opForget, 1)
		if held {
			j.nodes.at(index).state.Or(nodeHeld)
		}
		released := 0
		nodes := newNodeTable(&handleIDs{}, -1)
		nodes.keep = &Keep{Release: func(node uint64) {
			if released++; node != 77 {
				t.Errorf("node %d is released", node)
			}
		}}
		nodes.keepJournal(j)
		nodes.recover(j)
		nodes.forget(77, 1, nil, 1)
		if (released == 1) != held || released > 1 || j.nodes.at(index).key.Load() != 0 || nodes.known() != 1 {
			t.Errorf("held %v: released %d times, entry of node %d, %d nodes known", held, released, j.nodes.at(index).key.Load(), nodes.known())
		}
	}
}

// TestTakenOverAsHeld: what the keeper holds and what the journal says it holds are made
// one, whatever a death has left between the two.
func TestTakenOverAsHeld(t *testing.T) {
	j := newTestJournal(t)
	entries := map[uint64]*entry{}
	for id, state := range map[uint64]uint64{11: 0, 12: nodeHeld, 13: nodeHeld, 14: 0} {
		_, e, err := j.nodes.reserve()
		if err != nil {
			t.Fatal(err)
		}
		e.state.Store(3<<32 | state)
		e.key.Store(id)
		entries[id] = e
	}
	held := map[uint64]int{}
	for _, id := range []uint64{11, 12, 15} { // 11: not yet said to be, 13: not any more, 15: without an entry
		fd, err := unix.MemfdCreate("held", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		held[id] = fd
	}
	var released []uint64
	nodes := newNodeTable(&handleIDs{}, -1)
	nodes.keep = &Keep{Release: func(node uint64) { released = append(released, node) }}
	nodes.takeOver(j, held)
	for id, want := range map[uint64]uint64{11: nodeHeld, 12: nodeHeld, 13: 0, 14: 0} {
		if got := entries[id].state.Load(); got != 3<<32|want {
			t.Errorf("node %d: state %#x, want flag %d and 3 references", id, got, want)
		}
	}
	if len(released) != 1 || released[0] != 15 {
		t.Errorf("released: %v, want what has no entry", released)
	}
}
