//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// Java programs on a mount (workloads_*_test.go, sources in test/workloads): make workloads.

// workloadPatience bounds what a program that starts, stops or drains may take on a busy machine.
const workloadPatience = 3 * time.Minute

// requireWorkloads skips unless BYOKD_WORKLOADS asks for the workloads, and fetches and compiles them once.
func requireWorkloads(t *testing.T) {
	t.Helper()
	if os.Getenv("BYOKD_WORKLOADS") == "" {
		t.Skip("runs with make workloads")
	}
	for _, name := range []string{"java", "javac", "mvn"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("needs %s. Type: apt-get install openjdk-17-jdk-headless maven", name)
		}
	}
	if err := workloadClasses(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "byokd")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "byokd-secret")
	t.Setenv("AWS_REGION", "eu-central-1")
}

var workloadClasses = sync.OnceValue(func() error {
	text, err := exec.Command("workloads/fetch.sh").CombinedOutput()
	if err != nil {
		return fmt.Errorf("workloads/fetch.sh: %w\n%s", err, text)
	}
	return nil
})

// withHold sets how long the proxy holds a request of a frozen bucket; the default of the product is 20s.
func withHold(d time.Duration) option { return func(s *stack) { s.holdFor = d } }

// jvm starts a Java program of test/workloads.
func (d *database) jvm(name, class string, args ...string) *process {
	d.t.Helper()
	cache, err := filepath.Abs("../.cache/workloads")
	if err != nil {
		d.t.Fatal(err)
	}
	p := d.launch(name, nil, "java", append([]string{"-Xmx1g", "-Xms256m", "-XX:+UseSerialGC", "-cp", cache + "/classes:" + cache + "/jars/*", class}, args...)...)
	d.t.Cleanup(func() {
		file := fmt.Sprintf("%s/%s-%d.log", cache, name, p.pid())
		if err := os.WriteFile(file, []byte(p.output()), 0o644); err == nil {
			d.t.Logf("the log of %s is in %s", name, file)
		}
	})
	return p
}

// awaitLine waits until a program has printed "WORD VALUE" and returns the value.
func (d *database) awaitLine(p *process, word string) string {
	d.t.Helper()
	line := regexp.MustCompile(`(?m)^` + word + ` (\S+)$`)
	var value string
	d.awaitLong(word+" of "+p.name, p, func() bool {
		m := line.FindStringSubmatch(p.output())
		if m != nil {
			value = m[1]
		}
		return m != nil
	})
	return value
}

// awaitLong is await for what a program may take minutes for.
func (d *database) awaitLong(what string, p *process, ok func() bool) {
	d.t.Helper()
	for deadline := time.Now().Add(workloadPatience); !ok(); time.Sleep(10 * time.Millisecond) { // between two looks
		if p != nil && p.ended() {
			d.t.Fatalf("waiting for %s: %s has ended: %v\n%s", what, p.name, p.err, p.tail())
		}
		if time.Now().After(deadline) {
			r, _ := d.report()
			d.t.Fatalf("waited %v for %s; byokd says %s: %s", workloadPatience, what, r.State, r.Cause)
		}
	}
}

// complaints are the lines of a program's log, from a place on, at WARN or above that no pattern allows.
func complaints(text string, allowed ...string) (bad []string) {
	severe := regexp.MustCompile(`^[0-9:.]+ (WARN|ERROR|FATAL) |Exception in thread|A fatal error has been detected`)
	for line := range strings.SplitSeq(text, "\n") {
		if severe.MatchString(line) && !slices.ContainsFunc(allowed, func(p string) bool { return regexp.MustCompile(p).MatchString(line) }) {
			bad = append(bad, line)
		}
	}
	return bad
}

// outages are how long the key is away, by BYOKD_WORKLOADS_OUTAGES.
func outages(t *testing.T) (all []time.Duration) {
	t.Helper()
	text := os.Getenv("BYOKD_WORKLOADS_OUTAGES")
	if text == "" {
		text = "1s,60s"
	}
	for field := range strings.SplitSeq(text, ",") {
		d, err := time.ParseDuration(field)
		if err != nil {
			t.Fatalf("BYOKD_WORKLOADS_OUTAGES: %v", err)
		}
		all = append(all, d)
	}
	return all
}

// acknowledgements are the moments at which a program has answered a client of the test.
type acknowledgements struct {
	mu     sync.Mutex
	took   []time.Duration // guarded by mu
	last   time.Time       // guarded by mu
	resume time.Time       // guarded by mu; the first answer since the last look
	failed []error         // guarded by mu
}

func (a *acknowledgements) add(began time.Time, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.failed = append(a.failed, err)
		return
	}
	now := time.Now()
	if a.resume.IsZero() {
		a.resume = now
	}
	a.last = now
	a.took = append(a.took, now.Sub(began))
}

// reset forgets all answers so far.
func (a *acknowledgements) reset() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.took, a.last, a.failed = nil, time.Time{}, nil
}

func (a *acknowledgements) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.took)
}

// look returns when the last answer came, and begins to wait for the next.
func (a *acknowledgements) look() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.resume = time.Time{}
	return a.last
}

// resumed is the first answer since the last look, zero for none.
func (a *acknowledgements) resumed() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.resume
}

func (a *acknowledgements) errors() []error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.failed)
}

// percentile is that of how long answers took.
func (a *acknowledgements) percentile(p float64) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	sorted := slices.Sorted(slices.Values(a.took))
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(float64(len(sorted)-1)*p)]
}

// outage is what a freeze of a program in full flight looked like, in moments since the key was changed.
type outage struct {
	lastWrite, told, firstWrite time.Duration // firstWrite counts from the enabling
	length                      time.Duration
	reads                       int // answers to reads during the freeze, from the program's own memory
}

func (o outage) String() string {
	return fmt.Sprintf("key disabled for %v: last acknowledged write after %v, status and readiness say so after %v; %d reads answered from the program's own memory meanwhile; "+
		"first acknowledged write %v after enabling", o.length, o.lastWrite.Round(time.Millisecond), o.told.Round(time.Millisecond), o.reads, o.firstWrite.Round(time.Millisecond))
}

// freezeInFlight takes the key away under load for some time and checks that no write is acknowledged, that no call
// fails, and that all goes on within the promised time.
func (d *database) freezeInFlight(length time.Duration, writes, reads *acknowledgements) (o outage) {
	d.t.Helper()
	o.length = length
	writes.look()
	changed := time.Now()
	d.key(kmstest.KeyCommand{Do: "disable"})
	d.awaitState(metrics.StateFrozen)
	o.told = time.Since(changed)
	if code, _ := d.get("/readyz"); code == 200 {
		d.t.Error("readiness calls a frozen pod ready")
	}
	if code, _ := d.get("/livez"); code != 200 {
		d.t.Error("liveness would kill a frozen pod")
	}
	<-time.After(freezeLimit) // what was answered below may still be on its way to its client
	o.lastWrite = writes.look().Sub(changed)
	before := reads.count()
	d.hold(length-time.Since(changed), func() {
		if at := writes.resumed(); !at.IsZero() {
			d.t.Fatalf("a write was acknowledged %v after the key was disabled", at.Sub(changed))
		}
	})
	o.reads = reads.count() - before
	enabled := time.Now()
	d.key(kmstest.KeyCommand{Do: "enable"})
	d.awaitState(metrics.StateReady)
	d.awaitLong("a write after the thaw", nil, func() bool { return !writes.resumed().IsZero() })
	o.firstWrite = writes.resumed().Sub(enabled)
	for _, a := range []*acknowledgements{writes, reads} {
		if failed := a.errors(); len(failed) > 0 {
			d.t.Errorf("%d calls failed over a freeze, the first: %v", len(failed), failed[0])
		}
	}
	d.t.Log(o)
	return o
}

// hold lets time pass while something stays true, telling how far it is.
func (d *database) hold(length time.Duration, check func()) {
	d.t.Helper()
	began, told := time.Now(), time.Now()
	for time.Since(began) < length {
		check()
		if time.Since(told) > 30*time.Second {
			told = time.Now()
			d.t.Logf("frozen for %v of %v", time.Since(began).Round(time.Second), length.Round(time.Second))
		}
		time.Sleep(10 * time.Millisecond) // nothing can be awaited: nothing happens
	}
}

// crew is a number of clients that work until they are told to stop.
type crew struct {
	stop func()
	wg   sync.WaitGroup
}

func (d *database) newCrew(n int, work func(ctx context.Context, client int)) *crew {
	ctx, cancel := context.WithCancel(context.Background())
	c := &crew{stop: cancel}
	d.t.Cleanup(cancel)
	for i := range n {
		c.wg.Go(func() { work(ctx, i) })
	}
	return c
}

// end stops the clients after the call that each is in.
func (c *crew) end() {
	c.stop()
	c.wg.Wait()
}
