package keyguard

import (
	"context"
	"fmt"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Intent is what an operator has asked for and what could not be done at once,
// because the key was away.
type Intent uint8

// The intents.
const (
	NoIntent     Intent = iota
	FreezeIntent        // stay frozen when the key is back
	ThawIntent          // go on when the key is back
)

// String gives the stable name used in JSON.
func (i Intent) String() string {
	switch i {
	case NoIntent:
		return ""
	case FreezeIntent:
		return "freeze"
	case ThawIntent:
		return "thaw"
	default:
		return fmt.Sprintf("Intent(%d)", uint8(i))
	}
}

// MarshalText gives the same name as String.
func (i Intent) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText accepts the names that MarshalText writes.
func (i *Intent) UnmarshalText(text []byte) error {
	for _, known := range []Intent{NoIntent, FreezeIntent, ThawIntent} {
		if known.String() == string(text) {
			*i = known
			return nil
		}
	}
	return fmt.Errorf("keyguard: %q is not an intent", text)
}

// hold is the operator's freeze: as if the key were refused, but the key's state
// stays what KMS says.
func (m machine) hold(now instant) (machine, action) {
	m.held, m.pending = true, NoIntent
	switch m.gate {
	case Open, Degraded:
		m.doubt = noDoubt // whatever it was about, the next probe tells again
		m, _ = m.freeze(m.verdict, now)
		m.frozenFor = ReasonOperator
		return m, actFreeze
	case Thawing:
		m.gate, m.pending = m.closedGate(), FreezeIntent
		return m, actAbort | actProbe
	}
	if m.frozenFor != ReasonOperator {
		m.pending = FreezeIntent
	}
	return m, 0
}

// release takes the operator's freeze back. It opens nothing by itself: that
// takes granted calls and an unwrap, as after any freeze.
func (m machine) release() (machine, action) {
	m.held, m.pending = false, NoIntent
	if m.gate.Admits() {
		return m, 0
	}
	m.pending = ThawIntent
	return m, actProbe
}

// keepHolding is what comes of granted calls that would suffice for a thaw while
// the operator wants none: the key is told to be back, the gate stays closed.
func (m machine) keepHolding(v verdict) (machine, action) {
	m.verdict, m.lastWord = v, Unknown
	if m.pending != FreezeIntent {
		return m, 0
	}
	m.pending, m.frozenFor = NoIntent, ReasonOperator
	return m, actHeld
}

// operatorRequest is a request on its way to Run.
type operatorRequest struct {
	kind observationKind
	by   string
	done chan Status // capacity 1
}

// OperatorFreeze closes the gate as a refusal of KMS does, until OperatorThaw. by
// says who asks, for audit and status. When the key is away, the request is
// recorded: the gate then stays closed when the key is back (Status.OperatorPending
// tells). It returns the status after the gate was closed, or after the request
// was recorded; the keys may still be on their way out of memory (Status.Erased).
// The error is ctx's or ErrStopped.
func (g *Guard) OperatorFreeze(ctx context.Context, by string) (Status, error) {
	return g.request(ctx, operatorRequest{kind: sawHold, by: by})
}

// OperatorThaw takes OperatorFreeze back. The gate opens when KMS grants the key,
// within the time of any thaw; the returned status is from before. When the key is
// away, the request is recorded and carried out when it is back.
func (g *Guard) OperatorThaw(ctx context.Context, by string) (Status, error) {
	return g.request(ctx, operatorRequest{kind: sawRelease, by: by})
}

func (g *Guard) request(ctx context.Context, q operatorRequest) (Status, error) {
	q.done = make(chan Status, 1)
	select {
	case g.operator <- q:
	case <-ctx.Done():
		return Status{}, ctx.Err()
	case <-g.gate.stopped:
		return Status{}, ErrStopped
	}
	select {
	case s := <-q.done: // Run answers each request that it takes
		return s, nil
	case <-ctx.Done():
		return Status{}, ctx.Err()
	}
}

// asked carries out a request of the operator.
func (r *runner) asked(q operatorRequest) error {
	r.operatorBy, r.operatorSince = q.by, r.o.Clock.Now()
	event := AuditOperatorFreeze
	if q.kind == sawRelease {
		event = AuditOperatorThaw
	}
	if q.kind == sawRelease { // a thaw counts from here, not from when the key was first granted
		r.firstSuccess = r.o.Clock.Boot()
	}
	// Before the deed, so that the audit tells cause and effect in this order.
	r.audit(AuditRecord{Event: event, Reason: ReasonOperator, Detail: "asked for by " + q.by})
	err := r.apply(observation{kind: q.kind})
	if r.m.pending != NoIntent {
		r.logLater(zapcore.InfoLevel, "recorded: carried out when the key is back", zap.Stringer("intent", r.m.pending),
			zap.String("by", q.by), zap.Stringer("key", r.m.state))
	}
	q.done <- r.Status()
	return err
}

// tellHeld records that a freeze asked for while the key was away is carried out.
func (r *runner) tellHeld() {
	r.audit(AuditRecord{Event: AuditOperatorFreeze, Reason: ReasonOperator, RequestID: r.m.requestID,
		Detail: "carried out: the key is back, the gate stays closed as asked for by " + r.operatorBy})
	r.logLater(zapcore.InfoLevel, "the key is back; frozen on request", zap.String("by", r.operatorBy))
}
