package fs

import (
	"sync/atomic"
	"unsafe"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The request log: the journal keeps each request from the moment the kernel hands
// it over until its reply was written, so that the next process can answer what
// this one leaves behind. For a request that changes something it keeps the reply,
// too, before it is written: once answered, another process or thread may build on
// it, and it must not be done again.
//
//	read(2) into the buffer        length ≠ 0: there is a request
//	phaseServing                   it may have had effects
//	reply stored, phaseAnswered    it has had them all
//	write(2) of the reply          the kernel takes one reply for each request
//	length = 0, buffer cleared, phaseIdle
//
// Buffers are resident before they are read into: a page fault in the kernel's copy
// with a SIGKILL pending ends the request with EIO.

// maxAttempts is how often a request is served that has ended the process by a
// fault; then it gets EIO.
const maxAttempts = 3

// Phases of a record.
const (
	phaseIdle uint32 = iota
	phaseServing
	phaseAnswered
)

// record is what is known of the request in a slot's buffer.
type record struct {
	phase    atomic.Uint32
	attempts atomic.Uint32 // times that serving it has ended the process
	length   atomic.Uint32 // of reply
	given    atomic.Uint32 // references to nodes that the reply gives, see references.go
	handle   atomic.Uint64 // given by it, 0 for none
	before   atomic.Uint64 // what was there before it, see call.before
	reply    [maxLogged]byte

	forgotten atomic.Uint32 // how many of the request's FORGETs were carried out

	rooms atomic.Uint32 // bytes of room that are saved; see saveRooms
	room  [roomBefore * scratchBlocks]byte
}

// eachRoom calls use with the bytes of a WRITE of data at off that sealing takes, for
// moments, for the lengths of blocks: those before each block but the first
// (sealWhole).
func eachRoom(data []byte, off int64, use func(room []byte)) {
	first, _ := seal.BlockAt(off)
	for index := first + 1; ; index++ {
		at := seal.BlockStart(index) - off
		if at >= int64(len(data)) {
			return
		}
		if at >= roomBefore {
			use(data[at-roomBefore : at])
		}
	}
}

// saveRooms saves those bytes: a kill in the midst of sealing leaves them changed in
// the buffer, from which the WRITE is to be done again.
func (r *record) saveRooms(data []byte, off int64) {
	n := 0
	eachRoom(data, off, func(room []byte) { n += copy(r.room[n:], room) })
	r.rooms.Store(uint32(n))
}

// restoreRooms puts them back into a request.
func (r *record) restoreRooms(request []byte) {
	saved := r.room[:min(r.rooms.Load(), uint32(len(r.room)))]
	in := (*fuse.WriteIn)(unsafe.Pointer(&request[0]))
	if len(saved) == 0 || in.Opcode != opWrite || len(request) < int(unsafe.Sizeof(*in))+int(in.Size) {
		return
	}
	eachRoom(request[unsafe.Sizeof(*in):][:in.Size], int64(in.Offset), func(room []byte) { saved = saved[copy(room, saved):] })
}

// maxLogged is room for the longest reply of a call that changes something:
// CREATE's, 160 bytes.
const maxLogged = 256

var _ [recordRoom - unsafe.Sizeof(record{})]struct{}

// loggedCalls are those that change something: their replies are recorded.
const loggedCalls = 1<<4 | 1<<6 | 1<<8 | 1<<9 | 1<<10 | 1<<11 | 1<<12 | 1<<13 | 1<<14 | // setattr, symlink, mknod, mkdir, unlink, rmdir, rename, link, open
	1<<opWrite | 1<<21 | 1<<24 | 1<<27 | // setxattr, removexattr, opendir
	1<<35 | 1<<43 | 1<<45 | 1<<47 | 1<<51 // create, fallocate, rename2, copy_file_range, tmpfile

func isLogged(opcode uint32) bool { return opcode < 64 && loggedCalls>>opcode&1 != 0 }

// serve marks that the request may have effects from now on.
func (r *record) serve() { r.phase.Store(phaseServing) }

// answer records the reply to a request, all of whose effects there are.
func (r *record) answer(reply []byte) {
	if len(reply) > len(r.reply) {
		return // none is as long
	}
	copy(r.reply[:], reply)
	r.length.Store(uint32(len(reply)))
	r.phase.Store(phaseAnswered)
}

// journalSlot is a slot's part of the journal.
type journalSlot struct {
	journal  *journal
	offset   int64 // of the chunk
	in       []byte
	record   *record
	resident bool // all of in is; owned by who has the slot
}

func (j *journal) slotAt(offset int64, memory []byte) *journalSlot {
	return &journalSlot{journal: j, offset: offset, in: memory[recordRoom:][:bufferSize:bufferSize], record: (*record)(unsafe.Pointer(&memory[0]))}
}

// newSlot returns room for a request.
func (j *journal) newSlot() (*journalSlot, error) {
	j.mu.Lock()
	if n := len(j.spare); n > 0 {
		s := j.spare[n-1]
		j.spare = j.spare[:n-1]
		j.mu.Unlock()
		return s, nil
	}
	j.mu.Unlock()
	offset, memory, err := j.extend(slotsChunk, slotChunk)
	if err != nil {
		return nil, err
	}
	return j.slotAt(offset, memory), nil
}

// retire takes back a slot without a request.
func (j *journal) retire(s *journalSlot) {
	s.resident = false
	j.punch(s.offset, slotChunk)
	j.mu.Lock()
	j.spare = append(j.spare, s)
	j.mu.Unlock()
}

// length is that of the request in the buffer, as the kernel has put it there; 0
// when there is none.
func (s *journalSlot) length() *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&s.in[0])) }

// pending returns the request that an earlier process has left, or nil.
func (s *journalSlot) pending() []byte {
	n := s.length().Load()
	if n < inHeaderSize || n > bufferSize {
		return nil
	}
	return s.in[:n]
}

// populate makes the buffer resident.
func (s *journalSlot) populate() {
	if s.resident {
		return
	}
	if unix.Madvise(s.in, unix.MADV_POPULATE_WRITE) != nil { // before Linux 5.14
		for at := 0; at < len(s.in); at += 4096 {
			(*atomic.Uint32)(unsafe.Pointer(&s.in[at])).Or(0)
		}
	}
	s.resident = true
}

// settle forgets a request of n bytes whose reply has been written.
func (s *journalSlot) settle(n int) {
	r := s.record
	s.length().Store(0)
	r.handle.Store(0)
	r.before.Store(0)
	r.given.Store(0)
	r.forgotten.Store(0)
	r.attempts.Store(0)
	r.rooms.Store(0)
	r.phase.Store(phaseIdle)
	clear(s.in[:n])
}

// shrink gives back the buffer behind a request of n bytes, which waits, or is none.
func (s *journalSlot) shrink(n int) {
	from := (recordRoom + int64(n) + kernelPage - 1) &^ (kernelPage - 1)
	if from < slotChunk {
		s.resident = false
		s.journal.punch(s.offset+from, slotChunk-from)
	}
}

// handleState packs what a handle's entry remembers. The generation stays when the
// entry is freed, so that no number is given twice.
const (
	handleWrites = 1 << 0
	handleDir    = 1 << 1
	handleUntold = 8 // shift of the errno that it is to be told, 12 bits
)

// untold reads that errno from an entry's state.
func untold(state uint64) unix.Errno { return unix.Errno(state >> handleUntold & (1<<12 - 1)) }

// markHandle records what an open handle is to be told. Its callers hold the lock of
// the handles.
func (j *journal) markHandle(fh uint64, errno unix.Errno) {
	if j == nil {
		return
	}
	e := j.opened.at(uint32(fh) - 1)
	if e == nil || e.state.Load()>>32 != fh>>32 {
		return
	}
	e.state.Store(e.state.Load()&^(uint64(1<<12-1)<<handleUntold) | uint64(errno)<<handleUntold)
}

// addHandle records an open handle of a node and returns its number, which is in
// the request's record before the handle counts.
func (j *journal) addHandle(r *record, node, flags uint64) (uint64, error) {
	index, e, err := j.opened.reserve()
	if err != nil {
		return 0, err
	}
	generation := e.state.Load()>>32 + 1
	e.state.Store(generation<<32 | flags)
	fh := generation<<32 | uint64(index+1)
	if r != nil {
		r.handle.Store(fh)
	}
	e.key.Store(node)
	return fh, nil
}

// dropHandle forgets a handle; one that is gone already is no fault.
func (j *journal) dropHandle(fh uint64) {
	index := uint32(fh) - 1
	if e := j.opened.at(index); e != nil && e.state.Load()>>32 == fh>>32 {
		j.opened.remove(index)
	}
}

// nodeHeld is the flag of a node's entry which says that the keeper holds a descriptor
// of it.
const nodeHeld = 1 << 0

// replyOf returns a recorded reply, nil where it is damaged.
func (r *record) replyOf() []byte {
	n := r.length.Load()
	if n < outHeaderSize || n > maxLogged {
		return nil
	}
	return r.reply[:n]
}

// answerable says whether the kernel waits for a reply to a request.
func answerable(header *fuse.InHeader) bool {
	return !isForget(header) && header.Opcode != opInterrupt
}
