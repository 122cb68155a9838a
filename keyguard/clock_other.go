//go:build !linux

package keyguard

import "time"

// systemClock outside Linux (where byokd runs only its offline tools) takes the
// wall clock, which at least moves during suspend.
type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) Boot() time.Duration { return time.Duration(time.Now().UnixNano()) }
