package keyguard

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

const (
	freezeLimit = time.Second     // DESIGN, promise 1
	thawLimit   = 2 * time.Second // DESIGN, promise 2
	interval    = DefaultProbeInterval
)

func opened(t *testing.T, options func(*Options), f func(w *world)) {
	t.Helper()
	inWorld(t, options, func(w *world) {
		w.start()
		w.awaitGate(Open, thawLimit)
		f(w)
	})
}

// The table of DESIGN.md section 3, column "at start".
func TestAtStart(t *testing.T) {
	for _, state := range []KeyState{Disabled, PendingDeletion, AccessDenied, Unavailable, Unreachable} {
		t.Run(state.String(), func(t *testing.T) {
			inWorld(t, nil, func(w *world) {
				w.kms.set(state)
				w.start()
				w.await("state told", time.Second, func(s Status) bool { return s.Key == state })
				w.stays(Starting, 20*time.Minute)
				if s := w.guard.Status(); !s.Erased || s.Epoch != 0 || s.Headline() != "External encryption key is not ready" {
					t.Errorf("status while waiting: %+v", s)
				}
				w.kms.set(Enabled)
				if took := w.awaitGate(Open, time.Minute); took > thawLimit {
					t.Errorf("opened %v after the key came back, want at most %v", took, thawLimit)
				}
				if s := w.guard.Status(); s.Key != Enabled || s.Epoch != 1 {
					t.Errorf("status when open: %+v", s)
				}
			})
		})
	}
	t.Run("Enabled", func(t *testing.T) {
		opened(t, nil, func(w *world) {
			if got := w.seen.calls; !slices.Equal(got, []string{"thawed"}) {
				t.Errorf("subscriber was called %v", got)
			}
			if string(w.guard.ProbeCiphertext()) != "probe" {
				t.Error("no probe ciphertext after the first contact")
			}
		})
	})
	t.Run("Deleted, known from an earlier run", func(t *testing.T) {
		inWorld(t, func(o *Options) { o.Probe = []byte("probe") }, func(w *world) {
			w.kms.set(Deleted)
			w.start()
			w.await("state told", time.Second, func(s Status) bool { return s.Key == Deleted })
			w.stays(Starting, 20*time.Minute)
		})
	})
}

// A KMS that hangs at first contact is asked again before it is given up.
func TestStartAfterAHang(t *testing.T) {
	inWorld(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.hang = true })
		w.start()
		time.Sleep(10 * time.Minute)
		w.kms.set(Enabled)
		if took := w.awaitGate(Open, time.Minute); took > thawLimit {
			t.Errorf("opened %v after KMS answered again", took)
		}
	})
	inWorld(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.hang = true })
		w.start()
		time.Sleep(300 * time.Millisecond)
		w.kms.set(Enabled)
		if took := w.awaitGate(Open, time.Minute); took > thawLimit {
			t.Errorf("opened %v after a short hang", took)
		}
	})
}

func TestRefusesToStart(t *testing.T) {
	kinds := map[string]func(w *world){
		"never seen and not found":   func(w *world) { w.kms.set(Deleted) },
		"ciphertext of another key":  func(w *world) { w.kms.with(func(f *fakeKMS) { f.fail = refusal(Misconfigured) }) },
		"not a symmetric key":        func(w *world) { w.kms.with(func(f *fakeKMS) { f.desc.State = Misconfigured }) },
		"pinned root of another key": func(w *world) { w.guard.Pin(seal.NewID(), []byte("other/"), testBinding) },
		"pinned root of a wrong length": func(w *world) {
			w.guard.Pin(seal.NewID(), []byte(testBinding.Resource+"/short"), testBinding)
		},
	}
	for name, prepare := range kinds {
		t.Run(name, func(t *testing.T) {
			inWorld(t, nil, func(w *world) {
				prepare(w)
				w.start()
				waiter := make(chan error, 1)
				go func() {
					_, err := w.guard.Enter(context.Background(), Work, 0)
					waiter <- err
				}()
				select {
				case err := <-w.ended:
					if !errors.Is(err, ErrMisconfigured) {
						t.Errorf("Run: %v, want ErrMisconfigured", err)
					}
				case <-time.After(time.Minute):
					t.Fatalf("Run goes on: %+v", w.guard.Status())
				}
				if err := <-waiter; !errors.Is(err, ErrStopped) {
					t.Errorf("a waiting Enter: %v, want ErrStopped", err)
				}
				if s := w.guard.Status(); s.Key != Misconfigured || s.Gate != Stopping || s.Ready() {
					t.Errorf("status %+v", s)
				}
			})
		})
	}
}

// The same table, column "while running".
func TestRefusedWhileRunning(t *testing.T) {
	for _, state := range []KeyState{Disabled, PendingDeletion, Deleted, AccessDenied, Unavailable} {
		t.Run(state.String(), func(t *testing.T) {
			opened(t, nil, func(w *world) {
				pass, err := w.guard.Enter(context.Background(), Work, 1)
				if err != nil {
					t.Fatal(err)
				}
				w.kms.set(state)
				if took := w.awaitGate(Frozen, time.Minute); took > interval+freezeLimit {
					t.Errorf("froze after %v, want at most %v", took, interval+freezeLimit)
				}
				if !errors.Is(pass.Err(), ErrFrozen) {
					t.Error("a pass of the ended epoch is still good")
				}
				pass.Exit()
				w.await("erased", time.Second, func(s Status) bool { return s.Erased })
				if got := w.seen.froze[0].Closed; got > freezeLimit {
					t.Errorf("%v from the refusal to the closed gate", got)
				}
				w.await("explained", time.Second, func(s Status) bool {
					return s.Key == state && (state != PendingDeletion || !s.DeletionDate.IsZero())
				})
				w.stays(Frozen, 20*time.Minute) // growing back-off would show after hours
				w.kms.set(Enabled)
				if took := w.awaitGate(Open, time.Minute); took > thawLimit {
					t.Errorf("thawed after %v, want at most %v", took, thawLimit)
				}
				if s := w.guard.Status(); s.Epoch != 2 || s.Erased || !s.DeletionDate.IsZero() || !s.FrozenSince.IsZero() {
					t.Errorf("status after the thaw: %+v", s)
				}
				if want := []string{"thawed", "draining", "frozen", "thawed"}; !slices.Equal(w.seen.calls, want) {
					t.Errorf("subscriber was called %v, want %v", w.seen.calls, want)
				}
			})
		})
	}
}

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
		if got := w.seen.froze[0].Closed; got > freezeLimit {
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

func TestKeyStatesFollowWhileFrozen(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		for _, state := range []KeyState{PendingDeletion, Disabled, AccessDenied, Unavailable, Unreachable, PendingDeletion, Deleted} {
			w.kms.set(state)
			if took := w.await("state "+state.String(), time.Minute, func(s Status) bool { return s.Key == state }); took > time.Second {
				t.Errorf("%v told after %v", state, took)
			}
		}
		w.kms.set(Unreachable)
		time.Sleep(time.Minute)
		if s := w.guard.Status(); s.Key != Deleted {
			t.Errorf("an outage hides that the key is deleted: %+v", s)
		}
	})
}

// KMS is eventually consistent: granted calls between refusals open nothing.
func TestFlappingKeyStaysFrozen(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) {
			f.fail = refusal(Disabled)
			for range 50 {
				f.script = append(f.script, refusal(Disabled), nil, nil)
			}
		})
		w.awaitGate(Frozen, 2*interval)
		w.stays(Frozen, 10*time.Second)
		w.await("script is over", time.Hour, func(Status) bool { return w.kms.scriptLeft() == 0 })
		w.kms.set(Enabled)
		w.awaitGate(Open, thawLimit)
	})
}

func TestThawTakesAnUnwrapOfThePins(t *testing.T) {
	id := seal.NewID()
	wrapped := append([]byte(testBinding.Resource+"/"), make([]byte, seal.RootSize)...)
	inWorld(t, nil, func(w *world) {
		w.guard.Pin(id, wrapped, testBinding)
		w.start()
		w.awaitGate(Open, thawLimit)
		root := func() *seal.Root {
			p, err := w.guard.Enter(context.Background(), Work, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Exit()
			return p.Keys().Root(id)
		}
		first := root()
		if first == nil {
			t.Fatal("the gate is open and the pinned root is not loaded")
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		w.kms.set(Enabled)
		w.kms.with(func(f *fakeKMS) { f.failOp["Unwrap"] = refusal(AccessDenied) })
		time.Sleep(20 * time.Second)
		if s := w.guard.Status(); s.Ready() {
			t.Fatalf("open although the root could not be unwrapped: %+v", s)
		}
		w.kms.with(func(f *fakeKMS) { delete(f.failOp, "Unwrap") })
		w.awaitGate(Open, 2*thawLimit)
		if second := root(); second == nil || second == first {
			t.Error("the new epoch does not have a root of its own")
		}
	})
}

func TestPinWhileOpenIsLoaded(t *testing.T) {
	opened(t, nil, func(w *world) {
		id, wrapped, err := w.guard.Create(context.Background(), testBinding)
		if err != nil {
			t.Fatal(err)
		}
		other := seal.NewID()
		w.guard.Pin(id, wrapped, testBinding)
		w.guard.Pin(other, wrapped, testBinding)
		synctest.Wait()
		p, _ := w.guard.Enter(context.Background(), Work, 0)
		defer p.Exit()
		if p.Keys().Root(id) == nil || p.Keys().Root(other) == nil {
			t.Error("a pinned root is not loaded")
		}
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

// Pinned roots that could not be loaded when they were pinned are loaded later.
func TestPinIsLoadedWhenItCanBe(t *testing.T) {
	loaded := func(w *world, id seal.KeyID) bool {
		p, ok := w.guard.TryEnter(Work, 0)
		if !ok {
			return false
		}
		defer p.Exit()
		return p.Keys().Root(id) != nil
	}
	wrapped := append([]byte(testBinding.Resource+"/"), make([]byte, seal.RootSize)...)
	opened(t, nil, func(w *world) { // pinned during an outage
		w.kms.set(Unreachable)
		w.awaitGate(Degraded, 2*interval)
		id := seal.NewID()
		w.guard.Pin(id, wrapped, testBinding)
		time.Sleep(5 * time.Second)
		w.kms.set(Enabled)
		w.await("the pinned root", 2*interval, func(Status) bool { return loaded(w, id) })
	})
	inWorld(t, func(o *Options) { o.ProbeInterval = 20 * time.Second }, func(w *world) { // pinned during a thaw
		first, second := seal.NewID(), seal.NewID()
		w.guard.Pin(first, wrapped, testBinding)
		w.kms.with(func(f *fakeKMS) { f.latency = 300 * time.Millisecond })
		w.start()
		w.awaitGate(Thawing, thawLimit)
		w.guard.Pin(second, wrapped, testBinding)
		w.awaitGate(Open, thawLimit)
		w.await("the root pinned late", 400*time.Millisecond, func(s Status) bool { return loaded(w, second) && s.LoadedKeys == 2 })
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 21*time.Second) // the probe interval of this world, and its answer
		if s := w.guard.Status(); s.LoadedKeys != 0 {
			t.Errorf("frozen, %d keys are told to be in memory", s.LoadedKeys)
		}
	})
}

// The end of a thaw that was given up must not open anything.
func TestLateThawIsDiscarded(t *testing.T) {
	opened(t, nil, func(w *world) {
		stale := &thawAttempt{keys: newKeys(), cancel: func() {}}
		root := newRoot(t)
		stale.keys.add(root, true)
		w.guard.events <- event{kind: eventUnwrap, attempt: stale, obs: observation{kind: sawUnwrapped}}
		synctest.Wait()
		if s := w.guard.Status(); s.Epoch != 1 {
			t.Errorf("a thaw that was given up opened epoch %d", s.Epoch)
		}
		if stale.keys.Len() != 0 {
			t.Error("its keys are still there")
		}
	})
}

// An audit log that hangs must not keep the gate open.
func TestStuckAuditLogCannotHoldUpAFreeze(t *testing.T) {
	release := make(chan struct{})
	opened(t, func(o *Options) {
		release = make(chan struct{}) // of the bubble
		o.Audit = func(AuditRecord) { <-release }
	}, func(w *world) {
		defer func() { close(release) }()
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		w.await("erased", time.Second, func(s Status) bool { return s.Erased })
		w.kms.set(Enabled)
		w.awaitGate(Open, thawLimit)
	})
}

func TestSlowSubscriberCannotDelayTheFreeze(t *testing.T) {
	inWorld(t, nil, func(w *world) {
		w.seen.onDraining = func(ctx context.Context) { time.Sleep(10 * time.Second) }
		w.start()
		w.awaitGate(Open, thawLimit)
		w.kms.set(Disabled)
		if took := w.awaitGate(Frozen, time.Minute); took > interval+freezeLimit {
			t.Errorf("froze after %v", took)
		}
		if got := w.seen.froze[0].Closed; got > freezeLimit {
			t.Errorf("%v from the refusal to the closed gate", got)
		}
		time.Sleep(time.Minute)
	})
}

func TestDrainClassPassesWhileDraining(t *testing.T) {
	inWorld(t, nil, func(w *world) {
		var drain, work error
		w.seen.onDraining = func(ctx context.Context) {
			p, err := w.guard.Enter(ctx, Drain, 0)
			if drain = err; err == nil {
				p.Exit()
			}
			short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			_, work = w.guard.Enter(short, Work, 0)
		}
		w.start()
		w.awaitGate(Open, thawLimit)
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval+freezeLimit)
		if drain != nil || !errors.Is(work, context.DeadlineExceeded) {
			t.Errorf("while draining: class Drain %v, class Work %v", drain, work)
		}
	})
}

// A pass that is never given back delays erasure and is told; thawing goes on without it.
func TestStragglerDelaysErasureOnly(t *testing.T) {
	opened(t, nil, func(w *world) {
		p, err := w.guard.Enter(context.Background(), Work, 9)
		if err != nil {
			t.Fatal(err)
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		time.Sleep(10 * time.Second)
		if s := w.guard.Status(); s.Erased || s.Stragglers != 1 {
			t.Errorf("status with a pass in use: erased %v, stragglers %d", s.Erased, s.Stragglers)
		}
		w.kms.set(Enabled)
		w.awaitGate(Open, thawLimit)
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		time.Sleep(time.Second)
		if s := w.guard.Status(); s.Erased {
			t.Error("erased although the first epoch is still in use")
		}
		p.Exit()
		w.await("erased", time.Second, func(s Status) bool { return s.Erased })
		if got := w.seen.erased; !slices.Equal(got, []uint64{2, 1}) {
			t.Errorf("epochs erased: %v", got)
		}
	})
}

func TestCreateAndLoadWaitWhileFrozen(t *testing.T) {
	opened(t, nil, func(w *world) {
		ctx := context.Background()
		id, wrapped, err := w.guard.Create(ctx, testBinding)
		if err != nil {
			t.Fatal(err)
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		short, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if err := w.guard.Load(short, id, wrapped, testBinding); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Load while frozen, with a deadline: %v", err)
		}
		results := make(chan error, 2)
		go func() { results <- w.guard.Load(ctx, id, wrapped, testBinding) }()
		go func() {
			_, _, err := w.guard.Create(ctx, testBinding)
			results <- err
		}()
		time.Sleep(time.Hour)
		w.kms.set(Enabled)
		for range 2 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		p, _ := w.guard.Enter(ctx, Work, 0)
		defer p.Exit()
		if p.Keys().Root(id) == nil {
			t.Error("the key that was loaded after the thaw is not there")
		}
	})
}

// A refusal met by Load makes the guard look at once, and the call waits.
func TestRefusedLoadTriggersTheFreeze(t *testing.T) {
	opened(t, func(o *Options) { o.ProbeInterval = time.Minute; o.OutageGrace = 2 * time.Minute }, func(w *world) {
		ctx := context.Background()
		id, wrapped, err := w.guard.Create(ctx, testBinding)
		if err != nil {
			t.Fatal(err)
		}
		other := seal.NewID()
		w.kms.set(Disabled)
		result := make(chan error, 1)
		go func() { result <- w.guard.Load(ctx, other, wrapped, testBinding) }()
		if took := w.awaitGate(Frozen, time.Hour); took > freezeLimit {
			t.Errorf("froze %v after the refused load", took)
		}
		w.kms.set(Enabled)
		if err := <-result; err != nil {
			t.Error(err)
		}
		_ = id
	})
}

// One action being refused, while the key works, closes nothing and is told.
func TestRefusedActionIsAWarning(t *testing.T) {
	opened(t, nil, func(w *world) {
		w.kms.with(func(f *fakeKMS) { f.failOp["GenerateDataKey"] = refusal(AccessDenied) })
		result := make(chan error, 1)
		go func() {
			_, _, err := w.guard.Create(context.Background(), testBinding)
			result <- err
		}()
		w.await("warning", time.Second, func(s Status) bool { return strings.Contains(s.Warning, "kms:GenerateDataKey") })
		w.stays(Open, time.Minute)
		w.kms.with(func(f *fakeKMS) { delete(f.failOp, "GenerateDataKey") })
		if err := <-result; err != nil {
			t.Error(err)
		}
		w.await("no warning", time.Second, func(s Status) bool { return s.Warning == "" })
	})
}

// Whoever can write the storage can forge a wrapped key: that must not freeze.
func TestForgedWrappedKeyFailsItsLoadOnly(t *testing.T) {
	opened(t, nil, func(w *world) {
		err := w.guard.Load(context.Background(), seal.NewID(), []byte("forged"), testBinding)
		if !errors.Is(err, ErrMisconfigured) {
			t.Errorf("Load of a forged key: %v, want ErrMisconfigured", err)
		}
		w.stays(Open, time.Minute)
	})
}

func TestLoadIsSharedAndUnreachableWaits(t *testing.T) {
	opened(t, nil, func(w *world) {
		ctx := context.Background()
		_, wrapped, err := w.guard.Create(ctx, testBinding)
		if err != nil {
			t.Fatal(err)
		}
		id := seal.NewID()
		w.kms.with(func(f *fakeKMS) { f.latency = 100 * time.Millisecond })
		const callers = 20
		results := make(chan error, callers)
		for range callers {
			go func() { results <- w.guard.Load(ctx, id, wrapped, testBinding) }()
		}
		for range callers {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if n := w.kms.count("Unwrap"); n != 1 {
			t.Errorf("%d calls of KMS for %d loads of the same key", n, callers)
		}
		w.kms.set(Unreachable)
		go func() { results <- w.guard.Load(ctx, seal.NewID(), wrapped, testBinding) }()
		time.Sleep(20 * time.Second)
		w.kms.set(Enabled)
		if err := <-results; err != nil {
			t.Error(err)
		}
		if s := w.guard.Status(); s.Epoch != 1 {
			t.Errorf("status %+v", s)
		}
		w.kms.set(Disabled)
		w.await("erased: every call gave its pass back", 2*interval, func(s Status) bool { return s.Gate == Frozen && s.Erased })
	})
}

func TestFreezeCutsALoadUnderWay(t *testing.T) {
	opened(t, nil, func(w *world) {
		ctx := context.Background()
		_, wrapped, _ := w.guard.Create(ctx, testBinding)
		w.kms.with(func(f *fakeKMS) { f.failOp["Probe"] = refusal(Disabled); f.hangOp = "Unwrap" })
		result := make(chan error, 1)
		id := seal.NewID()
		go func() { result <- w.guard.Load(ctx, id, wrapped, testBinding) }()
		w.awaitGate(Frozen, 2*interval)
		w.await("erased", 10*time.Millisecond, func(s Status) bool { return s.Erased })
		w.kms.with(func(f *fakeKMS) { clear(f.failOp); f.hangOp = "" })
		w.awaitGate(Open, thawLimit)
		select {
		case err := <-result: // at once, not after a pause for another try
			if err != nil {
				t.Error(err)
			}
		default:
			t.Error("the load does not go on with the thaw")
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

func TestStopErasesAndReleasesWaiters(t *testing.T) {
	for _, frozen := range []bool{false, true} {
		opened(t, nil, func(w *world) {
			ctx := context.Background()
			if _, _, err := w.guard.Create(ctx, testBinding); err != nil {
				t.Fatal(err)
			}
			keys := w.guard.gate.admit[Work].Load().keys
			waiter := make(chan error, 1)
			if frozen {
				w.kms.set(Disabled)
				w.awaitGate(Frozen, 2*interval)
				go func() {
					_, err := w.guard.Enter(ctx, Drain, 0)
					waiter <- err
				}()
				synctest.Wait()
			}
			w.cancel()
			if err := <-w.ended; err != nil {
				t.Errorf("Run: %v", err)
			}
			if frozen {
				if err := <-waiter; !errors.Is(err, ErrStopped) {
					t.Errorf("waiting Enter: %v", err)
				}
			}
			if _, err := w.guard.Enter(ctx, Work, 0); !errors.Is(err, ErrStopped) {
				t.Errorf("Enter after the end: %v", err)
			}
			if n := keys.Len(); n != 0 {
				t.Errorf("%d roots left", n)
			}
			if s := w.guard.Status(); s.Gate != Stopping || !s.Erased {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func TestChangedFiresOnlyForNews(t *testing.T) {
	opened(t, nil, func(w *world) {
		time.Sleep(time.Second)
		changed := w.guard.Changed()
		before := w.guard.Status()
		time.Sleep(time.Minute)
		select {
		case <-changed:
			t.Errorf("changed although nothing happened: %+v\n%+v", before, w.guard.Status())
		default:
		}
		if s := w.guard.Status(); s.LastSuccess.Sub(before.LastSuccess) < 50*time.Second || s.LeaseUntil.Sub(s.LastSuccess) != DefaultOutageGrace {
			t.Errorf("the lease was not renewed: %+v", s)
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		time.Sleep(10 * time.Second)
		changed = w.guard.Changed()
		time.Sleep(time.Minute)
		select {
		case <-changed:
			t.Errorf("changed although the key only stayed disabled: %+v", w.guard.Status())
		default:
		}
	})
}

func TestAuditTellsTheStory(t *testing.T) {
	opened(t, nil, func(w *world) {
		if _, _, err := w.guard.Create(context.Background(), testBinding); err != nil {
			t.Fatal(err)
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		time.Sleep(10*time.Minute + 10*time.Second)
		w.kms.set(Enabled)
		w.awaitGate(Open, thawLimit)
		synctest.Wait()
		counts := map[AuditEvent]int{}
		for _, a := range w.seen.audit {
			counts[a.Event]++
			if a.Guard != "primary" || a.KeyARN != fakeARN || a.Time.IsZero() {
				t.Errorf("incomplete record %+v", a)
			}
			if (a.Event == AuditCreate || a.Event == AuditRefusal || a.Event == AuditFreeze) && a.RequestID == "" {
				t.Errorf("no request id in %+v", a)
			}
		}
		want := map[AuditEvent]int{AuditCreate: 2, AuditThaw: 2, AuditRefusal: 11, AuditFreeze: 1, AuditErase: 1}
		for event, n := range want {
			if counts[event] != n {
				t.Errorf("%d records of %s, want %d", counts[event], event, n)
			}
		}
	})
}

func TestOptionsAreChecked(t *testing.T) {
	bad := []Options{
		{ProbeInterval: time.Millisecond}, {ProbeInterval: time.Hour},
		{OutageGrace: time.Second}, {OutageGrace: -1}, {ProbeInterval: time.Minute},
	}
	for _, o := range bad {
		if _, err := New(newFakeKMS(), o); err == nil {
			t.Errorf("accepted %+v", o)
		}
	}
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
