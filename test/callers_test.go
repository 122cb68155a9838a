//go:build linux

package test

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// frozenCall is one kind of call: what is made ready before the freeze, and the
// call itself.
type frozenCall func(w *worker) (call func() error, err error)

// frozenCalls must all hang while frozen, and succeed after the thaw.
var frozenCalls = map[string]frozenCall{
	"read": onFile(func(w *worker, f *os.File) error {
		return readWhole(int(f.Fd()), make([]byte, pageSize), w.wanted(pageSize), 0)
	}),
	"write":    onFile(func(w *worker, f *os.File) error { return pwrite(int(f.Fd()), w.wanted(pageSize), pageSize) }),
	"append":   onFile(func(w *worker, f *os.File) error { return pwrite(int(f.Fd()), w.wanted(pageSize), fileSize) }),
	"fsync":    onFile(func(_ *worker, f *os.File) error { return f.Sync() }),
	"truncate": onFile(func(_ *worker, f *os.File) error { return f.Truncate(100) }),
	"allocate": onFile(func(_ *worker, f *os.File) error { return unix.Fallocate(int(f.Fd()), 0, 0, 2*fileSize) }),
	"chmod":    onFile(func(_ *worker, f *os.File) error { return f.Chmod(0o600) }),
	"fstat":    onFile(func(_ *worker, f *os.File) error { _, err := f.Stat(); return err }),
	"setxattr": onFile(func(w *worker, f *os.File) error { return unix.Fsetxattr(int(f.Fd()), "user.x", []byte(w.Canary), 0) }),
	"link":     onFile(func(w *worker, f *os.File) error { return os.Link(f.Name(), w.path("linked")) }),
	"rename":   onFile(func(w *worker, f *os.File) error { return os.Rename(f.Name(), w.path("renamed")) }),
	"unlink":   onFile(func(_ *worker, f *os.File) error { return os.Remove(f.Name()) }),
	"open":     onFile(func(_ *worker, f *os.File) error { _, err := os.Open(f.Name()); return err }),
	"create":   onFile(func(w *worker, _ *os.File) error { _, err := os.Create(w.path("created")); return err }),
	"mkdir":    onFile(func(w *worker, _ *os.File) error { return os.Mkdir(w.path("dir"), 0o755) }),
	"symlink":  onFile(func(w *worker, _ *os.File) error { return os.Symlink(w.Canary, w.path("link")) }),
	"readdir":  onFile(func(w *worker, _ *os.File) error { return listed(w.Dir, 1) }),
	"load": onMapping(unix.MAP_SHARED, func(w *worker, memory []byte) error {
		return differs(memory[pageSize:][:recordSize], w.Canary, pageSize/recordSize)
	}),
	"private load": onMapping(unix.MAP_PRIVATE, func(w *worker, memory []byte) error {
		return differs(memory[pageSize:][:recordSize], w.Canary, pageSize/recordSize)
	}),
	"store":   onMapping(unix.MAP_SHARED, func(_ *worker, memory []byte) error { memory[0]++; return nil }),
	"execute": executed,
}

// answeredCalls need no key, and tools of the operator make them.
var answeredCalls = map[string]frozenCall{
	"statfs":       onMount(func(dir string) error { return unix.Statfs(dir, &unix.Statfs_t{}) }),
	"stat of root": onMount(func(dir string) error { return unix.Stat(dir, &unix.Stat_t{}) }),
}

// wanted is the begin of the file that a call finds.
func (w *worker) wanted(n int) []byte {
	b := make([]byte, n)
	pattern(b, w.Canary, 0)
	return b
}

// onFile makes a call on an open file whose pages and attributes the kernel has cached.
func onFile(call func(*worker, *os.File) error) frozenCall {
	return func(w *worker) (func() error, error) {
		f, want, err := w.filled("file")
		if err != nil {
			return nil, err
		}
		err = readWhole(int(f.Fd()), make([]byte, fileSize), want, 0)
		return func() error { return call(w, f) }, err
	}
}

// onMapping makes a call on a mapping of which every page is present.
func onMapping(flags int, call func(*worker, []byte) error) frozenCall {
	return func(w *worker) (func() error, error) {
		f, _, err := w.filled("file")
		if err != nil {
			return nil, err
		}
		memory, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, flags)
		if err != nil {
			return nil, err
		}
		sum := byte(0)
		for i := 0; i < len(memory); i += pageSize {
			sum += memory[i]
		}
		if sum == 1 { // never: the records begin alike; it keeps the loads
			return nil, fmt.Errorf("loaded %d", sum)
		}
		return func() error { return call(w, memory) }, nil
	}
}

func onMount(call func(dir string) error) frozenCall {
	return func(w *worker) (func() error, error) {
		return func() error { return call(filepath.Dir(w.Dir)) }, nil
	}
}

// executed runs a program that lies on the mount.
func executed(w *worker) (func() error, error) {
	program, err := exec.LookPath("true")
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	f, err := w.make("program", 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(text); err != nil {
		return nil, err
	}
	if err := f.Chmod(0o755); err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	// In place of the worker: the process that hangs is then the one that is killed.
	return func() error { return unix.Exec(f.Name(), []string{"true"}, nil) }, nil
}

// call makes one call when it is told to.
func (w *worker) call() error {
	prepare, ok := frozenCalls[w.Call]
	if !ok {
		prepare = answeredCalls[w.Call]
	}
	call, err := prepare(w)
	if err != nil {
		return err
	}
	w.end() // from here on a call in hand is the call
	for !w.stopped() && w.Go.Load() == 0 {
		time.Sleep(time.Millisecond) // between two looks
	}
	return w.do(w.Call, call)
}

// callers starts a worker for each kind of call and waits until all are ready.
func (s *stack) callers(kinds map[string]frozenCall, copies int) map[string][]*writerState {
	s.t.Helper()
	all := map[string][]*writerState{}
	for kind := range kinds {
		for i := range copies {
			all[kind] = append(all[kind], s.spawn(task{Role: "call", Call: kind, Dir: fmt.Sprintf("%s/%s%d-%s", s.mount, kind, i, s.canary)}))
		}
	}
	for kind, workers := range all {
		for _, w := range workers {
			s.await(kind+" to be ready", w.process, func() bool { return w.Ready.Load() != 0 })
		}
	}
	return all
}

// killLimit is how long a frozen process may outlive SIGKILL: byokd looks at
// callers every 100 ms, and the machine is shared.
const killLimit = time.Second

// Every kind of call hangs while frozen, a caller can be killed, and one that is
// not goes on after the thaw.
func TestFrozenCalls(t *testing.T) {
	s := newStack(t, shipped)
	callers, answered := s.callers(frozenCalls, 2), s.callers(answeredCalls, 1)
	s.key(kmstest.KeyCommand{Do: "disable"})
	s.awaitGate(keyguard.Frozen)
	for _, all := range []map[string][]*writerState{callers, answered} {
		for _, workers := range all {
			for _, w := range workers {
				w.Go.Store(1)
			}
		}
	}
	for kind, workers := range answered {
		if !workers[0].wait(patience) || workers[0].code() != 0 {
			t.Errorf("%s is not answered while frozen: %s", kind, workers[0].tail())
		}
	}
	for kind, workers := range callers {
		for _, w := range workers {
			s.await(kind+" to be called", nil, func() bool { return w.hanging() || w.ended() })
		}
	}
	assertNothingEnds(t, callers)
	slowest := time.Duration(0)
	for kind, workers := range callers {
		began := time.Now()
		workers[0].signal(unix.SIGKILL)
		if !workers[0].wait(killLimit) {
			t.Errorf("%s: the caller still lives %v after SIGKILL", kind, killLimit)
		}
		slowest = max(slowest, time.Since(began))
	}
	assertNothingEnds(t, without(callers, 0))
	s.key(kmstest.KeyCommand{Do: "enable"})
	for kind, workers := range callers {
		if w := workers[1]; !w.wait(patience) || w.code() != 0 {
			t.Errorf("%s did not go on after the thaw: %s", kind, w.tail())
			w.kill()
		}
	}
	t.Logf("%d kinds of call hang; a killed caller is gone after %v at most", len(callers), slowest.Round(time.Millisecond))
}

// settle is how long a call that must hang is looked at.
const settle = 500 * time.Millisecond

// assertNothingEnds watches callers that must all hang.
func assertNothingEnds(t *testing.T, callers map[string][]*writerState) {
	t.Helper()
	deadline := time.After(settle)
	for kind, workers := range callers {
		for _, w := range workers {
			select {
			case <-w.done:
				t.Errorf("%s came back while frozen: exit %d, %s", kind, w.code(), w.tail())
			default:
			}
		}
	}
	<-deadline
	for kind, workers := range callers {
		for _, w := range workers {
			if w.ended() {
				t.Errorf("%s came back while frozen: exit %d, %s", kind, w.code(), w.tail())
			}
		}
	}
}

// without leaves one worker of each kind out.
func without(callers map[string][]*writerState, index int) map[string][]*writerState {
	rest := map[string][]*writerState{}
	for kind, workers := range callers {
		for i, w := range workers {
			if i != index {
				rest[kind] = append(rest[kind], w)
			}
		}
	}
	return rest
}

// signalled reads and writes under a storm of signals that it handles.
func (w *worker) signalled() error {
	f, want, err := w.filled("signalled")
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1, unix.SIGALRM)
	go func() {
		for range signals {
		}
	}()
	storm := unix.Itimerval{Interval: unix.Timeval{Usec: 5000}, Value: unix.Timeval{Usec: 5000}}
	if _, err := unix.Setitimer(unix.ITIMER_REAL, storm); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for off := 0; !w.stopped(); off = (off + len(buf)) % fileSize {
		switch w.Call {
		case "write":
			err = w.do("pwrite", func() error { return pwrite(int(f.Fd()), want[off:off+len(buf)], int64(off)) })
		case "fsync":
			err = w.do("small pwrite", func() error { return pwrite(int(f.Fd()), want[off:off+recordSize], int64(off)) })
			if err == nil {
				err = w.do("fsync", func() error { return unix.Fsync(int(f.Fd())) })
			}
		default:
			err = w.do("pread", func() error { return readWhole(int(f.Fd()), buf, want, off) })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Signals that a program handles neither end a frozen call nor make it fail: a
// JVM signals its own threads all the time.
func TestFrozenCallsIgnoreHarmlessSignals(t *testing.T) {
	s := newStack(t, shipped)
	var workers []*writerState
	for _, kind := range []string{"read", "write", "fsync"} {
		w := s.spawn(task{Role: "signalled", Call: kind, Dir: s.mount + "/" + kind})
		s.await(kind+" to begin", w.process, func() bool { return w.Ops.Load() > 10 })
		workers = append(workers, w)
	}
	s.key(kmstest.KeyCommand{Do: "disable"})
	s.awaitGate(keyguard.Frozen)
	for _, w := range workers {
		s.await("a call to hang", w.process, w.hanging)
	}
	var before []uint64
	for _, w := range workers {
		before = append(before, w.Ops.Load())
	}
	const signals, pause = 200, 5 * time.Millisecond // one second of storm
	for range signals {
		for _, w := range workers {
			if err := unix.Tgkill(w.pid(), int(w.Tid.Load()), unix.SIGUSR1); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(pause)
	}
	for i, w := range workers {
		if w.ended() || w.Ops.Load() != before[i] {
			t.Errorf("%s: a call came back while frozen: %s", w.task.Call, w.tail())
		}
	}
	s.key(kmstest.KeyCommand{Do: "enable"})
	for i, w := range workers {
		s.await(w.task.Call+" to go on", w.process, func() bool { return w.Ops.Load() > before[i] })
	}
	s.retire(workers)
}
