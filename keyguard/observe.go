package keyguard

import (
	"context"
	"time"
)

// Transition is one change of the gate, as subscribers and observers see it.
type Transition struct {
	Name   string    `json:"name"` // the guard
	From   GateState `json:"from"`
	To     GateState `json:"to"`
	Key    KeyState  `json:"key"`
	Reason Reason    `json:"reason"`
	Epoch  uint64    `json:"epoch"` // the epoch that ends (Draining, Frozen) or begins (Open)
	At     time.Time `json:"at"`
}

// Subscriber takes part in freezes and thaws. Run calls all subscribers of a
// guard in parallel, one kind of call at a time, in the order Draining, Frozen,
// Thawed; a subscriber must not call Subscribe or its cancel from within, and
// must not wait in Enter inside Frozen or Thawed.
type Subscriber interface {
	// Draining: class Work waits already, class Drain passes until this
	// returns or ctx (500 ms) ends; then the gate closes.
	Draining(ctx context.Context, t Transition)
	// Frozen: nothing passes any more. Drop every reference to ciphers and roots. ctx ends after 500 ms.
	Frozen(ctx context.Context, t Transition)
	// Thawed: the keys are back and the gate opens when this returns, at the
	// latest after 250 ms. Also called for the first opening (From is Starting).
	Thawed(t Transition)
}

// LateDrainer is a Subscriber that knows when its drain was not done in time, and
// that it lets nothing out while it goes on: where it left something behind that
// could be read until the thaw, a later close is better than an earlier one.
type LateDrainer interface {
	// DrainLate is called after Draining, when that has returned or its time is
	// over. It returns at once where nothing is left; the gate closes when it
	// returns or ctx (2 s) ends.
	DrainLate(ctx context.Context)
}

// HangingThread is the name (PR_SET_NAME) of threads that hang in a call of the
// kernel during a freeze, for as long as it lasts. Such a thread runs nothing
// inside seal.Do and has had a signal since it last did, so that its signal stack
// holds no key; the erasure does not wait for it.
const HangingThread = "byokd-hanging"

// Observer receives measurements. Calls come from Run and must return at once;
// they need not be safe for concurrent use among themselves for one guard.
type Observer interface {
	// Probed reports one finished probe: Enabled and "", or what the failure meant.
	Probed(state KeyState, reason Reason, took time.Duration)
	// Transitioned reports each change of the gate.
	Transitioned(t Transition)
	// Froze reports a freeze when the gate is closed: no plaintext leaves after it. took
	// counts from the first refusal (or the end of the lease), as the promise does.
	Froze(t Transition, took time.Duration)
	// Erased reports that the keys of an ended epoch are gone; took counts from the same
	// moment.
	Erased(epoch uint64, took time.Duration)
	// Thawed reports an opening: took counts from the first success after the refusals.
	Thawed(t Transition, took time.Duration)
}

// AuditEvent is the kind of an AuditRecord.
type AuditEvent string

// The audit events.
const (
	AuditUnwrap  AuditEvent = "unwrap"  // a wrapped key was decrypted
	AuditCreate  AuditEvent = "create"  // a data key or probe was made
	AuditRefusal AuditEvent = "refusal" // KMS refused (first of a kind, then once a minute)
	AuditOutage  AuditEvent = "outage"  // KMS became unreachable, the lease runs
	AuditRecover AuditEvent = "recover" // KMS answers again before the lease ended
	AuditFreeze  AuditEvent = "freeze"  // the gate is closed
	AuditErase   AuditEvent = "erase"   // the keys of the ended epoch are gone from memory
	AuditThaw    AuditEvent = "thaw"    // the gate is open
	AuditRotate  AuditEvent = "rotate"  // KMS has new key material for new ciphertexts; nothing changes for the old
	AuditStop    AuditEvent = "stop"    // the guard ended
	AuditRewrap  AuditEvent = "rewrap"  // a wrapped key got a form under another KMS key

	AuditOperatorFreeze AuditEvent = "operator_freeze" // an operator asked for a freeze, or it is carried out late
	AuditOperatorThaw   AuditEvent = "operator_thaw"   // an operator asked for a thaw

	AuditLost AuditEvent = "lost" // records could not be written and are missing
)

// AuditEvents lists every event, for the documentation of the schema.
func AuditEvents() []AuditEvent {
	return []AuditEvent{AuditUnwrap, AuditCreate, AuditRefusal, AuditOutage, AuditRecover, AuditFreeze, AuditErase,
		AuditThaw, AuditRotate, AuditStop, AuditRewrap, AuditOperatorFreeze, AuditOperatorThaw, AuditLost}
}

// AuditRecord is one line of the audit log.
type AuditRecord struct {
	Time      time.Time         `json:"time"`
	Event     AuditEvent        `json:"event"`
	Guard     string            `json:"guard"`
	KeyARN    string            `json:"keyArn"`
	Key       KeyState          `json:"key"`
	Gate      GateState         `json:"gate"`
	Epoch     uint64            `json:"epoch"`
	Operation string            `json:"operation,omitempty"` // of KMS, as CloudTrail names it
	Reason    Reason            `json:"reason,omitempty"`
	RequestID string            `json:"requestId,omitempty"`
	DataKey   string            `json:"dataKey,omitempty"` // id of the data or root key concerned
	Binding   map[string]string `json:"encryptionContext,omitempty"`
	TookMS    float64           `json:"tookMs,omitempty"`
	Count     int               `json:"count,omitempty"` // refusals since the last record; records lost
	Detail    string            `json:"detail,omitempty"`
}
