package metrics

import (
	"strconv"

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
}

var _ objstore.Observer = (*Objects)(nil)

// NewObjects registers the series of the proxy. buckets are the names of all configured buckets: their
// series exist from the start, so that an alert can rely on them.
func (r *Registry) NewObjects(buckets []string) *Objects {
	o := &Objects{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_s3_requests_total",
			Help: "Finished S3 requests by bucket, operation and answer: ok, the S3 error code, client_gone or aborted.",
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
	o.requests.WithLabelValues(e.Bucket, op, answerLabel(e)).Inc()
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

// answerLabel names how a request ended, from a bounded set.
func answerLabel(e objstore.Event) string {
	switch {
	case e.Code != "":
		return e.Code
	case e.Status == 0:
		return "aborted"
	case e.Status == 499:
		return "client_gone"
	case e.Status >= 400:
		return strconv.Itoa(e.Status)
	}
	return "ok"
}
