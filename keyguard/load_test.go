package keyguard

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

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

// A thaw whose unwrap is not answered asks again at once: one silent connection, as of
// one of several addresses, does not cost it the time after which a call is given up.
func TestSilentUnwrapIsAskedAgain(t *testing.T) {
	id := seal.NewID()
	wrapped := append([]byte(testBinding.Resource+"/"), make([]byte, seal.RootSize)...)
	inWorld(t, nil, func(w *world) {
		w.guard.Pin(id, wrapped, testBinding)
		w.start()
		w.awaitGate(Open, thawLimit)
		for range 3 {
			w.kms.set(Disabled)
			w.awaitGate(Frozen, 2*interval)
			w.kms.with(func(f *fakeKMS) { f.hangNext = "Unwrap" })
			w.kms.set(Enabled)
			w.awaitGate(Open, thawLimit)
		}
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		w.kms.with(func(f *fakeKMS) { f.hangOp = "Unwrap" })
		w.kms.set(Enabled)
		w.awaitGate(Thawing, thawLimit)
		asked := w.kms.count("Unwrap")
		time.Sleep(probeTimeout - 2*thawHedgeAfter)
		if again := w.kms.count("Unwrap"); again > asked+2 {
			t.Errorf("%d unwraps of one root in one attempt", again-asked)
		}
		w.kms.with(func(f *fakeKMS) { f.hangOp = "" })
		w.awaitGate(Open, probeTimeout+thawLimit)
	})
}

// A thaw that would open with another root than before does not open: what would be
// written under that could not be read any more. It opens by itself with the right one.
func TestThawWithAnotherRootDoesNotOpen(t *testing.T) {
	id := seal.NewID()
	wrapped := append([]byte(testBinding.Resource+"/"), make([]byte, seal.RootSize)...)
	inWorld(t, nil, func(w *world) {
		w.guard.Pin(id, wrapped, testBinding)
		w.start()
		w.awaitGate(Open, thawLimit)
		w.kms.set(Disabled)
		w.awaitGate(Frozen, 2*interval)
		w.kms.with(func(f *fakeKMS) { f.mixUp = true })
		w.kms.set(Enabled)
		w.await("the mix-up to be told", thawLimit, func(s Status) bool {
			return s.Gate == Frozen && s.Key == Misconfigured && s.Reason == ReasonWrongKey && strings.Contains(s.Cause(), "another key than before")
		})
		w.await("the erasure of the wrong root", time.Second, func(s Status) bool { return s.LoadedKeys == 0 })
		w.kms.with(func(f *fakeKMS) { f.mixUp = false })
		w.awaitGate(Open, thawLimit)
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
