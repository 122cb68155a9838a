package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// TrafficReport is what passes now, as a mean over the seconds before; all zero until there are two looks.
type TrafficReport struct {
	Over    float64     `json:"overSeconds"` // length of the span; 0 when nothing is known yet
	Disk    TrafficFlow `json:"disk"`        // through the mount; what the kernel's cache answers does not count
	Objects TrafficFlow `json:"objects"`     // through the S3 proxy
}

// TrafficFlow is the traffic of one front.
type TrafficFlow struct {
	InBytes    float64 `json:"inBytesPerSecond"`  // written by the workload
	OutBytes   float64 `json:"outBytesPerSecond"` // read by the workload
	Operations float64 `json:"operationsPerSecond"`
	Latency    float64 `json:"latencySeconds"` // mean of what has finished, waits for the key included
}

const (
	trafficSpan  = 10 * time.Second // traffic is a mean over about this
	trafficPause = time.Second      // between two looks
)

// trafficMeter turns the counters of a registry into rates. It looks only when it is asked, so that nobody
// who watches costs nothing. Safe for concurrent use.
type trafficMeter struct {
	gather prometheus.Gatherer
	now    func() time.Time

	mu    sync.Mutex
	looks []trafficLook // oldest first, trafficSpan apart at most; guarded by mu
}

// trafficLook is the counters at one moment.
type trafficLook struct {
	at            time.Time
	disk, objects trafficCounters
}

type trafficCounters struct{ in, out, operations, seconds float64 }

// report looks, unless somebody has within the last second.
func (m *trafficMeter) report() (TrafficReport, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if n := len(m.looks); n == 0 || now.Sub(m.looks[n-1].at) >= trafficPause {
		look, err := m.look(now)
		if err != nil {
			return TrafficReport{}, err
		}
		m.looks = append(m.looks, look)
	}
	for len(m.looks) > 2 && now.Sub(m.looks[1].at) >= trafficSpan {
		m.looks = m.looks[1:]
	}
	first, last := m.looks[0], m.looks[len(m.looks)-1]
	over := last.at.Sub(first.at).Seconds()
	if over <= 0 {
		return TrafficReport{}, nil
	}
	return TrafficReport{Over: over, Disk: last.disk.since(first.disk, over), Objects: last.objects.since(first.objects, over)}, nil
}

func (c trafficCounters) since(first trafficCounters, over float64) TrafficFlow {
	flow := TrafficFlow{InBytes: (c.in - first.in) / over, OutBytes: (c.out - first.out) / over, Operations: (c.operations - first.operations) / over}
	if n := c.operations - first.operations; n > 0 {
		flow.Latency = (c.seconds - first.seconds) / n
	}
	return flow
}

func (m *trafficMeter) look(now time.Time) (trafficLook, error) {
	families, err := m.gather.Gather()
	if err != nil {
		return trafficLook{}, err
	}
	sums := map[string]float64{} // by family, and by direction where there is one
	for _, f := range families {
		for _, metric := range f.GetMetric() {
			direction := ""
			for _, l := range metric.GetLabel() {
				if l.GetName() == "direction" {
					direction = " " + l.GetValue()
				}
			}
			sums[f.GetName()+direction] += metric.GetCounter().GetValue()
			sums[f.GetName()+" count"] += float64(metric.GetHistogram().GetSampleCount())
			sums[f.GetName()+" sum"] += metric.GetHistogram().GetSampleSum()
		}
	}
	return trafficLook{at: now,
		disk: trafficCounters{in: sums["byokd_fs_bytes_total write"], out: sums["byokd_fs_bytes_total read"],
			operations: sums["byokd_fs_operation_duration_seconds count"], seconds: sums["byokd_fs_operation_duration_seconds sum"]},
		objects: trafficCounters{in: sums["byokd_s3_bytes_total in"], out: sums["byokd_s3_bytes_total out"],
			operations: sums["byokd_s3_request_duration_seconds count"], seconds: sums["byokd_s3_request_duration_seconds sum"]},
	}, nil
}
