package fs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// waitingEnv is how many calls wait in TestManyCallsWait, each of a thread of its own;
// 3,000 without.
const waitingEnv = "BYOKD_WAITING"

// manyStats asks for a file's attributes, in as many threads as the test wants.
func manyStats(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	return func() (string, error) {
		var all sync.WaitGroup
		var mu sync.Mutex
		right := 0
		for range numberFrom(waitingEnv, 3000) {
			all.Go(func() {
				runtime.LockOSThread()
				var st unix.Statx_t
				err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &st)
				mu.Lock()
				defer mu.Unlock()
				if err == nil && st.Size == 6 {
					right++
				}
			})
		}
		all.Wait()
		return fmt.Sprint(right), nil
	}, err
}

// waitingThreads counts the threads of a process that wait for an answer.
func waitingThreads(pid int) (n int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", pid))
	for _, task := range tasks {
		if b, _ := os.ReadFile(task); strings.HasPrefix(string(b), "request_wait_answer") {
			n++
		}
	}
	return n
}

// footprint returns how much memory a process has, in bytes, and how many mappings.
func footprint(t *testing.T, pid int) (bytes, mappings int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &bytes); err == nil {
			break
		}
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil || bytes == 0 {
		t.Fatalf("%d KiB, %v", bytes, err)
	}
	return bytes << 10, strings.Count(string(maps), "\n")
}

// TestManyCallsWait: calls that wait at the gate take a few KiB each, and no mapping,
// of which a process has 65,530; they outlive workers, can be killed, and go on.
func TestManyCallsWait(t *testing.T) {
	k := newKeptVolume(t)
	if err := os.WriteFile(k.path("f"), []byte("cached"), 0o600); err != nil {
		t.Fatal(err)
	}
	const first = 500 // what these take is mostly what any number of calls takes: buffers that are read into, threads, the heap's first pages
	want := int(numberFrom(waitingEnv, 3000))
	t.Setenv(waitingEnv, strconv.Itoa(first))
	few := newVictim(t, "many-stats", k.dir, k.path("f"))
	t.Setenv(waitingEnv, strconv.Itoa(want))
	p := newVictim(t, "many-stats", k.dir, k.path("f"))
	k.disable()
	await(t, func() string { return "it does not freeze" }, func() bool { return k.frozen() })
	awaitWaiting := func(p *victim, want int) {
		t.Helper()
		p.start()
		await(t, func() string { return fmt.Sprintf("%d of %d calls wait", waitingThreads(p.cmd.Process.Pid), want) },
			func() bool { return waitingThreads(p.cmd.Process.Pid) == want })
	}
	awaitWaiting(few, first)
	before, mapped := footprint(t, int(k.pid.Load()))
	awaitWaiting(p, want)
	after, mappedThen := footprint(t, int(k.pid.Load()))
	each := (after - before) / want
	t.Logf("%d calls wait: %d MiB, %d bytes each; %d more mappings", want, after>>20, each, mappedThen-mapped)
	if each > waitingRoom {
		t.Errorf("a call that waits takes %d bytes, more than %d", each, waitingRoom)
	}
	if more := mappedThen - mapped; more > want/16 { // the heap, threads, and 64 calls in each part of the journal
		t.Errorf("%d more mappings", more)
	}
	for range 3 {
		k.kill(unix.SIGKILL)
		var st unix.Statfs_t
		if err := unix.Statfs(k.dir+"/mount", &st); err != nil {
			t.Error(err)
		}
	}
	killed := exec.Command("cat", k.path("other"))
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, func() string { return "cat does not wait" }, func() bool { return waitingThreads(killed.Process.Pid) > 0 })
	_ = killed.Process.Kill()
	if err := killed.Wait(); err == nil {
		t.Error("a caller that was killed has read")
	}
	k.enable()
	for p, want := range map[*victim]int{few: first, p: want} {
		if got := p.finishes(60 * time.Second); got != fmt.Sprint(want) {
			t.Errorf("%s of %d calls were answered rightly", got, want)
		}
	}
}

// frozen reports whether the volume keeps callers waiting: one is tried.
func (k *keptVolume) frozen() bool {
	c := exec.Command("cat", k.path("none"))
	if err := c.Start(); err != nil {
		k.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	select {
	case <-ended:
		return false
	case <-time.After(200 * time.Millisecond):
		_ = c.Process.Kill()
		<-ended
		return true
	}
}

// TestFullJournal: where the journal has no room for another request, calls wait in
// the kernel until there is.
func TestFullJournal(t *testing.T) {
	v := newVolume(t, Options{Keep: &Keep{Device: -1, Journal: -1, Deposit: func(int, int) error { return nil },
		Hold: func(uint64, int) error { return nil }, Release: func(uint64) {}}})
	if err := os.WriteFile(v.path("f"), []byte("cached"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(v.path("f"), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := newVictim(t, "many-stats", v.mount, v.path("f"))
	v.freeze()
	l := v.fs.loop.Load()
	chunks := l.journal.head.chunks.Swap(maxChunks)
	p.start()
	await(t, func() string { return fmt.Sprintf("%d slots are taken", l.atWork()) }, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.lacking
	})
	v.thaw()
	if got, want := p.finishes(60*time.Second), fmt.Sprint(numberFrom(waitingEnv, 3000)); got != want {
		t.Errorf("%s of %s calls were answered rightly", got, want)
	}
	l.journal.head.chunks.Store(chunks)
}

// TestAsideGoesOn: requests that wait are found by the next process, but for what was
// being copied to a slot, and for what is none.
func TestAsideGoesOn(t *testing.T) {
	j := newTestJournal(t)
	request := func(unique uint64, length int) []byte {
		b := bytes.Repeat([]byte{byte(unique)}, length)
		h := headerOf(b)
		h.Length, h.Unique = uint32(length), unique
		return b
	}
	var entries []*asideEntry
	for i := range uint64(3 * asidesPerChunk) { // more than one chunk
		e, err := j.setAside(request(i, inHeaderSize+int(i)%(asideRoom-inHeaderSize+1)), keyguard.Drain)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, e)
	}
	j.dropAside(entries[0])
	if entries[0].request != [asideRoom]byte{} {
		t.Error("what was dropped is there still")
	}
	s, err := j.newSlot()
	if err != nil {
		t.Fatal(err)
	}
	copy(s.in, request(1, inHeaderSize))
	entries[2].length.Store(inHeaderSize - 1)
	entries[3].length.Store(asideRoom + 1)
	next, err := reopened(t, j)
	if err != nil {
		t.Fatal(err)
	}
	kept := next.keptAside()
	if len(kept) != len(entries)-4 {
		t.Errorf("%d are found, want %d", len(kept), len(entries)-4)
	}
	for _, e := range kept {
		h := headerOf(e.request[:])
		if want := request(h.Unique, int(h.Length)); h.Unique < 4 || e.length.Load() != h.Length || !bytes.Equal(e.request[:h.Length], want) || keyguard.Class(e.class) != keyguard.Drain {
			t.Errorf("request %d is another", h.Unique)
		}
		next.dropAside(e)
	}
	for _, c := range next.asides.chunks { // memory that was given back reads as zeros
		if b := unsafe.Slice((*byte)(unsafe.Pointer(&c[0])), entryChunk); !bytes.Equal(b, make([]byte, entryChunk)) {
			t.Error("memory was not given back")
		}
	}
	if _, err := next.setAside(request(9, 100), keyguard.Work); err != nil {
		t.Error(err)
	}
	j.head.chunks.Store(maxChunks)
	var full error
	for i := uint64(0); full == nil && i < uint64(2*asidesPerChunk); i++ {
		_, full = j.setAside(request(i, 100), keyguard.Work)
	}
	if full == nil || !strings.Contains(full.Error(), "full") {
		t.Errorf("a journal that is full: %v", full)
	}
}

// TestKillableWithoutSlots: where there is no slot for another request, WRITEs that wait
// in theirs end when their callers are killed, and with the first the device is read again:
// STATFS, which lay behind them, is answered in the freeze.
func TestKillableWithoutSlots(t *testing.T) {
	v := newVolume(t, Options{})
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	device, kernel := ends[0], ends[1]
	if err := unix.SetsockoptTimeval(kernel, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		t.Fatal(err)
	}
	const firstCaller, statfs, uniqueOfStatfs = 1000, 17, 1 << 20
	var dead atomic.Uint32
	v.fs.parking.killed = func([]uint32) []uint32 { return []uint32{dead.Load()} }
	v.freeze()
	j, err := newJournal([16]byte{})
	if err != nil {
		t.Fatal(err)
	}
	l := newLoop(v.fs, device, j)
	l.start()
	j.head.chunks.Store(maxChunks)
	send := func(opcode uint32, node, unique uint64, pid uint32) {
		request := make([]byte, unsafe.Sizeof(fuse.WriteIn{}))
		*headerOf(request) = fuse.InHeader{Length: uint32(len(request)), Opcode: opcode, Unique: unique, NodeId: node, Caller: fuse.Caller{Pid: pid}}
		if _, err := ignoringEINTR(func() (int, error) { return unix.Write(kernel, request) }); err != nil {
			t.Fatal(err)
		}
	}
	const writes = warmSlots + idleReaders + 4
	for i := range uint32(writes) {
		send(opWrite, 1<<60, 2*uint64(i+1), firstCaller+i)
	}
	send(statfs, fuse.FUSE_ROOT_ID, uniqueOfStatfs, 1)
	await(t, func() string { return "there are slots for all" }, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.lacking && l.taken == warmSlots
	})

	answered := map[uint64]unix.Errno{}
	answer := func() uint64 {
		reply := make([]byte, 4096)
		if _, err := ignoringEINTR(func() (int, error) { return unix.Read(kernel, reply) }); err != nil {
			t.Fatalf("%d of %d calls were answered: %v", len(answered), writes+1, err)
		}
		unique := binary.NativeEndian.Uint64(reply[8:])
		answered[unique] = unix.Errno(-int32(binary.NativeEndian.Uint32(reply[4:])))
		return unique
	}
	for i := range uint32(writes) {
		dead.Store(firstCaller + i)
		for answer() != 2*uint64(i+1) { // STATFS comes between
		}
	}
	if _, found := answered[uniqueOfStatfs]; !found {
		answer()
	}
	for unique, errno := range answered {
		if unique == uniqueOfStatfs && errno != 0 || unique != uniqueOfStatfs && errno != unix.EINTR {
			t.Errorf("request %d: %v", unique, errno)
		}
	}
	if _, found := answered[uniqueOfStatfs]; !found {
		t.Error("STATFS is not answered")
	}
	v.thaw()
	unix.Close(kernel)
	await(t, func() string { return "readers are left" }, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return l.taken == 0 })
	if err := l.close(); err != nil {
		t.Error(err)
	}
}
