package keyguard

import (
	"context"
	"reflect"
	"runtime"
	"runtime/debug"
	"sort"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/byokd/byokd/internal/seal"
)

// freeze closes the gate: the ordered procedure of doc.go and nothing else. It
// blocks Run for at most drainLimit + lateLimit + frozenLimit; answers of KMS wait meanwhile.
func (r *runner) freeze(before machine) {
	from := r.m.frozenFrom
	r.gate.drain()
	r.frozenSince = r.o.Clock.Now()
	r.publish()
	t := r.transitioned(before.gate, Draining)
	r.notify(drainLimit, "draining", func(ctx context.Context, s Subscriber) { s.Draining(ctx, t) })
	r.notify(lateLimit, "draining late", func(ctx context.Context, s Subscriber) {
		if late, ok := s.(LateDrainer); ok {
			late.DrainLate(ctx)
		}
	})

	ended := r.gate.close()
	took := r.o.Clock.Boot() - from
	r.m, _ = step(r.m, observation{kind: sawClosed}, r.o.Clock.Boot(), r.o.OutageGrace)
	r.erasing[ended.n] = ended
	r.publish()
	t = r.transitioned(Draining, Frozen)
	r.o.Observer.Froze(t, took)
	r.audit(AuditRecord{Event: AuditFreeze, Reason: r.m.frozenFor, RequestID: r.m.requestID,
		TookMS: milliseconds(took), Detail: r.m.detail})
	r.notify(frozenLimit, "frozen", func(ctx context.Context, s Subscriber) { s.Frozen(ctx, t) })

	r.erase(ended, from)
}

// erase waits in the background until nobody uses the keys of an ended epoch,
// then wipes them. A straggler (a pass held over a stuck lower call) delays this
// and is shown in the status; nothing it produces can leave, for its Err fails.
func (r *runner) erase(ended *epoch, from instant) {
	r.wg.Go(func() {
		if ended.waitIdle(r.calls) != nil {
			return // Run is over, stop takes it from here
		}
		ended.keys.erase()
		if r.collect(r.calls) != nil {
			return
		}
		r.send(event{kind: eventErased, epoch: ended.n, took: r.o.Clock.Boot() - from})
	})
}

// collect runs the collector until what was dropped is gone and wiped: measured,
// one run leaves some copies that are reached through freed objects, three leave none.
//
// Last, what is free goes back to the kernel, which hands out zeroed pages only:
// stacks of goroutines that have ended, and whatever the runtime may have moved,
// are wiped by nobody else. The error is ctx's: the keys may then not be gone.
func collect(ctx context.Context) error {
	for range 3 {
		runtime.GC()
	}
	debug.FreeOSMemory()
	if !seal.ErasureGuaranteed {
		return nil
	}
	return awaitSignals(ctx)
}

func (r *runner) erased(e event) error {
	if e.epoch == 0 { // a failed thaw attempt
		r.unopened--
		r.publish()
		return nil
	}
	r.publish()
	r.o.Observer.Erased(e.epoch, e.took)
	r.audit(AuditRecord{Event: AuditErase, Epoch: e.epoch, TookMS: milliseconds(e.took)})
	r.logLater(zapcore.InfoLevel, "keys erased", zap.Uint64("epoch", e.epoch), zap.Duration("took", e.took),
		zap.Bool("every_copy", seal.ErasureGuaranteed))
	return nil
}

// thawAttempt unwraps the pinned roots for the next epoch.
type thawAttempt struct {
	keys   *Keys
	cancel context.CancelFunc
}

// thaw starts an attempt; its end comes as eventUnwrap.
func (r *runner) thaw() {
	ctx, cancel := context.WithTimeout(r.calls, probeTimeout)
	a := &thawAttempt{keys: newKeys(), cancel: cancel}
	r.attempt = a
	r.unopened++
	pins := r.pinned()
	r.wg.Go(func() {
		defer cancel()
		obs := observation{kind: sawUnwrapped, started: r.o.Clock.Boot()}
		for _, w := range pins {
			if err := r.loadHedged(ctx, a.keys, w); err != nil {
				obs.kind, obs.err = sawUnwrapError, err
				break
			}
		}
		obs.took = r.o.Clock.Boot() - obs.started
		if !r.send(event{kind: eventUnwrap, obs: obs, attempt: a}) {
			a.keys.erase()
		}
	})
}

// loadHedged is load that asks again in parallel when no answer comes: a connection that
// takes the question and stays silent, as one of several addresses of KMS may, would
// cost the thaw probeTimeout. The answer that comes first counts; a second root is as good.
func (r *runner) loadHedged(ctx context.Context, k *Keys, w pin) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 2)
	ask := func() { r.wg.Go(func() { ended <- r.load(ctx, k, w) }) }
	ask()
	hedge := time.NewTimer(thawHedgeAfter)
	defer hedge.Stop()
	for asked := 1; ; {
		select {
		case err := <-ended:
			if asked--; err == nil || asked == 0 || StateOf(err) != Unreachable {
				return err
			}
		case <-hedge.C:
			asked++
			ask()
		}
	}
}

// unwrapped ends an attempt: the gate opens, or its keys go.
func (r *runner) unwrapped(e event) error {
	current := r.attempt == e.attempt
	var err error
	if current {
		r.attempt = nil
		err = r.apply(e.obs)
	}
	if e.obs.err != nil {
		r.recordRefusal(e.obs.err)
	}
	if current && e.obs.kind == sawUnwrapped && r.m.gate == Open {
		r.open(e.attempt.keys)
		return nil
	}
	r.wg.Go(func() {
		e.attempt.keys.erase()
		if r.collect(r.calls) == nil {
			r.send(event{kind: eventErased})
		}
	})
	r.publish()
	return err
}

// open tells the subscribers and opens the gate in a new epoch.
func (r *runner) open(keys *Keys) {
	from := Frozen
	if r.epoch == 0 {
		from = Starting
	}
	r.epoch++
	t := r.transition(from, Open)
	r.notify(thawedLimit, "thawed", func(_ context.Context, s Subscriber) { s.Thawed(t) })
	r.gate.open(newEpoch(r.epoch, keys))
	r.unopened--
	r.frozenSince = time.Time{}
	r.audited = verdict{}
	for op := range r.warnings {
		if op != describeOp { // which an open gate says nothing about
			delete(r.warnings, op)
		}
	}
	r.siblingsEnabled, r.siblingsAsked = nil, never
	r.nextProbe = r.o.Clock.Boot() + r.interval()
	r.publish()
	t = r.transitioned(from, Open)
	took := r.o.Clock.Boot() - r.firstSuccess
	r.o.Observer.Thawed(t, took)
	r.audit(AuditRecord{Event: AuditThaw, RequestID: r.m.requestID, TookMS: milliseconds(took)})
	r.loadPins() // roots pinned while the attempt was under way
	r.describe() // what has changed meanwhile: rotation, expiry, siblings
}

func (r *runner) transition(from, to GateState) Transition {
	reason := r.m.reason
	if to == Draining || to == Frozen {
		reason = r.m.frozenFor
	}
	return Transition{Name: r.o.Name, From: from, To: to, Key: r.m.state, Reason: reason,
		Epoch: r.epoch, At: r.o.Clock.Now()}
}

// transitioned observes and logs a change of the gate.
func (r *runner) transitioned(from, to GateState) Transition {
	t := r.transition(from, to)
	r.o.Observer.Transitioned(t)
	r.logLater(zapcore.InfoLevel, "gate", zap.Stringer("from", from), zap.Stringer("to", to), zap.Stringer("key", t.Key),
		zap.String("reason", string(t.Reason)), zap.Uint64("epoch", t.Epoch),
		zap.String("detail", r.m.detail), zap.String("request_id", r.m.requestID))
	return t
}

// notify calls all subscribers in parallel and waits for them, at most limit.
func (r *runner) notify(limit time.Duration, what string, call func(context.Context, Subscriber)) {
	subscribers := r.subscribers()
	if len(subscribers) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(r.calls, limit)
	defer cancel()
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, s := range subscribers {
		wg.Go(func() { call(ctx, s) })
	}
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		r.logLater(zapcore.WarnLevel, "a subscriber missed its deadline", zap.String("call", what), zap.Duration("limit", limit))
	}
}

// publish makes the status; Changed fires unless only the lease was renewed.
func (r *runner) publish() {
	last := *r.status.Load()
	now, boot := r.o.Clock.Now(), r.o.Clock.Boot()
	wall := func(at instant) time.Time { return now.Add(at - boot).Round(0) }
	s := Status{Name: r.o.Name, KeyARN: r.kms.ARN(), Endpoint: r.o.Endpoint, Socket: r.o.Socket, Resumes: r.o.Resumes, Key: r.m.state, Gate: r.m.gate, Epoch: r.epoch,
		Reason: r.m.reason, Detail: r.m.detail, RequestID: r.m.requestID,
		MissingAction: r.m.action, Principal: r.m.principal, Warning: r.warning(),
		Since: last.Since, FrozenSince: r.frozenSince,
		MultiRegion: r.desc.MultiRegion, Siblings: r.desc.Replicas, SiblingsEnabled: r.siblingsEnabled, Origin: r.desc.Origin,
		KeyMaterialID: r.desc.KeyMaterialID, MaterialExpires: r.desc.ValidTo,
		OperatorFreeze: r.m.held, OperatorPending: r.m.pending,
		ErasureCertain: seal.ErasureGuaranteed, Bound: r.probeInterval() + time.Second}
	if s.OperatorFreeze || s.OperatorPending != NoIntent {
		s.OperatorBy, s.OperatorSince = r.operatorBy, r.operatorSince
	}
	if s.Gate != last.Gate {
		s.Since = now
	}
	if s.Key == AccessDenied || s.Key == Deleted { // the cause says it already
		s.Warning = ""
	}
	if s.Key == PendingDeletion {
		s.DeletionDate = r.m.deletion
	}
	for _, e := range r.erasing {
		s.Stragglers += e.stragglers()
	}
	s.Erased = !s.Gate.Admits() && s.Gate != Draining && s.Gate != Thawing && len(r.erasing) == 0 && r.unopened == 0
	quiet := s
	quiet.LastSuccess, quiet.LeaseUntil, quiet.RequestID = last.LastSuccess, last.LeaseUntil, last.RequestID
	quiet.Stragglers, quiet.Waiting = last.Stragglers, last.Waiting
	if r.m.lastSuccess != never {
		s.LastSuccess = wall(r.m.lastSuccess)
		if s.Gate.Admits() {
			s.LeaseUntil = wall(r.m.lastSuccess + r.o.OutageGrace)
		}
	}
	if s.Gate == Degraded {
		s.Bound = r.o.OutageGrace + time.Second
		quiet.Bound = s.Bound
	}
	r.status.Store(&s)
	if !reflect.DeepEqual(quiet, last) {
		r.changedMu.Lock()
		close(r.changed)
		r.changed = make(chan struct{})
		r.changedMu.Unlock()
	}
}

func (r *runner) warning() string {
	lines := make([]string, 0, len(r.warnings))
	for _, line := range r.warnings {
		lines = append(lines, line)
	}
	sort.Strings(lines)
	return strings.Join(lines, ", and ")
}
