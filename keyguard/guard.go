package keyguard

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/byokd/byokd/internal/seal"
)

// Defaults of Options.
const (
	DefaultProbeInterval = time.Second
	DefaultOutageGrace   = 60 * time.Second
)

const (
	// callTimeout bounds one unwrap or data key call made for Create or Load.
	// KMS answers in some 10 ms; 5 s lets a very slow one still be useful.
	callTimeout = 5 * time.Second

	// A call that KMS failed is repeated after 250 to 750 ms: with the latency
	// of the call itself this stays within the two seconds of a thaw.
	retryMin, retrySpread = 250 * time.Millisecond, 500 * time.Millisecond
)

// Options configure a Guard. The zero value of each field has a safe meaning.
type Options struct {
	Name          string        // names the guard in logs, metrics and audit
	ProbeInterval time.Duration // how often KMS is asked while open; default 1 s, 100 ms to 1 min
	// OutageGrace is the lease: how long work goes on after the last granted
	// call when KMS cannot be reached. Default 60 s, at least ProbeInterval + 2 s,
	// since a probe takes its interval, 800 ms to be missed and a repetition.
	OutageGrace  time.Duration
	ProbeBinding Binding // encryption context of the probe ciphertext
	// Probe is the probe ciphertext kept from earlier (from a volume header).
	// Without it one is made at the first contact. A given probe also tells that
	// the key has existed: not found then means deleted rather than mistyped.
	Probe []byte
	// Endpoint and Socket are where KMS and byokd's own commands are reached, if not where they look by themselves: next
	// steps name them, so that they work as they stand.
	Endpoint, Socket string

	// Resumes says that the mount of an earlier run waits for the first opening: to those who use it that is a thaw.
	Resumes bool
	Held    bool // begin with the operator's freeze in force, as OperatorFreeze would have it
	// Fleet is the other processes that watch this key, if they are known. With
	// StretchTo above ProbeInterval, the interval grows with their number up to
	// StretchTo, at most OutageGrace - 2 s: refusals that concern this process's role
	// alone are then seen later.
	Fleet     Fleet
	StretchTo time.Duration

	Observer Observer          // optional
	Audit    func(AuditRecord) // optional; called by one goroutine, in order, and may block
	Logger   *zap.Logger       // optional; transitions only, never key material
	Clock    Clock             // optional; default CLOCK_BOOTTIME
}

func (o Options) withDefaults() (Options, error) {
	if o.ProbeInterval == 0 {
		o.ProbeInterval = DefaultProbeInterval
	}
	if o.OutageGrace == 0 {
		o.OutageGrace = DefaultOutageGrace
	}
	if o.ProbeInterval < 100*time.Millisecond || o.ProbeInterval > time.Minute {
		return o, fmt.Errorf("keyguard: probe interval %v: must be between 100ms and 1m", o.ProbeInterval)
	}
	if least := o.ProbeInterval + 2*time.Second; o.OutageGrace < least {
		return o, fmt.Errorf("keyguard: outage grace %v: must be at least %v (probe interval + 2s)", o.OutageGrace, least)
	}
	if o.StretchTo != 0 && (o.StretchTo < o.ProbeInterval || o.StretchTo > o.OutageGrace-2*time.Second) {
		return o, fmt.Errorf("keyguard: probes stretched to %v: must be between the probe interval %v and the outage grace - 2s (%v)",
			o.StretchTo, o.ProbeInterval, o.OutageGrace-2*time.Second)
	}
	if o.Observer == nil {
		o.Observer = nopObserver{}
	}
	if o.Audit == nil {
		o.Audit = func(AuditRecord) {}
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Clock == nil {
		o.Clock = systemClock{}
	}
	return o, nil
}

// pin is a root that every epoch starts with.
type pin struct {
	id      seal.KeyID
	wrapped []byte
	binding Binding
}

// Guard decides whether the keys below one KMS key may be used right now. All
// methods are safe for concurrent use; Run is called once.
type Guard struct {
	kms  KMS
	o    Options
	log  *zap.Logger
	gate *gate

	collect func(context.Context) error // the collector; tests of a thousand guards spare it

	status atomic.Pointer[Status] // written by Run alone

	changedMu sync.Mutex
	changed   chan struct{} // changedMu; closed and replaced when the status changes

	running atomic.Bool
	pokes   chan struct{} // capacity 1: one request to probe is as good as ten
	repin   chan struct{} // capacity 1: the list of pins has changed
	events  chan event    // answers of KMS, to Run

	operator chan operatorRequest // requests of people, to Run

	trail *journal // audit records
	lines *journal // log lines, apart: a trail that hangs must not silence the log

	mu    sync.Mutex
	pins  []pin              // mu
	subs  map[int]Subscriber // mu
	subID int                // mu
	probe []byte             // mu; the probe ciphertext, once there is one

	recognized map[seal.KeyID][]byte // mu; a commitment to each root that was loaded
}

// New makes a Guard that admits nothing until Run has heard from KMS.
func New(kms KMS, o Options) (*Guard, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	g := &Guard{
		kms:     kms,
		o:       o,
		log:     o.Logger.With(zap.String("guard", o.Name), zap.String("key_arn", kms.ARN())),
		gate:    newGate(),
		collect: collect,
		changed: make(chan struct{}),
		pokes:   make(chan struct{}, 1),
		repin:   make(chan struct{}, 1),
		events:  make(chan event, eventBuffer),

		operator: make(chan operatorRequest),

		subs:  make(map[int]Subscriber),
		probe: append([]byte(nil), o.Probe...),

		recognized: make(map[seal.KeyID][]byte),
	}
	g.trail = newJournal(o.Logger, g.auditLost)
	g.lines = newJournal(o.Logger, func(int64) {})
	g.status.Store(&Status{Name: o.Name, KeyARN: kms.ARN(), Gate: Starting, Since: o.Clock.Now(),
		Erased: true, ErasureCertain: seal.ErasureGuaranteed, Bound: o.ProbeInterval + time.Second})
	return g, nil
}

// Enter waits until the gate admits class, and returns a pass. lane is any
// number that tells unrelated callers apart (inode, connection): those with
// different numbers rarely share a cache line. The error is ctx's, or
// ErrStopped; an open gate admits without looking at ctx.
func (g *Guard) Enter(ctx context.Context, class Class, lane uint32) (Pass, error) {
	return g.gate.enter(ctx, class, lane)
}

// TryEnter is Enter without waiting: false means that the gate does not admit
// class now. Who has to do something before waiting asks this first.
func (g *Guard) TryEnter(class Class, lane uint32) (Pass, bool) {
	return g.gate.tryEnter(class, lane)
}

// Status is what the guard knows now. It never blocks.
func (g *Guard) Status() Status {
	s := *g.status.Load()
	s.Waiting = g.gate.waiting.Load()
	if e := g.gate.admit[Work].Load(); e != nil {
		s.LoadedKeys = e.keys.Len()
	}
	return s
}

// Changed returns a channel that is closed at the next change of the status
// (not for a mere renewal of the lease). Take it before looking at Status.
func (g *Guard) Changed() <-chan struct{} {
	g.changedMu.Lock()
	defer g.changedMu.Unlock()
	return g.changed
}

// Poke asks Run to probe now (at most every 100 ms). It never blocks.
func (g *Guard) Poke() {
	select {
	case g.pokes <- struct{}{}:
	default:
	}
}

// ProbeCiphertext is the probe ciphertext, to be kept with the volume; nil
// before the first contact if none was given. It is no secret.
func (g *Guard) ProbeCiphertext() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.probe) == 0 {
		return nil
	}
	return append([]byte(nil), g.probe...)
}

// Subscribe adds a subscriber to later transitions; it is not told about the
// present state. After cancel returns no further call begins, one may be ending.
func (g *Guard) Subscribe(s Subscriber) (cancel func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.subID++
	id := g.subID
	g.subs[id] = s
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.subs, id)
	}
}

func (g *Guard) subscribers() []Subscriber {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]Subscriber, 0, len(g.subs))
	for _, s := range g.subs {
		list = append(list, s)
	}
	return list
}

// Pin makes a root part of every epoch: it is unwrapped before each opening and
// never evicted. If the gate is open and the root not loaded, loading starts;
// call Load to wait for it. Pinning an id again replaces its wrapped form.
func (g *Guard) Pin(id seal.KeyID, wrapped []byte, b Binding) {
	entry := pin{id: id, wrapped: append([]byte(nil), wrapped...), binding: b}
	g.mu.Lock()
	replaced := false
	for i := range g.pins {
		if g.pins[i].id == id {
			g.pins[i], replaced = entry, true
		}
	}
	if !replaced {
		g.pins = append(g.pins, entry)
	}
	g.mu.Unlock()
	select {
	case g.repin <- struct{}{}:
	default:
	}
}

func (g *Guard) pinned() []pin {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]pin(nil), g.pins...)
}

func (g *Guard) isPinned(id seal.KeyID) bool {
	for _, p := range g.pinned() {
		if p.id == id {
			return true
		}
	}
	return false
}

// Create makes a data key under b and loads it. It waits while frozen and while
// KMS does not grant it; the error is ctx's or ErrStopped, or wraps
// ErrMisconfigured. Calls with the same binding at the same moment may share one
// key. Call it without holding a pass.
func (g *Guard) Create(ctx context.Context, b Binding) (id seal.KeyID, wrapped []byte, err error) {
	what := fmt.Sprintf("create %q %q %q", b.Cluster, b.Resource, b.Tenant)
	f, err := g.share(ctx, what, nil, func(ctx context.Context, k *Keys, f *flight) error {
		f.id = seal.NewID()
		return g.create(ctx, k, f, b)
	})
	if err != nil {
		return seal.KeyID{}, nil, err
	}
	return f.id, append([]byte(nil), f.wrapped...), nil
}

// Load unwraps a data key into the present epoch; Keys.Root then finds it until
// the epoch ends or newer keys displace it. It waits while frozen and while KMS
// does not grant it; the error is ctx's or ErrStopped, or wraps ErrMisconfigured
// if the wrapped key is damaged or belongs to another key or binding. Call it
// without holding a pass.
func (g *Guard) Load(ctx context.Context, id seal.KeyID, wrapped []byte, b Binding) error {
	has := func(k *Keys) bool { return k.has(id) }
	_, err := g.share(ctx, loadFlight(id, b), has, func(ctx context.Context, k *Keys, f *flight) error {
		return g.load(ctx, k, pin{id: id, wrapped: wrapped, binding: b})
	})
	return err
}

func loadFlight(id seal.KeyID, b Binding) string {
	return fmt.Sprintf("load %v %q %q %q", id, b.Cluster, b.Resource, b.Tenant)
}

// share runs call once for all who want the same thing of the same epoch, and
// again until it succeeds or cannot.
func (g *Guard) share(ctx context.Context, what string, has func(*Keys) bool,
	call func(context.Context, *Keys, *flight) error) (*flight, error) {
	for {
		p, err := g.gate.enter(ctx, Work, rand.Uint32())
		if err != nil {
			return nil, err
		}
		if has != nil && has(p.Keys()) {
			p.Exit()
			return nil, nil
		}
		f := g.fly(p, what, call)
		err = f.wait(ctx)
		switch {
		case err == nil:
			return f, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, ErrMisconfigured):
			return nil, err
		case errors.Is(err, ErrFrozen): // the epoch ended: enter again, which waits
			continue
		}
		if err := sleep(ctx, retryMin+rand.N(retrySpread)); err != nil {
			return nil, err
		}
	}
}

// fly joins or starts the flight for what. It takes over the pass: whoever makes
// the KMS call keeps it, so that erasure waits for a plaintext key on its way.
// The network wait within the pass is cut by the end of the epoch.
func (g *Guard) fly(p Pass, what string, call func(context.Context, *Keys, *flight) error) *flight {
	f, mine := p.Keys().join(what)
	if !mine {
		p.Exit()
		return f
	}
	go func() {
		ctx, cancel := context.WithTimeout(p.e.ended, callTimeout)
		defer cancel()
		err := call(ctx, p.Keys(), f)
		if err != nil && p.Err() != nil {
			err = ErrFrozen
		}
		f.err = err
		p.Keys().land(what, f)
		p.Exit()
	}()
	return f
}

// load unwraps one root into k.
func (g *Guard) load(ctx context.Context, k *Keys, w pin) error {
	began := g.o.Clock.Boot()
	receipt, err := g.kms.Unwrap(ctx, w.wrapped, w.binding, func(plain []byte) error {
		return g.add(k, w.id, plain)
	})
	g.told("Decrypt", ctx, err)
	if err != nil {
		return g.judge(err)
	}
	g.audit(AuditRecord{Event: AuditUnwrap, Operation: "Decrypt", RequestID: receipt.RequestID, DataKey: w.id.String(),
		Binding: w.binding.Context(), TookMS: milliseconds(g.o.Clock.Boot() - began)})
	return nil
}

// create makes f.id a new root in k.
func (g *Guard) create(ctx context.Context, k *Keys, f *flight, b Binding) error {
	began := g.o.Clock.Boot()
	wrapped, receipt, err := g.kms.GenerateDataKey(ctx, b, func(plain []byte) error {
		return g.add(k, f.id, plain)
	})
	g.told("GenerateDataKey", ctx, err)
	if err != nil {
		return g.judge(err)
	}
	f.wrapped = wrapped
	g.audit(AuditRecord{Event: AuditCreate, Operation: "GenerateDataKey", RequestID: receipt.RequestID, DataKey: f.id.String(),
		Binding: b.Context(), TookMS: milliseconds(g.o.Clock.Boot() - began)})
	return nil
}

// add makes a root of a plaintext key. It runs inside seal.Do.
func (g *Guard) add(k *Keys, id seal.KeyID, plain []byte) error {
	root, err := seal.NewRoot(id, plain)
	if err != nil {
		return &KMSError{Op: "Decrypt", State: Misconfigured, Reason: ReasonInvalidCiphertext, Err: err}
	}
	if err := g.recognize(root); err != nil {
		root.Wipe()
		return err
	}
	if !k.add(root, g.isPinned(id)) {
		root.Wipe()
		return ErrFrozen
	}
	return nil
}

// judge turns a failed call into what share and its callers act upon. A wrapped
// key that KMS cannot open says nothing about the KMS key (whoever can write the
// storage could forge it), so it fails that one call and moves no state.
func (g *Guard) judge(err error) error {
	if errors.Is(err, ErrMisconfigured) || errors.Is(err, ErrFrozen) {
		return err
	}
	if StateOf(err) == Misconfigured {
		return fmt.Errorf("%w: %w", ErrMisconfigured, err)
	}
	return err
}

// told lets Run know how a call for a data key went. A refusal here freezes
// nothing by itself, for it may concern one context or one action only: it makes
// Run probe at once, and the probe decides.
func (g *Guard) told(op string, ctx context.Context, err error) {
	if err != nil && (errors.Is(err, ErrFrozen) || errors.Is(ctx.Err(), context.Canceled)) {
		return // cut by the end of the epoch: no news about KMS
	}
	if err != nil && StateOf(err) != Misconfigured {
		g.Poke()
	}
	select {
	case g.events <- event{kind: eventSideCall, op: op, err: err}:
	default: // Run is busy; the next call tells it
	}
}

func (g *Guard) audit(r AuditRecord) {
	r = g.complete(r)
	g.trail.add(func() { g.o.Audit(r) })
}

// auditLost records a gap, at its place; the journal calls it.
func (g *Guard) auditLost(n int64) {
	g.o.Audit(g.complete(AuditRecord{Event: AuditLost, Count: int(n), Detail: "records that could not be written in time"}))
}

// complete fills in what every record has.
func (g *Guard) complete(r AuditRecord) AuditRecord {
	s := g.status.Load()
	r.Time, r.Guard, r.KeyARN = g.o.Clock.Now(), g.o.Name, g.kms.ARN()
	r.Key, r.Gate = s.Key, s.Gate
	if r.Epoch == 0 {
		r.Epoch = s.Epoch
	}
	return r
}

func (g *Guard) logLater(level zapcore.Level, text string, fields ...zap.Field) {
	entry := g.log.Check(level, text)
	if entry == nil {
		return
	}
	g.lines.add(func() { entry.Write(fields...) })
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

type nopObserver struct{}

func (nopObserver) Probed(KeyState, Reason, time.Duration) {}
func (nopObserver) Transitioned(Transition)                {}
func (nopObserver) Froze(Transition, time.Duration)        {}
func (nopObserver) Erased(uint64, time.Duration)           {}
func (nopObserver) Thawed(Transition, time.Duration)       {}
