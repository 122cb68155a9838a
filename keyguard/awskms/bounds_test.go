package awskms

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// The promises of docs/ARCHITECTURE.md.
const (
	freezeBound = time.Second
	thawBound   = 2 * time.Second
)

// cyclesVariable says how many cycles TestFreezeAndThawBounds makes in all; make
// soak makes 1000. outagesVariable switches the outage of ten minutes on.
const cyclesVariable, outagesVariable = "BYOKD_SOAK_CYCLES", "BYOKD_SOAK_OUTAGES"

// cycle is one freeze and thaw.
type cycle struct{ refusedToClosed, disabledToClosed, enabledToOpen time.Duration }

// TestFreezeAndThawBounds disables and enables keys at random moments, ten at a
// time, each with a guard of the default probe interval, half of them with callers.
func TestFreezeAndThawBounds(t *testing.T) {
	guards, cycles := 8, 16
	if n, err := strconv.Atoi(os.Getenv(cyclesVariable)); err == nil {
		guards, cycles = 10, n
	}
	server, err := kmstest.Start(kmstest.Options{CallLimit: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	var all sync.WaitGroup
	var mu sync.Mutex
	var seen []cycle
	for n := range guards {
		w := newRig(t, server.Server)
		w.options.ProbeInterval, w.options.OutageGrace = keyguard.DefaultProbeInterval, keyguard.DefaultOutageGrace
		w.watch(w.arn)
		all.Go(func() {
			w.open()
			if n%2 == 0 { // callers meet the refusal before a probe does
				defer w.startLoad().finish()
			}
			for range (cycles + guards - 1) / guards {
				c := w.cycle()
				mu.Lock()
				seen = append(seen, c)
				mu.Unlock()
			}
		})
	}
	all.Wait()
	t.Logf("%d disable/enable cycles at random moments, %d guards at a time\n%s%s%s", len(seen), guards,
		assertBound(t, "refusal → gate closed", freezeBound, seen, func(c cycle) time.Duration { return c.refusedToClosed }),
		assertBound(t, "disable → gate closed", keyguard.DefaultProbeInterval+freezeBound, seen, func(c cycle) time.Duration { return c.disabledToClosed }),
		assertBound(t, "enable → gate open", thawBound, seen, func(c cycle) time.Duration { return c.enabledToOpen }))
}

// cycle disables the key, waits for the freeze, enables it, waits for the thaw.
func (w *rig) cycle() (c cycle) {
	time.Sleep(rand.N(2 * keyguard.DefaultProbeInterval)) // a random moment; nothing is waited for
	seq, disabled := w.kms.LastCall(), time.Now()
	w.must(w.kms.Disable(w.arn))
	s := w.awaitGate(keyguard.Frozen)
	refusal, err := w.kms.WaitCall(w.t.Context(), seq, func(k kmstest.Call) bool { return k.Key == w.arn && k.Error == "DisabledException" })
	w.must(err)
	c.refusedToClosed, c.disabledToClosed = s.Since.Sub(refusal.Time), s.Since.Sub(disabled)
	w.awaitErased()
	time.Sleep(rand.N(keyguard.DefaultProbeInterval)) // as above
	w.must(w.kms.Enable(w.arn))
	enabled := time.Now()
	c.enabledToOpen = w.awaitGate(keyguard.Open).Since.Sub(enabled)
	return c
}

// assertBound wants every time within a bound, and gives their distribution.
func assertBound(t *testing.T, what string, bound time.Duration, all []cycle, of func(cycle) time.Duration) string {
	t.Helper()
	var times []time.Duration
	for _, c := range all {
		times = append(times, of(c))
	}
	slices.Sort(times)
	at := func(share float64) time.Duration {
		return times[int(share*float64(len(times)-1))].Round(100 * time.Microsecond)
	}
	if at(1) > bound {
		t.Errorf("%s took up to %v; promised %v", what, at(1), bound)
	}
	return fmt.Sprintf("%-24s p50 %8v  p99 %8v  max %8v  (promised %v)\n", what, at(0.5), at(0.99), at(1), bound)
}

// A long outage is not waited out with growing pauses: after ten minutes the gate
// opens as soon as after ten seconds.
func TestRecoveryDoesNotDependOnTheOutage(t *testing.T) {
	if os.Getenv(outagesVariable) == "" {
		t.Skipf("for soak tests: %s=1 makes an outage of ten minutes (keyguard's TestRecoveryAfterAnyOutage does it in virtual time)", outagesVariable)
	}
	var all sync.WaitGroup
	for _, length := range []time.Duration{10 * time.Second, 10 * time.Minute} {
		all.Go(func() {
			t.Run(length.String(), func(t *testing.T) {
				server, err := kmstest.Start(kmstest.Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer server.Close()
				w := newRig(t, server.Server)
				w.options.ProbeInterval, w.options.OutageGrace = time.Second, 3*time.Second
				w.watch(w.arn)
				w.open()
				var took []string
				for range 5 {
					if length > time.Minute && len(took) == 1 {
						break
					}
					fault, err := w.kms.Inject(kmstest.Fault{Kind: kmstest.FaultCut, Key: w.arn})
					w.must(err)
					w.awaitGate(keyguard.Frozen)
					time.Sleep(length) // the outage
					w.kms.ClearFault(fault.ID)
					restored := time.Now()
					back := w.awaitGate(keyguard.Open).Since.Sub(restored)
					if back > thawBound {
						t.Errorf("open %v after KMS answered again; promised %v", back, thawBound)
					}
					took = append(took, back.Round(time.Millisecond).String())
				}
				t.Logf("open again after an outage of %v: %s", length, strings.Join(took, ", "))
			})
		})
	}
	all.Wait()
}
