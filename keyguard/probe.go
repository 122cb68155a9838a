package keyguard

import (
	"context"
	"math/rand/v2"
	"time"
)

// The pacing of probes. Probes are started by the clock, not one after the
// other: a slow answer does not delay the next question, so KMS may be slower
// than the probe interval without being taken for down, and the bound on
// noticing a refusal is interval + one latency.
const (
	// openJitter only shortens the interval (to 85 … 100 %), so that the
	// interval stays an upper bound and pods started together drift apart.
	openJitter = 0.15
	// While closed or Degraded, probes are 480 … 800 ms apart whatever the
	// interval: 800 ms to notice, 300 ms to confirm (confirmPause) leave 900 ms
	// of the two seconds of a thaw for four round trips and for unwrapping.
	closedPause  = 800 * time.Millisecond
	closedJitter = 0.4
	// While KMS throttles, probes are 600 ms … 1 s apart: no faster than while
	// open, and still in time for the thaw.
	throttledPause = time.Second
	confirmPause   = 150 * time.Millisecond
	pokePause      = 100 * time.Millisecond // at most ten probes a second on request

	// A probe that got no answer after hedgeAfter is asked again in parallel: a
	// lost packet then costs 250 ms plus a latency, not another interval, and
	// with 500 ms of draining the promise (interval + 1 s) holds up to 250 ms
	// of latency. KMS answers in some 10 ms.
	hedgeAfter = 250 * time.Millisecond
	// An unwrap for a thaw is repeated later: it costs a connection of its own, and after
	// 800 ms to notice and 300 ms to confirm the two seconds still leave 400 ms for the answer.
	thawHedgeAfter = 500 * time.Millisecond
	// silentAfter without any answer is told as an outage (Degraded): within
	// the second that the status may lag behind.
	silentAfter = 800 * time.Millisecond
	// probeTimeout gives up on one call. It may be longer than the interval,
	// since calls overlap; answers that took longer than 3 s are not worth having.
	probeTimeout = 3 * time.Second
	// pokedProbes are the calls under way that may be there on request, beside those of the clock.
	pokedProbes = 4

	slowAnswer = time.Second // a granted call slower than this is told in the status
)

// maxProbes bounds the calls under way: to as many as there are when a silent network
// keeps each for probeTimeout, each asked again. With fewer, none would be left to notice
// that it is back: 17 at the default interval, 40 at the shortest.
func (o Options) maxProbes() int {
	pause := time.Duration((1 - openJitter) * float64(o.ProbeInterval))
	if o.ProbeInterval > closedPause {
		pause = time.Duration((1 - closedJitter) * float64(closedPause))
	}
	n := int(probeTimeout/pause) + 1
	if pause > hedgeAfter {
		n *= 2
	}
	return n + pokedProbes
}

// launchDue starts the probes that are due.
func (r *runner) launchDue(now instant) {
	switch {
	case now >= r.nextProbe:
		r.nextProbe = now + r.interval()
		r.hedgeAt = never
		if r.launch(now) && r.m.gate.Admits() {
			r.hedgeAt = now + hedgeAfter
		}
	case r.hedgeAt != never && now >= r.hedgeAt:
		r.hedgeAt = never
		r.launch(now)
	}
}

// interval is the jittered time until the next probe.
func (r *runner) interval() time.Duration {
	switch {
	case r.m.gate != Open && r.m.reason == ReasonThrottled:
		return jitter(throttledPause, closedJitter)
	case r.m.gate == Open && r.o.Fleet != nil:
		rank, size := r.o.Fleet.Place()
		return staggered(r.probeInterval(), r.o.Clock.Now(), rank, size)
	case r.m.gate == Open || r.o.ProbeInterval <= closedPause:
		return jitter(r.o.ProbeInterval, openJitter)
	default:
		return jitter(closedPause, closedJitter)
	}
}

// jitter takes up to share off d.
func jitter(d time.Duration, share float64) time.Duration {
	return d - time.Duration(rand.Float64()*share*float64(d))
}

func (r *runner) sooner(at instant) { r.nextProbe = min(r.nextProbe, at) }

// launch starts one probe, or the making of the probe ciphertext.
func (r *runner) launch(now instant) bool {
	ciphertext := r.ProbeCiphertext()
	if r.probes >= r.o.maxProbes() {
		return false
	}
	if kms, able := r.kms.(Reconnector); able && r.awaiting != never && now-r.awaiting >= hedgeAfter {
		kms.Reconnect()
	}
	r.probes++
	r.lastLaunch = now
	if r.awaiting == never {
		r.awaiting = now
	}
	r.wg.Go(func() {
		ctx, cancel := context.WithTimeout(r.calls, probeTimeout)
		defer cancel()
		obs := observation{kind: sawSuccess, started: r.o.Clock.Boot()}
		receipt, err := r.ask(ctx, ciphertext)
		obs.took = r.o.Clock.Boot() - obs.started
		obs.requestID, obs.err = receipt.RequestID, err
		if err != nil {
			obs.kind = sawFailure
		}
		r.send(event{kind: eventProbe, obs: obs})
	})
	return true
}

// ask makes the probe ciphertext if there is none yet, and has it decrypted.
func (r *runner) ask(ctx context.Context, ciphertext []byte) (Receipt, error) {
	if ciphertext == nil {
		made, receipt, err := r.kms.GenerateProbe(ctx, r.o.ProbeBinding)
		if err != nil {
			return receipt, err
		}
		r.audit(AuditRecord{Event: AuditCreate, Operation: "GenerateDataKeyWithoutPlaintext", RequestID: receipt.RequestID,
			Binding: r.o.ProbeBinding.Context(), Detail: "probe ciphertext"})
		ciphertext = r.keepProbe(made)
	}
	return r.kms.Probe(ctx, ciphertext, r.o.ProbeBinding)
}

// keepProbe makes the first probe ciphertext the one that is used and told.
func (r *runner) keepProbe(made []byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.probe) == 0 {
		r.probe = append([]byte(nil), made...)
	}
	return r.probe
}

// describe asks for an explanation, unless the answer to the last question may
// still be expected.
func (r *runner) describe() {
	if r.describes >= r.o.maxProbes() || r.describes > 0 && r.o.Clock.Boot()-r.described < hedgeAfter {
		return
	}
	r.describes++
	r.described = r.o.Clock.Boot()
	r.wg.Go(func() {
		ctx, cancel := context.WithTimeout(r.calls, probeTimeout)
		defer cancel()
		obs := observation{kind: sawDescription, started: r.o.Clock.Boot()}
		obs.desc, obs.err = r.kms.Describe(ctx)
		r.send(event{kind: eventDescribe, obs: obs})
	})
}

// probed takes the end of a probe. What it means is done before it is told.
func (r *runner) probed(o observation) error {
	r.probes--
	r.awaiting, r.hedgeAt = never, never
	err := r.apply(o)
	r.o.Observer.Probed(StateOf(o.err), ReasonOf(o.err), o.took)
	if o.err != nil {
		r.recordRefusal(o.err)
	} else if r.m.gate == Open {
		r.loadPins() // what could not be loaded when it was pinned
	}
	return err
}
