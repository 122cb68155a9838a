package fs

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reopened opens a journal as the next process does: by a descriptor of its own.
func reopened(t *testing.T, j *journal) (*journal, error) {
	t.Helper()
	fd, err := unix.Dup(j.fd)
	if err != nil {
		t.Fatal(err)
	}
	next, err := openJournal(fd, j.head.volume)
	if err == nil {
		t.Cleanup(next.close)
	} else {
		unix.Close(fd)
	}
	return next, err
}

func newTestJournal(t *testing.T) *journal {
	t.Helper()
	j, err := newJournal([16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.close)
	return j
}

// TestJournalGoesOn: what one process has put down the next one finds, and numbers are
// not given twice.
func TestJournalGoesOn(t *testing.T) {
	j := newTestJournal(t)
	j.saveInit([]byte("request"), []byte("reply"))
	s, err := j.newSlot()
	if err != nil {
		t.Fatal(err)
	}
	s.populate()
	request := make([]byte, inHeaderSize)
	binary.NativeEndian.PutUint32(request, inHeaderSize)
	copy(s.in, request)
	s.record.serve()
	given := map[uint64]bool{}
	handles := map[uint64]uint64{}
	for i := range uint64(3 * entriesPerChunk) { // more than one chunk
		fh, err := j.addHandle(nil, i+1, handleWrites)
		if err != nil || given[fh] {
			t.Fatalf("handle %#x given twice, or %v", fh, err)
		}
		given[fh] = true
		if handles[fh] = i + 1; i%3 == 0 {
			j.dropHandle(fh)
			delete(handles, fh)
		}
	}
	for fh := range handles {
		j.markHandle(fh, unix.ENOSPC)
		break
	}
	next, err := reopened(t, j)
	if err != nil {
		t.Fatal(err)
	}
	if request, reply := next.savedInit(); string(request) != "request" || string(reply) != "reply" {
		t.Errorf("INIT %q, %q", request, reply)
	}
	if len(next.slots) != 1 || string(next.slots[0].pending()) != string(request) || next.slots[0].record.phase.Load() != phaseServing {
		t.Errorf("%d slots", len(next.slots))
	}
	marked := 0
	next.opened.each(func(index uint32, e *entry) {
		fh := e.state.Load()>>32<<32 | uint64(index+1)
		if handles[fh] != e.key.Load() || e.state.Load()&handleWrites == 0 {
			t.Errorf("handle %#x of %d, want %d", fh, e.key.Load(), handles[fh])
		}
		if untold(e.state.Load()) == unix.ENOSPC {
			marked++
		}
		delete(handles, fh)
	})
	if len(handles) > 0 || marked != 1 {
		t.Errorf("%d handles are missing, %d are to be told", len(handles), marked)
	}
	for range entriesPerChunk {
		fh, err := next.addHandle(nil, 1, 0)
		if err != nil || given[fh] {
			t.Fatalf("the next process gives handle %#x again, or %v", fh, err)
		}
		given[fh] = true
	}
}

// TestJournalDamaged: what is no journal of this volume and version is refused, and
// nothing that could be in one makes the process that opens it crash.
func TestJournalDamaged(t *testing.T) {
	made := func(t *testing.T) *journal {
		j := newTestJournal(t)
		for range 2 {
			if _, err := j.newSlot(); err != nil {
				t.Fatal(err)
			}
			if _, err := j.addHandle(nil, 1, 0); err != nil {
				t.Fatal(err)
			}
		}
		return j
	}
	for _, c := range []struct {
		name   string
		damage func(*journal)
		says   string
	}{
		{"none", func(*journal) {}, ""},
		{"no magic", func(j *journal) { j.head.magic++ }, "damaged"},
		{"of another version", func(j *journal) { j.head.version++ }, "version"},
		{"cut short", func(j *journal) { _ = unix.Ftruncate(j.fd, 4096) }, "is none"},
		{"a part cut off", func(j *journal) { _ = unix.Ftruncate(j.fd, j.size-1) }, "outside"},
		{"a part of no kind", func(j *journal) { j.head.chunk[0] |= 7 << 48 }, "kind"},
		{"a part in the head", func(j *journal) { j.head.chunk[0] &^= 1<<48 - 1 }, "outside"},
		{"a part far away", func(j *journal) { j.head.chunk[0] |= 1<<48 - 1 }, "outside"},
		{"too many parts", func(j *journal) { j.head.chunks.Store(1 << 60) }, "outside"}, // those that are none
	} {
		t.Run(c.name, func(t *testing.T) {
			j := made(t)
			c.damage(j)
			_, err := reopened(t, j)
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
	t.Run("of another volume", func(t *testing.T) {
		j := made(t)
		if _, err := openJournal(j.fd, [16]byte{2}); err == nil || !strings.Contains(err.Error(), "another volume") {
			t.Error(err)
		}
	})
	t.Run("anything", func(t *testing.T) {
		r := rand.New(rand.NewPCG(7, 7))
		for range 200 {
			j := made(t)
			head := unsafe.Slice((*byte)(unsafe.Pointer(j.head)), headSize)
			for range 1 + r.IntN(20) {
				head[r.IntN(int(headSize))] = byte(r.Uint32())
			}
			slot, err := j.newSlot()
			if err == nil {
				slot.populate()
				for range 64 {
					slot.in[r.IntN(256)] = byte(r.Uint32())
				}
				memory := unsafe.Slice((*byte)(unsafe.Pointer(slot.record)), recordRoom)
				for range 200 {
					memory[r.IntN(recordRoom)] = byte(r.Uint32())
				}
			}
			if next, err := reopened(t, j); err == nil {
				for _, s := range next.slots {
					if request := s.pending(); request != nil {
						s.record.restoreRooms(request)
					}
					s.record.replyOf()
				}
				next.savedInit()
			}
		}
	})
}

// TestJournalFull: a journal that has no room for another part says so; what there is
// of it goes on.
func TestJournalFull(t *testing.T) {
	j := newTestJournal(t)
	fh, err := j.addHandle(nil, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	j.head.chunks.Store(maxChunks)
	for range entriesPerChunk - 1 {
		if _, err := j.addHandle(nil, 1, 0); err != nil {
			t.Fatalf("in a part that there is: %v", err)
		}
	}
	if _, err := j.addHandle(nil, 1, 0); err == nil {
		t.Error("a handle that has no place")
	}
	if _, err := j.newSlot(); err == nil {
		t.Error("a slot that has no place")
	}
	j.dropHandle(fh)
	if again, err := j.addHandle(nil, 1, 0); err != nil || again == fh {
		t.Errorf("in the place of one that was dropped: %#x, %v", again, err)
	}
}
