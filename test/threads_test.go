//go:build linux

package test

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// maxThreads is what byokd may need at most: 64 in lower reads and writes, and
// those that wait for requests, timers and the network.
const maxThreads = 120

// A flush of many scattered pages comes as a thousand WRITEs at once. That must
// not make a thousand threads, which a pod's limit would refuse: Go's runtime
// ends the process then.
func TestThreadsAreBounded(t *testing.T) {
	s := newStack(t, shipped)
	f, err := os.Create(s.mount + "/scattered")
	if err != nil {
		t.Fatal(err)
	}
	const pages = 16_000
	if err := f.Truncate(pages * pageSize); err != nil {
		t.Fatal(err)
	}
	most := 0
	page := make([]byte, pageSize)
	for round := range 3 { // holes, then blocks to rewrite
		r := rand.New(rand.NewPCG(1, uint64(round)))
		for range pages / 4 {
			if err := pwrite(int(f.Fd()), page, r.Int64N(pages)*pageSize); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Fsync(int(f.Fd())); err != nil {
			t.Fatal(err)
		}
		threads, err := os.ReadDir("/proc/" + strconv.Itoa(s.workerPid()) + "/task")
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, len(threads)) // the runtime gives none back
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if most > maxThreads {
		t.Errorf("byokd has %d threads after a flush of scattered pages, more than %d", most, maxThreads)
	}
	t.Logf("%d threads", most)
}
