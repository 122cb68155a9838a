package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// The serve loop: the only reader of the FUSE device and the only user of
// go-fuse's ProtocolServer, which is marked experimental upstream.
//
// Every slot has a ProtocolServer of its own, told the same INIT, so that an
// operation finds the pass of its request in the slot rather than in a table,
// and so that requests share no lock of the library.

const (
	maxWrite = 1 << 20 // largest WRITE and READ: what the kernel takes without a raised max_pages_limit
	// A request is a WRITE's header (80 bytes) and its data; the kernel asks
	// for a page more than max_write (fs/fuse/dev.c, fuse_dev_do_read).
	bufferSize = maxWrite + 2*4096
	// The most blocks that a request touches: those of its bytes, were all blocks
	// as short as the first, and one more at either end.
	scratchBlocks = maxWrite/seal.FirstPayload + 2
	scratchSize   = scratchBlocks * block

	// idleReaders is how many goroutines wait in read(2) on the device: one
	// takes the next request while the others serve theirs.
	idleReaders = 2

	// flushWorkers is how many WRITEs of the kernel's flush are served at a time
	// before the device is read no further. The kernel hands over a thousand at
	// once, which all want the two or three locks of one lower file: more of them
	// at work would only wait for each other, each with a slot of its own.
	flushWorkers = 8

	// forgetWorkers is the same for FORGETs, which come by the hundred thousand when
	// the kernel lacks memory, and all want the lock of the nodes. With a journal each
	// more at work would make a megabyte resident.
	forgetWorkers = 2

	// forgetMost bounds them altogether: with so many at work the device is read no
	// further, however late they are. They wait for the lock of the nodes alone, as
	// all calls do; descriptors are closed elsewhere (closing.go).
	forgetMost = 8

	// atWorkMax is how many requests are at work before no more are read until one of
	// them is done. Where the disk hangs each has a thread, and Go ends a process that
	// has 10,000. What waits at the gate is not at work.
	atWorkMax = 1024

	// lateAfter is when a reader is started all the same: those requests wait for a
	// slow disk, and others should not.
	lateAfter = 20 * time.Millisecond

	// warmSlots is how many slots are made at the start, enough for a flush: what
	// is asked of the kernel for memory may have to wait for a mapping that is
	// being taken down and waits for its flush, if it is one of this process.
	warmSlots = flushWorkers + 2*idleReaders

	// keepSlots bounds the idle slots: 3 MiB of address space each, of which is
	// resident what requests have used since the last freeze.
	keepSlots = 32
)

type loop struct {
	fs  *Filesystem
	log *zap.Logger
	dev int // the FUSE device

	journal *journal // what outlives this process; nil when nothing does

	init struct {
		sync.Mutex
		request []byte // the kernel's INIT, to tell later slots the same
		reply   fuse.InitOut
	}

	mu      sync.Mutex
	free    []*slot    // guarded by mu; last in, first out, so that few slots' memory is warm
	unused  int        // as many of free, the first ones, were not used since trim; guarded by mu
	taken   int        // slots not in free; guarded by mu
	clean   int        // of these, with nothing in them but a request that waits; guarded by mu
	stale   int        // of the others, taken before the last freeze; guarded by mu
	span    uint32     // freezes so far; guarded by mu
	frozen  bool       // a slot is wiped when it has served its request; guarded by mu
	given   *sync.Cond // a slot was given back; with mu
	lacking bool       // there was no memory for a slot, and it was said; guarded by mu

	waiting    atomic.Int32  // goroutines in read(2)
	flushing   atomic.Int32  // WRITEs of the kernel's flush being served
	forgetting atomic.Int32  // FORGETs being served
	left       atomic.Bool   // close gave up on the readers: nothing is served any more
	mute       atomic.Bool   // calls that are not being served are left to a successor (passed.go)
	resuming   chan struct{} // holds one for each call that is served after it was set aside
	serving    sync.WaitGroup
	ended      chan struct{} // closed when the connection is gone
	end        sync.Once
}

func newLoop(f *Filesystem, dev int, j *journal) *loop {
	l := &loop{fs: f, log: f.log, dev: dev, journal: j, ended: make(chan struct{}), resuming: make(chan struct{}, resumeAtOnce)}
	l.given = sync.NewCond(&l.mu)
	return l
}

func (l *loop) start() {
	l.redo()
	var warm [warmSlots]*slot
	for i := range warm {
		var err error
		if warm[i], err = l.tryTake(); err != nil {
			panic("fs: no memory for a request buffer: " + err.Error())
		}
	}
	for _, s := range warm {
		l.give(s)
	}
	for range idleReaders {
		l.readOn()
	}
	go l.keepTrim()
}

// readOn starts a goroutine that reads the device.
func (l *loop) readOn() {
	if l.mute.Load() {
		return
	}
	l.serving.Add(1)
	l.waiting.Add(1)
	go l.serve()
}

// serve reads and answers requests until the connection ends, or until enough
// others wait.
func (l *loop) serve() {
	defer l.serving.Done()
	for {
		s := l.take()
		n, err := l.next(s)
		left := l.waiting.Add(-1)
		if err != nil {
			l.give(s)
			l.stop(err)
			return
		}
		flush := isFlush(s.in[:n])
		forget := isForget(headerOf(s.in))
		var forgets int32
		if forget {
			forgets = l.forgetting.Add(1)
		}
		busy := flush && l.flushing.Add(1) > flushWorkers || forgets > forgetWorkers
		switch {
		case left > 0:
		case busy:
			s.lone.Store(true)
			if forgets < forgetMost {
				s.late.Reset(lateAfter)
			}
		case l.crowded():
			s.lone.Store(true) // whoever is done first reads on
		default: // always leave one behind to read
			l.readOn()
		}
		l.fs.options.Keep.after(stepRead)
		if ruleOf(headerOf(s.in).Opcode).observed {
			s.call.began = time.Now()
		}
		l.answer(s, s.in[:n])
		l.settle(s, n)
		if flush {
			l.flushing.Add(-1)
		}
		if forget {
			l.forgetting.Add(-1)
		}
		if s.lone.Swap(false) {
			s.late.Stop()
		}
		l.give(s)
		if l.mute.Load() {
			return
		}
		if l.waiting.Add(1) > idleReaders {
			l.waiting.Add(-1)
			return
		}
	}
}

// settle forgets the request of n bytes in a slot.
func (l *loop) settle(s *slot, n int) {
	if s.kept != nil {
		l.fs.options.Keep.after(stepReplied)
		s.kept.settle(n)
	}
}

// parks is called before a request waits at the gate in its slot, or was served for
// long.
func (l *loop) parks(s *slot) {
	if s.lone.Swap(false) {
		l.readOn()
	}
}

// isFlush reports whether a request is a WRITE of dirty pages by the kernel.
func isFlush(request []byte) bool {
	in := (*fuse.WriteIn)(unsafe.Pointer(&request[0]))
	return in.Opcode == opWrite && len(request) >= int(unsafe.Sizeof(*in)) && in.WriteFlags&fuse.WRITE_CACHE != 0
}

// isForget reports whether a request is a FORGET, to which there is no reply.
func isForget(header *fuse.InHeader) bool {
	return header.Opcode == opForget || header.Opcode == opBatchForget
}

// next waits for a request.
func (l *loop) next(s *slot) (int, error) {
	if s.kept != nil {
		s.kept.populate()
	}
	for {
		n, err := unix.Read(l.dev, s.in)
		switch {
		case err == nil && n >= int(unsafe.Sizeof(fuse.InHeader{})):
			return n, nil
		case err == nil:
			return 0, unix.EPROTO
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue // ENOENT: the request was interrupted before it was read
		default:
			return 0, err // ENODEV: unmounted
		}
	}
}

func (l *loop) stop(err error) {
	l.end.Do(func() {
		if !errors.Is(err, unix.ENODEV) {
			l.log.Error("fuse connection lost", zap.Error(err))
		}
		close(l.ended)
	})
}

func headerOf(request []byte) *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&request[0])) }

// answer serves one request: gate, operation, last look, reply.
func (l *loop) answer(s *slot, request []byte) {
	header := headerOf(request)
	rule := ruleOf(header.Opcode)
	if header.Opcode == opInterrupt {
		return // parked callers are looked at without being asked, see parking.go
	}
	if rule.gate != always && l.mute.Load() {
		return
	}
	if l.left.Load() {
		l.reply(s, l.failure(s, header.Unique, unix.ENOTCONN))
		return
	}
	s.call.begin(header)
	reply, aside := l.handle(s, rule, request)
	if aside {
		s.call.end()
		return
	}
	if len(reply) > 0 {
		if s.kept != nil && isLogged(header.Opcode) {
			s.kept.record.answer(reply)
			l.fs.options.Keep.after(stepAnswered)
		}
		l.reply(s, reply)
	}
	if rule.observed {
		l.fs.observe(rule.name, &s.call, time.Since(s.call.began))
	}
	s.call.end()
}

// handle returns the reply to a request, or nothing where the kernel expects
// none, or says that the request was set aside. The pass is still held: what follows
// the reply gives it back.
func (l *loop) handle(s *slot, rule rule, request []byte) (reply []byte, aside bool) {
	for {
		if err := l.fs.enter(rule, &s.call, request); err != nil {
			if err == errAside || l.mute.Load() {
				return nil, err == errAside
			}
			return l.failure(s, s.call.header.Unique, errnoOf(err)), false
		}
		if s.kept != nil {
			s.kept.record.serve()
			l.fs.options.Keep.after(stepServing)
		}
		reply := l.operate(s, request)
		l.fs.options.Keep.after(stepDone)
		if rule.plain && s.call.inside && s.call.pass.Err() != nil {
			clear(reply) // the epoch ended under us: nothing read in it may leave
			s.call.undo()
			if r := s.call.record; r != nil && !s.call.again {
				r.phase.Store(phaseIdle) // as if it had not been served: it had no effect
			}
			continue
		}
		return reply, false
	}
}

// operate lets the operation run that the request asks for.
func (l *loop) operate(s *slot, request []byte) []byte {
	switch s.call.header.Opcode {
	case opRead:
		return l.read(s, request)
	case opWrite:
		return l.write(s, request)
	}
	n, code := s.server.HandleRequest([][]byte{request}, [][]byte{s.out})
	if code != fuse.OK {
		s.call.takeBack()
		return l.failure(s, s.call.header.Unique, unix.Errno(code))
	}
	if s.call.header.Opcode == opInit {
		l.initialised(request, s.out[:n])
		l.fs.keepInit(request, s.out[:n])
	}
	return s.out[:n]
}

// read and write serve the two requests that matter for speed without the
// protocol server, which allocates 1 kB for each (measured).

func (l *loop) read(s *slot, request []byte) []byte {
	in := (*fuse.ReadIn)(unsafe.Pointer(&request[0]))
	if len(request) < int(unsafe.Sizeof(*in)) || in.Size > maxWrite {
		return l.failure(s, s.call.header.Unique, unix.EINVAL)
	}
	got, code := s.call.readFile(in, s.out[outHeaderSize:][:in.Size])
	if code != fuse.OK {
		return l.failure(s, s.call.header.Unique, unix.Errno(code))
	}
	return s.success(got)
}

func (l *loop) write(s *slot, request []byte) []byte {
	in := (*fuse.WriteIn)(unsafe.Pointer(&request[0]))
	data := request[min(len(request), int(unsafe.Sizeof(*in))):]
	if len(request) < int(unsafe.Sizeof(*in)) || uint64(in.Size) > uint64(len(data)) {
		return l.failure(s, s.call.header.Unique, unix.EINVAL)
	}
	written, code := s.call.writeFile(in, data[:in.Size])
	if code != fuse.OK {
		return l.failure(s, s.call.header.Unique, unix.Errno(code))
	}
	out := (*fuse.WriteOut)(unsafe.Pointer(&s.out[outHeaderSize]))
	*out = fuse.WriteOut{Size: written}
	return s.success(int(unsafe.Sizeof(*out)))
}

// success puts the header before n bytes of reply.
func (s *slot) success(n int) []byte {
	binary.NativeEndian.PutUint32(s.out[0:], uint32(outHeaderSize+n))
	binary.NativeEndian.PutUint32(s.out[4:], 0)
	binary.NativeEndian.PutUint64(s.out[8:], s.call.header.Unique)
	return s.out[:outHeaderSize+n]
}

// failure builds a reply that only says an errno.
func (l *loop) failure(s *slot, unique uint64, errno unix.Errno) []byte {
	out := s.out[:outHeaderSize]
	binary.NativeEndian.PutUint32(out[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(out[4:], uint32(-int32(errno)))
	binary.NativeEndian.PutUint64(out[8:], unique)
	return out
}

const outHeaderSize = 16

// reply writes a reply. ENOENT means that the kernel no longer waits for it.
func (l *loop) reply(s *slot, reply []byte) {
	for {
		_, err := unix.Write(l.dev, reply)
		switch {
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EBADF):
			return
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		default:
			l.log.Error("fuse reply refused by the kernel", zap.String("op", s.call.name()), zap.Error(err))
			return
		}
	}
}

// initialised remembers the kernel's INIT and tells it to the other slots.
func (l *loop) initialised(request, reply []byte) {
	if l.journal != nil {
		l.journal.saveInit(request, reply)
	}
	l.agreed(request, reply)
}

// agreed takes over what kernel and byokd have agreed on.
func (l *loop) agreed(request, reply []byte) {
	l.init.Lock()
	defer l.init.Unlock()
	l.init.request = bytes.Clone(request)
	if len(reply) >= outHeaderSize {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&l.init.reply)), unsafe.Sizeof(l.init.reply)), reply[outHeaderSize:])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.free {
		s.tell(l.init.request)
	}
}

func (s *slot) tell(init []byte) {
	if init != nil {
		s.server.HandleRequest([][]byte{init}, [][]byte{s.out})
	}
}

// endsWithin is how long the kernel may take to end a connection whose mount is
// gone: it has nothing left to do.
const endsWithin = time.Second

// close waits for the readers to see the end of the connection, frees the slots
// and closes the device. Calls that wait at the gate have been dismissed. Where
// another mount namespace holds a copy of the mount there is no end to be seen:
// the readers are left behind, and its users lose it when this process exits.
func (l *loop) close() error {
	done := make(chan struct{})
	go func() { l.serving.Wait(); close(done) }()
	timer := time.NewTimer(endsWithin)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		l.left.Store(true)
		l.log.Warn("the mount lives on in another mount namespace until this process exits")
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.free {
		_ = unix.Munmap(s.memory)
	}
	l.free = nil
	if l.journal != nil {
		l.journal.close()
	}
	return unix.Close(l.dev)
}

// libraryLog takes what the protocol server has to say, which is never about
// names or data unless Debug is set, and it is not.
func libraryLog(l *zap.Logger) *log.Logger { return zap.NewStdLog(l.Named("go-fuse")) }

var (
	_ keyguard.Subscriber  = (*Filesystem)(nil)
	_ keyguard.LateDrainer = (*Filesystem)(nil)
)
