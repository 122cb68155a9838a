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
	History   []Event          `json:"history"` // newest first
}

// State is the daemon's or a resource's state in one word.
type State string

// The states, best first.
const (
	StateReady    State = "ready"    // everything serves
	StateDegraded State = "degraded" // serves while KMS cannot be reached, until the lease ends
	StateWaiting  State = "waiting"  // not started yet: the key is not usable, or was not asked yet
	StateFrozen   State = "frozen"   // reads and writes hang until the key is back
	StateFinal    State = "final"    // frozen for good: the key is deleted
	StateStopping State = "stopping" // on the way out
	StateFailed   State = "failed"   // a resource broke for a reason other than its key
)

// worse orders states for the summary: a larger number hides a smaller one.
func (s State) worse(than State) bool {
	rank := map[State]int{StateReady: 0, StateDegraded: 1, StateWaiting: 2, StateFrozen: 3, StateFinal: 4, StateFailed: 5, StateStopping: 6}
	return rank[s] > rank[than]
}

// KeyReport is a guard's status with its messages.
type KeyReport struct {
	keyguard.Status
	Headline string  `json:"headline"`
	Cause    string  `json:"cause,omitempty"`
	NextStep string  `json:"nextStep,omitempty"`
	BoundSec float64 `json:"boundSeconds"` // Bound in seconds
}

// ResourceReport is one protected resource.
type ResourceReport struct {
	Name  string `json:"name"` // orchestration disk, documents
	Kind  string `json:"kind"` // volume or bucket
	Key   string `json:"key"`  // the guard it depends on
	State State  `json:"state"`
	Where string `json:"where"`            // mount point, or bucket below and above
	Note  string `json:"detail,omitempty"` // what it waits for, or how it failed
}

// Event is one entry of the history.
type Event struct {
	At     time.Time          `json:"at"`
	Guard  string             `json:"guard"`
	Gate   keyguard.GateState `json:"gate"`
	Key    keyguard.KeyState  `json:"key"`
	Reason keyguard.Reason    `json:"reason,omitempty"`
}

// keyReport adds the messages to a status.
func keyReport(s keyguard.Status) KeyReport {
	return KeyReport{Status: s, Headline: s.Headline(), Cause: s.Cause(), NextStep: s.NextStep(), BoundSec: s.Bound.Seconds()}
}

// stateOf translates a guard's two states into the one word.
func stateOf(s keyguard.Status) State {
	switch s.Gate {
	case keyguard.Open:
		return StateReady
	case keyguard.Degraded:
		return StateDegraded
	case keyguard.Starting:
		if s.Key == keyguard.Deleted {
			return StateFinal
		}
		return StateWaiting
	case keyguard.Stopping:
		return StateStopping
	}
	if s.Key == keyguard.Deleted {
		return StateFinal
	}
	return StateFrozen // Draining, Frozen, Thawing: nothing new passes
}
