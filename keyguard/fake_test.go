package keyguard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

const fakeARN = "arn:aws:kms:eu-central-1:111122223333:key/0b0c0d0e-0000-4000-8000-000000000001"

// fakeKMS is one key in memory, with scripted moods. Safe for concurrent use.
type fakeKMS struct {
	mu       sync.Mutex
	fail     error            // mu; answer of every call but Describe, nil for granted
	failOp   map[string]error // mu; answer of one operation, before fail
	script   []error          // mu; answers of the next probes, before fail; nil means granted
	thenHang bool             // mu; hang when the script is over
	latency  time.Duration    // mu; of every call
	hang     bool             // mu; calls last until their context ends
	hangOp   string           // mu; calls of one operation do
	hangNext string           // mu; the next call of one operation does
	mixUp    bool             // mu; unwraps give another key than was wrapped
	desc     Description      // mu
	descErr  error            // mu
	calls    map[string]int   // mu
	times    []time.Time      // mu; when probes were asked
	serial   int              // mu
}

func newFakeKMS() *fakeKMS {
	return &fakeKMS{failOp: map[string]error{}, calls: map[string]int{}, desc: Description{State: Enabled, Raw: "Enabled"}}
}

// refusal builds what awskms would answer for a state.
func refusal(s KeyState) error {
	reasons := map[KeyState]Reason{Disabled: ReasonKeyDisabled, PendingDeletion: ReasonPendingDeletion,
		Deleted: ReasonKeyDeleted, AccessDenied: ReasonAccessDenied, Unavailable: ReasonPendingImport,
		Misconfigured: ReasonWrongKey, Unreachable: ReasonConnection}
	e := &KMSError{Op: "Decrypt", State: s, Reason: reasons[s], RequestID: "req-" + s.String(), Err: errors.New("as AWS says: " + s.String())}
	if s == AccessDenied {
		e.Action, e.Principal = "kms:Decrypt", "arn:aws:iam::111122223333:role/byokd-tenant"
	}
	return e
}

// vague is KMSInvalidStateException without a hint in its text.
func vague() error {
	return &KMSError{Op: "Decrypt", State: Unavailable, Reason: ReasonInvalidState, Ambiguous: true,
		RequestID: "req-vague", Err: errors.New("KMSInvalidStateException")}
}

// set changes the mood: state for every call, and what DescribeKey says of it.
func (f *fakeKMS) set(s KeyState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang = false
	f.descErr = nil
	f.desc = Description{State: s, Raw: s.String(), RequestID: "req-describe"}
	switch s {
	case Enabled:
		f.fail = nil
	case PendingDeletion:
		f.fail = refusal(s)
		f.desc.Reason = ReasonPendingDeletion
		f.desc.DeletionDate = time.Date(2000, 1, 15, 0, 0, 0, 0, time.UTC)
	case Deleted, AccessDenied, Unreachable:
		f.fail, f.descErr = refusal(s), refusal(s)
	default:
		f.fail = refusal(s)
		f.desc.Reason = ReasonOf(refusal(s))
	}
}

func (f *fakeKMS) with(change func(*fakeKMS)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *fakeKMS) scriptLeft() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.script)
}

func (f *fakeKMS) count(op string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// answer takes the time a call takes and decides on it at its end, as late as
// possible: a test that passes with this passes with an earlier decision.
func (f *fakeKMS) answer(ctx context.Context, op string) (string, error) {
	f.mu.Lock()
	f.calls[op]++
	f.serial++
	id := fmt.Sprintf("req-%d", f.serial)
	latency, hang := f.latency, f.hang || op == f.hangOp || op == f.hangNext
	if op == f.hangNext {
		f.hangNext = ""
	}
	if op == "Probe" {
		f.times = append(f.times, time.Now())
	}
	f.mu.Unlock()
	var after <-chan time.Time
	if !hang {
		after = time.After(latency)
	}
	select {
	case <-after:
	case <-ctx.Done():
		return "", &KMSError{Op: op, State: Unreachable, Reason: ReasonTimeout, Err: ctx.Err()}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failOp[op]; err != nil {
		return id, err
	}
	if op == "Describe" {
		return id, f.descErr
	}
	if op == "Probe" && len(f.script) > 0 {
		err := f.script[0]
		f.script = f.script[1:]
		f.hang = f.hang || f.thenHang && len(f.script) == 0
		return id, err
	}
	if k, ok := f.fail.(*KMSError); ok { // no two refusals have the same words
		again := *k
		again.RequestID, again.Err = id, fmt.Errorf("%w, for the %dth time", k.Err, f.serial)
		return id, &again
	}
	return id, f.fail
}

func (f *fakeKMS) ARN() string { return fakeARN }

func (f *fakeKMS) GenerateProbe(ctx context.Context, b Binding) ([]byte, Receipt, error) {
	id, err := f.answer(ctx, "GenerateProbe")
	return []byte("probe"), Receipt{RequestID: id}, err
}

func (f *fakeKMS) Probe(ctx context.Context, ciphertext []byte, b Binding) (Receipt, error) {
	id, err := f.answer(ctx, "Probe")
	if err == nil && string(ciphertext) != "probe" {
		err = refusal(Misconfigured)
	}
	return Receipt{RequestID: id}, err
}

// A wrapped key of the fake is the binding and 32 bytes.
func (f *fakeKMS) GenerateDataKey(ctx context.Context, b Binding, use func([]byte) error) ([]byte, Receipt, error) {
	id, err := f.answer(ctx, "GenerateDataKey")
	if err != nil {
		return nil, Receipt{RequestID: id}, err
	}
	secret := bytes.Repeat([]byte{7}, seal.RootSize)
	wrapped := append([]byte(b.Resource+"/"), secret...)
	seal.Do(func() { err = use(secret) })
	return wrapped, Receipt{RequestID: id}, err
}

func (f *fakeKMS) Unwrap(ctx context.Context, wrapped []byte, b Binding, use func([]byte) error) (Receipt, error) {
	id, err := f.answer(ctx, "Unwrap")
	if err != nil {
		return Receipt{RequestID: id}, err
	}
	secret, ok := bytes.CutPrefix(wrapped, []byte(b.Resource+"/"))
	if !ok {
		return Receipt{}, refusal(Misconfigured)
	}
	secret = bytes.Clone(secret)
	f.mu.Lock()
	if f.mixUp {
		secret[0] ^= 1
	}
	f.mu.Unlock()
	seal.Do(func() { err = use(secret) })
	return Receipt{RequestID: id}, err
}

func (f *fakeKMS) Describe(ctx context.Context) (Description, error) {
	_, err := f.answer(ctx, "Describe")
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		return Description{}, err
	}
	return f.desc, nil
}

// bubbleClock takes both clocks from the bubble of testing/synctest. skew lets a
// test suspend the machine: Boot runs on, timers do not.
type bubbleClock struct {
	mu        sync.Mutex
	suspended time.Duration // mu
	stepped   time.Duration // mu; of the wall clock alone
}

var bubbleStart = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC)

func (c *bubbleClock) Now() time.Time {
	boot := c.Boot()
	c.mu.Lock()
	defer c.mu.Unlock()
	return bubbleStart.Add(boot + c.stepped)
}

// step sets the wall clock, as NTP or a person does.
func (c *bubbleClock) step(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stepped += d
}

func (c *bubbleClock) Boot() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(bubbleStart) + c.suspended
}

func (c *bubbleClock) suspend(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.suspended += d
}

// recorder is Observer, Subscriber and audit log of a test.
type recorder struct {
	mu          sync.Mutex
	transitions []Transition
	froze       []time.Duration
	thawed      []time.Duration
	erased      []uint64
	erasedIn    []time.Duration
	audit       []AuditRecord
	calls       []string                  // of the subscriber
	onDraining  func(ctx context.Context) // before start only
}

func (r *recorder) Probed(KeyState, Reason, time.Duration) {}

func (r *recorder) Transitioned(t Transition) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.transitions = append(r.transitions, t)
}

func (r *recorder) Froze(t Transition, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.froze = append(r.froze, took)
}

func (r *recorder) Erased(epoch uint64, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.erased, r.erasedIn = append(r.erased, epoch), append(r.erasedIn, took)
}

func (r *recorder) record(a AuditRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.audit = append(r.audit, a)
}

// observer and subscriber have a method name in common, hence two faces.
type recordingObserver struct{ *recorder }

func (r recordingObserver) Thawed(t Transition, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.thawed = append(r.thawed, took)
}

type recordingSubscriber struct{ *recorder }

func (r recordingSubscriber) called(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, what)
}

func (r recordingSubscriber) Draining(ctx context.Context, t Transition) {
	r.called("draining")
	if r.onDraining != nil {
		r.onDraining(ctx)
	}
}
func (r recordingSubscriber) Frozen(ctx context.Context, t Transition) { r.called("frozen") }
func (r recordingSubscriber) Thawed(t Transition)                      { r.called("thawed") }

// world is a guard with its Run, in a bubble.
type world struct {
	*testing.T
	kms    *fakeKMS
	clock  *bubbleClock
	guard  *Guard
	seen   *recorder
	cancel context.CancelFunc
	ended  chan error // gets Run's result
}

var testBinding = Binding{Cluster: "acme", Resource: "volume-1"}

// inWorld runs f with a guard whose Run is not started yet.
func inWorld(t *testing.T, options func(*Options), f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, kms: newFakeKMS(), clock: &bubbleClock{}, seen: &recorder{}, ended: make(chan error, 1)}
		o := Options{Name: "primary", ProbeBinding: testBinding, Observer: recordingObserver{w.seen}, Audit: w.seen.record, Clock: w.clock}
		if options != nil {
			options(&o)
		}
		var err error
		if w.guard, err = New(w.kms, o); err != nil {
			t.Fatal(err)
		}
		w.guard.Subscribe(recordingSubscriber{w.seen})
		defer func() { // also when the test gives up: the bubble must be empty
			if w.cancel != nil {
				w.cancel()
				<-w.ended
			}
		}()
		f(w)
	})
}

func (w *world) start() {
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	go func() {
		w.ended <- w.guard.Run(ctx)
		close(w.ended)
	}()
}

// await waits for a status, for at most limit of the bubble's time, and returns
// how long it took.
func (w *world) await(what string, limit time.Duration, ok func(Status) bool) time.Duration {
	w.Helper()
	began := time.Now()
	deadline := time.After(limit)
	for {
		changed := w.guard.Changed()
		if ok(w.guard.Status()) {
			took := time.Since(began)
			synctest.Wait() // the status is published first, observers and audit follow
			return took
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // ok may look at more than the status
		case <-deadline:
			w.Fatalf("%s: not within %v; status %+v", what, limit, w.guard.Status())
		}
	}
}

func (w *world) awaitGate(gate GateState, limit time.Duration) time.Duration {
	w.Helper()
	return w.await("gate "+gate.String(), limit, func(s Status) bool { return s.Gate == gate })
}

// stays asserts that the gate keeps its state for d.
func (w *world) stays(gate GateState, d time.Duration) {
	w.Helper()
	end := time.After(d)
	for {
		changed := w.guard.Changed()
		if s := w.guard.Status(); s.Gate != gate {
			w.Fatalf("gate became %v (%v %v), want it to stay %v for %v", s.Gate, s.Key, s.Reason, gate, d)
		}
		select {
		case <-changed:
		case <-end:
			return
		}
	}
}
