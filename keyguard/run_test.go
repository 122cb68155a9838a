package keyguard

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

const (
	freezeLimit = time.Second     // docs/ARCHITECTURE.md, "Guarantees"
	thawLimit   = 2 * time.Second // the same
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

// The table of docs/ARCHITECTURE.md, "The guard", column "at the start".
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
			w.kms.with(func(f *fakeKMS) { f.failOp["Describe"] = refusal(Deleted) })
			w.start()
			w.await("state told", time.Second, func(s Status) bool { return s.Key == Deleted })
			w.stays(Starting, 20*time.Minute)
			if warning := w.guard.Status().Warning; warning != "" { // that DescribeKey finds no key either
				t.Errorf("beside the cause it warns: %s", warning)
			}
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
				if got := w.seen.froze[0]; got > freezeLimit {
					t.Errorf("%v from the refusal to the closed gate", got)
				}
				if closed, erased := w.seen.froze[0], w.seen.erasedIn[0]; erased < closed {
					t.Errorf("%v from the refusal to the closed gate, and %v to the erased keys", closed, erased)
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
		if got := w.seen.froze[0]; got > freezeLimit {
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
