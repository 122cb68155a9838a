package keyguard

import (
	"fmt"
	"time"
)

// KeyState is what KMS says about the key. It is a fact about the world, kept
// apart from GateState, which is what the guard does about it.
type KeyState uint8

// The key states. Unknown is only seen before the first answer.
const (
	Unknown         KeyState = iota // nothing heard yet
	Enabled                         // usable
	Disabled                        // disabled by its owner; data hangs until it is enabled
	PendingDeletion                 // scheduled for deletion; cancelling leaves it Disabled
	Deleted                         // gone, and the data with it
	AccessDenied                    // key policy, IAM policy or grant forbids us to use it
	Unavailable                     // imported material missing or expired, custom key store down
	Misconfigured                   // another key's ciphertext, wrong kind of key, wrong region
	Unreachable                     // no usable answer: outage, throttling, credentials, unknown fault
)

var keyStateNames = [...]string{"Unknown", "Enabled", "Disabled", "PendingDeletion", "Deleted",
	"AccessDenied", "Unavailable", "Misconfigured", "Unreachable"}

// KeyStates lists every key state, for tables and label sets.
func KeyStates() []KeyState {
	return []KeyState{Unknown, Enabled, Disabled, PendingDeletion, Deleted, AccessDenied,
		Unavailable, Misconfigured, Unreachable}
}

// String gives the stable name used in logs, JSON and metric labels.
func (s KeyState) String() string {
	if int(s) < len(keyStateNames) {
		return keyStateNames[s]
	}
	return fmt.Sprintf("KeyState(%d)", uint8(s))
}

// MarshalText gives the same name as String.
func (s KeyState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts the names that MarshalText writes.
func (s *KeyState) UnmarshalText(text []byte) error {
	for i, name := range keyStateNames {
		if name == string(text) {
			*s = KeyState(i)
			return nil
		}
	}
	return fmt.Errorf("keyguard: %q is not a key state", text)
}

// refuses reports whether KMS, having been reached, refused the key: the states
// on which the guard freezes without waiting for the lease.
func (s KeyState) refuses() bool {
	switch s {
	case Disabled, PendingDeletion, Deleted, AccessDenied, Unavailable:
		return true
	default:
		return false
	}
}

// GateState is what the guard does: whether work may use keys.
type GateState uint8

// The gate states.
const (
	Starting GateState = iota // never opened yet: waiting for the key, fail closed
	Open                      // everything passes
	Degraded                  // open, but KMS is unreachable and the lease is running
	Draining                  // class Drain passes, class Work waits
	Frozen                    // nothing passes
	Thawing                   // key is back, pinned roots are being unwrapped; nothing passes
	Stopping                  // Run is over: nothing passes, waiting calls end with ErrStopped
)

var gateStateNames = [...]string{"Starting", "Open", "Degraded", "Draining", "Frozen", "Thawing", "Stopping"}

// GateStates lists every gate state, for tables and label sets.
func GateStates() []GateState {
	return []GateState{Starting, Open, Degraded, Draining, Frozen, Thawing, Stopping}
}

// String gives the stable name used in logs, JSON and metric labels.
func (s GateState) String() string {
	if int(s) < len(gateStateNames) {
		return gateStateNames[s]
	}
	return fmt.Sprintf("GateState(%d)", uint8(s))
}

// MarshalText gives the same name as String.
func (s GateState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts the names that MarshalText writes.
func (s *GateState) UnmarshalText(text []byte) error {
	for i, name := range gateStateNames {
		if name == string(text) {
			*s = GateState(i)
			return nil
		}
	}
	return fmt.Errorf("keyguard: %q is not a gate state", text)
}

// Admits reports whether new work of class Work passes.
func (s GateState) Admits() bool { return s == Open || s == Degraded }

// Status is a snapshot of what the guard knows and does. It is a plain value;
// times are wall-clock times, zero where they do not apply.
type Status struct {
	Name   string    `json:"name"`   // the guard's name in the configuration
	KeyARN string    `json:"keyArn"` // the key it watches
	Key    KeyState  `json:"key"`    // last word from KMS
	Gate   GateState `json:"gate"`   // whether work passes
	Epoch  uint64    `json:"epoch"`  // grows with each opening; 0 before the first
	Reason Reason    `json:"reason"` // why Key is what it is, from a fixed list
	Detail string    `json:"detail"` // the same in KMS's own words; never key material

	Endpoint string `json:"endpoint,omitempty"` // address of KMS where that is not AWS' own; next steps name it
	Socket   string `json:"socket,omitempty"`   // control socket where commands must be told it; next steps name it
	Resumes  bool   `json:"resumes,omitempty"`  // a mount of an earlier run waits for the first opening

	Since        time.Time `json:"since"`        // when Gate last changed
	LastSuccess  time.Time `json:"lastSuccess"`  // start of the last call that KMS granted
	LeaseUntil   time.Time `json:"leaseUntil"`   // if KMS stays unreachable, work passes until then; zero while closed
	DeletionDate time.Time `json:"deletionDate"` // when KMS will delete the key (PendingDeletion)
	FrozenSince  time.Time `json:"frozenSince"`  // begin of the present freeze
	RequestID    string    `json:"requestId"`    // KMS request behind the last change of Key

	MissingAction string `json:"missingAction,omitempty"` // AccessDenied: the action, e.g. kms:Decrypt
	Principal     string `json:"principal,omitempty"`     // AccessDenied: role ARN that needs it
	Warning       string `json:"warning,omitempty"`       // something is wrong that does not close the gate

	OperatorFreeze  bool      `json:"operatorFreeze"`            // an operator wants the gate closed, whatever KMS says
	OperatorPending Intent    `json:"operatorPending,omitempty"` // asked for while the key is away: carried out when it is back
	OperatorBy      string    `json:"operatorBy,omitempty"`      // who asked
	OperatorSince   time.Time `json:"operatorSince"`             // and when

	MultiRegion     bool      `json:"multiRegion"`               // key is part of a multi-Region set
	Siblings        []string  `json:"siblings,omitempty"`        // ARNs of the other keys of that set; byokd never turns to them
	SiblingsEnabled []string  `json:"siblingsEnabled,omitempty"` // while refused: those of them that still decrypt the data
	Origin          string    `json:"origin,omitempty"`          // AWS_KMS, EXTERNAL, AWS_CLOUDHSM, EXTERNAL_KEY_STORE
	KeyMaterialID   string    `json:"keyMaterialId,omitempty"`   // changes with each rotation
	MaterialExpires time.Time `json:"materialExpires"`           // when imported key material stops working
	Erased          bool      `json:"erased"`                    // no key is referenced any more and the collector has run
	ErasureCertain  bool      `json:"erasureCertain"`            // built with runtimesecret: Erased covers every copy
	Stragglers      int       `json:"stragglers,omitempty"`      // passes of ended epochs still in use
	LoadedKeys      int       `json:"loadedKeys"`                // root and data keys in memory that work may use, at the time of Status()
	Waiting         int64     `json:"waiting"`                   // calls waiting to enter, at the time of Status()

	Bound time.Duration `json:"bound"` // longest time from a refusal by KMS to the last plaintext byte, as things stand
}

// Ready reports whether work passes now.
func (s Status) Ready() bool { return s.Gate.Admits() }
