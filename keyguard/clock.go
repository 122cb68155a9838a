package keyguard

import "time"

// Clock tells the time. Timers are not part of it: they only wake Run, which
// then compares against Boot.
type Clock interface {
	// Now is the wall clock, for people.
	Now() time.Time
	// Boot is a monotonic reading that also runs while the machine is
	// suspended, so that a lease cannot outlive a suspended laptop or VM.
	Boot() time.Duration
}
