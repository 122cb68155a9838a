package metrics

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/byokd/byokd/objstore"
)

// Objects turns the S3 proxy's requests into series. It implements objstore.Observer.
type Objects struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	bytes    *prometheus.CounterVec
	waited   *prometheus.CounterVec
	held     *prometheus.GaugeVec
	tampered *prometheus.CounterVec
	upstream *prometheus.CounterVec
	codes    codeLabels
}

var _ objstore.Observer = (*Objects)(nil)

// NewObjects registers the series of the proxy. buckets are the names of all configured buckets: their
// series exist from the start, so that an alert can rely on them.
func (r *Registry) NewObjects(buckets []string) *Objects {
	o := &Objects{
		codes: codeLabels{known: map[string]bool{}},
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_requests_total",
			Help: "Finished S3 requests by bucket, operation and answer: ok, or the S3 error code; ClientLeft where the client left before its answer.",
		}, []string{"bucket", "op", "code"}),
		duration: newHistogramVec("byokd_s3_request_duration_seconds",
			"Time from a request's header to its last byte, including any wait for the key.",
			[]float64{1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1, 2.5, 10, 60}, "op"),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_bytes_total", Help: "Plain bytes taken from (in) and given to (out) clients.",
		}, []string{"bucket", "direction"}),
		waited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_held_seconds_total", Help: "Time that finished requests spent waiting for the key.",
		}, []string{"bucket"}),
		held: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "byokd_s3_held_requests", Help: "Requests that wait for the key now.",
		}, []string{"bucket"}),
		tampered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_tampered_total", Help: "Sealed objects or segments that failed authentication and were withheld.",
		}, []string{"bucket"}),
		upstream: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_upstream_failures_total", Help: "Requests that failed because the bucket below is not there, refuses byokd or cannot be reached.",
		}, []string{"bucket"}),
	}
	for _, b := range buckets {
		o.held.WithLabelValues(b)
		o.tampered.WithLabelValues(b)
		o.upstream.WithLabelValues(b)
		o.bytes.WithLabelValues(b, "in")
		o.bytes.WithLabelValues(b, "out")
		o.waited.WithLabelValues(b)
	}
	r.prom.MustRegister(o.requests, o.duration, o.bytes, o.waited, o.held, o.tampered, o.upstream)
	return o
}

// Done records one finished request.
func (o *Objects) Done(e objstore.Event) {
	op := string(e.Op)
	o.requests.WithLabelValues(e.Bucket, op, o.codes.of(e)).Inc()
	o.duration.WithLabelValues(op).Observe(e.Took.Seconds())
	if e.Bucket == "" {
		return
	}
	o.bytes.WithLabelValues(e.Bucket, "in").Add(float64(e.In))
	o.bytes.WithLabelValues(e.Bucket, "out").Add(float64(e.Out))
	o.waited.WithLabelValues(e.Bucket).Add(e.Held.Seconds())
	if e.UpstreamFailed {
		o.upstream.WithLabelValues(e.Bucket).Inc()
	}
}

// Held follows the number of requests that wait for the key.
func (o *Objects) Held(bucket string, delta int) { o.held.WithLabelValues(bucket).Add(float64(delta)) }

// Tampered counts one authentication failure.
func (o *Objects) Tampered(bucket string) { o.tampered.WithLabelValues(bucket).Inc() }

// maxCodes bounds the codes that are told apart. S3 has some 150, and what the upstream calls an error is not byokd's to say.
const maxCodes = 200

// codeLabels makes labels of how requests ended. Safe for concurrent use.
type codeLabels struct {
	mu    sync.Mutex
	known map[string]bool // guarded by mu; at most maxCodes
}

// of names how a request ended.
func (l *codeLabels) of(e objstore.Event) string {
	if e.Code == "" {
		return "ok"
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.known[e.Code] {
		if len(l.known) >= maxCodes {
			return "other"
		}
		l.known[e.Code] = true
	}
	return e.Code
}
