package inject

import (
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// sidecar puts the sidecar first in the list of init containers: those after it, and the application, start when its
// startup probe has passed.
func (m *mutation) sidecar() error {
	at := slices.IndexFunc(m.spec.InitContainers, func(c corev1.Container) bool { return c.Name == SidecarName })
	if at < 0 {
		want := m.ourSidecar()
		m.addPodResources(want.Resources)
		if len(m.spec.InitContainers) == 0 {
			m.do("add", "/spec/initContainers", []corev1.Container{want})
		} else {
			m.do("add", "/spec/initContainers/0", want)
		}
		return nil
	}
	has := m.spec.InitContainers[at]
	want, err := m.mergedSidecar(has)
	if err != nil {
		return err
	}
	if at > 0 {
		m.do("remove", fmt.Sprintf("/spec/initContainers/%d", at), nil)
		m.do("add", "/spec/initContainers/0", want)
	} else if !equality.Semantic.DeepEqual(has, want) {
		m.do("replace", "/spec/initContainers/0", want)
	}
	return nil
}

// ourSidecar is the sidecar of a pod that has none.
func (m *mutation) ourSidecar() corev1.Container {
	image := m.options.image
	if image == "" {
		image = m.options.settings.Image
	}
	always := corev1.ContainerRestartPolicyAlways
	c := corev1.Container{
		Name: SidecarName, Image: image, RestartPolicy: &always,
		Args:            []string{"run", "--config", configFile},
		Resources:       m.options.resources(guaranteed(m.spec)),
		VolumeMounts:    m.ourMounts(),
		Ports:           []corev1.ContainerPort{{Name: AdminPortName, ContainerPort: AdminPort, Protocol: corev1.ProtocolTCP}},
		SecurityContext: m.security(),
	}
	c.Env = m.environment(c.Resources)
	c.StartupProbe, c.ReadinessProbe, c.LivenessProbe = probes()
	if m.options.settings.RestartAll && m.options.mode == ModePrivileged {
		// The mount dies with the daemon that made it, so the other containers are started anew, after it. The node driver's
		// mounts survive, and a new daemon goes on serving them. 0 is a stop that was asked for.
		c.RestartPolicyRules = []corev1.ContainerRestartRule{{Action: corev1.ContainerRestartRuleActionRestartAllContainers,
			ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpNotIn, Values: []int32{0}}}}
	}
	return c
}

// mergedSidecar is the sidecar of a pod that was injected before, by an earlier pass or by `byokd render`. What others
// may have added stays: the image of a registry's mirror, variables and mounts of credentials, resources of an
// autoscaler. What makes it byokd's sidecar is put right.
func (m *mutation) mergedSidecar(has corev1.Container) (corev1.Container, error) {
	want := m.ourSidecar()
	if m.options.image == "" && has.Image != "" {
		if err := m.options.checkImage("the container "+SidecarName, has.Image); err != nil {
			return want, err
		}
		want.Image = has.Image
	}
	merged := *has.DeepCopy()
	merged.Image, merged.Command, merged.Args = want.Image, nil, want.Args
	merged.RestartPolicy, merged.Lifecycle = want.RestartPolicy, nil
	merged.SecurityContext = want.SecurityContext
	if want.RestartPolicyRules != nil {
		merged.RestartPolicyRules = want.RestartPolicyRules
	}
	if merged.Resources.Limits.Memory().IsZero() {
		merged.Resources = want.Resources
	}
	merged.Env = m.mergedEnvironment(merged.Env, merged.Resources)
	merged.VolumeMounts = mergedMounts(merged.VolumeMounts, want.VolumeMounts)
	if !slices.ContainsFunc(merged.Ports, func(p corev1.ContainerPort) bool { return p.ContainerPort == AdminPort && p.Name == AdminPortName }) {
		merged.Ports = append(merged.Ports, want.Ports...)
	}
	for _, p := range []struct{ has, want **corev1.Probe }{{&merged.StartupProbe, &want.StartupProbe},
		{&merged.ReadinessProbe, &want.ReadinessProbe}, {&merged.LivenessProbe, &want.LivenessProbe}} {
		if *p.has == nil || !equality.Semantic.DeepEqual((*p.has).Exec, (*p.want).Exec) || !samePlace((*p.has).HTTPGet, (*p.want).HTTPGet) {
			*p.has = *p.want
		}
	}
	return merged, nil
}

// samePlace compares where two probes ask; the API server fills the scheme in.
func samePlace(a, b *corev1.HTTPGetAction) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Path == b.Path && a.Port == b.Port && a.Host == b.Host
}

func (m *mutation) mergedEnvironment(has []corev1.EnvVar, resources corev1.ResourceRequirements) []corev1.EnvVar {
	merged := slices.Clone(has)
	for _, want := range m.environment(resources) {
		if at := slices.IndexFunc(merged, func(e corev1.EnvVar) bool { return e.Name == want.Name }); at >= 0 {
			merged[at] = want
		} else {
			merged = append(merged, want)
		}
	}
	return merged
}

// mergedMounts puts ours in the place of whatever was mounted at their paths.
func mergedMounts(has, ours []corev1.VolumeMount) (merged []corev1.VolumeMount) {
	missing := slices.Clone(ours)
	for _, mount := range has {
		at := slices.IndexFunc(ours, func(v corev1.VolumeMount) bool { return v.MountPath == mount.MountPath })
		if at < 0 {
			merged = append(merged, mount)
		} else if n := slices.IndexFunc(missing, func(v corev1.VolumeMount) bool { return v.MountPath == mount.MountPath }); n >= 0 {
			merged = append(merged, ours[at])
			missing = slices.Delete(missing, n, n+1)
		}
	}
	return append(merged, missing...)
}

// environment overrides what the pod decides and not the configuration.
func (m *mutation) environment(resources corev1.ResourceRequirements) []corev1.EnvVar {
	env := []corev1.EnvVar{{Name: "BYOKD_VOLUME_LOWER", Value: sealedPath}}
	if m.options.mode == ModePrivileged {
		env = append(env, corev1.EnvVar{Name: "BYOKD_VOLUME_MOUNT", Value: privilegedPath + "/" + mountSubPath})
	} else {
		env = append(env, corev1.EnvVar{Name: "BYOKD_VOLUME_MOUNT", Value: m.firstDataPath()}, // shown to people only
			corev1.EnvVar{Name: "BYOKD_VOLUME_MOUNT_SOCKET", Value: mountSocket})
	}
	if m.options.profile.Role != "" {
		env = append(env, corev1.EnvVar{Name: "BYOKD_VOLUME_ROLE", Value: m.options.profile.Role})
	}
	env = append(env,
		corev1.EnvVar{Name: "BYOKD_ADMIN_LISTEN", Value: ":" + strconv.Itoa(AdminPort)}, // kubelet and Prometheus ask from outside
		corev1.EnvVar{Name: "BYOKD_ADMIN_ALLOW_REMOTE", Value: "true"},
		corev1.EnvVar{Name: "BYOKD_ADMIN_SOCKET", Value: controlSocket})
	env = append(env,
		// Files of the ConfigMap and the Secret, where they are there: credentials for clusters without IRSA and Pod
		// Identity, and authorities of VPC endpoints and proxies (ca.crt) besides the public ones.
		corev1.EnvVar{Name: "AWS_SHARED_CREDENTIALS_FILE", Value: configPath + "/aws-credentials"},
		corev1.EnvVar{Name: "SSL_CERT_DIR", Value: configPath})
	if m.options.frozenReady {
		env = append(env, corev1.EnvVar{Name: "BYOKD_ADMIN_READY_WHILE_FROZEN", Value: "true"})
	}
	// The collector works harder when nine tenths are reached: a kill for lack of memory takes the mount along.
	limit := resources.Limits.Memory().Value()
	return append(env, corev1.EnvVar{Name: "GOMEMLIMIT", Value: strconv.FormatInt(limit/10*9, 10)})
}

// firstDataPath is where the workload sees the plain files.
func (m *mutation) firstDataPath() string {
	for i := range m.spec.Containers {
		if mount, ok := m.dataMount(&m.spec.Containers[i]); ok {
			return mount.MountPath
		}
	}
	for _, c := range m.others() {
		if mount, ok := m.dataMount(c.Container); ok {
			return mount.MountPath
		}
	}
	panic("checkContainers denies pods in which nobody mounts the volume")
}

func (m *mutation) ourMounts() []corev1.VolumeMount {
	mounts := []corev1.VolumeMount{
		{Name: ConfigVolume, MountPath: configPath, ReadOnly: true},
		{Name: RunVolume, MountPath: runPath},
		{Name: m.options.volume, MountPath: sealedPath},
	}
	if m.options.mode == ModePrivileged {
		both := corev1.MountPropagationBidirectional
		mounts = append(mounts, corev1.VolumeMount{Name: MountVolume, MountPath: privilegedPath, MountPropagation: &both})
	}
	return mounts
}

func (m *mutation) security() *corev1.SecurityContext {
	yes, no, root, id := true, false, int64(0), int64(sidecarID)
	if m.options.mode == ModePrivileged {
		// The API takes a Bidirectional mount from privileged containers only.
		return &corev1.SecurityContext{Privileged: &yes, RunAsUser: &root, RunAsGroup: &root, RunAsNonRoot: &no, ReadOnlyRootFilesystem: &yes}
	}
	profile := &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}
	if path := m.options.settings.LocalhostSeccomp; path != "" {
		profile = &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost, LocalhostProfile: &path}
	}
	return &corev1.SecurityContext{
		RunAsNonRoot: &yes, RunAsUser: &id, RunAsGroup: &id, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
		Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile: profile,
	}
}

// endless is as many failures as kubelet can count: with 2 s between them, a hundred years.
const endless = 1<<31 - 1

// probes are those of the sidecar.
func probes() (startup, readiness, liveness *corev1.Probe) {
	get := func(path string) corev1.ProbeHandler {
		return corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(AdminPort), Scheme: corev1.URISchemeHTTP}}
	}
	// Fails while the key cannot be used at the start, for as long as that takes: the pod waits in Init. A command,
	// because kubelet makes its words an Event of the pod, and of an http probe only the number 503.
	startup = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{program, "probe", "startup"}}},
		PeriodSeconds: 2, TimeoutSeconds: 5, SuccessThreshold: 1, FailureThreshold: endless}
	// One failure is enough: a frozen pod is not healthy.
	readiness = &corev1.Probe{ProbeHandler: get("/readyz"), PeriodSeconds: 2, TimeoutSeconds: 2, SuccessThreshold: 1, FailureThreshold: 1}
	// A minute: an overloaded node is no reason to take a mount away.
	liveness = &corev1.Probe{ProbeHandler: get("/livez"), PeriodSeconds: 10, TimeoutSeconds: 5, SuccessThreshold: 1, FailureThreshold: 6}
	return startup, readiness, liveness
}

// guaranteed tells whether kubelet puts the pod into the class Guaranteed: every container has limits of CPU and memory, and
// requests that equal them or are left out.
func guaranteed(spec *corev1.PodSpec) bool {
	if r := spec.Resources; r != nil && (len(r.Limits) > 0 || len(r.Requests) > 0) {
		return limited(*r) // they decide alone
	}
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for _, c := range list {
			if c.Name != SidecarName && !limited(c.Resources) {
				return false
			}
		}
	}
	return true
}

func limited(r corev1.ResourceRequirements) bool {
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		limit, ok := r.Limits[name]
		if !ok || limit.IsZero() {
			return false
		}
		if request, ok := r.Requests[name]; ok && request.Cmp(limit) != 0 {
			return false
		}
	}
	return true
}

// addPodResources adds the sidecar's to those that the pod has as a whole, so that the application keeps what it had.
func (m *mutation) addPodResources(sidecar corev1.ResourceRequirements) {
	if m.spec.Resources == nil {
		return
	}
	for _, part := range []struct {
		path      string
		has, more corev1.ResourceList
	}{
		{"/spec/resources/requests/", m.spec.Resources.Requests, sidecar.Requests},
		{"/spec/resources/limits/", m.spec.Resources.Limits, limitsFor(sidecar)},
	} {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			if has, ok := part.has[name]; ok {
				sum := has.DeepCopy()
				sum.Add(part.more[name])
				m.do("replace", part.path+string(name), sum)
			}
		}
	}
}

// limitsFor is what the sidecar may need of the pod's limits: of CPU, what it requests.
func limitsFor(sidecar corev1.ResourceRequirements) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: sidecar.Requests[corev1.ResourceCPU], corev1.ResourceMemory: sidecar.Limits[corev1.ResourceMemory]}
}
