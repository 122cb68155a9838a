package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Node is the observer of the node driver (byokd node). Safe for concurrent use.
type Node struct {
	registry *Registry
	calls    *prometheus.CounterVec
}

// NewNode registers the series of the node driver.
func (r *Registry) NewNode() *Node {
	n := &Node{registry: r, calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "byokd_node_volume_calls_total",
		Help: "Calls of kubelet to mount for a pod (publish) or to unmount (unpublish), by result."}, []string{"call", "result"})}
	for _, call := range []string{"publish", "unpublish"} {
		for _, result := range []string{"ok", "failed"} {
			n.calls.WithLabelValues(call, result)
		}
	}
	r.prom.MustRegister(n.calls)
	return n
}

// Published counts one call.
func (n *Node) Published(call string, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	n.calls.WithLabelValues(call, result).Inc()
}

// Follow shows how many mounts a sidecar serves, and how many wait for one.
func (n *Node) Follow(mounts func() (served, waiting int)) {
	gauge := func(state string, value func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "byokd_node_mounts", Help: "Mounts for pods of the node, by whether a sidecar serves them.",
			ConstLabels: prometheus.Labels{"state": state}}, func() float64 { return float64(value()) })
	}
	n.registry.prom.MustRegister(gauge("served", func() int { s, _ := mounts(); return s }), gauge("waiting", func() int { _, w := mounts(); return w }))
}
