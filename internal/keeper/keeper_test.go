package keeper

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// patience bounds what is not promised a time.
const patience = 20 * time.Second

// watched is a keeper that runs in the test.
type watched struct {
	t       *testing.T
	program string // where the worker's binary lies
	signals chan os.Signal
	input   *os.File    // the workers' standard input
	lines   chan string // what they say
	logs    *observer.ObservedLogs
	starts  atomic.Int64
	stops   atomic.Int64 // of the sentinel
	pid     int          // of the last one heard
	done    chan struct{}
	code    int   // after done
	err     error // after done
}

// install puts the test binary where a worker's program lies, under the name that
// says what it does.
func install(t *testing.T, dir, role string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, role)
	if err := os.Link(self, path); err != nil {
		if text, err := exec.Command("cp", self, path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
	}
	return path
}

// keep runs a keeper of a worker until it ends or the test does. The program that it
// knows is a link, which point moves.
func keep(t *testing.T, role string, change ...func(*Options)) *watched {
	t.Helper()
	// Run lowers the score of its own process, which here is the test's.
	score := ownOOMScore()
	t.Cleanup(func() { _ = os.WriteFile("/proc/self/oom_score_adj", []byte(score), 0) })
	w := &watched{t: t, program: filepath.Join(t.TempDir(), "program"), signals: make(chan os.Signal, 8), lines: make(chan string, 1000), done: make(chan struct{})}
	w.point(role)
	stdin, input, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	output, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.input = input
	go func() {
		defer close(w.lines)
		for s := bufio.NewScanner(output); s.Scan(); {
			w.lines <- s.Text()
		}
	}()
	core, logs := observer.New(zapcore.InfoLevel)
	w.logs = logs
	o := Options{Program: w.program, Args: []string{"worker"}, Env: append(os.Environ(), childVariable+"=worker"),
		Files: [3]*os.File{stdin, stdout, os.Stderr}, Signals: w.signals, CannotTakeOver: cannotTakeOver, StatusWithin: patience, Log: zap.New(core),
		Sentinel: func(string) (func(), error) { return func() { w.stops.Add(1) }, nil },
		Started:  func(int) { w.starts.Add(1) }}
	for _, c := range change {
		c(&o)
	}
	go func() {
		defer close(w.done)
		w.code, w.err = Run(o)
		stdin.Close()
		stdout.Close()
	}()
	t.Cleanup(func() {
		w.signals <- syscall.SIGTERM
		select {
		case <-w.done:
		case <-time.After(patience):
			t.Error("the keeper does not stop")
		}
		input.Close()
		if t.Failed() {
			for _, e := range logs.All() {
				t.Log(e.Message, e.ContextMap())
			}
		}
	})
	return w
}

// silent keeps what the runtime says of a crash out of the test's output.
func silent(o *Options) { o.Files[2] = nil }

// point puts another binary where the keeper looks for it, by renaming.
func (w *watched) point(role string) {
	w.t.Helper()
	target := install(w.t, w.t.TempDir(), role)
	if err := os.Symlink(target, w.program+".new"); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(w.program+".new", w.program); err != nil {
		w.t.Fatal(err)
	}
}

// hear returns the next line of a worker.
func (w *watched) hear() string {
	w.t.Helper()
	select {
	case line, ok := <-w.lines:
		if !ok {
			w.t.Fatal("the workers say nothing any more")
		}
		if _, rest, ok := strings.Cut(line, " pid="); ok {
			pid, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				w.t.Fatal(err)
			}
			w.pid = pid
		}
		return line
	case <-time.After(patience):
		w.t.Fatal("no worker says anything")
	}
	return ""
}

// hears fails unless the next line has all the parts.
func (w *watched) hears(parts ...string) string {
	w.t.Helper()
	line := w.hear()
	for _, p := range parts {
		if !strings.Contains(line, p) {
			w.t.Fatalf("a worker says %q, without %q", line, p)
		}
	}
	return line
}

func (w *watched) tell(command string) {
	w.t.Helper()
	if _, err := w.input.WriteString(command + "\n"); err != nil {
		w.t.Fatal(err)
	}
}

// settled returns when the keeper has heeded all that the worker has said so far.
func (w *watched) settled() {
	w.t.Helper()
	w.tell("hold")
	w.tell("release")
	w.hears("released")
}

func (w *watched) kill(s syscall.Signal) {
	w.t.Helper()
	if err := unix.Kill(w.pid, s); err != nil {
		w.t.Fatal(err)
	}
}

// ends waits for Run to return.
func (w *watched) ends(code int) {
	w.t.Helper()
	select {
	case <-w.done:
	case <-time.After(patience):
		w.t.Fatal("the keeper does not end")
	}
	if w.err != nil || w.code != code {
		w.t.Errorf("Run returned %d, %v; want %d", w.code, w.err, code)
	}
}

// logged waits for a line of the log.
func (w *watched) logged(message string) {
	w.t.Helper()
	w.await(message, func() bool { return w.logs.FilterMessage(message).Len() > 0 })
}

func (w *watched) await(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) { // the pace of looking
		if time.Now().After(deadline) {
			w.t.Fatal("waited in vain for: " + what)
		}
	}
}

func (w *watched) hangUp() { w.signals <- syscall.SIGHUP }

// TestRespawn: whatever ends a worker, another follows, who knows why, and gets what
// was deposited.
func TestRespawn(t *testing.T) {
	for _, c := range []struct {
		signal syscall.Signal
		says   string
	}{
		{syscall.SIGKILL, "cause=killed killed=1 fault=0"},
		{syscall.SIGSEGV, "cause=fault killed=0 fault=1"},
		{syscall.SIGABRT, "cause=fault killed=0 fault=1"},
	} {
		t.Run(c.signal.String(), func(t *testing.T) {
			w := keep(t, "serves", silent)
			w.hears("cause= killed=0 fault=0", `text=""`, "comm=worker")
			first := w.pid
			w.await("the deposit", func() bool { return w.heldByKeeper("memfd:text") })
			w.kill(c.signal)
			w.hears(c.says, fmt.Sprintf("text=%q", fmt.Sprint("from ", first)), "comm=worker")
			w.signals <- syscall.SIGTERM
			w.hears("told terminated")
			w.ends(0)
			if n := w.stops.Load(); n != 1 {
				t.Errorf("the sentinel was stopped %d times", n)
			}
		})
	}
}

// heldByKeeper reports whether this process, where the keeper runs, has a descriptor of
// something.
func (w *watched) heldByKeeper(name string) bool {
	all, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		w.t.Fatal(err)
	}
	return slices.ContainsFunc(all, func(path string) bool {
		target, _ := os.Readlink(path)
		return strings.Contains(target, name)
	})
}

// TestHold: what a worker has had held outlives it, and is let go when told.
func TestHold(t *testing.T) {
	w := keep(t, "serves")
	w.hears("cause=")
	w.tell("hold")
	w.tell("release")
	w.hears("released <nil>")
	w.tell("hold")
	w.tell("hold") // under the same number: the one before is let go
	w.hears("released <nil>")
}

// TestHeldGoesOn: the next worker gets all that is held, and nothing that was let go.
func TestHeldGoesOn(t *testing.T) {
	w := keep(t, "holds", silent)
	for _, held := range []int{0, manyHeld * 2 / 3, manyHeld * 2 / 3} {
		w.hears("holds", "cause=")
		w.hears(fmt.Sprintf("held %d, of which right %d", held, held))
	}
	w.signals <- syscall.SIGTERM
	w.ends(0)
}

// TestSlowClose: the worker does not wait for the close of what it has let go of.
func TestSlowClose(t *testing.T) {
	w := keep(t, "lingers")
	w.hears("lingers", "cause=")
	w.hears("held 0")
	w.signals <- syscall.SIGTERM
	w.ends(0)
}

// TestEndInOrder: a worker that says farewell is not followed by another.
func TestEndInOrder(t *testing.T) {
	w := keep(t, "ends")
	w.hears("ends")
	w.ends(7)
	if n := w.starts.Load(); n != 1 {
		t.Errorf("%d workers were started", n)
	}
}

// TestBackoff: a worker that soon ends by itself is started again at once, and after
// a pause if that goes on; the pauses grow up to a second.
func TestBackoff(t *testing.T) {
	for _, role := range []string{"mute", "crashes"} {
		t.Run(role, func(t *testing.T) {
			var at []time.Time
			w := keep(t, role, silent, func(o *Options) {
				started := o.Started
				o.Started = func(pid int) { at = append(at, time.Now()); started(pid) }
			})
			w.await("seven workers", func() bool { return w.starts.Load() >= 7 })
			w.signals <- syscall.SIGTERM // the next one is told, and ends by itself
			w.ends(1)
			deaths := w.logs.FilterMessage("the worker has ended and is started again").All()
			for i, least := range []time.Duration{0, firstPause, 2 * firstPause, 4 * firstPause, 8 * firstPause} {
				if got := at[i+1].Sub(deaths[i].Time); got < least {
					t.Errorf("worker %d was started %v after the end of the one before, want at least %v", i+2, got, least)
				}
			}
		})
	}
}

// TestPause: a pause is cut short by a signal to stop and by an upgrade, not by one
// that is refused.
func TestPause(t *testing.T) {
	for _, c := range []struct {
		name    string
		signals []os.Signal
		suits   error
		upgrade bool
	}{
		{"SIGTERM", []os.Signal{syscall.SIGTERM}, nil, false},
		{"SIGHUP", []os.Signal{syscall.SIGHUP}, nil, true},
		{"a SIGHUP that is refused, SIGINT", []os.Signal{syscall.SIGHUP, syscall.SIGINT}, errors.New("another seam"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			signals := make(chan os.Signal, len(c.signals))
			for _, s := range c.signals {
				signals <- s
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			k := &keeper{log: zap.NewNop(), Options: Options{Program: self, Signals: signals, Suits: func(string) error { return c.suits }}}
			done := make(chan struct{})
			go func() { k.pause(time.Hour); close(done) }()
			select {
			case <-done:
			case <-time.After(patience):
				t.Fatal("the pause goes on")
			}
			if k.unproven != c.upgrade || (k.stopping == nil) != c.upgrade {
				t.Errorf("another binary: %v, stopping: %v", k.unproven, k.stopping)
			}
			if k.unproven {
				k.program.close()
			}
		})
	}
}

// TestSignals: they reach the worker that can heed them, whichever that is.
func TestSignals(t *testing.T) {
	t.Run("a worker killed while it stops", func(t *testing.T) {
		w := keep(t, "dies")
		w.hears("killed=0")
		w.signals <- syscall.SIGTERM
		w.hears("killed=1")
		w.hears("killed=2") // it is told, too, without another signal
		w.ends(0)
	})
	t.Run("a worker that crashes while it stops", func(t *testing.T) {
		w := keep(t, "panics", silent)
		w.hears("panics")
		w.signals <- syscall.SIGINT
		w.ends(1)
	})
	t.Run("before a worker is ready", func(t *testing.T) {
		w := keep(t, "serves", func(o *Options) {
			signals := make(chan os.Signal, 1)
			signals <- syscall.SIGINT
			o.Signals = signals
		})
		w.hears("cause=")
		w.hears("told interrupt")
		w.ends(0)
	})
	t.Run("by hand to a worker", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("cause=")
		w.kill(syscall.SIGINT)
		w.hears("told interrupt")
		w.ends(0) // a worker that ends in order ends all
	})
}

// TestKeeperTakesNoMemory: neither what workers say nor their deaths make the keeper
// grow, and messages cost it none at all: it has to work when there is none left.
func TestKeeperTakesNoMemory(t *testing.T) {
	t.Run("messages", func(t *testing.T) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pair[1])
		if err := unix.SetNonblock(pair[0], true); err != nil {
			t.Fatal(err)
		}
		ours := os.NewFile(uintptr(pair[0]), "ours")
		defer ours.Close()
		conn, err := ours.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		k := &keeper{held: map[uint64]int{}, closing: make(chan int)}
		closed := make(chan struct{})
		go func() { defer close(closed); closeAll(k.closing) }()
		box := newInbox()
		rights, number := unix.UnixRights(int(null.Fd())), number(1)
		with, without := append([]byte{byte(hold)}, number...), append([]byte{byte(release)}, number...)
		before := descriptors(t)
		heeded := func(message, rights []byte) {
			if _, err := unix.SendmsgN(pair[1], message, rights, nil, 0); err != nil {
				t.Fatal(err)
			}
			m, ok := box.receive(conn)
			if !ok {
				t.Fatal("no message")
			}
			k.heed(m)
		}
		if n := testing.AllocsPerRun(1000, func() { heeded(with, rights); heeded(without, nil) }); n != 0 {
			t.Errorf("a message takes %v allocations", n)
		}
		close(k.closing)
		<-closed
		if after := descriptors(t); after > before { // fewer: those of other tests are being closed
			t.Errorf("%d descriptors, %d before", after, before)
		}
	})
	t.Run("deaths", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		die := func(times int) (heap uint64, goroutines, fds int) {
			for range times {
				w.kill(syscall.SIGKILL)
				w.hears("cause=killed")
			}
			w.logs.TakeAll() // the test's own
			w.await("the last deposit", func() bool { return w.heldByKeeper("memfd:text") })
			runtime.GC()
			runtime.GC() // finalizers of the first
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc, runtime.NumGoroutine(), descriptors(t)
		}
		heap, goroutines, fds := die(10)
		heap2, goroutines2, fds2 := die(40)
		const room = 64 << 10 // for what the runtime and the test have of their own
		if heap2 > heap+room || goroutines2 > goroutines+2 || fds2 > fds+2 {
			t.Errorf("after 40 more deaths: heap %d → %d, goroutines %d → %d, descriptors %d → %d", heap, heap2, goroutines, goroutines2, fds, fds2)
		}
		t.Logf("heap %d KiB", heap2>>10)
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
