package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/byokd/byokd/keyguard"
)

var frozenSeconds = guardDesc("byokd_frozen_seconds_total", "Time that the gate was closed by freezes, the present one included; waiting for the first opening does not count.")

// frozenTimes adds up how long each guard was frozen. It is read at the scrape, so that it grows during a
// freeze and not only after it. Safe for concurrent use.
type frozenTimes struct {
	now func() time.Time

	mu sync.Mutex
	of map[string]*frozenTime // by guard; guarded by mu
}

type frozenTime struct {
	past  time.Duration // freezes that are over
	since time.Time     // begin of the present one; zero when there is none
}

func (f *frozenTimes) add(guard string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.of[guard] = &frozenTime{}
}

// follow takes part in a transition of a guard that was added.
func (f *frozenTimes) follow(guard string, t keyguard.Transition) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one, now := f.of[guard], f.now()
	switch {
	case t.From.Admits() && !t.To.Admits() && t.To != keyguard.Stopping:
		one.since = now
	case !one.since.IsZero() && (t.To.Admits() || t.To == keyguard.Stopping):
		one.past += now.Sub(one.since)
		one.since = time.Time{}
	}
}

func (f *frozenTimes) Describe(ch chan<- *prometheus.Desc) { ch <- frozenSeconds }

func (f *frozenTimes) Collect(ch chan<- prometheus.Metric) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	for guard, one := range f.of {
		total := one.past
		if !one.since.IsZero() {
			total += now.Sub(one.since)
		}
		ch <- prometheus.MustNewConstMetric(frozenSeconds, prometheus.CounterValue, total.Seconds(), guard)
	}
}
