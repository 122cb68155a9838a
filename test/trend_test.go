//go:build linux

package test

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// trend is what one quantity was, at equal distances.
type trend []float64

// climbs says whether a series goes up, by the test of Mann and Kendall: it asks
// of each pair of values which is the larger, so that single peaks weigh no more
// than any other value. z beyond 3 is chance once in 700 times where nothing climbs.
func (s trend) climbs() (z float64) {
	n := float64(len(s))
	sum := 0.0
	for i, a := range s {
		for _, b := range s[i+1:] {
			switch {
			case b > a:
				sum++
			case b < a:
				sum--
			}
		}
	}
	if sum == 0 {
		return 0
	}
	return (sum - math.Copysign(1, sum)) / math.Sqrt(n*(n-1)*(2*n+5)/18)
}

// gain is how much it goes up from its first value to its last, by the slope of
// Theil and Sen: the median of the slopes between all pairs.
func (s trend) gain() float64 {
	var slopes []float64
	for i, a := range s {
		for j, b := range s[i+1:] {
			slopes = append(slopes, (b-a)/float64(j+1))
		}
	}
	if len(slopes) == 0 {
		return 0
	}
	slices.Sort(slopes)
	return slopes[len(slopes)/2] * float64(len(s)-1)
}

// leaks says that a series goes up for certain, and by more than slack.
func (s trend) leaks(slack float64) bool {
	const certain = 3
	return s.climbs() > certain && s.gain() > slack
}

// TestTrend: a leak is seen below noise and single peaks, which are not taken for one.
func TestTrend(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		name   string
		length int
		value  func(i int) float64
		leaks  bool
	}{
		{"noise", 12, func(int) float64 { return 100 + 5*r.NormFloat64() }, false},
		{"long noise", 500, func(int) float64 { return 100 + 5*r.NormFloat64() }, false},
		{"peaks", 12, func(int) float64 { return 100 + 50*float64(r.IntN(8)/7) }, false},
		{"falls", 12, func(i int) float64 { return 100 - float64(i) }, false},
		{"a descriptor each round", 10, func(i int) float64 { return 100 + float64(i) }, true},
		{"one in ten rounds beside noise", 500, func(i int) float64 { return 100 + float64(i/10) + 5*r.NormFloat64() }, true},
		{"less than the slack", 500, func(i int) float64 { return 100 + float64(i)/500 }, false},
	} {
		seen, rounds := 0, max(5, 2000/c.length)
		for range rounds {
			s := make(trend, c.length)
			for i := range s {
				s[i] = c.value(i)
			}
			if s.leaks(4) {
				seen++
			}
		}
		if c.leaks && seen < rounds || !c.leaks && seen > 2 {
			t.Errorf("%s: a leak is seen %d times of %d", c.name, seen, rounds)
		}
	}
}
