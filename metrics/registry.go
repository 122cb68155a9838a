package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Registry is a registry of its own, so that several daemons can live in one test process.
type Registry struct{ prom *prometheus.Registry }

// NewRegistry returns a registry that knows the Go runtime, the process and how byokd was built.
// version is the program's version, erasure how keys are erased ("guaranteed" or "best_effort").
func NewRegistry(version, erasure string) *Registry {
	r := &Registry{prom: prometheus.NewRegistry()}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "byokd_build_info",
		Help: "Always 1; the version of byokd and whether this build can guarantee the erasure of keys.",
	}, []string{"version", "erasure"})
	build.WithLabelValues(version, erasure).Set(1)
	r.prom.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build)
	return r
}

// latencyBuckets cover a cached read (10 µs) to a fsync on a bad day (10 s), about three per decade.
func latencyBuckets() []float64 {
	return []float64{10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 1, 10}
}

// newHistogramVec makes a histogram in both forms: classic buckets, at the bounds that promises and alerts
// name, and native ones (a factor of 1.1 apart) for a Prometheus that asks for them. A native histogram that
// outgrows its buckets starts anew at most once an hour, else it gets coarser.
func newHistogramVec(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour}, labels)
}
