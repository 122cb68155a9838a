package keyguard

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// watchPause is the longest sleep of Run. Go's timers stand still during
	// suspend and the lease does not: so the lease ends at most 250 ms after resuming.
	watchPause = 250 * time.Millisecond

	// describeEvery keeps rotation, expiry and siblings in the status current.
	describeEvery = 10 * time.Minute

	// Deadlines of subscribers: draining 500 ms (half of the promised second),
	// Frozen the same. Thawed is short, since the gate waits for it.
	drainLimit  = 500 * time.Millisecond
	frozenLimit = 500 * time.Millisecond
	// lateLimit bounds what a LateDrainer may take beyond its 500 ms.
	lateLimit   = 2 * time.Second
	thawedLimit = 250 * time.Millisecond

	// stopLimit bounds waiting for passes and calls when Run ends.
	stopLimit = 2 * time.Second

	auditAgain  = time.Minute // a lasting refusal is recorded again after this
	eventBuffer = 64

	describeOp = "DescribeKey"
)

type eventKind uint8

const (
	eventProbe    eventKind = iota // a probe ended
	eventDescribe                  // DescribeKey ended
	eventUnwrap                    // a thaw attempt ended
	eventErased                    // the keys of an ended epoch are gone
	eventSideCall                  // a call for Create or Load ended
	eventSiblings                  // the other keys of a multi-Region set were asked about
)

// event is an answer on its way to Run.
type event struct {
	kind    eventKind
	obs     observation
	attempt *thawAttempt // eventUnwrap
	epoch   uint64       // eventErased
	took    time.Duration
	op      string   // eventSideCall
	err     error    // eventSideCall
	enabled []string // eventSiblings: ARNs
}

// runner is the state of Run; everything in it belongs to Run's goroutine.
type runner struct {
	*Guard
	m     machine
	epoch uint64 // of the present or last opening

	calls     context.Context // ends with Run: cancels every KMS call
	cancel    context.CancelFunc
	wg        sync.WaitGroup // goroutines started by Run
	attempt   *thawAttempt   // the thaw under way, or nil
	erasing   map[uint64]*epoch
	unopened  int // thaw attempts whose keys are neither in use nor erased
	describes int // DescribeKey calls under way
	described instant

	nextProbe  instant
	lastLaunch instant
	hedgeAt    instant // when to ask again, or never
	awaiting   instant // launch of the oldest probe since the last answer, or never
	probes     int     // under way

	firstSuccess instant // of the present streak of granted calls while closed
	desc         Description
	warnings     map[string]string // by KMS operation
	audited      verdict           // last recorded refusal
	auditedAt    instant
	refusals     int // since auditedAt
	frozenSince  time.Time

	operatorBy    string // who asked last
	operatorSince time.Time

	siblingsAsked   instant
	siblingsEnabled []string // of a refused key; replaced, never changed
}

// Run watches the key until ctx ends and is the only writer of the guard's
// state: it probes, freezes, thaws and tells subscribers. It returns nil when ctx
// ended, and an error wrapping ErrMisconfigured when the key or a pinned root
// turns out wrong before the first opening; either way the gate is closed, waiting
// calls end with ErrStopped and the keys are erased. Subscribers are not told
// about the end: stop what uses keys first.
func (g *Guard) Run(ctx context.Context) error {
	if !g.running.CompareAndSwap(false, true) {
		panic("keyguard: Run called twice")
	}
	r := &runner{
		Guard: g, m: newMachine(len(g.o.Probe) > 0),
		erasing: make(map[uint64]*epoch), warnings: make(map[string]string),
		hedgeAt: never, awaiting: never, lastLaunch: never, auditedAt: never, siblingsAsked: never,
	}
	if g.o.Held {
		r.m, _ = r.m.hold(g.o.Clock.Boot())
		r.operatorBy, r.operatorSince = "an earlier run", g.o.Clock.Now()
	}
	r.calls, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	r.nextProbe = g.o.Clock.Boot()
	var writers sync.WaitGroup
	writers.Go(g.trail.write)
	writers.Go(g.lines.write)
	r.describe()
	err := r.loop(ctx)
	r.stop(err)
	g.trail.end()
	g.lines.end()
	written := make(chan struct{})
	go func() {
		writers.Wait()
		close(written)
	}()
	select {
	case <-written:
	case <-time.After(stopLimit): // whatever the log hangs on must not hold up the end
	}
	return err
}

func (r *runner) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		r.launchDue(r.o.Clock.Boot())
		timer.Reset(r.pause(r.o.Clock.Boot()))
		var err error
		select {
		case <-ctx.Done():
			return nil
		case e := <-r.events:
			err = r.handle(e)
		case <-r.pokes:
			r.sooner(max(r.o.Clock.Boot(), r.lastLaunch+pokePause))
		case <-r.repin:
			r.loadPins()
		case q := <-r.operator:
			err = r.asked(q)
		case <-timer.C:
			err = r.tick()
		}
		if err != nil {
			return err
		}
	}
}

// pause is the time until something is due, at most watchPause.
func (r *runner) pause(now instant) time.Duration {
	due := min(r.nextProbe, now+watchPause)
	if r.hedgeAt != never {
		due = min(due, r.hedgeAt)
	}
	if r.awaiting != never && r.m.gate == Open {
		due = min(due, r.awaiting+silentAfter)
	}
	if r.m.doubt != noDoubt {
		due = min(due, r.m.doubtSince+doubtLimit)
	}
	if r.m.gate.Admits() {
		due = min(due, r.m.lastSuccess+r.o.OutageGrace)
	}
	return max(due-now, 0)
}

func (r *runner) tick() error {
	now := r.o.Clock.Boot()
	if r.m.gate == Open && now-r.described >= describeEvery {
		r.describe()
	}
	kind := sawTick
	if r.awaiting != never && now-r.awaiting >= silentAfter {
		kind = sawSilence
	}
	return r.apply(observation{kind: kind})
}

// send hands an event to Run and reports false when Run is over.
func (r *runner) send(e event) bool {
	select {
	case r.events <- e:
		return true
	case <-r.calls.Done():
		return false
	}
}

func (r *runner) handle(e event) error {
	switch e.kind {
	case eventProbe:
		return r.probed(e.obs)
	case eventDescribe:
		r.describes--
		r.warn(describeOp, e.obs.err)
		if e.obs.err == nil {
			r.rotated(e.obs.desc)
			r.desc = e.obs.desc
		}
		if err := r.apply(e.obs); err != nil {
			return err
		}
		r.askSiblings()
		return nil
	case eventSiblings:
		r.siblingsEnabled = e.enabled
		r.publish()
		return nil
	case eventUnwrap:
		return r.unwrapped(e)
	case eventErased:
		delete(r.erasing, e.epoch)
		return r.erased(e)
	case eventSideCall:
		r.warn(e.op, e.err)
		r.publish()
		return nil
	}
	return r.apply(e.obs)
}

// apply steps the machine and does what it asks for.
func (r *runner) apply(o observation) error {
	now := r.o.Clock.Boot()
	before := r.m
	var act action
	r.m, act = step(r.m, o, now, r.o.OutageGrace)
	if r.m.streak == 1 && before.streak == 0 {
		r.firstSuccess = now
	}
	if before.gate == Open && r.m.gate != Open {
		r.sooner(now + r.interval()) // a long interval is for an open gate only
	}
	r.hintFleet(before, act)
	if act&actAbort != 0 && r.attempt != nil {
		r.attempt.cancel()
		r.attempt = nil
	}
	if act&actRefuse != 0 {
		r.publish()
		return fmt.Errorf("%w: %s", ErrMisconfigured, r.Status().Cause())
	}
	if act&actProbe != 0 {
		r.sooner(now)
	}
	if act&actConfirm != 0 {
		r.sooner(now + confirmPause)
	}
	if act&actDescribe != 0 {
		r.describe()
	}
	if act&actHeld != 0 {
		r.tellHeld()
	}
	switch {
	case act&actFreeze != 0:
		r.freeze(before)
	case act&actThaw != 0:
		r.publish()
		r.thaw()
	case act&actOpen != 0:
		// the attempt opens the gate, see unwrapped
	default:
		r.publish()
		r.tellOutage(before)
	}
	return nil
}

// tellOutage logs and records the begin and the end of an outage within the lease.
func (r *runner) tellOutage(before machine) {
	switch {
	case before.gate == Open && r.m.gate == Degraded:
		r.transitioned(before.gate, Degraded)
		r.audit(AuditRecord{Event: AuditOutage, Reason: r.m.reason, RequestID: r.m.requestID, Detail: r.m.detail})
	case before.gate == Degraded && r.m.gate == Open:
		r.transitioned(before.gate, Open)
		r.audit(AuditRecord{Event: AuditRecover, Reason: before.reason, RequestID: r.m.requestID})
	case before.state != r.m.state || before.reason != r.m.reason:
		r.logLater(zapcore.InfoLevel, "key state", zap.Stringer("key", r.m.state), zap.String("reason", string(r.m.reason)),
			zap.Stringer("gate", r.m.gate), zap.String("detail", r.m.detail), zap.String("request_id", r.m.requestID))
	}
}

// recordRefusal writes a refusal to the audit log when it is new, and a lasting
// one once a minute: a key that stays disabled for a month is no reason to fill a disk.
func (r *runner) recordRefusal(err error) {
	v := judgement(err)
	if !v.state.refuses() {
		return
	}
	r.refusals++
	now := r.o.Clock.Boot()
	if v.same(r.audited) && now-r.auditedAt < auditAgain {
		return
	}
	r.audit(AuditRecord{Event: AuditRefusal, Operation: operationOf(err), Reason: v.reason, RequestID: v.requestID,
		Detail: v.detail, Count: r.refusals, Binding: r.o.ProbeBinding.Context()})
	r.audited, r.auditedAt, r.refusals = v, now, 0
}

// warn keeps what went wrong with a call that does not decide about the gate.
func (r *runner) warn(op string, err error) {
	state := StateOf(err)
	if !state.refuses() && state != Misconfigured {
		delete(r.warnings, op)
		return
	}
	warning := fmt.Sprintf("kms:%s is refused for this key (%s)", op, ReasonOf(err))
	if r.warnings[op] == warning {
		return
	}
	r.warnings[op] = warning
	r.audit(AuditRecord{Event: AuditRefusal, Operation: op, Reason: ReasonOf(err), RequestID: RequestIDOf(err), Detail: judgement(err).detail, Count: 1})
	r.logLater(zapcore.WarnLevel, "a call was refused", zap.String("operation", op), zap.Error(err))
}

// stop ends everything: called once, when the loop is over.
func (r *runner) stop(cause error) {
	from := r.m.gate
	r.m.gate = Stopping
	e := r.gate.stop()
	if r.attempt != nil {
		r.attempt.cancel()
	}
	r.publish()
	r.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	if r.waitGoroutines(ctx) {
		r.discardAttempts()
	}
	if e != nil {
		r.erasing[e.n] = e
	}
	for n, ended := range r.erasing {
		if ended.waitIdle(ctx) == nil {
			ended.keys.erase()
			delete(r.erasing, n)
		}
	}
	_ = r.collect(ctx) // the process ends: what a hanging thread holds goes with it
	r.publish()
	r.transitioned(from, Stopping)
	r.audit(AuditRecord{Event: AuditStop, Reason: r.m.reason})
	if cause != nil {
		r.logLater(zapcore.ErrorLevel, "refusing to start", zap.Error(cause))
	}
}

// discardAttempts erases the keys of thaw attempts that nobody will look at.
func (r *runner) discardAttempts() {
	for {
		select {
		case e := <-r.events:
			if e.kind == eventUnwrap {
				e.attempt.keys.erase()
			}
		default:
			r.unopened = 0
			return
		}
	}
}

// waitGoroutines waits for Run's goroutines, whose calls are cancelled, but not
// for one that a KMS ignoring its context keeps: then it reports false.
func (r *runner) waitGoroutines(ctx context.Context) bool {
	done := make(chan struct{})
	go func() {
		r.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// loadPins makes the present epoch hold every pinned root.
func (r *runner) loadPins() {
	for _, w := range r.pinned() {
		p, ok := r.gate.tryEnter(Work, 0)
		if !ok {
			return // closed: the next thaw loads them
		}
		if p.Keys().pin(w.id) {
			p.Exit()
			continue
		}
		r.fly(p, loadFlight(w.id, w.binding), func(ctx context.Context, k *Keys, f *flight) error {
			return r.load(ctx, k, w)
		})
	}
}
