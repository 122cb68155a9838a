package awskms

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// behaviour is one row of the table of key states (docs/ARCHITECTURE.md), for one
// way in which AWS comes to say so. What a guard does is looked at from outside,
// through the real SDK: state, gate, messages, metrics, log and audit trail.
type behaviour struct {
	name string
	take func(w *rig) // makes KMS answer so; nil: fault
	give func(w *rig) // and takes it back; nil where fault is injected, or never
	// fault is injected instead of take, for Decrypt and GenerateDataKey*; DescribeKey stays true.
	fault kmstest.Fault

	state    keyguard.KeyState
	reason   keyguard.Reason
	cause    string // in Status.Cause
	nextStep string // in Status.NextStep
	refused  bool   // KMS itself says no: frozen at once, not at the end of the lease
	final    bool   // nothing brings the key back
	silent   bool   // no answer, hence no request id
	// atStart is what it means for a key that was never seen, if something else:
	// then Run refuses to start.
	atStart keyguard.Reason
	// What the freeze itself is told with, if DescribeKey explains it better afterwards.
	frozeKey keyguard.KeyState
	froze    keyguard.Reason
	heard    keyguard.Reason // what KMS's refusal itself says, if DescribeKey explains it better
}

// answer is a fault that has KMS answer with an error of AWS.
func answer(status int, code, message string) kmstest.Fault {
	return kmstest.Fault{Kind: kmstest.FaultError, Status: status, Code: code, Message: message}
}

const goesOn = "byokd goes on by itself"

// behaviours has every error name of AWS KMS that a guard can meet.
func behaviours() []behaviour {
	const (
		disabled, pending, deleted = keyguard.Disabled, keyguard.PendingDeletion, keyguard.Deleted
		denied, unavailable        = keyguard.AccessDenied, keyguard.Unavailable
		unreachable, misconfigured = keyguard.Unreachable, keyguard.Misconfigured
	)
	return []behaviour{
		// What the owner of the key does.
		{name: "disabled", state: disabled, reason: keyguard.ReasonKeyDisabled, refused: true,
			cause: "is disabled", nextStep: "aws kms enable-key --key-id",
			take: func(w *rig) { w.must(w.kms.Disable(w.arn)) }, give: func(w *rig) { w.must(w.kms.Enable(w.arn)) }},
		{name: "deletion scheduled", state: pending, reason: keyguard.ReasonPendingDeletion, refused: true,
			cause: "scheduled for deletion on ", nextStep: "cancel-key-deletion",
			take: func(w *rig) { w.must(w.kms.ScheduleDeletion(w.arn, 7*24*time.Hour)) },
			give: func(w *rig) { w.must(w.kms.CancelDeletion(w.arn)); w.must(w.kms.Enable(w.arn)) }},
		{name: "deleted", state: deleted, reason: keyguard.ReasonKeyDeleted, atStart: keyguard.ReasonKeyNotFound, refused: true, final: true,
			cause: "This is final", nextStep: "no way back", take: func(w *rig) { w.must(w.kms.Delete(w.arn)) }},
		{name: "decrypt denied, describe allowed", state: denied, reason: keyguard.ReasonAccessDenied, refused: true,
			cause: "kms:Decrypt is denied to " + kmstest.TenantRole, nextStep: "put-key-policy",
			take: func(w *rig) { w.must(w.kms.Deny(w.arn, "kms:Decrypt", kmstest.TenantRole)) },
			give: func(w *rig) { w.must(w.kms.Allow(w.arn, "kms:Decrypt", kmstest.TenantRole)) }},
		{name: "everything denied", state: denied, reason: keyguard.ReasonAccessDenied, refused: true,
			cause: "is denied to " + kmstest.TenantRole, nextStep: "put-key-policy",
			take: func(w *rig) { w.must(w.kms.Deny(w.arn, "*", kmstest.TenantRole)) },
			give: func(w *rig) { w.must(w.kms.Allow(w.arn, "*", kmstest.TenantRole)) }},
		{name: "key material expired", state: unavailable, reason: keyguard.ReasonPendingImport, refused: true,
			cause: "key material is missing or has expired", nextStep: "import-key-material",
			take: func(w *rig) { w.must(w.kms.SetState(w.arn, "PendingImport")) }, give: enableState},
		{name: "key store down", state: unavailable, reason: keyguard.ReasonKeyStoreDown, heard: keyguard.ReasonInvalidState, refused: true,
			cause: "custom key store is not connected", nextStep: "connect-custom-key-store",
			take: func(w *rig) { w.must(w.kms.SetState(w.arn, "Unavailable")) }, give: enableState},
		{name: "key being created", state: unavailable, reason: keyguard.ReasonKeyCreating, heard: keyguard.ReasonInvalidState, refused: true,
			cause: "it is still being created", nextStep: "describe-key",
			take: func(w *rig) { w.must(w.kms.SetState(w.arn, "Creating")) }, give: enableState},

		// The same errors by name, while DescribeKey says that all is well.
		{name: "DisabledException", fault: answer(400, "DisabledException", "is disabled."), state: disabled,
			reason: keyguard.ReasonKeyDisabled, refused: true, cause: "is disabled", nextStep: "enable-key"},
		{name: "NotFoundException", fault: answer(400, "NotFoundException", "Key does not exist"), state: deleted,
			reason: keyguard.ReasonKeyDeleted, atStart: keyguard.ReasonKeyNotFound, refused: true, cause: "This is final", nextStep: "no way back"},
		{name: "AccessDeniedException", fault: answer(400, "AccessDeniedException", ""), state: denied,
			reason: keyguard.ReasonAccessDenied, refused: true, cause: "kms:Decrypt is denied to byokd's role", nextStep: "put-key-policy"},
		{name: "KMSInvalidStateException without a word", fault: answer(400, "KMSInvalidStateException", ""), state: unavailable,
			reason: keyguard.ReasonKeyStoreDown, frozeKey: unreachable, froze: keyguard.ReasonInvalidState, cause: "custom key store is not connected", nextStep: "describe-custom-key-stores"},
		// Waiting does not help at the start; while running it cannot arise, and counts as an outage.
		{name: "InvalidCiphertextException", fault: answer(400, "InvalidCiphertextException", ""), state: misconfigured,
			reason: keyguard.ReasonInvalidCiphertext, atStart: keyguard.ReasonInvalidCiphertext, cause: "belongs to another cluster", nextStep: "Name the key"},
		{name: "IncorrectKeyException", fault: answer(400, "IncorrectKeyException", ""), state: misconfigured,
			reason: keyguard.ReasonWrongKey, atStart: keyguard.ReasonWrongKey, cause: "under another key", nextStep: "Name the key"},
		// KMS itself.
		{name: "DependencyTimeoutException", fault: answer(503, "DependencyTimeoutException", ""), state: unreachable,
			reason: keyguard.ReasonServiceFault, cause: "internal failure", nextStep: goesOn},
		{name: "KeyUnavailableException", fault: answer(500, "KeyUnavailableException", ""), state: unreachable,
			reason: keyguard.ReasonServiceFault, cause: "internal failure", nextStep: goesOn},
		{name: "KMSInternalException", fault: answer(500, "KMSInternalException", ""), state: unreachable,
			reason: keyguard.ReasonServiceFault, cause: "internal failure", nextStep: goesOn},
		{name: "HTTP 502 without a name", fault: answer(502, "", ""), state: unreachable,
			reason: keyguard.ReasonServiceFault, cause: "internal failure", nextStep: goesOn},
		{name: "ThrottlingException", fault: kmstest.Fault{Kind: kmstest.FaultThrottle}, state: unreachable,
			reason: keyguard.ReasonThrottled, cause: "throttled", nextStep: "Raise the quota"},
		{name: "LimitExceededException", fault: answer(400, "LimitExceededException", ""), state: unreachable,
			reason: keyguard.ReasonThrottled, cause: "throttled", nextStep: "Raise the quota"},
		{name: "an error of the future", fault: answer(400, "SomethingNewException", ""), state: unreachable,
			reason: keyguard.ReasonUnknownFault, cause: "does not know", nextStep: goesOn},
		// Our own standing.
		{name: "ExpiredTokenException", fault: answer(400, "ExpiredTokenException", "The security token included in the request is expired"),
			state: unreachable, reason: keyguard.ReasonCredentials, cause: "no valid AWS credentials", nextStep: "get-caller-identity"},
		{name: "UnrecognizedClientException", fault: answer(400, "UnrecognizedClientException", ""),
			state: unreachable, reason: keyguard.ReasonCredentials, cause: "no valid AWS credentials", nextStep: "get-caller-identity"},
		{name: "clock skew", fault: answer(400, "InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z"),
			state: unreachable, reason: keyguard.ReasonClockSkew, cause: "clock is wrong", nextStep: "chrony"},
		// The way to KMS.
		{name: "connection cut", fault: kmstest.Fault{Kind: kmstest.FaultCut}, silent: true, state: unreachable,
			reason: keyguard.ReasonConnection, cause: "connection", nextStep: goesOn},
		{name: "no answer", fault: kmstest.Fault{Kind: kmstest.FaultHang}, silent: true, state: unreachable,
			reason: keyguard.ReasonTimeout, cause: "does not answer", nextStep: goesOn},
		{name: "DNS failure", silent: true, state: unreachable, reason: keyguard.ReasonDNS, cause: "host name cannot be resolved", nextStep: goesOn,
			take: func(w *rig) { w.network(&w.noDNS, true) }, give: func(w *rig) { w.network(&w.noDNS, false) }},
		{name: "TLS failure", silent: true, state: unreachable, reason: keyguard.ReasonTLS, cause: "no trusted TLS connection", nextStep: goesOn,
			take: func(w *rig) { w.network(&w.badTLS, true) }, give: func(w *rig) { w.network(&w.badTLS, false) }},
	}
}

func enableState(w *rig) { w.must(w.kms.SetState(w.arn, "Enabled")) }

// TestBehaviour goes through the table: each row at the start, while idle, under
// load and in the midst of a thaw. Many run at the same time: they wait most of it.
func TestBehaviour(t *testing.T) {
	phases := map[string]func(*rig, behaviour){
		"at the start": (*rig).atStart, "idle": (*rig).idle, "under load": (*rig).underLoad, "during a thaw": (*rig).duringThaw,
	}
	server := startKMS(t)
	var all sync.WaitGroup
	together := make(chan struct{}, 10) // more would starve each other's leases of two seconds
	for _, b := range behaviours() {
		for phase, check := range phases {
			all.Go(func() {
				together <- struct{}{}
				defer func() { <-together }()
				t.Run(b.name+"/"+phase, func(t *testing.T) {
					w := newRig(t, server.Server)
					if b.refused { // does not wait for the lease; on a busy machine it must not end by itself
						w.options.OutageGrace = keyguard.DefaultOutageGrace
						w.watch(w.arn)
					}
					check(w, b)
				})
			})
		}
	}
	all.Wait()
}

func (w *rig) atStart(b behaviour) {
	w.take(b)
	w.start()
	if b.atStart != "" {
		err := w.ended()
		if s := w.guard.Status(); !errors.Is(err, keyguard.ErrMisconfigured) || s.Key != keyguard.Misconfigured || s.Reason != b.atStart {
			w.t.Errorf("Run: %v; status %+v", err, s)
		}
		if !w.logged("refusing to start", "") {
			w.t.Error("the log does not say why byokd refuses to start")
		}
		return
	}
	w.awaitTold(b, keyguard.Starting)
	if s := w.guard.Status(); !strings.Contains(s.Cause(), "Nothing is mounted or served until the key is usable") {
		w.t.Errorf("at the start: %s", s.Cause())
	}
	w.mustNotEnter()
	w.awaitRefusal(b)
	w.awaitLog("key state", b.state)
	w.give(b)
	w.awaitGate(keyguard.Open)
}

func (w *rig) idle(b behaviour) {
	w.open()
	w.take(b)
	if !b.refused {
		w.awaitGate(keyguard.Degraded, keyguard.Draining, keyguard.Frozen) // the lease is short
		w.awaitAudit(keyguard.AuditOutage, behaviour{})
	}
	w.awaitFrozen(b)
	if b.final {
		return
	}
	w.give(b)
	w.awaitGate(keyguard.Open)
	w.awaitAudit(keyguard.AuditThaw, behaviour{})
}

// underLoad has callers use the key without pause; some make data keys, whose
// calls meet the refusal before a probe does.
func (w *rig) underLoad(b behaviour) {
	w.open()
	load := w.startLoad()
	w.take(b)
	w.awaitFrozen(b)
	if n := load.leaked(); n != 0 {
		w.t.Errorf("%d passes were good after the gate had closed", n)
	}
	if b.final {
		load.abandon()
		return
	}
	w.give(b)
	w.awaitGate(keyguard.Open)
	load.finish()
}

// duringThaw has the key come back, and go again after the probes were granted
// and before the pinned root is unwrapped.
func (w *rig) duringThaw(b behaviour) {
	w.open()
	w.must(w.kms.Disable(w.arn))
	w.awaitGate(keyguard.Frozen)
	w.awaitErased()
	arrived := w.holdUnwraps()
	w.must(w.kms.Enable(w.arn))
	select {
	case <-arrived:
	case <-time.After(patience):
		w.t.Fatalf("no unwrap came: %+v", w.guard.Status())
	}
	if s := w.guard.Status(); s.Gate != keyguard.Thawing {
		w.t.Errorf("an unwrap came while the gate was %v", s.Gate)
	}
	w.take(b)
	w.releaseUnwraps()
	w.awaitTold(b, keyguard.Frozen)
	w.awaitErased()
	w.mustNotEnter()
	if n := w.thaws(); n != 1 {
		w.t.Errorf("the gate opened %d times, want only the first", n)
	}
	if b.final {
		return
	}
	w.give(b)
	w.awaitGate(keyguard.Open)
}

// awaitFrozen waits until the gate is closed because of b, and looks at every
// face of that.
func (w *rig) awaitFrozen(b behaviour) {
	w.t.Helper()
	w.awaitTold(b, keyguard.Frozen)
	w.awaitErased()
	w.mustNotEnter()
	w.awaitAudit(keyguard.AuditFreeze, b)
	w.awaitAudit(keyguard.AuditErase, behaviour{})
	w.awaitRefusal(b)
	if b.frozeKey == keyguard.Unknown {
		b.frozeKey = b.state
	}
	w.awaitLog("gate", b.frozeKey)
	series := w.series()
	for _, want := range []string{
		fmt.Sprintf(`byokd_freezes_total{guard="g",reason=%q} 1`, b.frozeAs()),
		`byokd_gate_state{guard="g",state="frozen"} 1`,
		fmt.Sprintf(`byokd_key_state{guard="g",state=%q} 1`, snake(b.state)),
		`byokd_keys_erased{guard="g"} 1`,
	} {
		if !strings.Contains(series, want+"\n") {
			w.t.Errorf("the metrics lack %s", want)
		}
	}
}

// frozeAs is the reason with which the freeze was counted.
func (b behaviour) frozeAs() keyguard.Reason {
	if b.froze != keyguard.ReasonNone {
		return b.froze
	}
	return b.reason
}

// awaitRefusal waits for the record of a refusal, in KMS's own words.
func (w *rig) awaitRefusal(b behaviour) {
	w.t.Helper()
	if !b.refused {
		return
	}
	if b.heard != keyguard.ReasonNone {
		b.reason = b.heard
	}
	w.awaitAudit(keyguard.AuditRefusal, b)
}

// snake writes a state's name as a label.
func snake(s keyguard.KeyState) string {
	var text strings.Builder
	for i, r := range s.String() {
		if i > 0 && r < 'a' {
			text.WriteByte('_')
		}
		text.WriteString(strings.ToLower(string(r)))
	}
	return text.String()
}

// awaitTold waits until the status names b with the gate in this state, and
// checks its words.
func (w *rig) awaitTold(b behaviour, gate keyguard.GateState) {
	w.t.Helper()
	s := w.await("the gate "+gate.String()+" because of "+b.name, func(s keyguard.Status) bool {
		// DescribeKey adds details, such as the date of a deletion, a moment later.
		return s.Gate == gate && s.Key == b.state && s.Reason == b.reason && strings.Contains(s.Cause(), b.cause)
	})
	if s.Headline() != "External encryption key is not ready" {
		w.t.Errorf("headline: %s", s.Headline())
	}
	if !strings.Contains(s.Cause(), w.arn) {
		w.t.Errorf("the cause does not name the key: %s", s.Cause())
	}
	if !strings.Contains(s.NextStep(), b.nextStep) {
		w.t.Errorf("next step: %s; want %q", s.NextStep(), b.nextStep)
	}
	if (s.RequestID == "") != b.silent {
		w.t.Errorf("request id %q of a KMS that answered: %v", s.RequestID, !b.silent)
	}
}

// mustNotEnter checks that the gate admits neither class.
func (w *rig) mustNotEnter() {
	w.t.Helper()
	for _, class := range []keyguard.Class{keyguard.Work, keyguard.Drain} {
		if p, ok := w.guard.TryEnter(class, 0); ok {
			p.Exit()
			w.t.Errorf("a closed gate admits class %v", class)
		}
	}
}

// A KMS that grants Decrypt but not DescribeKey serves; the status warns.
func TestDescribeDeniedOnly(t *testing.T) {
	server := startKMS(t)
	w := newRig(t, server.Server)
	w.must(w.kms.Deny(w.arn, "kms:DescribeKey", kmstest.TenantRole))
	w.open()
	s := w.await("the warning", func(s keyguard.Status) bool { return s.Warning != "" })
	if s.Gate != keyguard.Open || s.Key != keyguard.Enabled || !strings.Contains(s.Cause(), "kms:DescribeKey is refused") || !strings.Contains(s.NextStep(), "put-key-policy") {
		t.Errorf("%+v\n%s\n%s", s, s.Cause(), s.NextStep())
	}
	w.must(w.kms.Disable(w.arn)) // it freezes without an explanation
	s = w.awaitGate(keyguard.Frozen)
	if s.Key != keyguard.Disabled {
		t.Errorf("%+v", s)
	}
}

// A key that flaps is served only once it has been granted for a while, and every
// freeze is as prompt as the first.
func TestFlappingKey(t *testing.T) {
	server := startKMS(t)
	w := newRig(t, server.Server)
	w.open()
	w.must(w.kms.Disable(w.arn))
	w.awaitGate(keyguard.Frozen)
	for range 5 { // granted once, then refused again: never long enough to be believed
		seq := w.kms.LastCall()
		w.must(w.kms.Enable(w.arn))
		if _, err := w.kms.WaitCall(t.Context(), seq, func(c kmstest.Call) bool {
			return c.Operation == "Decrypt" && c.Key == w.arn && c.Error == ""
		}); err != nil {
			t.Fatal(err)
		}
		w.must(w.kms.Disable(w.arn))
		seq = w.kms.LastCall()
		if _, err := w.kms.WaitCall(t.Context(), seq, func(c kmstest.Call) bool {
			return c.Operation == "Decrypt" && c.Key == w.arn && c.Error == "DisabledException"
		}); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.thaws(); n != 1 {
		t.Errorf("the gate of a flapping key opened %d times", n-1)
	}
	w.must(w.kms.Enable(w.arn))
	w.awaitGate(keyguard.Open)
}

// A KMS that takes longer than the probe interval is slow and not down; while it
// throttles, the probes keep a jittered distance and are not repeated at once.
func TestSlowAndThrottlingKMS(t *testing.T) {
	server := startKMS(t)
	w := newRig(t, server.Server)
	w.open()
	slow, err := w.kms.Inject(kmstest.Fault{Kind: kmstest.FaultLatency, DelayMillis: 1100, Key: w.arn}) // ten probe intervals
	if err != nil {
		t.Fatal(err)
	}
	s := w.await("the slowness to be told", func(s keyguard.Status) bool { return s.Reason == keyguard.ReasonSlow })
	if s.Gate != keyguard.Open || !strings.Contains(s.Cause(), "answers slowly") {
		t.Errorf("%+v: %s", s, s.Cause())
	}
	w.kms.ClearFault(slow.ID)
	w.await("quick answers", func(s keyguard.Status) bool { return s.Reason == keyguard.ReasonNone && s.Gate == keyguard.Open })

	if _, err := w.kms.Inject(kmstest.Fault{Kind: kmstest.FaultThrottle, Key: w.arn, Operations: []string{"Decrypt"}}); err != nil {
		t.Fatal(err)
	}
	w.awaitGate(keyguard.Degraded)
	seq := w.kms.LastCall()
	var times []time.Time
	for len(times) < 8 {
		c, err := w.kms.WaitCall(t.Context(), seq, func(c kmstest.Call) bool { return c.Operation == "Decrypt" && c.Key == w.arn })
		if err != nil {
			t.Fatal(err)
		}
		seq = c.Seq
		times = append(times, c.Time)
	}
	gaps := map[time.Duration]bool{}
	for i := range times[1:] {
		gap := times[i+1].Sub(times[i])
		gaps[gap.Round(10*time.Millisecond)] = true
	}
	if len(gaps) < 3 {
		t.Errorf("throttled probes come in step: %v", gaps)
	}
}
