package keyguard

import "time"

// Fleet is what a guard knows of other processes that watch the same key. Its
// methods are safe for concurrent use and never block.
type Fleet interface {
	// Place tells how many processes there are and which of them this one is, from 0.
	Place() (rank, size int)
	// Hint tells the others that KMS refused the key: they look for themselves (Poke).
	Hint()
}

// probeInterval is the interval between probes while open. In a fleet it may be
// stretched, so that all members together ask about once per ProbeInterval; the
// status states the bound that follows.
func (r *runner) probeInterval() time.Duration {
	if r.o.Fleet == nil || r.o.StretchTo <= r.o.ProbeInterval {
		return r.o.ProbeInterval
	}
	_, size := r.o.Fleet.Place()
	return min(time.Duration(size)*r.o.ProbeInterval, r.o.StretchTo)
}

// staggered is the time until the next probe of a member of a fleet: each has its
// own moment in the interval, by the wall clock, which members share well enough.
// The way there shortens an interval, once, so that the interval stays an upper
// bound: members that were started together are apart from their second probe on.
func staggered(interval time.Duration, now time.Time, rank, size int) time.Duration {
	slot := interval * time.Duration(rank) / time.Duration(size)
	past := (time.Duration(now.UnixNano()) - slot) % interval // since our last moment
	if past > interval-interval/50 {
		return interval // a hair before our moment: as good as there
	}
	return interval - past
}

// hintFleet tells the fleet of a refusal that has just been heard.
func (r *runner) hintFleet(before machine, act action) {
	if r.o.Fleet == nil || !before.gate.Admits() {
		return
	}
	doubted := before.doubt == noDoubt && r.m.doubt != noDoubt
	if doubted || act&actFreeze != 0 && r.m.state.refuses() {
		r.o.Fleet.Hint()
	}
}
