package fs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The journal is what a mount needs to outlive this process: a memfd, of which a
// parent holds a descriptor too (Keep). It is memory, not a disk: it has to be
// right after a kill at any instruction, not after a power cut. So what counts is
// the order of stores, and what makes a record valid is one word, stored last.
//
// It begins with a head and grows by chunks, never shrinking: what is free in it
// is given back to the kernel as holes. It never holds a key. It holds plaintext
// of requests that are being served or wait, which is cleared when the reply has
// been written.
type journal struct {
	fd   int
	head *journalHead

	stall func(step) // Keep.after

	mu     sync.Mutex
	size   int64          // guarded by mu; of the memfd
	spare  []*journalSlot // guarded by mu; without a request, and without memory
	maps   [][]byte       // guarded by mu
	slots  []*journalSlot // of an earlier process, until the loop takes them over
	asides asides         // requests that wait without a slot
	nodes  entryTable     // what the kernel knows: node id and flags
	opened entryTable     // handles: node id and flags
}

// JournalVersion is the version of the journal's layout: a process goes on only
// with a mount whose journal has its own.
const JournalVersion = 3

const (
	journalMagic = 0x6c6e726a646b7962 // "bykdjrnl"

	// chunkAlign is the largest page of the kernels that byokd runs on.
	chunkAlign = 64 << 10
	// maxChunks bounds the chunks of all kinds: 4 million inodes known to the
	// kernel take a thousand, each waiting WRITE one, 64 other waiting calls one.
	maxChunks   = 1 << 16
	entryChunk  = chunkAlign
	slotChunk   = (recordRoom + bufferSize + chunkAlign - 1) / chunkAlign * chunkAlign
	recordRoom  = 4096 // before a slot's buffer, which is page-aligned so
	initMessage = 256  // the INIT request and its reply take 104 and 80 bytes
)

type chunkKind uint64

const (
	slotsChunk chunkKind = 1 + iota
	nodesChunk
	handlesChunk
	asideChunk
)

type journalHead struct {
	magic   uint64
	version uint64
	volume  [16]byte

	// INIT, valid from initLength on.
	initLength, replyLength atomic.Uint32
	init, reply             [initMessage]byte

	numbers  atomic.Uint32 // 1: ids are those of tableIDs
	transfer transfer      // see references.go

	chunks atomic.Uint64
	chunk  [maxChunks]uint64 // kind << 48 | offset / chunkAlign
}

const headSize = (int64(unsafe.Sizeof(journalHead{})) + chunkAlign - 1) / chunkAlign * chunkAlign

// newJournal makes the journal of a new mount.
func newJournal(volume [16]byte) (*journal, error) {
	fd, err := unix.MemfdCreate("byokd-journal", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("byokd-journal", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd for the journal: %w", err)
	}
	j := &journal{fd: fd, size: headSize}
	if err := unix.Ftruncate(fd, headSize); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if err := j.mapHead(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	j.head.magic, j.head.version, j.head.volume = journalMagic, JournalVersion, volume
	return j, nil
}

// openJournal goes on with the journal of an earlier process; fd becomes its own.
func openJournal(fd int, volume [16]byte) (*journal, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Size < headSize {
		return nil, fmt.Errorf("a journal of %d bytes is none", st.Size)
	}
	j := &journal{fd: fd, size: st.Size}
	if err := j.mapHead(); err != nil {
		return nil, err
	}
	h := j.head
	switch {
	case h.magic != journalMagic:
		return nil, errors.New("the journal of the mount is damaged")
	case h.version != JournalVersion:
		return nil, fmt.Errorf("the journal of the mount has version %d, this byokd has %d", h.version, JournalVersion)
	case h.volume != volume:
		return nil, errors.New("the journal of the mount belongs to another volume")
	}
	for _, c := range h.chunk[:min(h.chunks.Load(), maxChunks)] {
		if err := j.openChunk(chunkKind(c>>48), int64(c&(1<<48-1))*chunkAlign); err != nil {
			return nil, err
		}
	}
	return j, nil
}

func (j *journal) mapHead() error {
	memory, err := j.mapAt(0, headSize)
	if err != nil {
		return err
	}
	j.head = (*journalHead)(unsafe.Pointer(&memory[0]))
	j.nodes.grow = func() ([]entry, error) { return j.growEntries(nodesChunk) }
	j.opened.grow = func() ([]entry, error) { return j.growEntries(handlesChunk) }
	return nil
}

func (j *journal) mapAt(offset, length int64) ([]byte, error) {
	memory, err := unix.Mmap(j.fd, offset, int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the journal: %w", err)
	}
	_ = unix.Madvise(memory, unix.MADV_DONTFORK) // a child has no business with it
	j.maps = append(j.maps, memory)
	return memory, nil
}

// extend adds a chunk of zeros.
func (j *journal) extend(kind chunkKind, length int64) (offset int64, memory []byte, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.head.chunks.Load()
	if n == maxChunks {
		return 0, nil, errors.New("the journal is full")
	}
	offset = j.size
	if err := unix.Ftruncate(j.fd, offset+length); err != nil {
		return 0, nil, err
	}
	if memory, err = j.mapAt(offset, length); err != nil {
		return 0, nil, err
	}
	j.size = offset + length
	j.head.chunk[n] = uint64(kind)<<48 | uint64(offset/chunkAlign)
	j.head.chunks.Store(n + 1)
	return offset, memory, nil
}

func (j *journal) openChunk(kind chunkKind, offset int64) error {
	length := int64(entryChunk)
	if kind == slotsChunk {
		length = slotChunk
	}
	if offset < headSize || offset+length > j.size {
		return errors.New("the journal of the mount is damaged: a part lies outside")
	}
	memory, err := j.mapAt(offset, length)
	if err != nil {
		return err
	}
	switch kind {
	case slotsChunk:
		j.slots = append(j.slots, j.slotAt(offset, memory))
	case nodesChunk:
		j.nodes.chunks = append(j.nodes.chunks, entriesOf(memory))
	case asideChunk:
		j.asides.add(offset, memory)
	case handlesChunk:
		j.opened.chunks = append(j.opened.chunks, entriesOf(memory))
	default:
		return fmt.Errorf("the journal of the mount is damaged: a part of kind %d", kind)
	}
	return nil
}

// punch gives memory back to the kernel; it then reads as zeros. offset and length
// are of whole pages.
func (j *journal) punch(offset, length int64) {
	_, _ = ignoringEINTR(func() (int, error) {
		return 0, unix.Fallocate(j.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
}

// saveInit records how kernel and byokd agreed, before the kernel is told.
func (j *journal) saveInit(request, reply []byte) {
	h := j.head
	if h.initLength.Load() != 0 || len(request) > len(h.init) || len(reply) > len(h.reply) {
		return
	}
	copy(h.init[:], request)
	copy(h.reply[:], reply)
	h.replyLength.Store(uint32(len(reply)))
	h.initLength.Store(uint32(len(request)))
}

// savedInit returns what saveInit recorded, nil when nothing.
func (j *journal) savedInit() (request, reply []byte) {
	h := j.head
	n, m := h.initLength.Load(), h.replyLength.Load()
	if n == 0 || n > initMessage || m > initMessage {
		return nil, nil
	}
	return append([]byte(nil), h.init[:n]...), append([]byte(nil), h.reply[:m]...)
}

// close forgets the journal; nobody uses it any more.
func (j *journal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, m := range j.maps {
		_ = unix.Munmap(m)
	}
	j.maps, j.spare, j.head = nil, nil, nil
	unix.Close(j.fd)
}

// entry is a node or a handle that the kernel knows. It counts while key is not 0.
type entry struct {
	key   atomic.Uint64 // node id
	state atomic.Uint64
}

const entriesPerChunk = entryChunk / int(unsafe.Sizeof(entry{}))

func entriesOf(memory []byte) []entry {
	return unsafe.Slice((*entry)(unsafe.Pointer(&memory[0])), entriesPerChunk)
}

func (j *journal) growEntries(kind chunkKind) ([]entry, error) {
	_, memory, err := j.extend(kind, entryChunk)
	if err != nil {
		return nil, err
	}
	return entriesOf(memory), nil
}

// entryTable is the set of entries of one kind. Which are free is known to this
// process alone, and found out anew by the next.
type entryTable struct {
	grow func() ([]entry, error)

	mu     sync.Mutex
	chunks [][]entry // guarded by mu
	free   []uint32  // guarded by mu
	known  bool      // free has been found out; guarded by mu
}

// reserve returns an entry that nobody uses; its key is 0 until the caller sets it.
func (t *entryTable) reserve() (uint32, *entry, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.learn()
	if len(t.free) == 0 {
		chunk, err := t.grow()
		if err != nil {
			return 0, nil, err
		}
		t.chunks = append(t.chunks, chunk)
		t.addFree(len(t.chunks) - 1)
	}
	index := t.free[len(t.free)-1]
	t.free = t.free[:len(t.free)-1]
	return index, t.find(index), nil
}

// putBack takes back an entry that was reserved and not used.
func (t *entryTable) putBack(index uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = append(t.free, index)
}

// learn finds the free entries of chunks that came from an earlier process.
func (t *entryTable) learn() {
	if t.known {
		return
	}
	t.known = true
	for i := range t.chunks {
		t.addFree(i)
	}
}

func (t *entryTable) addFree(chunk int) {
	for i := entriesPerChunk - 1; i >= 0; i-- {
		if t.chunks[chunk][i].key.Load() == 0 {
			t.free = append(t.free, uint32(chunk*entriesPerChunk+i))
		}
	}
}

func (t *entryTable) find(index uint32) *entry {
	chunk := int(index) / entriesPerChunk
	if chunk >= len(t.chunks) {
		return nil
	}
	return &t.chunks[chunk][int(index)%entriesPerChunk]
}

// at returns the entry with a number, nil where there is none.
func (t *entryTable) at(index uint32) *entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.find(index)
}

// remove frees an entry.
func (t *entryTable) remove(index uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.find(index); e != nil && e.key.Swap(0) != 0 && t.known {
		t.free = append(t.free, index)
	}
}

// each calls use for every entry in use. Nobody changes the table meanwhile.
func (t *entryTable) each(use func(index uint32, e *entry)) {
	for c, chunk := range t.chunks {
		for i := range chunk {
			if chunk[i].key.Load() != 0 {
				use(uint32(c*entriesPerChunk+i), &chunk[i])
			}
		}
	}
}
