package inject

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestLifeOfThePod looks at what decides, in kubelet, how an injected pod starts, is
// frozen, runs out of memory and ends. What it does then, test.TestPodUnprivileged shows
// in containers.
func TestLifeOfThePod(t *testing.T) {
	short, long := int64(5), int64(7200)
	for name, c := range map[string]struct {
		pod   *corev1.Pod
		grace int64
	}{
		"csi":                {podOf(), 60},
		"privileged":         {podOf(annotated(AnnotationMountMode, ModePrivileged)), 60},
		"zeebe":              {podOf(annotated(AnnotationProfile, "zeebe")), 90},
		"too short a grace":  {podOf(func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &short }), 60},
		"a grace of its own": {podOf(func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &long }), long},
	} {
		out, _ := mutated(t, c.pod, settings())
		sidecar := out.Spec.InitContainers[0]
		// It gates the others, and never gives up: the pod waits in Init for as long as the key is away.
		if s := sidecar.StartupProbe; s == nil || s.Exec == nil || s.FailureThreshold < 1<<30 {
			t.Errorf("%s: startup %+v", name, s)
		}
		if r := sidecar.ReadinessProbe; r == nil || r.HTTPGet == nil || r.HTTPGet.Path != "/readyz" || r.FailureThreshold != 1 {
			t.Errorf("%s: readiness %+v", name, r)
		}
		// Alive while frozen; a minute's patience for a loaded node.
		if l := sidecar.LivenessProbe; l == nil || l.HTTPGet == nil || l.HTTPGet.Path != "/livez" || l.PeriodSeconds*l.FailureThreshold < 60 {
			t.Errorf("%s: liveness %+v", name, l)
		}
		// kubelet runs a sidecar's preStop when the pod begins to end, which would take the disk from under the workload.
		if sidecar.Lifecycle != nil {
			t.Errorf("%s: a sidecar with %+v", name, sidecar.Lifecycle)
		}
		if got := out.Spec.TerminationGracePeriodSeconds; got == nil || *got != c.grace {
			t.Errorf("%s: grace %v, want %d", name, got, c.grace)
		}
		limit, request := sidecar.Resources.Limits.Memory(), sidecar.Resources.Requests.Memory()
		if limit.IsZero() || limit.Cmp(*request) != 0 {
			t.Errorf("%s: memory request %s, limit %s", name, request, limit)
		}
	}
}
