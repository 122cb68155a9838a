package keyguard

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

// freeze and thaw ask as an operator does.
func (w *world) freeze() Status {
	w.Helper()
	s, err := w.guard.OperatorFreeze(context.Background(), "uid 0")
	if err != nil {
		w.Fatal(err)
	}
	return s
}

func (w *world) thaw() Status {
	w.Helper()
	s, err := w.guard.OperatorThaw(context.Background(), "uid 0")
	if err != nil {
		w.Fatal(err)
	}
	return s
}

// asked lists the audit's records of requests and of what came of them.
func (w *world) asked() []string {
	synctest.Wait()
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	var list []string
	for _, a := range w.seen.audit {
		switch a.Event {
		case AuditOperatorFreeze, AuditOperatorThaw, AuditFreeze, AuditThaw:
			word := string(a.Event)
			if a.Event == AuditFreeze {
				word += " " + string(a.Reason)
			}
			if strings.HasPrefix(a.Detail, "carried out") {
				word += " carried out"
			}
			list = append(list, word)
		}
	}
	return list
}

func TestOperatorFreeze(t *testing.T) {
	opened(t, nil, func(w *world) {
		pass, err := w.guard.Enter(context.Background(), Work, 1)
		if err != nil {
			t.Fatal(err)
		}
		s := w.freeze()
		if s.Gate != Frozen || s.Key != Enabled || !s.OperatorFreeze || s.OperatorPending != NoIntent || s.OperatorBy != "uid 0" {
			t.Errorf("answer %+v", s)
		}
		if !errors.Is(pass.Err(), ErrFrozen) {
			t.Error("a pass of the ended epoch is still good")
		}
		pass.Exit()
		w.await("erasure", time.Second, func(s Status) bool { return s.Erased })
		w.stays(Frozen, 20*time.Minute) // granted probes do not thaw
		if again := w.freeze(); again.Gate != Frozen || again.OperatorPending != NoIntent {
			t.Errorf("asked twice: %+v", again)
		}
		if s := w.thaw(); s.OperatorFreeze {
			t.Errorf("answer %+v", s)
		}
		if took := w.awaitGate(Open, time.Minute); took > thawLimit {
			t.Errorf("opened %v after the request, want at most %v", took, thawLimit)
		}
		if s := w.guard.Status(); s.OperatorFreeze || s.OperatorPending != NoIntent || s.OperatorBy != "" || s.Epoch != 2 {
			t.Errorf("status %+v", s)
		}
		want := []string{"thaw", "operator_freeze", "freeze operator", "operator_freeze", "operator_thaw", "thaw"}
		if got := w.asked(); !slices.Equal(got, want) {
			t.Errorf("audit %v, want %v", got, want)
		}
		if got := w.seen.calls; !slices.Equal(got, []string{"thawed", "draining", "frozen", "thawed"}) {
			t.Errorf("subscriber was called %v", got)
		}
		if i := slices.IndexFunc(w.seen.transitions, func(x Transition) bool { return x.To == Frozen }); w.seen.transitions[i].Reason != ReasonOperator {
			t.Errorf("transition %+v", w.seen.transitions[i])
		}
	})
}

// What is asked for while the key is away is recorded, and carried out when it is back.
func TestOperatorIntentWhileTheKeyIsAway(t *testing.T) {
	for _, away := range []KeyState{Disabled, PendingDeletion, AccessDenied, Unavailable, Unreachable} {
		t.Run(away.String(), func(t *testing.T) {
			opened(t, nil, func(w *world) {
				w.kms.set(away)
				w.awaitGate(Frozen, DefaultOutageGrace+5*time.Second)
				if s := w.freeze(); s.OperatorPending != FreezeIntent || s.Key != away || !s.OperatorFreeze {
					t.Errorf("a freeze while refused: %+v", s)
				}
				w.kms.set(Enabled)
				w.await("the key to be told back", thawLimit, func(s Status) bool { return s.Key == Enabled })
				w.stays(Frozen, time.Minute)
				if s := w.guard.Status(); s.OperatorPending != NoIntent || !s.OperatorFreeze {
					t.Errorf("carried out: %+v", s)
				}
				w.kms.set(away)
				w.await("the key to be told away", 5*time.Second, func(s Status) bool { return s.Key == away })
				if s := w.thaw(); s.OperatorPending != ThawIntent || s.OperatorFreeze {
					t.Errorf("a thaw while refused: %+v", s)
				}
				w.stays(Frozen, time.Minute)
				w.kms.set(Enabled)
				if took := w.awaitGate(Open, time.Minute); took > thawLimit {
					t.Errorf("opened after %v", took)
				}
				want := []string{"thaw", "freeze " + string(ReasonOf(refusal(away))), "operator_freeze", "operator_freeze carried out", "operator_thaw", "thaw"}
				if got := w.asked(); !slices.Equal(got, want) {
					t.Errorf("audit %v, want %v", got, want)
				}
			})
		})
	}
}

// A freeze wins over a thaw that is under way, and holds from the first moment of a run.
func TestOperatorFreezeBeforeTheFirstOpening(t *testing.T) {
	inWorld(t, nil, func(w *world) {
		w.kms.set(Disabled)
		w.start()
		w.await("state told", time.Second, func(s Status) bool { return s.Key == Disabled })
		if s := w.freeze(); s.Gate != Starting || s.OperatorPending != FreezeIntent {
			t.Errorf("answer %+v", s)
		}
		w.kms.set(Enabled)
		w.await("the key to be told back", thawLimit, func(s Status) bool { return s.Key == Enabled && s.OperatorPending == NoIntent })
		w.stays(Starting, time.Minute)
		w.thaw()
		w.awaitGate(Open, thawLimit)
	})
	inWorld(t, func(o *Options) { o.Held = true }, func(w *world) {
		w.start()
		w.await("the key to be told", thawLimit, func(s Status) bool { return s.Key == Enabled })
		w.stays(Starting, time.Minute)
		w.thaw()
		w.awaitGate(Open, thawLimit)
	})
	inWorld(t, nil, func(w *world) {
		w.kms.set(Disabled)
		w.start()
		w.await("state told", time.Second, func(s Status) bool { return s.Key == Disabled })
		w.kms.with(func(f *fakeKMS) { f.hangOp = "Unwrap" })
		w.guard.Pin(seal.NewID(), []byte(testBinding.Resource+"/12345678901234567890123456789012"), testBinding)
		w.kms.with(func(f *fakeKMS) { f.fail, f.desc = nil, Description{State: Enabled} })
		w.awaitGate(Thawing, thawLimit)
		if s := w.freeze(); s.Gate != Starting || s.OperatorPending != FreezeIntent {
			t.Errorf("answer in the middle of a thaw: %+v", s)
		}
		w.await("carried out", thawLimit, func(s Status) bool { return s.OperatorPending == NoIntent && s.Key == Enabled })
		w.stays(Starting, time.Minute)
	})
}

func TestOperatorRequestsEnd(t *testing.T) {
	opened(t, nil, func(w *world) {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		w.cancel()
		<-w.ended
		if _, err := w.guard.OperatorFreeze(context.Background(), "uid 0"); !errors.Is(err, ErrStopped) {
			t.Errorf("after the end: %v", err)
		}
		if _, err := w.guard.OperatorThaw(ended, "uid 0"); err == nil {
			t.Error("an ended context was not noticed")
		}
	})
}

func TestIntentsAsText(t *testing.T) {
	for _, i := range []Intent{NoIntent, FreezeIntent, ThawIntent} {
		text, _ := json.Marshal(i)
		var back Intent
		if err := json.Unmarshal(text, &back); err != nil || back != i {
			t.Errorf("%v became %v: %v", i, back, err)
		}
	}
	var i Intent
	if i.UnmarshalText([]byte("nap")) == nil {
		t.Error("accepted an unknown intent")
	}
}
