package inject

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// warnings tells what of the pod will hurt when its key is away. The text names the container, the consequence and
// what to do.
func (m *mutation) warnings() (all []Warning) {
	inDataPath := false
	for _, c := range m.others() {
		mount, mounts := m.dataMount(c.Container)
		if mounts {
			all = append(all, m.probeWarnings(c.Container)...)
			inDataPath = inDataPath || m.coversDataPath(c.Container)
			if mount.SubPath != "" && m.options.mode == ModeCSI || mount.SubPathExpr != "" {
				all = append(all, warn(ReasonSubPath, "container %s: kubelet looks subPath up in the encrypted filesystem; while frozen, a restart of the container waits there", c.Name))
			}
		}
		if c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged {
			all = append(all, warn(ReasonPrivileged, "container %s is privileged: it can reach the node's disks, past byokd", c.Name))
		}
		for _, v := range m.spec.Volumes {
			if v.PersistentVolumeClaim != nil && v.Name != m.options.volume && slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name }) {
				all = append(all, warn(ReasonPlainVolume, "container %s: what it writes to the volume %s stays plain; byokd seals %s only", c.Name, v.Name, m.options.volume))
			}
		}
	}
	if len(m.options.profile.DataPaths) > 0 && !inDataPath {
		all = append(all, warn(ReasonDataPath, "no container mounts the volume %s where this kind of workload keeps its data (%s): is that set elsewhere?",
			m.options.volume, strings.Join(m.options.profile.DataPaths, ", ")))
	}
	return all
}

// dataMount is the container's mount of the sealed volume, before or after it was replaced.
func (m *mutation) dataMount(c *corev1.Container) (corev1.VolumeMount, bool) {
	at := slices.IndexFunc(c.VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == m.options.volume || v.Name == MountVolume })
	if at < 0 {
		return corev1.VolumeMount{}, false
	}
	return c.VolumeMounts[at], true
}

// coversDataPath tells whether the container mounts the volume at, or above, a place where its kind of workload keeps data.
func (m *mutation) coversDataPath(c *corev1.Container) bool {
	for _, mount := range c.VolumeMounts {
		if mount.Name != m.options.volume && mount.Name != MountVolume {
			continue
		}
		for _, path := range m.options.profile.DataPaths {
			if strings.HasPrefix(path+"/", strings.TrimSuffix(mount.MountPath, "/")+"/") {
				return true
			}
		}
	}
	return false
}

// probeWarnings looks at probes and hooks that would fail, or wait, while the disk hangs.
func (m *mutation) probeWarnings(c *corev1.Container) (all []Warning) {
	if p := c.LivenessProbe; p != nil && p.TCPSocket == nil {
		all = append(all, warn(ReasonLivenessProbe, "container %s: if its livenessProbe touches the disk, kubelet kills it %d s after a freeze; %s",
			c.Name, duration(p), m.options.profile.LivenessAdvice))
	}
	if p := c.StartupProbe; p != nil && p.TCPSocket == nil {
		all = append(all, warn(ReasonStartupProbe, "container %s: a freeze during its start kills it when startupProbe fails for %d s; give it more time", c.Name, duration(p)))
	}
	if c.Lifecycle != nil && c.Lifecycle.PreStop != nil && c.Lifecycle.PreStop.Sleep == nil {
		all = append(all, warn(ReasonPreStop, "container %s: if its preStop hook touches the disk, deleting a frozen pod takes its whole grace period", c.Name))
	}
	return all
}

// duration is for how many seconds a probe has to fail.
func duration(p *corev1.Probe) int64 {
	period, failures := p.PeriodSeconds, p.FailureThreshold
	if period == 0 {
		period = 10
	}
	if failures == 0 {
		failures = 3
	}
	return int64(period) * int64(failures)
}

// WarnOfService looks at the headless service that gives the pods their names.
func WarnOfService(s *corev1.Service) []Warning {
	if s.Spec.ClusterIP != corev1.ClusterIPNone || s.Spec.PublishNotReadyAddresses {
		return nil
	}
	return []Warning{warn(ReasonHeadlessService,
		"service %s: a frozen pod is not ready and loses its DNS name, and with it its peers; set publishNotReadyAddresses: true", s.Name)}
}
