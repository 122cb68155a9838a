package keyguard

import (
	"errors"
	"time"
)

// instant is a reading of Clock.Boot. never precedes every reading.
type instant = time.Duration

const never instant = -1 << 62

// The pacing of decisions. The promise behind them: at most 1 s from the first
// refusal, and probe interval + 1 s from the moment KMS starts refusing, to the
// last plaintext byte; at most 2 s from the moment KMS answers again to open.
const (
	// doubtLimit bounds confirming a doubtful refusal: 400 ms, since draining
	// may take 500 ms and both must fit into one second. A confirmation that
	// does not come in time counts as given: fail closed.
	doubtLimit = 400 * time.Millisecond

	// After a refusal KMS may flap (it is eventually consistent), so for
	// refusalMemory an opening takes thawSuccesses granted calls within
	// thawWindow. They are confirmPause apart: found after at most 800 ms
	// (closedPause), 2 × 150 ms more, then the unwrap: 1.1 s and four round trips.
	refusalMemory = 10 * time.Second
	thawSuccesses = 3
	thawWindow    = time.Second

	// explainEvery limits DescribeKey while nothing new is heard: a changed
	// deletion date is shown at most 5 s late, a changed state at once.
	explainEvery = 5 * time.Second
)

// doubt is a refusal that waits for its confirmation. Work still passes.
type doubt uint8

const (
	noDoubt   doubt = iota
	denied          // AccessDenied, which fresh grants and policies give for a moment: ask again
	ambiguous       // KMSInvalidState, which does not say which state: ask DescribeKey
)

// verdict is what one answer of KMS says about the key.
type verdict struct {
	state     KeyState
	reason    Reason
	detail    string
	requestID string
	action    string
	principal string
}

// machine is the whole state of the decision, a plain value: step maps one to
// the next and does nothing else.
type machine struct {
	verdict
	gate     GateState
	deletion time.Time // PendingDeletion
	lastWord KeyState  // while closed and Unreachable: how KMS refused before, or Unknown

	opened      bool    // the gate has been open before: closed means Frozen, not Starting
	known       bool    // the key is known to have been usable: not found means deleted
	contacted   bool    // the first DescribeKey was answered (or refused)
	lastSuccess instant // start of the last granted call
	lastRefusal instant // arrival of the last refusal
	failures    int     // failed probes since the last granted one

	doubt      doubt
	doubtSince instant
	doubted    verdict
	frozenFrom instant // first refusal behind the last freeze, or the end of the lease
	frozenFor  Reason  // why the gate is closed: KMS's reason at the last freeze, or ReasonOperator

	held    bool   // the operator has asked for a freeze: granted calls do not thaw
	pending Intent // what the operator has asked for while the key was away, until it is carried out

	streak    int                    // granted calls since the last failure
	successes [thawSuccesses]instant // arrivals of the last of them, by streak modulo

	explained   verdict // what DescribeKey last said; state Unknown if it could not
	explainedAs Reason  // the refusal that it explained
	explainedAt instant
}

func newMachine(known bool) machine {
	return machine{gate: Starting, known: known, lastSuccess: never, lastRefusal: never, explainedAt: never}
}

type observationKind uint8

const (
	sawTick        observationKind = iota // time has passed
	sawSilence                            // as sawTick, and a probe has waited too long for an answer
	sawSuccess                            // a probe was granted
	sawFailure                            // a probe failed
	sawDescription                        // DescribeKey answered or failed
	sawUnwrapped                          // the pinned roots are unwrapped
	sawUnwrapError                        // or not
	sawClosed                             // draining is over, the gate is closed
	sawHold                               // the operator asks for a freeze
	sawRelease                            // the operator takes it back
)

// observation is one thing that happened.
type observation struct {
	kind      observationKind
	started   instant // when the call began
	took      time.Duration
	err       error       // sawFailure, sawDescription, sawUnwrapError
	desc      Description // sawDescription without err
	requestID string
}

// action is what Run must do after a step.
type action uint16

const (
	actProbe    action = 1 << iota // probe at once
	actConfirm                     // probe after confirmPause
	actDescribe                    // ask DescribeKey
	actFreeze                      // drain, close, erase
	actThaw                        // unwrap the pinned roots
	actAbort                       // give up the thaw under way
	actOpen                        // open the gate with the unwrapped roots
	actRefuse                      // at start: Run returns ErrMisconfigured
	actHeld                        // tell that a freeze asked for earlier is carried out now
)

// step is the transition function: pure, total, and tested over its whole table.
// grace is the length of the lease.
func step(m machine, o observation, now instant, grace time.Duration) (machine, action) {
	if m.gate == Stopping {
		return m, 0
	}
	switch o.kind {
	case sawSuccess:
		return m.success(o, now)
	case sawFailure:
		return m.failure(o, now)
	case sawDescription:
		return m.described(o, now)
	case sawUnwrapped:
		return m.unwrapped(o, now)
	case sawUnwrapError:
		if m.gate != Thawing {
			return m, 0
		}
		return m.failure(o, now)
	case sawClosed:
		if m.gate == Draining {
			m.gate = Frozen
		}
		return m, 0
	case sawHold:
		return m.hold(now)
	case sawRelease:
		return m.release()
	default:
		return m.tick(o, now, grace)
	}
}

// closedGate is where the gate rests while it admits nothing.
func (m machine) closedGate() GateState {
	if m.opened {
		return Frozen
	}
	return Starting
}

// freeze begins a freeze because of v.
func (m machine) freeze(v verdict, now instant) (machine, action) {
	m.frozenFrom = now
	if m.doubt != noDoubt {
		m.frozenFrom = m.doubtSince
	}
	m.verdict = v
	m.frozenFor = v.reason
	m.gate = Draining
	m.doubt = noDoubt
	m.streak = 0
	return m, actDescribe | actFreeze
}

// tick looks at what time alone decides.
func (m machine) tick(o observation, now instant, grace time.Duration) (machine, action) {
	if !m.gate.Admits() {
		return m, 0
	}
	if m.doubt != noDoubt && now-m.doubtSince >= doubtLimit {
		return m.freeze(m.doubted, now)
	}
	if now-m.lastSuccess >= grace {
		v := m.verdict
		if v.state == Enabled { // e.g. resumed from a long suspend: no failure was seen
			v = verdict{state: Unreachable, reason: ReasonTimeout, detail: "no answer from KMS since the lease began"}
		}
		return m.freeze(v, now)
	}
	if o.kind == sawSilence && m.gate == Open {
		m.verdict = verdict{state: Unreachable, reason: ReasonTimeout, detail: "KMS does not answer"}
		m.gate = Degraded
		m.failures = max(m.failures, 1)
	}
	return m, 0
}

func (m machine) success(o observation, now instant) (machine, action) {
	if o.started < m.lastRefusal { // asked before KMS refused: says nothing about now, dispels no doubt
		return m, 0
	}
	m.lastSuccess = max(m.lastSuccess, o.started)
	m.known = true
	m.failures = 0
	m.successes[m.streak%thawSuccesses] = now
	m.streak++
	m.doubt = noDoubt
	switch m.gate {
	case Open, Degraded:
		m.gate = Open
		m.verdict = granted(o)
		return m, 0
	case Starting, Frozen:
		if m.state == Unknown || m.state == Unreachable {
			m.verdict = granted(o) // a refusal stands until the gate opens
		}
		return m.mayThaw(granted(o), now)
	default:
		return m, 0
	}
}

// granted is the verdict of a granted call.
func granted(o observation) verdict {
	v := verdict{state: Enabled, requestID: o.requestID}
	if o.took > slowAnswer {
		v.reason = ReasonSlow
		v.detail = "KMS answers slowly"
	}
	return v
}

// mayThaw decides whether the successes so far suffice to unwrap the roots. v is
// the verdict of the last.
func (m machine) mayThaw(v verdict, now instant) (machine, action) {
	if !m.contacted {
		return m, actDescribe
	}
	if now-m.lastRefusal < refusalMemory {
		oldest := m.successes[m.streak%thawSuccesses] // the next to be overwritten
		if m.streak < thawSuccesses || now-oldest > thawWindow {
			return m, actConfirm
		}
	}
	if m.held {
		return m.keepHolding(v)
	}
	m.gate = Thawing
	return m, actThaw
}

func (m machine) unwrapped(o observation, now instant) (machine, action) {
	if m.gate != Thawing {
		return m, 0
	}
	m.lastSuccess = max(m.lastSuccess, o.started)
	m.known = true
	m.failures = 0
	m.verdict = verdict{state: Enabled, requestID: o.requestID}
	m.lastWord = Unknown
	m.gate = Open
	m.opened = true
	m.pending = NoIntent
	return m, actOpen
}

// failure sorts a failed call: misconfigured, refused, or not reached.
func (m machine) failure(o observation, now instant) (machine, action) {
	v := judgement(o.err)
	if v.state == Deleted {
		v = m.notFound(v)
	}
	if !v.state.refuses() && o.kind == sawFailure && o.started < m.lastSuccess {
		return m, 0 // a call made later was granted: this one only got lost
	}
	m.failures++
	switch {
	case v.state == Misconfigured && m.gate != Draining && !m.opened:
		m.verdict = v
		m.gate = Starting
		return m, actRefuse
	case v.state.refuses():
		return m.refused(v, isAmbiguous(o.err), o.started, now)
	default:
		// Misconfigured cannot arise while running; should it, it is treated as
		// an outage: not usable, but no word from the key's owner either.
		return m.unreached(v, o.started, now)
	}
}

func judgement(err error) verdict {
	v := verdict{state: StateOf(err), reason: ReasonOf(err), requestID: RequestIDOf(err)}
	if err != nil {
		v.detail = err.Error()
	}
	var k *KMSError
	if errors.As(err, &k) {
		v.action, v.principal = k.Action, k.Principal
		if k.Err != nil {
			v.detail = k.Err.Error()
		}
	}
	return v
}

func isAmbiguous(err error) bool {
	var k *KMSError
	return errors.As(err, &k) && k.Ambiguous
}

// notFound: KMS forgets a deleted key. One that was never seen is more likely mistyped.
func (m machine) notFound(v verdict) verdict {
	if m.known {
		v.state, v.reason = Deleted, ReasonKeyDeleted
	} else {
		v.state, v.reason = Misconfigured, ReasonKeyNotFound
	}
	return v
}

// refused handles an answer that forbids the key.
func (m machine) refused(v verdict, vague bool, started, now instant) (machine, action) {
	m.streak = 0
	m.lastRefusal = now
	switch m.gate {
	case Open, Degraded:
		return m.refusedOpen(v, vague, started, now)
	case Draining:
		return m, 0 // closing already
	}
	var act action
	if m.gate == Thawing {
		m.gate = m.closedGate()
		act = actAbort
	}
	as := v.reason
	if vague && m.explained.state.refuses() && m.explainedAs == as {
		v.state, v.reason = m.explained.state, m.explained.reason // as explained before
	}
	m.lastWord = Unknown
	if !v.same(m.verdict) { // the words of the first refusal stay, with its request id
		m.verdict = v
	}
	return m.explain(act, as, now)
}

// same: nothing new is said about the key.
func (v verdict) same(w verdict) bool {
	return v.state == w.state && v.reason == w.reason && v.action == w.action
}

// explain asks DescribeKey if there is something new to explain.
func (m machine) explain(act action, as Reason, now instant) (machine, action) {
	if m.explainedAs != as {
		m.explained = verdict{}
	} else if now-m.explainedAt < explainEvery {
		return m, act
	}
	m.explainedAs, m.explainedAt = as, now
	return m, act | actDescribe
}

// refusedOpen: clear words close at once, doubtful ones are confirmed first.
func (m machine) refusedOpen(v verdict, vague bool, started, now instant) (machine, action) {
	switch {
	case vague && m.doubt == noDoubt:
		m.doubt, m.doubtSince, m.doubted = ambiguous, now, v
		return m, actDescribe
	case vague:
		return m, 0 // DescribeKey is on its way, or doubtLimit ends it
	case v.state == AccessDenied && m.doubt == noDoubt:
		m.doubt, m.doubtSince, m.doubted = denied, now, v
		return m, actProbe
	case v.state == AccessDenied && started < m.doubtSince:
		return m, 0 // asked before the doubt arose: confirms nothing
	default:
		return m.freeze(v, now)
	}
}

// unreached handles everything that is no answer about the key.
func (m machine) unreached(v verdict, started, now instant) (machine, action) {
	m.streak = 0
	switch m.gate {
	case Open, Degraded:
		if m.doubt != noDoubt {
			if started < m.doubtSince {
				return m, 0
			}
			return m.freeze(m.doubted, now) // the confirming call was not granted: fail closed
		}
		if m.gate == Open && m.failures == 1 && v.reason != ReasonThrottled {
			return m, actProbe // one lost call is no outage; a throttled one is not repeated at once
		}
		m.gate = Degraded
		m.verdict = v
		return m, 0
	case Draining:
		return m, 0
	}
	var act action
	if m.gate == Thawing {
		m.gate = m.closedGate()
		act = actAbort
	}
	if m.state == Deleted {
		return m, act // final: an outage does not make it less so
	}
	if !v.same(m.verdict) {
		if m.state.refuses() {
			m.lastWord = m.state
		}
		if m.lastWord != Unknown {
			v.detail += "; the last word of KMS was " + m.lastWord.String()
		}
		m.verdict = v
	}
	return m, act
}
