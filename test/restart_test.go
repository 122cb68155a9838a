//go:build linux

package test

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// A byokd that is killed while frozen and started while the key is still away
// waits, unmounted and truthful, goes ready by itself when the key is back, and
// has everything that was acknowledged before.
func TestKilledWhileFrozen(t *testing.T) {
	s := newStack(t, shipped, alone)
	for round := range rounds {
		l := s.startLoad()
		s.awaitProgress(l)
		s.freezeUnder(l)
		s.daemon.signal(syscall.SIGKILL)
		if !s.daemon.wait(patience) {
			t.Fatal("byokd survived SIGKILL")
		}
		told := s.abort(l)

		s.startDaemon()
		s.awaitKey(keyguard.Disabled)
		s.assertWaiting("is disabled", "enable-key")
		s.key(kmstest.KeyCommand{Do: "enable"})
		restored := time.Now()
		s.awaitState(metrics.StateReady)
		if took := time.Since(restored); took > thawLimit {
			t.Errorf("ready %v after the key was enabled; promised %v", took, thawLimit)
		} else {
			t.Logf("started while disabled: enabled → ready %d ms", took.Milliseconds())
		}
		s.assertHealth(true, true, true)
		s.once(task{Role: "verify", Claims: told, Crash: true})
		s.verifyObjects(l.clients)
		if round < rounds-1 {
			s.once(task{Role: "clear", Dir: s.mount})
		}
	}
	s.stopDaemon()
	s.assertSealed()
}

// cutOff lets every call of KMS break off; reconnect ends that.
func (s *stack) cutOff() {
	s.t.Helper()
	if _, err := s.control.Inject(s.t.Context(), kmstest.Fault{Kind: kmstest.FaultCut}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) reconnect() {
	s.t.Helper()
	if _, err := s.control.Clear(s.t.Context(), 0); err != nil {
		s.t.Fatal(err)
	}
}

// TestKilledWhileDegraded kills byokd while KMS cannot be reached and the lease runs.
// The lease dies with it: the next one waits, also when that is killed in turn,
// until KMS answers, and has everything that was acknowledged, in the lease too.
func TestKilledWhileDegraded(t *testing.T) {
	const grace = 30 * time.Second
	s := newStack(t, shipped, withGrace(grace))
	l := s.startLoad()
	s.awaitProgress(l)
	s.cutOff()
	degraded := s.awaitGate(keyguard.Degraded)
	s.awaitProgress(l)
	l.assertUnharmed(t, "while degraded")
	s.killDaemon()
	if over := degraded.LastSuccess.Add(grace); time.Now().After(over) {
		t.Fatalf("the lease was over at %v: it was not killed while degraded", over)
	}
	told := s.abort(l)
	for range 2 {
		s.startDaemon()
		s.awaitKey(keyguard.Unreachable)
		s.assertWaiting("cannot be asked", "goes on by itself")
		s.killDaemon()
	}
	s.startDaemon()
	s.awaitKey(keyguard.Unreachable)
	s.reconnect()
	answers := time.Now()
	s.awaitState(metrics.StateReady)
	if took := time.Since(answers); took > thawLimit {
		t.Errorf("ready %v after KMS answered again; promised %v", took, thawLimit)
	}
	s.once(task{Role: "verify", Claims: told, Crash: true})
	s.verifyObjects(l.clients)
	s.stopDaemon()
	s.assertSealed()
}

// freezeUnder disables the key and waits until everything hangs.
func (s *stack) freezeUnder(l load) {
	s.t.Helper()
	s.key(kmstest.KeyCommand{Do: "disable"})
	closed := s.awaitGate(keyguard.Frozen).Since
	s.await("the promised second to pass", s.daemon, func() bool { return time.Since(closed) > freezeLimit })
	s.assertHangs(l, settle)
}

// abort ends a load whose calls can only fail from now on, and returns what the
// writers were told before.
func (s *stack) abort(l load) []claim {
	s.t.Helper()
	for _, w := range l.workers {
		w.kill()
	}
	for _, c := range l.clients {
		c.stop()
		<-c.done
	}
	return claims(l.workers)
}

// assertWaiting checks what a byokd tells and serves that was started without its key.
func (s *stack) assertWaiting(cause, nextStep string) {
	s.t.Helper()
	s.assertHealth(true, false, false)
	r, _ := s.report()
	if r.State != metrics.StateWaiting || r.Headline != "External encryption key is not ready" ||
		!strings.Contains(r.Cause, cause) || !strings.Contains(r.NextStep, nextStep) {
		s.t.Errorf("the status says %s: %s. %s Next: %s", r.State, r.Headline, r.Cause, r.NextStep)
	}
	if code, text := s.command("status", "--admin", strings.TrimPrefix(s.admin, "http://")); code != 11 {
		s.t.Errorf("byokd status: exit code %d, want 11:\n%s", code, text)
	}
	if mounted(s.mount) {
		s.t.Error("it is mounted")
	}
	if entries, err := os.ReadDir(s.mount); err != nil || len(entries) > 0 {
		s.t.Errorf("the mount point holds %v, %v", entries, err)
	}
	c := s.newClient("early")
	began := time.Now()
	err := c.tolerant(func() error { return c.put(s.t.Context(), "early", object{0, 100}) })
	if err != nil || c.slow.Load() != 1 || c.early.Load() != 0 {
		s.t.Errorf("a request was answered after %v: %v (503 SlowDown: %d, held too short: %d)", time.Since(began), err, c.slow.Load(), c.early.Load())
	}
}

// SIGTERM ends a frozen byokd in time and in order, although calls hang; what
// was acknowledged is there at the next start.
func TestStoppedWhileFrozen(t *testing.T) {
	s := newStack(t, shipped)
	l := s.startLoad()
	s.awaitProgress(l)
	s.freezeUnder(l)
	took := s.stopDaemon()
	if took > stopTimeout {
		t.Errorf("stopped %v after SIGTERM; stopTimeout is %v", took, stopTimeout)
	}
	t.Logf("SIGTERM while frozen → exit 0: %d ms", took.Milliseconds())
	for _, w := range l.workers {
		if !w.wait(patience) {
			t.Errorf("%s still hangs although its filesystem is gone", w.name)
		}
	}
	told := s.abort(l)
	s.assertSealed()
	s.key(kmstest.KeyCommand{Do: "enable"})
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	s.once(task{Role: "verify", Claims: told, Crash: true})
	s.verifyObjects(l.clients)
}
