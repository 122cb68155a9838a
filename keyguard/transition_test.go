package keyguard

import (
	"fmt"
	"testing"
	"time"
)

const (
	testNow   instant = 1000 * time.Second
	testGrace         = 60 * time.Second
)

// row is one observation of the table, with what must come of it for each gate.
type row struct {
	name string
	obs  observation
	want func(c situation) outcome
}

// situation is where an observation is met.
type situation struct {
	gate      GateState
	key       KeyState
	opened    bool // the gate has been open before
	leaseOver bool
	held      bool // the operator wants it closed
}

type outcome struct {
	gate GateState
	key  KeyState
	act  action
}

func (c situation) String() string {
	return fmt.Sprintf("%v/%v opened=%v leaseOver=%v held=%v", c.gate, c.key, c.opened, c.leaseOver, c.held)
}

func (c situation) stays() outcome             { return outcome{c.gate, c.key, 0} }
func (c situation) becomes(k KeyState) outcome { return outcome{c.gate, k, 0} }
func (c situation) with(a action) outcome      { return outcome{c.gate, c.key, a} }
func (c situation) closed() GateState {
	if c.opened {
		return Frozen
	}
	return Starting
}

// machine builds the state behind a situation.
func (c situation) machine() machine {
	m := newMachine(true)
	m.gate, m.opened, m.contacted, m.held = c.gate, c.opened, true, c.held
	m.verdict = verdict{state: c.key}
	m.lastSuccess = testNow - time.Second
	if c.leaseOver {
		m.lastSuccess = testNow - testGrace - time.Second
	}
	if c.gate == Thawing {
		m.streak = 1
	}
	return m
}

// situations are all that can be told apart. Open and Degraded mean opened;
// Starting means not.
func situations() []situation {
	var all []situation
	for _, gate := range GateStates() {
		for _, key := range KeyStates() {
			for _, over := range []bool{false, true} {
				if gate != Starting {
					all = append(all, situation{gate, key, true, over, false})
				}
				if gate == Starting || gate == Thawing || gate == Stopping {
					all = append(all, situation{gate, key, false, over, false})
				}
				if gate == Starting || gate == Draining || gate == Frozen { // held, nothing else is to be had
					all = append(all, situation{gate, key, gate != Starting, over, true})
				}
			}
		}
	}
	return all
}

func saw(kind observationKind, err error) observation {
	return observation{kind: kind, started: testNow - 10*time.Millisecond, err: err}
}

func sawDesc(s KeyState) observation {
	o := saw(sawDescription, nil)
	o.desc = Description{State: s, Reason: ReasonKeyDisabled}
	return o
}

func leaseEnds(c situation) outcome {
	key := c.key
	if key == Enabled {
		key = Unreachable
	}
	return outcome{Draining, key, actFreeze | actDescribe}
}

// refusedAs is the column of a clear refusal.
func refusedAs(s KeyState) func(situation) outcome {
	return func(c situation) outcome {
		switch c.gate {
		case Open, Degraded:
			return outcome{Draining, s, actFreeze | actDescribe}
		case Starting, Frozen:
			return outcome{c.gate, s, actDescribe}
		case Thawing:
			return outcome{c.closed(), s, actAbort | actDescribe}
		default:
			return c.stays()
		}
	}
}

// doubtful is the column of a refusal that open gates confirm first.
func doubtful(s KeyState, confirm action) func(situation) outcome {
	return func(c situation) outcome {
		if c.gate.Admits() {
			return c.with(confirm)
		}
		return refusedAs(s)(c)
	}
}

// lost is the column of a failure that says nothing about the key.
func lost(s KeyState, open outcome) func(situation) outcome {
	return func(c situation) outcome {
		key := s
		if c.key == Deleted {
			key = Deleted
		}
		switch c.gate {
		case Open:
			if open.gate == Open {
				return c.with(actProbe)
			}
			return outcome{Degraded, s, 0}
		case Degraded:
			return c.becomes(s)
		case Starting, Frozen:
			return c.becomes(key)
		case Thawing:
			return outcome{c.closed(), key, actAbort}
		default:
			return c.stays()
		}
	}
}

// misconfigured refuses to start, and is like an outage afterwards.
func misconfigured(c situation) outcome {
	if !c.opened && (c.gate == Starting || c.gate == Thawing) {
		return outcome{Starting, Misconfigured, actRefuse}
	}
	return lost(Misconfigured, outcome{gate: Open})(c)
}

// only makes a column that says something about one gate.
func only(gate GateState, f func(situation) outcome) func(situation) outcome {
	return func(c situation) outcome {
		if c.gate != gate {
			return c.stays()
		}
		return f(c)
	}
}

// explains is the column of a description that refines a refusal.
func explains(s KeyState) func(situation) outcome {
	return func(c situation) outcome {
		refinable := c.key.refuses() && (c.key != AccessDenied || s == Deleted) || c.key == Unknown
		if refinable && (c.gate == Starting || c.gate == Frozen || c.gate == Draining) {
			return c.becomes(s)
		}
		return c.stays()
	}
}

func table() []row {
	throttled := &KMSError{State: Unreachable, Reason: ReasonThrottled}
	unknown := fmt.Errorf("never heard of this")
	unchanged := func(c situation) outcome { return c.stays() }
	rows := []row{
		{"time passes", observation{kind: sawTick}, func(c situation) outcome {
			if c.gate.Admits() && c.leaseOver {
				return leaseEnds(c)
			}
			return c.stays()
		}},
		{"silence", observation{kind: sawSilence}, func(c situation) outcome {
			switch {
			case c.gate.Admits() && c.leaseOver:
				return leaseEnds(c)
			case c.gate == Open:
				return outcome{Degraded, Unreachable, 0}
			}
			return c.stays()
		}},
		{"granted", saw(sawSuccess, nil), func(c situation) outcome {
			switch c.gate {
			case Open, Degraded:
				return outcome{Open, Enabled, 0}
			case Starting, Frozen:
				if c.held {
					return outcome{c.gate, Enabled, 0}
				}
				if c.key == Unknown || c.key == Unreachable {
					return outcome{Thawing, Enabled, actThaw}
				}
				return outcome{Thawing, c.key, actThaw}
			}
			return c.stays()
		}},
		{"AccessDenied", saw(sawFailure, refusal(AccessDenied)), doubtful(AccessDenied, actProbe)},
		{"KMSInvalidState", saw(sawFailure, vague()), doubtful(Unavailable, actDescribe)},
		{"Misconfigured", saw(sawFailure, refusal(Misconfigured)), misconfigured},
		{"Unreachable", saw(sawFailure, refusal(Unreachable)), lost(Unreachable, outcome{gate: Open})},
		{"unknown fault", saw(sawFailure, unknown), lost(Unreachable, outcome{gate: Open})},
		{"throttled", saw(sawFailure, throttled), lost(Unreachable, outcome{gate: Degraded})},
		{"unwrapped", saw(sawUnwrapped, nil), only(Thawing, func(c situation) outcome { return outcome{Open, Enabled, actOpen} })},
		{"unwrap misconfigured", saw(sawUnwrapError, refusal(Misconfigured)), only(Thawing, misconfigured)},
		{"unwrap unreachable", saw(sawUnwrapError, refusal(Unreachable)), only(Thawing, lost(Unreachable, outcome{}))},
		{"operator freezes", observation{kind: sawHold}, func(c situation) outcome {
			switch c.gate {
			case Open, Degraded:
				return outcome{Draining, c.key, actFreeze}
			case Thawing:
				return outcome{c.closed(), c.key, actAbort | actProbe}
			}
			return c.stays()
		}},
		{"operator thaws", observation{kind: sawRelease}, func(c situation) outcome {
			if c.gate.Admits() {
				return c.stays()
			}
			return c.with(actProbe)
		}},
		{"closed", observation{kind: sawClosed}, only(Draining, func(c situation) outcome { return outcome{Frozen, c.key, 0} })},
		{"described Enabled", sawDesc(Enabled), unchanged},
		{"described Misconfigured", sawDesc(Misconfigured), func(c situation) outcome {
			if !c.opened && (c.gate == Starting || c.gate == Thawing) {
				return outcome{Starting, Misconfigured, actRefuse}
			}
			return c.stays()
		}},
		{"description Unreachable", saw(sawDescription, refusal(Unreachable)), unchanged},
		{"description AccessDenied", saw(sawDescription, refusal(AccessDenied)), unchanged},
		{"description finds nothing", saw(sawDescription, refusal(Deleted)), explains(Deleted)},
	}
	for _, s := range []KeyState{Disabled, PendingDeletion, Deleted, Unavailable} {
		rows = append(rows, row{s.String(), saw(sawFailure, refusal(s)), refusedAs(s)},
			row{"unwrap " + s.String(), saw(sawUnwrapError, refusal(s)), only(Thawing, refusedAs(s))})
		if s != Deleted { // DescribeKey has no such state, it fails
			rows = append(rows, row{"described " + s.String(), sawDesc(s), explains(s)})
		}
	}
	rows = append(rows, row{"unwrap AccessDenied", saw(sawUnwrapError, refusal(AccessDenied)), only(Thawing, refusedAs(AccessDenied))})
	return rows
}

func TestStepTable(t *testing.T) {
	n := 0
	for _, r := range table() {
		for _, c := range situations() {
			n++
			before := c.machine()
			m, act := step(before, r.obs, testNow, testGrace)
			want := r.want(c)
			if c.gate == Stopping {
				want = c.stays()
			}
			if got := (outcome{m.gate, m.state, act}); got != want {
				t.Errorf("%s at %v: %v/%v actions %b, want %v/%v actions %b",
					r.name, c, got.gate, got.key, got.act, want.gate, want.key, want.act)
			}
		}
	}
	if n < 3500 {
		t.Errorf("the table has only %d entries", n)
	}
}

// TestStepInvariants: whatever is seen, wherever: the gate opens by nothing but
// an unwrap in Thawing (or a granted call while admitted on credit), and what
// refuses never leaves an open gate without a freeze or a doubt.
func TestStepInvariants(t *testing.T) {
	for _, r := range table() {
		for _, c := range situations() {
			m, act := step(c.machine(), r.obs, testNow, testGrace)
			name := fmt.Sprintf("%s at %v", r.name, c)
			if m.gate.Admits() && !c.gate.Admits() && (r.obs.kind != sawUnwrapped || c.gate != Thawing || act != actOpen) {
				t.Errorf("%s: opened", name)
			}
			if act&actThaw != 0 && (r.obs.kind != sawSuccess || m.gate != Thawing) {
				t.Errorf("%s: thaws", name)
			}
			if c.gate.Admits() && r.obs.kind == sawFailure && StateOf(r.obs.err).refuses() && m.gate.Admits() && m.doubt == noDoubt {
				t.Errorf("%s: a refusal without consequence", name)
			}
			if c.held && r.obs.kind != sawRelease && (!m.held || m.gate.Admits() || m.gate == Thawing) {
				t.Errorf("%s: what the operator froze became %v", name, m.gate)
			}
			if (act&actFreeze != 0) != (c.gate.Admits() && m.gate == Draining) {
				t.Errorf("%s: draining and actFreeze do not go together", name)
			}
			if m.gate.Admits() && m.doubt == noDoubt && m.gate == Open && m.state != Enabled && c.gate != Open {
				t.Errorf("%s: open with key state %v", name, m.state)
			}
		}
	}
}
