package keyguard

import (
	"errors"
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

// script is a list of observations with the gate after each.
type stage struct {
	at   time.Duration // after testNow
	obs  observation
	gate GateState
	act  action
}

func granteds(started time.Duration) observation {
	return observation{kind: sawSuccess, started: testNow + started}
}

func failed(started time.Duration, err error) observation {
	return observation{kind: sawFailure, started: testNow + started, err: err}
}

func TestStepSequences(t *testing.T) {
	const ms = time.Millisecond
	tick := observation{kind: sawTick}
	open := situation{gate: Open, key: Enabled, opened: true}
	frozen := situation{gate: Frozen, key: Disabled, opened: true}
	described := func(s KeyState) observation {
		o := sawDesc(s)
		o.started = testNow + 1*ms
		return o
	}
	tests := []struct {
		name   string
		from   situation
		stages []stage
	}{
		{"a denial that the confirming call does not repeat", open, []stage{
			{0, failed(-5*ms, refusal(AccessDenied)), Open, actProbe},
			{5 * ms, granteds(1 * ms), Open, 0},
			{500 * ms, tick, Open, 0},
		}},
		{"a denial that is repeated", open, []stage{
			{0, failed(-5*ms, refusal(AccessDenied)), Open, actProbe},
			{5 * ms, failed(1*ms, refusal(AccessDenied)), Draining, actFreeze | actDescribe},
		}},
		{"a granted call from before the doubt does not dispel it", open, []stage{
			{0, failed(-5*ms, refusal(AccessDenied)), Open, actProbe},
			{1 * ms, granteds(-2 * ms), Open, 0},
			{2 * ms, failed(-1*ms, refusal(AccessDenied)), Open, 0},
			{400 * ms, tick, Draining, actFreeze | actDescribe},
		}},
		{"a confirming call that is lost", open, []stage{
			{0, failed(-5*ms, refusal(AccessDenied)), Open, actProbe},
			{5 * ms, failed(1*ms, refusal(Unreachable)), Draining, actFreeze | actDescribe},
		}},
		{"a clear refusal ends a doubt", open, []stage{
			{0, failed(-5*ms, refusal(AccessDenied)), Open, actProbe},
			{1 * ms, failed(-4*ms, refusal(Disabled)), Draining, actFreeze | actDescribe},
		}},
		{"an invalid state that DescribeKey confirms", open, []stage{
			{0, failed(-5*ms, vague()), Open, actDescribe},
			{1 * ms, failed(-4*ms, vague()), Open, 0},
			{5 * ms, described(Unavailable), Draining, actFreeze},
		}},
		{"an invalid state that DescribeKey denies", open, []stage{
			{0, failed(-5*ms, vague()), Open, actDescribe},
			{5 * ms, described(Enabled), Degraded, 0},
			{10 * ms, granteds(6 * ms), Open, 0},
		}},
		{"a description from before an invalid state settles nothing", open, []stage{
			{0, failed(-5*ms, vague()), Open, actDescribe},
			{5 * ms, observation{kind: sawDescription, started: testNow - 50*ms, desc: Description{State: Enabled}}, Open, actDescribe},
			{9 * ms, observation{kind: sawDescription, started: testNow + 6*ms, desc: Description{State: Unavailable}}, Draining, actFreeze},
		}},
		{"an invalid state that nobody explains in time", open, []stage{
			{0, failed(-5*ms, vague()), Open, actDescribe},
			{399 * ms, tick, Open, 0},
			{400 * ms, tick, Draining, actFreeze | actDescribe},
		}},
		{"two lost calls are an outage, one granted call ends it", open, []stage{
			{0, failed(-5*ms, refusal(Unreachable)), Open, actProbe},
			{5 * ms, failed(1*ms, refusal(Unreachable)), Degraded, 0},
			{10 * ms, granteds(6 * ms), Open, 0},
			{15 * ms, failed(11*ms, refusal(Unreachable)), Open, actProbe},
		}},
		{"a lost call that began before a granted one is no news", open, []stage{
			{0, granteds(-5 * ms), Open, 0},
			{1 * ms, failed(-3000*ms, refusal(Unreachable)), Open, 0},
			{2 * ms, failed(-3000*ms, refusal(Unreachable)), Open, 0},
		}},
		{"thaw after a refusal takes three granted calls within a second", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{600 * ms, granteds(590 * ms), Frozen, actConfirm},
			{750 * ms, granteds(740 * ms), Frozen, actConfirm},
			{900 * ms, granteds(890 * ms), Thawing, actThaw},
			{920 * ms, observation{kind: sawUnwrapped, started: testNow + 901*ms}, Open, actOpen},
		}},
		{"three granted calls in more than a second are not enough", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{600 * ms, granteds(590 * ms), Frozen, actConfirm},
			{1200 * ms, granteds(1190 * ms), Frozen, actConfirm},
			{1700 * ms, granteds(1690 * ms), Frozen, actConfirm},
			{1800 * ms, granteds(1790 * ms), Thawing, actThaw},
		}},
		{"a refusal between them starts over", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{600 * ms, granteds(590 * ms), Frozen, actConfirm},
			{750 * ms, granteds(740 * ms), Frozen, actConfirm},
			{800 * ms, failed(790*ms, refusal(Disabled)), Frozen, 0},
			{900 * ms, granteds(890 * ms), Frozen, actConfirm},
			{1050 * ms, granteds(1040 * ms), Frozen, actConfirm},
			{1200 * ms, granteds(1190 * ms), Thawing, actThaw},
		}},
		{"a granted call from before the refusal counts for nothing", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{1 * ms, granteds(-3 * ms), Frozen, 0},
		}},
		{"just before ten seconds it is not", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{9990 * ms, granteds(9900 * ms), Frozen, actConfirm},
		}},
		{"the lease counts from the start of a slow granted call", open, []stage{
			{10 * time.Second, granteds(7 * time.Second), Open, 0},
			{66900 * ms, tick, Open, 0},
			{67000 * ms, tick, Draining, actFreeze | actDescribe},
		}},
		{"ten seconds after the last refusal one granted call is enough", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{10 * time.Second, granteds(9990 * ms), Thawing, actThaw},
		}},
		{"a refusal aborts a thaw", frozen, []stage{
			{0, granteds(-5 * ms), Thawing, actThaw},
			{10 * ms, failed(5*ms, refusal(Disabled)), Frozen, actAbort | actDescribe},
			{20 * ms, observation{kind: sawUnwrapped, started: testNow + 1*ms}, Frozen, 0},
		}},
		{"a lasting refusal is explained again every five seconds", frozen, []stage{
			{0, failed(-5*ms, refusal(Disabled)), Frozen, actDescribe},
			{1000 * ms, failed(990*ms, refusal(Disabled)), Frozen, 0},
			{1500 * ms, failed(1490*ms, refusal(PendingDeletion)), Frozen, actDescribe},
			{2000 * ms, failed(1990*ms, refusal(PendingDeletion)), Frozen, 0},
			{6500 * ms, failed(6490*ms, refusal(PendingDeletion)), Frozen, actDescribe},
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := test.from.machine()
			for i, s := range test.stages {
				var act action
				m, act = step(m, s.obs, testNow+s.at, testGrace)
				if m.gate != s.gate || act != s.act {
					t.Fatalf("stage %d: %v actions %b, want %v actions %b", i, m.gate, act, s.gate, s.act)
				}
			}
		})
	}
}

// What is told of a long refusal must not grow with it, and an outage in
// between must not hide it.
func TestStepKeepsItsWords(t *testing.T) {
	m := situation{gate: Frozen, key: Disabled, opened: true}.machine()
	at := testNow
	for range 100 {
		at += 6 * time.Second
		m, _ = step(m, observation{kind: sawFailure, started: at, err: refusal(AccessDenied)}, at, testGrace)
		o := sawDesc(Disabled)
		o.started = at
		m, _ = step(m, o, at, testGrace)
	}
	if want := "as AWS says: AccessDenied; the key is also Disabled"; m.detail != want {
		t.Errorf("detail %q, want %q", m.detail, want)
	}
	for _, reason := range []Reason{ReasonDNS, ReasonTimeout, ReasonDNS} {
		at += time.Second
		lost := &KMSError{State: Unreachable, Reason: reason, Err: errors.New("lost")}
		m, _ = step(m, observation{kind: sawFailure, started: at, err: lost}, at, testGrace)
		if want := "lost; the last word of KMS was AccessDenied"; m.state != Unreachable || m.detail != want {
			t.Errorf("%v %q, want %q", m.state, m.detail, want)
		}
	}
}

func TestStepAtFirstContact(t *testing.T) {
	m := newMachine(false)
	m, act := step(m, saw(sawSuccess, nil), testNow, testGrace)
	if m.gate != Starting || act != actDescribe {
		t.Fatalf("before the kind of key is known: %v actions %b", m.gate, act)
	}
	if after, act := step(m, sawDesc(Enabled), testNow, testGrace); after.gate != Thawing || act != actThaw {
		t.Errorf("a described key: %v actions %b", after.gate, act)
	}
	if after, act := step(m, saw(sawDescription, refusal(AccessDenied)), testNow, testGrace); after.gate != Thawing || act != actThaw {
		t.Errorf("a policy without DescribeKey: %v actions %b", after.gate, act)
	}
	if after, act := step(m, saw(sawDescription, refusal(Unreachable)), testNow, testGrace); after.gate != Starting || act != 0 {
		t.Errorf("no description to be had: %v actions %b", after.gate, act)
	}
	fresh := newMachine(false)
	if after, act := step(fresh, saw(sawFailure, refusal(Deleted)), testNow, testGrace); act != actRefuse || after.state != Misconfigured || after.reason != ReasonKeyNotFound {
		t.Errorf("never seen and not found: %v %v actions %b", after.state, after.reason, act)
	}
}
