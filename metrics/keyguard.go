package metrics

import (
	"strings"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/byokd/byokd/keyguard"
)

// Watched is the view of a keyguard.Guard that this package needs.
type Watched interface {
	Status() keyguard.Status
	Changed() <-chan struct{}
}

var _ Watched = (*keyguard.Guard)(nil)

// Guards makes the observers of guards. One per registry.
type Guards struct {
	probes  *prometheus.CounterVec
	probe   *prometheus.HistogramVec
	freezes *prometheus.CounterVec
	thaws   *prometheus.CounterVec
	freeze  *prometheus.HistogramVec
	erase   *prometheus.HistogramVec
	thaw    *prometheus.HistogramVec
	frozen  *frozenTimes
}

// NewGuards registers the series that guards fill by observing.
func (r *Registry) NewGuards() *Guards {
	// A freeze is promised within 1 s and a thaw within 2 s: buckets stand at the promises.
	bounds := []float64{0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10}
	g := &Guards{
		probes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_probes_total",
			Help: "Probes of the key by what they said: the state, and the reason when it was not enabled.",
		}, []string{"guard", "state", "reason"}),
		probe: newHistogramVec("byokd_probe_duration_seconds", "Time that KMS took to answer a probe.",
			[]float64{1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1, 2.5, 5}, "guard"),
		freezes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_freezes_total", Help: "Freezes by the reason why the key may not be used.",
		}, []string{"guard", "reason"}),
		thaws: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_thaws_total", Help: "Openings of the gate: the first after start, and one after each freeze.",
		}, []string{"guard"}),
		freeze: newHistogramVec("byokd_freeze_duration_seconds",
			"Time from the first refusal (or the end of the lease) to the closed gate: no plain byte leaves after it.", bounds, "guard"),
		erase: newHistogramVec("byokd_erase_duration_seconds",
			"Time from the first refusal (or the end of the lease) to the last key gone from memory.", bounds, "guard"),
		thaw: newHistogramVec("byokd_thaw_duration_seconds",
			"Time from the first success of KMS to the open gate.", bounds, "guard"),
	}
	g.frozen = &frozenTimes{now: time.Now, of: map[string]*frozenTime{}}
	r.prom.MustRegister(g.probes, g.probe, g.freezes, g.thaws, g.freeze, g.erase, g.thaw, g.frozen)
	return g
}

// Observer returns the observer for the guard of that name, with its series in place from the start.
func (g *Guards) Observer(guard string) keyguard.Observer {
	g.thaws.WithLabelValues(guard)
	g.frozen.add(guard)
	for _, duration := range []*prometheus.HistogramVec{g.probe, g.freeze, g.erase, g.thaw} {
		duration.WithLabelValues(guard)
	}
	for _, reason := range []keyguard.Reason{keyguard.ReasonKeyDisabled, keyguard.ReasonPendingDeletion,
		keyguard.ReasonKeyDeleted, keyguard.ReasonAccessDenied, keyguard.ReasonOperator} {
		g.freezes.WithLabelValues(guard, reasonLabel(reason))
	}
	return &guardObserver{Guards: g, guard: guard}
}

// guardObserver implements keyguard.Observer. The vectors do their own locking.
type guardObserver struct {
	*Guards
	guard string
}

func (o *guardObserver) Probed(state keyguard.KeyState, reason keyguard.Reason, took time.Duration) {
	o.probes.WithLabelValues(o.guard, label(state.String()), reasonLabel(reason)).Inc()
	o.probe.WithLabelValues(o.guard).Observe(took.Seconds())
}

// Transitioned measures how long freezes last; states are read at the scrape.
func (o *guardObserver) Transitioned(t keyguard.Transition) { o.frozen.follow(o.guard, t) }

func (o *guardObserver) Froze(t keyguard.Transition, took time.Duration) {
	o.freezes.WithLabelValues(o.guard, reasonLabel(t.Reason)).Inc()
	o.freeze.WithLabelValues(o.guard).Observe(took.Seconds())
}

func (o *guardObserver) Erased(_ uint64, took time.Duration) {
	o.erase.WithLabelValues(o.guard).Observe(took.Seconds())
}

func (o *guardObserver) Thawed(_ keyguard.Transition, took time.Duration) {
	o.thaws.WithLabelValues(o.guard).Inc()
	o.thaw.WithLabelValues(o.guard).Observe(took.Seconds())
}

// label writes a state's name as a label value: PendingDeletion → pending_deletion.
func label(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

func reasonLabel(r keyguard.Reason) string {
	if r == keyguard.ReasonNone {
		return "none"
	}
	return string(r)
}

func guardDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, append([]string{"guard"}, labels...), nil)
}

var (
	gateState   = guardDesc("byokd_gate_state", "What the guard does, as a state set: 1 for the present state, 0 for the others.", "state")
	keyState    = guardDesc("byokd_key_state", "What KMS says about the key, as a state set: 1 for the present state, 0 for the others.", "state")
	keyInfo     = guardDesc("byokd_key_info", "Always 1; the key that the guard watches.", "key_arn", "multi_region", "origin")
	gateSince   = guardDesc("byokd_gate_state_since_timestamp_seconds", "When the gate last changed.")
	leaseExpiry = guardDesc("byokd_lease_expiry_timestamp_seconds", "Until when work passes if KMS stays unreachable; absent while closed.")
	lastSuccess = guardDesc("byokd_last_success_timestamp_seconds", "When KMS last granted the use of the key; absent before the first time.")
	deletionAt  = guardDesc("byokd_key_deletion_timestamp_seconds", "When KMS will delete the key and the data with it; absent unless scheduled.")
	materialEnd = guardDesc("byokd_key_material_expiry_timestamp_seconds", "When the key's imported material stops working; absent for keys that AWS made.")
	erased      = guardDesc("byokd_keys_erased", "1 when no key of this guard is in memory.")
	bound       = guardDesc("byokd_freeze_bound_seconds", "Longest time from a refusal by KMS to the last plain byte, as things stand.")
	heldGate    = guardDesc("byokd_operator_freeze", "1 when an operator has asked for a freeze: the gate is closed, or stays closed when the key is back.")
	pending     = guardDesc("byokd_operator_pending", "1 when the operator's request waits for the key.", "request")
	loadedKeys  = guardDesc("byokd_keys_loaded", "Root and data keys in memory that work may use: one for a volume, and those of a bucket's objects in use; 0 while closed.")
	stragglers  = guardDesc("byokd_stragglers", "Calls that still hold keys of an ended epoch, and so hold up their erasure.")
	waiting     = guardDesc("byokd_gate_waiting", "Calls that wait for the gate.")
)

// AddGuard registers the series that are read from g at each scrape.
func (r *Registry) AddGuard(g Watched) { r.prom.MustRegister(guardCollector{g}) }

// guardCollector reads a guard's status, so that no series lags behind it. It is unchecked (Describe
// sends nothing) because several guards share the same names with different label values.
type guardCollector struct{ guard Watched }

func (c guardCollector) Describe(chan<- *prometheus.Desc) {}

func (c guardCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.guard.Status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{s.Name}, labels...)...)
	}
	timestamp := func(d *prometheus.Desc, t time.Time) {
		if !t.IsZero() {
			gauge(d, float64(t.UnixMilli())/1000)
		}
	}
	for _, state := range keyguard.GateStates() {
		gauge(gateState, oneIf(s.Gate == state), label(state.String()))
	}
	for _, state := range keyguard.KeyStates() {
		gauge(keyState, oneIf(s.Key == state), label(state.String()))
	}
	multiRegion := "false"
	if s.MultiRegion {
		multiRegion = "true"
	}
	gauge(keyInfo, 1, s.KeyARN, multiRegion, s.Origin)
	timestamp(gateSince, s.Since)
	timestamp(leaseExpiry, s.LeaseUntil)
	timestamp(lastSuccess, s.LastSuccess)
	timestamp(deletionAt, s.DeletionDate)
	timestamp(materialEnd, s.MaterialExpires)
	gauge(erased, oneIf(s.Erased))
	gauge(bound, s.Bound.Seconds())
	gauge(heldGate, oneIf(s.OperatorFreeze))
	for _, intent := range []keyguard.Intent{keyguard.FreezeIntent, keyguard.ThawIntent} {
		gauge(pending, oneIf(s.OperatorPending == intent), intent.String())
	}
	gauge(loadedKeys, float64(s.LoadedKeys))
	gauge(stragglers, float64(s.Stragglers))
	gauge(waiting, float64(s.Waiting))
}
