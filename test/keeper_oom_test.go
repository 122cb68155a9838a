//go:build linux

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/keeper/oomtest"
)

const hogged = 4 << 20 // bytes at a time

// hog takes memory while it is told to go, and gives it back when not.
func (w *worker) hog() error {
	var taken [][]byte
	for !w.stopped() {
		w.end()
		if w.Go.Load() != 0 && len(taken) < 1<<30/hogged { // should the limit not hold, the machine is not to suffer
			memory, err := unix.Mmap(-1, 0, hogged, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				return err
			}
			for at := 0; at < hogged; at += pageSize { // a signal would cut MAP_POPULATE short
				memory[at] = 1
			}
			taken = append(taken, memory)
			continue
		}
		for _, memory := range taken {
			if err := unix.Munmap(memory); err != nil {
				return err
			}
		}
		taken = nil
		time.Sleep(time.Millisecond) // the pace of looking
	}
	return nil
}

// oomKills is how many want of memory TestWorkerOutOfMemory makes; BYOKD_KILLS says otherwise.
func oomKills(t *testing.T) int {
	if os.Getenv("BYOKD_KILLS") != "" {
		return keeperKills(t)
	}
	return 4
}

// TestWorkerOutOfMemory has the kernel end the worker for want of memory, in a cgroup
// that keeper and worker share with a process that takes it, under the whole load on the mount:
// no call fails, nothing is lost, and the cause is told.
func TestWorkerOutOfMemory(t *testing.T) {
	requireFUSE(t)
	group := oomtest.New(t, 320<<20)
	s := newStack(t, shipped)
	group.Add(t, s.daemon.pid())
	group.Add(t, s.workerPid())
	newHog := func() *writerState {
		hog := s.spawn(task{Role: "hog", Dir: t.TempDir()})
		s.await("the hog", hog.process, func() bool { return hog.Ready.Load() != 0 })
		group.Add(t, hog.pid())
		return hog
	}
	hog := newHog()
	l := load{workers: s.workers(slices.Concat(readers(), writers())...)}
	s.awaitProgress(l)
	kills := oomKills(t)
	var took []time.Duration
	for range kills {
		time.Sleep(rand.N(300 * time.Millisecond)) // the random moment
		if hog.ended() {                           // it went on taking memory after the worker's end, and was next
			hog = newHog()
		}
		pid := s.workerPid()
		// Of all in the group, the kernel is to take the worker.
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("1000"), 0); err != nil {
			t.Fatal(err)
		}
		hog.Go.Store(1)
		s.await("the kernel to end the worker", s.daemon, func() bool { return !alive(pid) })
		began := time.Now()
		hog.Go.Store(0)
		s.awaitProgress(l)
		took = append(took, time.Since(began))
		l.assertUnharmed(t, "after want of memory")
	}
	_, text := s.get("/metrics")
	told := map[string]int{}
	for line := range strings.Lines(string(text)) {
		var cause string
		var n int
		if _, err := fmt.Sscanf(line, "byokd_worker_restarts_total{cause=%q} %d", &cause, &n); err == nil {
			told[cause] = n
		}
	}
	if told["oom"] < kills || told["killed"] != 0 || told["fault"] != 0 { // more where the next worker was taken, too
		t.Errorf("the series tell %v, after %d kills for want of memory", told, kills)
	}
	hog.kill()
	s.retire(l.workers)
	s.once(task{Role: "verify", Claims: claims(l.workers)})
	s.stopDaemon()
	slices.Sort(took)
	t.Logf("%d times out of memory; until all went on p50 %v, max %v", kills, took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}
