package metrics

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/byokd/byokd/internal/inject"
)

// Injector is the observer of the webhook (byokd inject). Safe for concurrent use.
type Injector struct {
	reviews, warnings *prometheus.CounterVec
	duration          prometheus.Histogram
	renewals          *prometheus.CounterVec
	server, authority atomic.Int64 // seconds; 0 before the first certificate
}

// NewInjector registers the series of the webhook.
func (r *Registry) NewInjector() *Injector {
	i := &Injector{
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "byokd_inject_reviews_total",
			Help: "Pods that the API server asked about, by what became of them, and why where they were denied."}, []string{"outcome", "reason"}),
		warnings: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "byokd_inject_warnings_total",
			Help: "Warnings about injected pods, by what will hurt when the key is away."}, []string{"reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "byokd_inject_review_duration_seconds",
			Help: "Time from a review to its answer; the API server waits 5 s.", Buckets: []float64{1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 1, 5}}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "byokd_inject_certificate_checks_total",
			Help: "Looks at the webhook's certificates and at the trust in them, by result."}, []string{"result"}),
	}
	for _, outcome := range inject.Outcomes() {
		if outcome != inject.OutcomeDenied {
			i.reviews.WithLabelValues(string(outcome), "")
		}
	}
	for _, result := range []string{"ok", "failed"} {
		i.renewals.WithLabelValues(result)
	}
	r.prom.MustRegister(i.reviews, i.warnings, i.duration, i.renewals,
		expiry("byokd_inject_certificate_expiry_timestamp_seconds", "When the webhook's certificate ends.", &i.server),
		expiry("byokd_inject_authority_expiry_timestamp_seconds", "When the authority of the webhook's certificate ends.", &i.authority))
	return i
}

func expiry(name, help string, at *atomic.Int64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(at.Load()) })
}

// Reviewed implements inject.Observer.
func (i *Injector) Reviewed(outcome inject.Outcome, reason inject.Reason, took time.Duration) {
	i.reviews.WithLabelValues(string(outcome), string(reason)).Inc()
	i.duration.Observe(took.Seconds())
}

// Warned implements inject.Observer.
func (i *Injector) Warned(reason inject.Reason) { i.warnings.WithLabelValues(string(reason)).Inc() }

// Certified implements inject.Observer.
func (i *Injector) Certified(server, authority time.Time) {
	i.server.Store(server.Unix())
	i.authority.Store(authority.Unix())
}

// Renewed implements inject.Observer.
func (i *Injector) Renewed(err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	i.renewals.WithLabelValues(result).Inc()
}

// Handler answers /metrics for programs without a panel.
func (r *Registry) Handler() http.Handler { return promhttp.HandlerFor(r.prom, promhttp.HandlerOpts{}) }
