//go:build linux

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The load on the mount runs in child processes, one call at a time in each: a
// call that hangs then hangs nothing of the test, and the child can be killed.
// A child is this test binary, told by the environment what to do.

const (
	taskVariable = "BYOKD_TEST_TASK"
	binVariable  = "BYOKD_TEST_BIN"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(taskVariable); text != "" {
		os.Exit(workerMain(text))
	}
	bin, err := os.MkdirTemp("", "byokd-test-bin")
	if err == nil {
		err = os.Setenv(binVariable, bin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(bin)
	os.Exit(code)
}

// board is what a worker tells. It lies in memory that worker and test share, so
// that a worker which hangs in the kernel has told all that happened before.
// Times are wall-clock nanoseconds: comparable between processes, and with the
// call log of devcloud.
type board struct {
	Ready   atomic.Uint32 // the loop has begun
	Go      atomic.Uint32 // set by the test: make the call now
	Stop    atomic.Uint32 // set by the test: end after the call in hand
	Tid     atomic.Int64  // the thread that makes the calls
	Started atomic.Int64  // begin of the call in hand, or of the last
	Done    atomic.Int64  // end of the last call that succeeded
	Resumed atomic.Int64  // end of the first call since the test set it to 0
	Ops     atomic.Uint64 // calls that succeeded
	Begun   atomic.Uint64 // writes that have begun …
	Written atomic.Uint64 // … that were accepted …
	Acked   atomic.Uint64 // … and that were acknowledged as durable
}

func (b *board) begin() { b.Started.Store(time.Now().UnixNano()) }

func (b *board) end() {
	now := time.Now().UnixNano()
	b.Resumed.CompareAndSwap(0, now)
	b.Done.Store(now)
	b.Ops.Add(1)
}

// hanging reports whether a call is in hand.
func (b *board) hanging() bool { return b.Started.Load() > b.Done.Load() }

// do makes one call.
func (b *board) do(what string, call func() error) error {
	b.begin()
	if err := call(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	b.end()
	return nil
}

// task is what a child is told.
type task struct {
	Role   string
	Dir    string // on the mount, the worker's own
	Board  string // file of the board
	Canary string
	Call   string  // of the role call
	Pid    int     // of the role registers
	Claims []claim // of the role verify
	Crash  bool    // of the role verify: byokd died, so only Acked counts
}

// worker is the child's side of a worker.
type worker struct {
	task
	*board
}

func workerMain(text string) int {
	lockThread()
	debug.SetPanicOnFault(true) // a SIGBUS becomes a message
	w := worker{board: &board{}}
	if err := json.Unmarshal([]byte(text), &w.task); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if w.Board != "" {
		memory, err := mapBoard(w.Board)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		w.board = memory
	}
	w.Tid.Store(int64(unix.Gettid()))
	if err := w.run(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", w.Role, err)
		return 3
	}
	return 0
}

func (w *worker) run() (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("fault: %v\n%s", fault, debug.Stack())
		}
	}()
	role, ok := roles[w.Role]
	if !ok {
		return fmt.Errorf("no such role")
	}
	return role(w)
}

// stopped tells that the loop runs, and whether it is to end.
func (w *worker) stopped() bool {
	w.Ready.Store(1)
	return w.Stop.Load() != 0
}

func lockThread() { runtime.LockOSThread() }

// mapBoard maps the board in a file, which is made if need be.
func mapBoard(file string) (*board, error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(pageSize); err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*board)(unsafe.Pointer(&memory[0])), nil // stays mapped until the process ends
}

const pageSize = 4096

// writerState is the test's side of a worker.
type writerState struct {
	*process
	*board
	task task
}

// spawn starts a worker in a directory of its own on the mount, or in dir.
func (s *stack) spawn(t task) *writerState {
	s.t.Helper()
	t.Canary = s.canary
	if t.Dir == "" {
		t.Dir = s.mount + "/" + t.Role + "-" + s.canary
	}
	t.Board = filepath.Join(s.dir, fmt.Sprintf("board-%d-%s", len(s.writers), t.Role))
	memory, err := mapBoard(t.Board)
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := json.Marshal(t)
	if err != nil {
		s.t.Fatal(err)
	}
	env := append(os.Environ(), taskVariable+"="+string(text), "GOMAXPROCS=1")
	w := &writerState{board: memory, task: t, process: s.start(t.Role, env, os.Args[0])}
	s.writers = append(s.writers, w)
	return w
}

// workers starts one worker for each role and waits until all are in their loops.
func (s *stack) workers(names ...string) []*writerState {
	s.t.Helper()
	var all []*writerState
	for _, name := range names {
		all = append(all, s.spawn(task{Role: name}))
	}
	for _, w := range all {
		s.await(w.name+" to begin", w.process, func() bool { return w.Ready.Load() != 0 && w.Ops.Load() > 0 })
	}
	return all
}

// retire ends workers after the call in hand, and checks that none has failed.
func (s *stack) retire(workers []*writerState) {
	s.t.Helper()
	for _, w := range workers {
		w.Stop.Store(1)
	}
	for _, w := range workers {
		if !w.wait(patience) {
			s.t.Errorf("%s did not end its last call within %v", w.name, patience)
			w.kill()
		} else if w.code() != 0 {
			s.t.Errorf("%s failed: %s", w.name, w.tail())
		}
	}
}

// kill ends a worker, whatever it is doing.
func (w *writerState) kill() {
	w.signal(syscall.SIGKILL)
	w.wait(patience)
}

// once runs a role to its end.
func (s *stack) once(t task) {
	s.t.Helper()
	w := s.spawn(t)
	if !w.wait(4 * patience) {
		w.kill()
		s.t.Fatalf("%s hangs", t.Role)
	}
	if w.code() != 0 {
		s.t.Errorf("%s: %s", t.Role, w.output())
	}
}

// recordSize is the unit of the test's plaintext: the canary and a number.
const recordSize = 64

// pattern fills dst, whose length is a multiple of recordSize, with records
// numbered from stamp on.
func pattern(dst []byte, canary string, stamp uint64) {
	const digits = "0123456789abcdef"
	for i := 0; i < len(dst); i += recordSize {
		record := dst[i : i+recordSize]
		n := copy(record, canary)
		number := stamp + uint64(i/recordSize)
		for k := range 16 {
			record[n+k] = digits[number>>(60-4*k)&15]
		}
		for k := n + 16; k < recordSize; k++ {
			record[k] = '.'
		}
	}
}

// differs describes the first difference between what was read and the pattern.
func differs(got []byte, canary string, stamp uint64) error {
	want := make([]byte, (len(got)+recordSize-1)/recordSize*recordSize)
	pattern(want, canary, stamp)
	if bytes.Equal(got, want[:len(got)]) {
		return nil
	}
	at := 0
	for at < len(got) && got[at] == want[at] {
		at++
	}
	from := at / recordSize * recordSize
	return fmt.Errorf("wrong byte at %d of %d: read %q, want %q", at, len(got),
		got[from:min(from+recordSize, len(got))], want[from:from+recordSize])
}
