package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Workers turns the ends of byokd's worker processes into series. It exists where a keeper starts them.
type Workers struct {
	recovery prometheus.Gauge
	refused  prometheus.Counter
}

// NewWorkers registers the series. restarts is how often a worker had to be started again so far, by cause; it
// does not change while this worker lives.
func (r *Registry) NewWorkers(restarts map[string]uint64) *Workers {
	ends := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "byokd_worker_restarts_total",
		Help: "Workers that the keeper has started again since byokd run, by what ended the one before: killed, oom, fault or upgraded.",
	}, []string{"cause"})
	for cause, n := range restarts {
		ends.WithLabelValues(cause).Add(float64(n))
	}
	w := &Workers{
		recovery: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "byokd_worker_recovery_seconds",
			Help: "Time from the end of the worker before to the moment this one served its mount, key in hand; 0 for the first.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "byokd_worker_refused_requests_total",
			Help: "Requests answered with EIO because they had ended the worker by a fault each time they were served.",
		}),
	}
	r.prom.MustRegister(ends, w.recovery, w.refused)
	return w
}

// Recovered tells how long the mount was not served.
func (w *Workers) Recovered(took time.Duration) { w.recovery.Set(took.Seconds()) }

// Refused tells of a request that was given up.
func (w *Workers) Refused() { w.refused.Inc() }
