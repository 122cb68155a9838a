package inject

import (
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// checkNode denies pods that reach the node, or into the sidecar, and so past it.
func (m *mutation) checkNode() error {
	s := m.spec
	switch {
	case s.OS != nil && s.OS.Name == corev1.Windows:
		return deny(ReasonWindows, "byokd mounts by FUSE, which Windows nodes have not")
	case s.HostNetwork:
		return deny(ReasonHostAccess, "hostNetwork: byokd's S3 endpoint, on the loopback address, would be open to everything on the node")
	case s.HostPID:
		return deny(ReasonHostAccess, "hostPID: the sealed claim could be reached through /proc of byokd")
	case s.ShareProcessNamespace != nil && *s.ShareProcessNamespace:
		return deny(ReasonSharedProcesses, "shareProcessNamespace: the sealed claim could be reached through /proc of byokd")
	case s.HostUsers != nil && !*s.HostUsers:
		return deny(ReasonUserNamespace, "hostUsers: false: the encrypted filesystem cannot be mapped into a user namespace yet")
	}
	for _, v := range s.Volumes {
		if v.HostPath != nil && reachesClaims(v.HostPath.Path) {
			return deny(ReasonHostAccess, "the volume %s is %s of the node, through which the sealed claim could be reached", v.Name, v.HostPath.Path)
		}
	}
	return nil
}

// kubeletDir is where kubelet mounts claims, unless its --root-dir says otherwise.
const kubeletDir = "/var/lib/kubelet"

// reachesClaims tells whether a path of the node holds mounts of claims, or their devices.
func reachesClaims(hostPath string) bool {
	p := path.Clean("/" + hostPath)
	if p == "/" || strings.HasPrefix(kubeletDir+"/", p+"/") {
		return true
	}
	parts := strings.Split(p, "/")
	return parts[1] == "dev" || slices.Contains(parts, "kubelet")
}

// checkNames denies pods that have something else under one of our names.
func (m *mutation) checkNames() error {
	sidecars := 0
	for _, c := range m.spec.InitContainers {
		if c.Name == SidecarName {
			sidecars++
		}
	}
	taken := slices.ContainsFunc(m.spec.Containers, func(c corev1.Container) bool { return c.Name == SidecarName })
	if taken || sidecars > 1 || sidecars == 1 && !m.options.injectedBefore {
		return deny(ReasonNameTaken, "a container is called %s already; give it another name", SidecarName)
	}
	names := []string{ConfigVolume, RunVolume, MountVolume}
	if slices.Contains(names, m.options.volume) {
		return deny(ReasonAnnotation, "%s: %s is a volume of byokd's own; name the one that holds the data", AnnotationVolume, m.options.volume)
	}
	if m.options.injectedBefore {
		return nil
	}
	for _, v := range m.spec.Volumes {
		if slices.Contains(names, v.Name) {
			return deny(ReasonNameTaken, "a volume is called %s already; give it another name", v.Name)
		}
	}
	return nil
}

// checkVolume denies pods whose volume is not exactly one claim, of files, reached by one name.
func (m *mutation) checkVolume() error {
	name := m.options.volume
	at := slices.IndexFunc(m.spec.Volumes, func(v corev1.Volume) bool { return v.Name == name })
	template := slices.Contains(m.pod.ClaimTemplates, name) // the StatefulSet's claim then replaces a volume of the name
	if at < 0 && !template {
		return deny(ReasonNoVolume, "there is no volume %s to seal; the annotation %s names another", name, AnnotationVolume)
	}
	claim := m.pod.Name + "-" + name // of an ephemeral volume
	if !template {
		switch v := m.spec.Volumes[at]; {
		case v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly:
			return deny(ReasonVolumeKind, "the volume %s is read-only; byokd has to write its claim", name)
		case v.PersistentVolumeClaim != nil:
			claim = v.PersistentVolumeClaim.ClaimName
		case v.Ephemeral == nil:
			return deny(ReasonVolumeKind, "the volume %s is no persistentVolumeClaim (or ephemeral volume), and those alone can be sealed", name)
		}
	}
	for i, v := range m.spec.Volumes {
		if i != at && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim {
			return deny(ReasonSecondVolume, "the volume %s is the same claim as %s (%s), and would stay plain; mount %s instead", v.Name, name, claim, name)
		}
	}
	return nil
}

// checkContainers denies pods in which it is not clear who sees the plain files, or that reach what is the sidecar's.
func (m *mutation) checkContainers() error {
	var mounting []string
	for _, c := range m.others() {
		for _, device := range c.VolumeDevices {
			if device.Name == m.options.volume {
				return deny(ReasonBlockVolume, "the container %s uses the volume %s as a block device, which cannot be sealed", c.Name, device.Name)
			}
		}
		for _, mount := range c.VolumeMounts {
			switch mount.Name {
			case m.options.volume, MountVolume:
				mounting = append(mounting, c.Name)
			case ConfigVolume, RunVolume:
				return deny(ReasonContainers, "the container %s mounts the volume %s, which is byokd's own", c.Name, mount.Name)
			}
		}
	}
	for _, c := range m.spec.EphemeralContainers {
		if slices.ContainsFunc(c.VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == m.options.volume }) ||
			slices.ContainsFunc(c.VolumeDevices, func(v corev1.VolumeDevice) bool { return v.Name == m.options.volume }) {
			return deny(ReasonContainers, "the ephemeral container %s reaches the sealed volume %s", c.Name, m.options.volume)
		}
	}
	if len(mounting) == 0 {
		return deny(ReasonNotMounted, "no container mounts the volume %s; the annotation %s names another", m.options.volume, AnnotationVolume)
	}
	if m.options.containers == nil {
		return nil
	}
	for _, name := range m.options.containers {
		if !slices.Contains(mounting, name) {
			return deny(ReasonContainers, "%s: the container %q does not mount the volume %s", AnnotationContainers, name, m.options.volume)
		}
	}
	for _, name := range mounting {
		if !slices.Contains(m.options.containers, name) {
			return deny(ReasonContainers, "the container %s mounts the volume %s and is not named in %s: name it, or take its mount away", name, m.options.volume, AnnotationContainers)
		}
	}
	return nil
}
