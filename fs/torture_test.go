package fs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The torture: the worker is killed at random moments while model-checked writers
// use the mount. No call may fail, none may be wrong, none may hang.

// killsVariable says how often TestTorture kills; make soak sets 1000.
const killsVariable = "BYOKD_KILLS"

// shortKills take about 10 s.
const shortKills = 30

func killsWanted(t testing.TB) int {
	text := os.Getenv(killsVariable)
	if text == "" {
		return shortKills
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number of kills", killsVariable, text)
	}
	return n
}

// storm is everything that goes on while the worker is killed.
type storm struct {
	k    *keptVolume
	ctx  context.Context
	stop context.CancelFunc
	done sync.WaitGroup
	ops  atomic.Int64

	mu     sync.Mutex
	faults []error // guarded by mu
}

func (s *storm) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, err)
	s.stop()
}

func (s *storm) failed() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.faults)
}

// start runs a writer again and again until the storm ends. What it opens, it
// checks.
func (s *storm) start(name string, work func(dir string, r *rand.Rand, going func() bool) error) {
	dir := s.k.path(name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.k.t.Fatal(err)
	}
	seed := rand.Uint64()
	s.done.Go(func() {
		defer func() {
			if fault := recover(); fault != nil {
				s.fail(fmt.Errorf("%s (seed %d): %v\n%s", name, seed, fault, debug.Stack()))
			}
		}()
		debug.SetPanicOnFault(true) // a SIGBUS becomes a message
		going := func() bool { s.ops.Add(1); return s.ctx.Err() == nil }
		if err := work(dir, rand.New(rand.NewPCG(seed, 0)), going); err != nil {
			s.fail(fmt.Errorf("%s (seed %d): %w", name, seed, err))
		}
	})
}

func newStorm(k *keptVolume) *storm {
	s := &storm{k: k}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for i := range 3 {
		s.start(fmt.Sprint("names-", i), names)
	}
	s.start("append", appends)
	s.start("grow", grows)
	s.start("buffered", func(dir string, r *rand.Rand, going func() bool) error { return overwrites(dir, r, going, 0) })
	s.start("direct", func(dir string, r *rand.Rand, going func() bool) error {
		return overwrites(dir, r, going, unix.O_DIRECT)
	})
	s.start("mapped", stores)
	s.start("nameless", nameless)
	s.start("stream", streams)
	s.start("attributes", attributes)
	return s
}

// finish ends the storm. A call that hangs is one that does not end in time.
func (s *storm) finish() {
	s.k.t.Helper()
	s.stop()
	done := make(chan struct{})
	go func() { s.done.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		s.k.t.Error("a call hangs")
		_ = s.k.keeper.Process.Kill() // frees it, and this process with it
	}
	for _, err := range s.failed() {
		s.k.t.Error(err)
	}
}

// firstReply makes a call that the worker has to answer, and returns when it has.
func (k *keptVolume) firstReply() error {
	_, err := unix.Getxattr(k.path("attributes/f"), "user.none", nil)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// TestTortureControl shows what the request log is for: without it, calls fail that
// had succeeded.
func TestTortureControl(t *testing.T) {
	k := newKeptVolume(t, keptVariable+"_FORGETFUL=1")
	s := newStorm(k)
	const most = 300
	for range most {
		time.Sleep(time.Duration(5+rand.IntN(20)) * time.Millisecond) // the random moment
		k.kill(unix.SIGKILL)
		if err := k.firstReply(); err != nil {
			s.fail(err)
		}
		if faults := s.failed(); len(faults) > 0 {
			t.Logf("as it must: %v", faults[0])
			s.stop()
			s.done.Wait()
			return
		}
	}
	s.finish()
	t.Errorf("%d kills without a log broke nothing: the torture tests nothing", most)
}

// stalls returns what the worker does between the steps of a request: mostly
// nothing, now and then it waits, so that the moments in which a death leaves
// something half done are as likely as any other.
func stalls(seed, generation uint64) func(step) {
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(seed, generation))
	return func(step) {
		mu.Lock()
		var wait time.Duration
		switch n := r.IntN(100); {
		case n == 0:
			wait = time.Duration(r.IntN(30)) * time.Millisecond
		case n < 10:
			wait = time.Duration(r.IntN(3000)) * time.Microsecond
		}
		mu.Unlock()
		if wait > 0 {
			time.Sleep(wait) // what the seed says
		}
	}
}

// tortured is a way to kill the worker at random moments.
type tortured struct {
	name    string
	cache   CacheMode
	stalled bool // the moments between two steps of a request are drawn out
	again   int  // each how manieth kill is followed by one in the recovery
}

// in tortures a volume in a directory.
func (c tortured) in(t *testing.T, dir string, kills int, env ...string) {
	env = append(env, keptVariable+"_CACHE="+c.cache.String())
	recovery := 15
	if c.stalled {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		env = append(env, fmt.Sprintf("%s_STALLS=%d", keptVariable, seed))
		recovery = 60
	}
	k := newKeptVolumeIn(t, dir, env...)
	s := newStorm(k)
	var took []time.Duration
	for kill := range kills {
		time.Sleep(time.Duration(5+rand.IntN(150)) * time.Millisecond) // the random moment
		began := time.Now()
		k.kill(unix.SIGKILL)
		if kill%c.again == c.again-1 { // in the middle of the recovery
			time.Sleep(time.Duration(rand.IntN(recovery)) * time.Millisecond)
			k.kill(unix.SIGKILL)
		}
		if err := k.firstReply(); err != nil {
			s.fail(err)
		}
		took = append(took, time.Since(began))
		if len(s.failed()) > 0 {
			t.Logf("after kill %d", kill+1)
			break
		}
	}
	s.finish()
	slices.Sort(took)
	t.Logf("%d kills, %d operations; from the kill to the first reply p50 %v, p90 %v, max %v", len(took), s.ops.Load(),
		took[len(took)/2].Round(100*time.Microsecond), took[len(took)*9/10].Round(100*time.Microsecond), took[len(took)-1].Round(100*time.Microsecond))
	if !t.Failed() {
		k.nothingStays()
	}
}

// nothingStays removes all files, which the kernel forgets then: nobody holds one of
// them any more, however many workers there were.
func (k *keptVolume) nothingStays() {
	k.t.Helper()
	entries, err := os.ReadDir(k.dir + "/mount")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(k.path(e.Name())); err != nil {
			k.t.Fatal(err)
		}
	}
	for _, who := range []struct {
		name string
		pid  int
		own  int // the worker's reserve has no name
	}{{"keeper", k.keeper.Process.Pid, 0}, {"worker", int(k.pid.Load()), 1}} {
		gone := func() (paths []string) {
			fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", who.pid))
			for _, fd := range fds {
				target, _ := os.Readlink(fd)
				if strings.HasPrefix(target, k.dir+"/lower/") && strings.HasSuffix(target, " (deleted)") {
					paths = append(paths, target)
				}
			}
			return paths
		}
		await(k.t, func() string { return fmt.Sprintf("the %s holds what is gone: %q", who.name, gone()) },
			func() bool { return len(gone()) <= who.own })
	}
}

// TestTorture kills the worker at random moments.
func TestTorture(t *testing.T) {
	for _, c := range []tortured{
		{"writeback", Writeback, false, 5},
		{"write-through", Writethrough, false, 5},
		{"writeback, drawn out", Writeback, true, 2},
		{"write-through, drawn out", Writethrough, true, 2},
	} {
		t.Run(c.name, func(t *testing.T) { c.in(t, t.TempDir(), killsWanted(t)) })
	}
}

// TestTortureBelow does so on lower filesystems and with rights that the others have
// not: where inodes cannot be opened by their ids, the keeper holds them.
func TestTortureBelow(t *testing.T) {
	kills := killsWanted(t)
	if kills == shortKills {
		kills = 12
	}
	temporary := func(t *testing.T) string { return t.TempDir() }
	unable := keptVariable + "_UNABLE=1"
	for _, c := range []struct {
		lower func(*testing.T) string
		env   string
		tortured
	}{
		{temporary, unable, tortured{"without capability, writeback", Writeback, false, 5}},
		{temporary, unable, tortured{"without capability, write-through, drawn out", Writethrough, true, 2}},
		{func(t *testing.T) string { return newXFS(t, largeXFS) }, "", tortured{"large XFS, writeback, drawn out", Writeback, true, 2}},
		{func(t *testing.T) string { return newXFS(t, smallXFS) }, "", tortured{"small XFS, write-through", Writethrough, false, 5}},
	} {
		t.Run(c.name, func(t *testing.T) { c.in(t, c.lower(t), kills, c.env) })
	}
}
