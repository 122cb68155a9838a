package main

import (
	"errors"
	"strconv"
	"strings"
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

// Size is a number of bytes in the configuration, written with its unit (64MiB). It knows whether it was
// given.
type Size struct {
	Bytes int64
	given bool
}

var errSize = errors.New("not a size: write a whole number and a unit, such as 512KiB, 64MiB or 1GiB")

// parse reads text into s.
func (s *Size) parse(text string) error {
	for unit, shift := range map[string]uint{"KiB": 10, "MiB": 20, "GiB": 30} {
		number, ok := strings.CutSuffix(text, unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 31)
		if err != nil {
			return errSize
		}
		*s = Size{Bytes: int64(n) << shift, given: true}
		return nil
	}
	return errSize
}

func (s *Size) setDefault(bytes int64) {
	if !s.given {
		*s = Size{Bytes: bytes}
	}
}

func (d *Duration) setDefault(v time.Duration) {
	if !d.given {
		*d = Duration{Duration: v}
	}
}
