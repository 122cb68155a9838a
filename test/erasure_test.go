//go:build linux

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// freezesVariable says how many freezes TestFreezeOverAndOver makes.
const freezesVariable = "BYOKD_SOAK_FREEZES"

// TestFreezeOverAndOver disables and enables the key at random moments under full
// load, as often as BYOKD_SOAK_FREEZES says (make soak: 100), looks through the
// memory of the frozen daemon each time, and prints how long everything took.
// What is seldom left in memory is only seen so: a signal in the midst of a
// cipher, a thread that hangs in a system call, a stack that was just moved.
func TestFreezeOverAndOver(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv(freezesVariable))
	if err != nil || rounds < 1 {
		t.Skipf("for soak tests: %s gives the number of freezes", freezesVariable)
	}
	s := newStack(t, shipped, sealedOwners)
	l := s.startLoad()
	s.awaitProgress(l)
	root, data := s.secrets()
	s.assertKeysInMemory(root, data)
	disable := revocations[0]
	var all []figures
	for round := range rounds {
		s.signalStorm(rand.N(probeInterval))
		f := disable.freeze(s, l, round)
		s.assertErased(root, data)
		disable.thaw(s, l, round, &f)
		all = append(all, f)
		s.awaitProgress(l)
		l.assertUnharmed(t, "after the thaw")
		if t.Failed() {
			t.Fatalf("after freeze %d of %d: %v", round+1, rounds, f)
		}
	}
	t.Logf("%d freezes under load, each followed by a scan\n%s", rounds, summarize(all))
	s.finish(l)
}

// signalStorm sends signals that do nothing to byokd's threads for some time, as
// many as the machine allows: so that the kernel stores registers in the midst of
// ciphers again and again. Go's runtime does the same, some hundred times a second.
func (s *stack) signalStorm(length time.Duration) {
	s.t.Helper()
	for end := time.Now().Add(length); time.Now().Before(end); {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.workerPid()))
		if err != nil {
			s.t.Fatal(err)
		}
		for _, thread := range threads {
			if tid, err := strconv.Atoi(thread.Name()); err == nil {
				_ = unix.Tgkill(s.workerPid(), tid, unix.SIGURG) // it may have ended
			}
		}
	}
}

// summarize gives the distribution of every time that is promised.
func summarize(all []figures) string {
	rows := []struct {
		name string
		of   func(f figures) time.Duration
	}{
		{"refusal → gate closed", func(f figures) time.Duration { return f.closed.Sub(f.refused) }},
		{"refusal → last byte on the mount", func(f figures) time.Duration { return f.lastMount.Sub(f.refused) }},
		{"refusal → last byte on the proxy", func(f figures) time.Duration { return f.lastProxy.Sub(f.refused) }},
		{"refusal → keys erased", func(f figures) time.Duration { return f.erased.Sub(f.refused) }},
		{"disable → gate closed", func(f figures) time.Duration { return f.closed.Sub(f.changed) }},
		{"enable → gate open", func(f figures) time.Duration { return f.opened.Sub(f.restored) }},
		{"enable → first byte on the mount", func(f figures) time.Duration { return f.firstMount.Sub(f.restored) }},
		{"enable → first byte on the proxy", func(f figures) time.Duration { return f.firstProxy.Sub(f.restored) }},
	}
	var text strings.Builder
	for _, row := range rows {
		var times []time.Duration
		for _, f := range all {
			times = append(times, row.of(f))
		}
		slices.Sort(times)
		at := func(share float64) int64 { return times[int(share*float64(len(times)-1))].Milliseconds() }
		fmt.Fprintf(&text, "%-34s p50 %4d ms  p99 %4d ms  max %4d ms\n", row.name, at(0.5), at(0.99), at(1))
	}
	return text.String()
}
