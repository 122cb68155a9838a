package keyguard

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestOutageRunsTheLease(t *testing.T) {
	for _, hang := range []bool{false, true} {
		opened(t, nil, func(w *world) {
			began := time.Now()
			w.kms.set(Unreachable)
			w.kms.with(func(f *fakeKMS) { f.hang = hang })
			if took := w.awaitGate(Degraded, time.Minute); took > interval+time.Second {
				t.Errorf("hang %v: told after %v", hang, took)
			}
			s := w.guard.Status()
			if !s.Ready() || s.LeaseUntil.IsZero() || s.Key != Unreachable {
				t.Errorf("hang %v: degraded status %+v", hang, s)
			}
			w.stays(Degraded, DefaultOutageGrace-2*interval-time.Second)
			w.awaitGate(Frozen, 2*time.Second+interval)
			if took := time.Since(began); took > DefaultOutageGrace+time.Second {
				t.Errorf("hang %v: froze %v after the last granted call", hang, took)
			}
			w.stays(Frozen, 20*time.Minute)
			w.kms.set(Enabled)
			if took := w.awaitGate(Open, time.Minute); took > thawLimit {
				t.Errorf("hang %v: thawed after %v", hang, took)
			}
		})
	}
}

func TestShortOutageFreezesNothing(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.set(Unreachable)
		w.awaitGate(Degraded, 3*time.Second)
		time.Sleep(40 * time.Second)
		w.kms.set(Enabled)
		if took := w.awaitGate(Open, time.Minute); took > thawLimit {
			t.Errorf("recovered after %v", took)
		}
		if s := w.guard.Status(); s.Epoch != 1 || s.Key != Enabled {
			t.Errorf("status %+v", s)
		}
		w.stays(Open, 20*time.Minute)
	})
}

func TestOneLostCallIsNoOutage(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.script = []error{refusal(Unreachable)} })
		w.stays(Open, time.Minute)
		if n := w.kms.scriptLeft(); n != 0 {
			t.Error("the failure was not delivered")
		}
	})
}

func TestThrottlingIsAnOutageAndNotRepeatedAtOnce(t *testing.T) {
	opened(t, nil, func(w *world) {
		throttled := &KMSError{Op: "Decrypt", State: Unreachable, Reason: ReasonThrottled, Err: errors.New("ThrottlingException")}
		w.kms.with(func(f *fakeKMS) { f.fail = throttled })
		w.awaitGate(Degraded, 2*interval)
		before := w.kms.count("Probe")
		time.Sleep(10 * time.Second)
		if n := w.kms.count("Probe") - before; n > 21 || n < 10 {
			t.Errorf("%d probes in ten throttled seconds, want one to two a second", n)
		}
		if s := w.guard.Status(); s.Reason != ReasonThrottled || s.Gate != Degraded || s.Bound != DefaultOutageGrace+time.Second {
			t.Errorf("status %+v", s)
		}
	})
}

// A KMS slower than the probe interval is slow, not away and not refusing.
func TestSlowKMSStaysOpen(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.latency = 2500 * time.Millisecond })
		time.Sleep(10 * time.Second) // the change of pace may be told as an outage once
		w.stays(Open, 10*time.Minute)
		if s := w.guard.Status(); s.Reason != ReasonSlow || s.Key != Enabled {
			t.Errorf("status %+v", s)
		}
		w.kms.set(Disabled) // decided at the end of a call: those under way are refused
		if took := w.awaitGate(Frozen, time.Minute); took > interval+freezeLimit {
			t.Errorf("froze after %v", took)
		}
		w.kms.set(Enabled)
		w.awaitGate(Open, time.Minute)
	})
}

// A probe that got lost just when KMS starts refusing must not cost an interval.
func TestLostProbeIsAskedAgain(t *testing.T) {
	const long = 20 * time.Second
	opened(t, func(o *Options) { o.ProbeInterval = long }, func(w *world) {
		asked := w.kms.count("Probe")
		w.kms.with(func(f *fakeKMS) { f.hang = true })
		w.await("a probe under way", long, func(Status) bool { return w.kms.count("Probe") > asked })
		w.kms.set(Disabled) // the lost probe stays lost: its answer never comes
		if took := w.awaitGate(Frozen, time.Minute); took > hedgeAfter+10*time.Millisecond {
			t.Errorf("froze %v after KMS started refusing", took)
		}
	})
}

func TestDeniedIsConfirmedOnce(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.script = []error{refusal(AccessDenied)} })
		w.stays(Open, time.Minute)
		w.kms.with(func(f *fakeKMS) { f.script = []error{refusal(AccessDenied), refusal(AccessDenied)} })
		w.awaitGate(Frozen, 2*interval)
		s := w.guard.Status()
		if s.Key != AccessDenied || s.MissingAction != "kms:Decrypt" || s.Principal != "arn:aws:iam::111122223333:role/byokd-tenant" {
			t.Errorf("status %+v", s)
		}
		w.awaitGate(Open, thawLimit+interval)
	})
}

func TestDeniedAndThenSilentFreezes(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.script, f.thenHang = []error{refusal(AccessDenied)}, true })
		w.awaitGate(Frozen, interval+doubtLimit+freezeLimit)
		if got := w.seen.froze[0]; got > freezeLimit {
			t.Errorf("%v from the refusal to the closed gate", got)
		}
	})
}

func TestInvalidStateIsConfirmedByDescribe(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.fail = vague() }) // DescribeKey says Enabled: custom key store trouble
		w.awaitGate(Degraded, 2*interval)
		w.stays(Degraded, 20*time.Second)
		w.kms.with(func(f *fakeKMS) { f.desc.State, f.desc.Reason = Unavailable, ReasonKeyStoreDown })
		w.awaitGate(Frozen, interval)
		if s := w.guard.Status(); s.Key != Unavailable || s.Reason != ReasonKeyStoreDown {
			t.Errorf("status %+v", s)
		}
		w.stays(Frozen, time.Minute)
		if s := w.guard.Status(); s.Key != Unavailable || s.Reason != ReasonKeyStoreDown {
			t.Errorf("status a minute later %+v", s)
		}
	})
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.fail = vague(); f.descErr = refusal(AccessDenied) })
		w.awaitGate(Frozen, interval+freezeLimit) // nobody can vouch for it: fail closed
	})
}

func TestLeaseRunsDuringSuspend(t *testing.T) {
	opened(t, func(o *Options) { o.ProbeInterval = time.Minute; o.OutageGrace = 2 * time.Minute }, func(w *world) {
		time.Sleep(time.Second)
		w.kms.with(func(f *fakeKMS) { f.hang = true })
		w.clock.suspend(time.Hour)
		if took := w.awaitGate(Frozen, time.Minute); took > watchPause+drainLimit {
			t.Errorf("froze %v after resuming", took)
		}
	})
}

func TestPokeProbesAtOnceButNotTooOften(t *testing.T) {
	opened(t, func(o *Options) { o.ProbeInterval = time.Minute; o.OutageGrace = 2 * time.Minute }, func(w *world) {
		time.Sleep(time.Second)
		before := w.kms.count("Probe")
		w.guard.Poke()
		synctest.Wait()
		if n := w.kms.count("Probe") - before; n != 1 {
			t.Errorf("%d probes after a poke, want 1", n)
		}
		for range 100 {
			w.guard.Poke()
			time.Sleep(10 * time.Millisecond)
		}
		if n := w.kms.count("Probe") - before; n < 9 || n > 12 {
			t.Errorf("%d probes in a second of pokes, want about 10", n)
		}
	})
}

func TestProbesKeepTheirInterval(t *testing.T) {
	opened(t, nil, func(w *world) {
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		times := w.kms.times
		for i := 3; i < len(times); i++ {
			if gap := times[i].Sub(times[i-1]); gap > interval || gap < interval*8/10 {
				t.Fatalf("probe %d came %v after the one before", i, gap)
			}
		}
		if len(times) < 600 || len(times) > 720 {
			t.Errorf("%d probes in ten minutes", len(times))
		}
	})
}

// Rotation shows without a restart.
func TestDescriptionIsKeptCurrent(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.desc.KeyMaterialID = "rotated"; f.desc.Replicas = []string{"arn:other"} })
		w.await("the new material", describeEvery+time.Second, func(s Status) bool {
			return s.KeyMaterialID == "rotated" && slices.Equal(s.Siblings, []string{"arn:other"})
		})
		if n := w.kms.count("Describe"); n > 3 {
			t.Errorf("%d calls of DescribeKey in ten quiet minutes", n)
		}
	})
}

// The pauses between probes do not grow: after an outage of seconds, minutes or
// days the gate opens within the same bound.
func TestRecoveryAfterAnyOutage(t *testing.T) {
	for _, reason := range []Reason{ReasonConnection, ReasonThrottled, ReasonCredentials} {
		for _, length := range []time.Duration{10 * time.Second, 10 * time.Minute, 2 * time.Hour} {
			opened(t, func(o *Options) { o.OutageGrace = 3 * time.Second }, func(w *world) {
				w.kms.with(func(f *fakeKMS) {
					f.fail = &KMSError{Op: "Decrypt", State: Unreachable, Reason: reason, Err: errors.New("outage")}
				})
				w.awaitGate(Frozen, 10*time.Second)
				time.Sleep(length)
				w.kms.set(Enabled)
				w.awaitGate(Open, thawLimit)
			})
		}
	}
}

// A wall clock that is set decides nothing: neither does an open gate close, nor
// does a lease end early or late, nor does a thaw take longer.
func TestClockStepsDecideNothing(t *testing.T) {
	for _, step := range []time.Duration{-24 * time.Hour, -time.Second, time.Hour, 365 * 24 * time.Hour} {
		opened(t, nil, func(w *world) {
			w.clock.step(step)
			w.stays(Open, 5*interval)
			w.kms.set(Unreachable)
			w.awaitGate(Degraded, 3*interval)
			began := time.Now()
			w.clock.step(step)
			w.awaitGate(Frozen, DefaultOutageGrace+time.Second)
			if took := time.Since(began); took < DefaultOutageGrace-5*interval {
				t.Errorf("step %v: the lease of %v ended after %v", step, DefaultOutageGrace, took)
			}
			w.clock.step(-2 * step)
			w.kms.set(Enabled)
			w.awaitGate(Open, thawLimit)
		})
	}
}

// After a suspend that outlasts the lease the gate closes before it is asked
// anything, and opens again when KMS answers; a shorter one is not noticed.
func TestSuspend(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.clock.suspend(DefaultOutageGrace / 2)
		w.stays(Open, 5*interval)
		w.kms.with(func(f *fakeKMS) { f.hang = true }) // the network is not up yet
		w.clock.suspend(time.Hour)
		w.awaitGate(Frozen, watchPause+time.Second)
		w.kms.set(Enabled)
		w.awaitGate(Open, thawLimit)
	})
}

// A network that takes every question and stays silent is noticed to be back as soon as one
// that refuses connections: calls that are lost for good, however many, hold up no later one.
func TestLostCallsDoNotDelayTheNext(t *testing.T) {
	for _, every := range []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, DefaultProbeInterval, 10 * time.Second} {
		for outage := time.Second; outage < 8*time.Second; outage += 270 * time.Millisecond {
			opened(t, func(o *Options) { o.ProbeInterval, o.OutageGrace = every, every+2*time.Second }, func(w *world) {
				w.kms.with(func(f *fakeKMS) { f.hang = true })
				w.await("the outage", every+time.Second, func(s Status) bool { return !s.Ready() || s.Gate == Degraded })
				time.Sleep(outage)
				w.kms.with(func(f *fakeKMS) { f.hang = false }) // for calls that begin now
				w.awaitGate(Open, thawLimit)
			})
		}
	}
}
