package metrics

import (
	"time"

	"github.com/byokd/byokd/keyguard"
)

// Report is what /v1/status answers and `byokd status` reads. Fields are only ever added.
type Report struct {
	Version   string           `json:"version"`
	Cluster   string           `json:"cluster"`
	Time      time.Time        `json:"time"`
	State     State            `json:"state"`              // the worst of everything below
	Headline  string           `json:"headline"`           // one line for people
	Cause     string           `json:"cause,omitempty"`    // why, when not ready
	NextStep  string           `json:"nextStep,omitempty"` // what to do, when not ready
	Erasure   string           `json:"erasure"`            // guaranteed or best_effort
	Keys      []KeyReport      `json:"keys"`
	Resources []ResourceReport `json:"resources"`
	History   []Event          `json:"history"`        // newest first
	Role      string           `json:"role,omitempty"` // the IAM role that the key policies must allow, once AWS has told
	Traffic   TrafficReport    `json:"traffic"`
}

// State is the daemon's or a resource's state in one word.
type State string

// The states, best first.
const (
	StateReady    State = "ready"    // everything serves
	StateImpaired State = "impaired" // serves, but a resource is not well for a reason other than its key
	StateDegraded State = "degraded" // serves while KMS cannot be reached, until the lease ends
	StateWaiting  State = "waiting"  // not started yet: the key is not usable, or was not asked yet
	StateFrozen   State = "frozen"   // reads and writes hang until the key is back
	StateFinal    State = "final"    // frozen for good: the key is deleted
	StateStopping State = "stopping" // on the way out
	StateFailed   State = "failed"   // a resource does not serve for a reason other than its key
)

// States lists every state, best first.
func States() []State {
	return []State{StateReady, StateImpaired, StateDegraded, StateWaiting, StateFrozen, StateFinal, StateStopping, StateFailed}
}

// worse orders states for the summary: a larger number hides a smaller one.
func (s State) worse(than State) bool {
	rank := map[State]int{StateReady: 0, StateImpaired: 1, StateDegraded: 2, StateWaiting: 3, StateFrozen: 4, StateFinal: 5, StateFailed: 6, StateStopping: 7}
	return rank[s] > rank[than]
}

// KeyReport is what a guard knows and does, with its messages. Times that do not apply are left out.
type KeyReport struct {
	Name          string             `json:"name"`
	KeyARN        string             `json:"keyArn"`
	Key           keyguard.KeyState  `json:"key"`  // what KMS says
	Gate          keyguard.GateState `json:"gate"` // what the guard does
	Headline      string             `json:"headline"`
	Cause         string             `json:"cause,omitempty"`
	NextStep      string             `json:"nextStep,omitempty"`
	Warning       string             `json:"warning,omitempty"` // something is wrong that does not close the gate
	Reason        keyguard.Reason    `json:"reason,omitempty"`
	Detail        string             `json:"detail,omitempty"` // in KMS's own words
	RequestID     string             `json:"requestId,omitempty"`
	MissingAction string             `json:"missingAction,omitempty"` // AccessDenied: what is denied …
	Principal     string             `json:"principal,omitempty"`     // … and to whom
	Since         time.Time          `json:"since,omitzero"`          // when the gate last changed
	LastSuccess   time.Time          `json:"lastSuccess,omitzero"`
	LeaseUntil    time.Time          `json:"leaseUntil,omitzero"`   // if KMS stays unreachable
	DeletionDate  time.Time          `json:"deletionDate,omitzero"` // PendingDeletion
	FrozenSince   time.Time          `json:"frozenSince,omitzero"`
	Epoch         uint64             `json:"epoch"`
	Erased        bool               `json:"erased"`             // no key is in memory
	Operator      *OperatorReport    `json:"operator,omitempty"` // what an operator has asked for, while it matters
	Waiting       int64              `json:"waiting"`            // calls that wait for the gate
	BoundSeconds  float64            `json:"boundSeconds"`       // longest time from a refusal to the last plain byte, as things stand
	MultiRegion   bool               `json:"multiRegion"`
	Siblings      []string           `json:"siblings,omitempty"`        // the other keys of a multi-Region set
	SiblingsOn    []string           `json:"siblingsEnabled,omitempty"` // while refused: those that still decrypt the data
	Origin        string             `json:"origin,omitempty"`
	KeyMaterialID string             `json:"keyMaterialId,omitempty"`  // changes with each rotation
	MaterialEnds  time.Time          `json:"materialExpires,omitzero"` // when imported key material stops working
}

// OperatorReport is a freeze or thaw that an operator asked for.
type OperatorReport struct {
	Freeze  bool            `json:"freeze"`            // the gate is closed, or will stay closed, on request
	Pending keyguard.Intent `json:"pending,omitempty"` // recorded: freeze or thaw, carried out when the key is back
	By      string          `json:"by"`
	Since   time.Time       `json:"since"`
}

// ResourceReport is one protected resource.
type ResourceReport struct {
	Name  string `json:"name"` // orchestration disk, documents
	Kind  string `json:"kind"` // volume or bucket
	Key   string `json:"key"`  // the guard it depends on
	State State  `json:"state"`
	Where string `json:"where"`              // mount point, or bucket below and above
	Note  string `json:"detail,omitempty"`   // what it waits for, or how it failed
	Next  string `json:"nextStep,omitempty"` // what to do where its key is not to blame
	Facts []Fact `json:"facts,omitempty"`    // how it is sealed
}

// Fact is one thing worth knowing about a resource that does not change while it serves.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Event is one entry of the history.
type Event struct {
	At     time.Time          `json:"at"`
	Guard  string             `json:"guard"`
	Gate   keyguard.GateState `json:"gate"`
	Key    keyguard.KeyState  `json:"key"`
	Reason keyguard.Reason    `json:"reason,omitempty"`
}

func keyReport(s keyguard.Status) KeyReport {
	var operator *OperatorReport
	if s.OperatorFreeze || s.OperatorPending != keyguard.NoIntent {
		operator = &OperatorReport{Freeze: s.OperatorFreeze, Pending: s.OperatorPending, By: s.OperatorBy, Since: s.OperatorSince}
	}
	return KeyReport{Name: s.Name, KeyARN: s.KeyARN, Key: s.Key, Gate: s.Gate,
		Headline: s.Headline(), Cause: s.Cause(), NextStep: s.NextStep(), Warning: s.Warning,
		Reason: s.Reason, Detail: s.Detail, RequestID: s.RequestID, MissingAction: s.MissingAction, Principal: s.Principal,
		Since: s.Since, LastSuccess: s.LastSuccess, LeaseUntil: s.LeaseUntil, DeletionDate: s.DeletionDate, FrozenSince: s.FrozenSince,
		Epoch: s.Epoch, Erased: s.Erased, Operator: operator, Waiting: s.Waiting, BoundSeconds: s.Bound.Seconds(),
		MultiRegion: s.MultiRegion, Siblings: s.Siblings, SiblingsOn: s.SiblingsEnabled, Origin: s.Origin, KeyMaterialID: s.KeyMaterialID, MaterialEnds: s.MaterialExpires}
}

// stateOf translates a guard's two states into the one word.
func stateOf(gate keyguard.GateState, key keyguard.KeyState) State {
	switch {
	case gate == keyguard.Open:
		return StateReady
	case gate == keyguard.Degraded:
		return StateDegraded
	case gate == keyguard.Stopping:
		return StateStopping
	case key == keyguard.Deleted:
		return StateFinal
	case gate == keyguard.Starting:
		return StateWaiting
	}
	return StateFrozen // Draining, Frozen, Thawing: nothing new passes
}
