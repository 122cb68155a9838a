package keyguard

import (
	"errors"
	"testing"
	"time"
)

// stage is an observation of a sequence, with the gate and the action after it.
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
