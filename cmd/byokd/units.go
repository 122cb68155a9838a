package main

import (
	"errors"
	"time"
)

// Duration is a length of time in the configuration, written with its unit (1s, 250ms, 1m30s). It knows
// whether it was given, so that an explicit 0s is not taken for the default.
type Duration struct {
	time.Duration
	given bool
}

var errDuration = errors.New("not a length of time: write a number and a unit, such as 500ms, 30s or 5m")

// parse reads text into d. Numbers without a unit and negative lengths are refused.
func (d *Duration) parse(text string) error {
	v, err := time.ParseDuration(text)
	if err != nil || text == "0" || v < 0 {
		return errDuration
	}
	*d = Duration{Duration: v, given: true}
	return nil
}

func (d *Duration) setDefault(v time.Duration) {
	if !d.given {
		*d = Duration{Duration: v}
	}
}
