package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Operation is one step of a patch (RFC 6902).
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Result is what has to be done to a pod.
type Result struct {
	Patch    []Operation // empty when the pod is as it should be
	Warnings []Warning
}

// Pod is a pod, or a pod's template, with what is known around it.
type Pod struct {
	Annotations map[string]string
	Spec        *corev1.PodSpec
	// ClaimTemplates are names of volumes that a StatefulSet will add.
	ClaimTemplates []string
	// Name of the pod, where it has one already.
	Name string
}

// Mutate says how a pod becomes one with byokd. It changes nothing itself and asks nobody. The paths of the patch begin
// at the object that holds metadata and spec. The error is a *Denial; the label is not looked at (see Wanted).
func Mutate(pod Pod, s Settings) (Result, error) {
	o, err := parseOptions(pod.Annotations, s)
	if err != nil {
		return Result{}, err
	}
	m := mutation{pod: pod, spec: pod.Spec, options: o}
	for _, check := range []func() error{m.checkNode, m.checkNames, m.checkVolume, m.checkContainers} {
		if err := check(); err != nil {
			return Result{}, err
		}
	}
	m.mounts()
	m.volumes()
	m.podSettings()
	if err := m.sidecar(); err != nil {
		return Result{}, err
	}
	m.annotate()
	return Result{Patch: m.patch, Warnings: m.warnings()}, nil
}

// mutation is one pod on its way. spec is only read; patch is what will be done.
type mutation struct {
	pod     Pod
	spec    *corev1.PodSpec
	options options
	patch   []Operation
}

func (m *mutation) do(op, path string, value any) {
	m.patch = append(m.patch, Operation{op, path, value})
}

// set is add or replace, which are the same for a field, where the value differs.
func set[T any](m *mutation, path string, has, want T) {
	if !equality.Semantic.DeepEqual(has, want) {
		m.do("add", path, want)
	}
}

// place is a container of the pod and where it stands.
type place struct {
	*corev1.Container
	path string // of the container in the pod
}

// others are all containers but the sidecar.
func (m *mutation) others() (all []place) {
	for i := range m.spec.InitContainers {
		if c := &m.spec.InitContainers[i]; c.Name != SidecarName {
			all = append(all, place{c, fmt.Sprintf("/spec/initContainers/%d", i)})
		}
	}
	for i := range m.spec.Containers {
		all = append(all, place{&m.spec.Containers[i], fmt.Sprintf("/spec/containers/%d", i)})
	}
	return all
}

// mounts makes every mount of the sealed volume one of the encrypted filesystem.
func (m *mutation) mounts() {
	for _, c := range m.others() {
		for i, mount := range c.VolumeMounts {
			if mount.Name != m.options.volume {
				continue
			}
			path := fmt.Sprintf("%s/volumeMounts/%d", c.path, i)
			m.do("replace", path+"/name", MountVolume)
			// What is mounted after the container's start, when the node driver had to mount anew, has to arrive in it.
			propagation := corev1.MountPropagationHostToContainer
			set(m, path+"/mountPropagation", mount.MountPropagation, &propagation)
			if m.options.mode != ModePrivileged {
				continue
			}
			if mount.SubPathExpr != "" {
				m.do("replace", path+"/subPathExpr", mountSubPath+"/"+mount.SubPathExpr)
			} else {
				m.do("add", path+"/subPath", strings.TrimSuffix(mountSubPath+"/"+mount.SubPath, "/"))
			}
		}
	}
}

// volumes adds ours.
func (m *mutation) volumes() {
	for _, want := range m.ourVolumes() {
		at := slices.IndexFunc(m.spec.Volumes, func(v corev1.Volume) bool { return v.Name == want.Name })
		switch {
		case at >= 0:
			// Ours of an earlier pass, or checkNames had denied it. Defaults that the API server has filled in stay.
			if !sameVolume(m.spec.Volumes[at], want) {
				m.do("replace", fmt.Sprintf("/spec/volumes/%d", at), want)
			}
		case len(m.spec.Volumes) == 0 && !slices.ContainsFunc(m.patch, func(o Operation) bool { return o.Path == "/spec/volumes" }):
			m.do("add", "/spec/volumes", []corev1.Volume{want})
		default:
			m.do("add", "/spec/volumes/-", want)
		}
	}
}

func (m *mutation) ourVolumes() []corev1.Volume {
	readable := int32(0o440) // not by everybody: byokd refuses such credentials; by the pod's fsGroup
	sources := []corev1.VolumeProjection{{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: m.options.config}}}}
	if m.options.credentials != "" {
		sources = append(sources, corev1.VolumeProjection{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: m.options.credentials}}})
	}
	small := resource.MustParse("16Mi")
	// medium Memory, always: a disk emptyDir is removed file by file and without a look at mounts, so that kubelet would
	// delete the workload's data through a filesystem that is still mounted in it.
	memory := func() corev1.VolumeSource {
		return corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: &small}}
	}
	mount := memory()
	if m.options.mode == ModeCSI {
		mount = corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: CSIDriver,
			VolumeAttributes: map[string]string{"runVolume": RunVolume, "volume": m.options.volume}}}
	}
	return []corev1.Volume{
		{Name: ConfigVolume, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: sources, DefaultMode: &readable}}},
		{Name: RunVolume, VolumeSource: memory()},
		{Name: MountVolume, VolumeSource: mount},
	}
}

// sameVolume compares what we set, and no defaults.
func sameVolume(has, want corev1.Volume) bool {
	if has.CSI != nil && want.CSI != nil {
		return has.CSI.Driver == want.CSI.Driver && equality.Semantic.DeepEqual(has.CSI.VolumeAttributes, want.CSI.VolumeAttributes)
	}
	return equality.Semantic.DeepEqual(has.VolumeSource, want.VolumeSource)
}

// podSettings changes what belongs to the pod as a whole.
func (m *mutation) podSettings() {
	if grace := m.spec.TerminationGracePeriodSeconds; grace == nil || *grace < m.options.profile.TerminationGracePeriodSeconds {
		m.do("add", "/spec/terminationGracePeriodSeconds", m.options.profile.TerminationGracePeriodSeconds)
	}
	if m.options.mode == ModeCSI {
		// The claim has to be writable to a sidecar that is not root, and the credentials readable.
		switch security := m.spec.SecurityContext; {
		case security == nil:
			onChange, id := corev1.FSGroupChangeOnRootMismatch, int64(sidecarID)
			m.do("add", "/spec/securityContext", corev1.PodSecurityContext{FSGroup: &id, FSGroupChangePolicy: &onChange})
		case security.FSGroup == nil:
			m.do("add", "/spec/securityContext/fsGroup", int64(sidecarID))
			if security.FSGroupChangePolicy == nil {
				m.do("add", "/spec/securityContext/fsGroupChangePolicy", corev1.FSGroupChangeOnRootMismatch)
			}
		}
	}
}

// annotate notes the version. A sidecar that was there before keeps its own: its image does, too.
func (m *mutation) annotate() {
	switch {
	case m.options.injectedBefore:
	case len(m.pod.Annotations) == 0:
		m.do("add", "/metadata/annotations", map[string]string{AnnotationInjected: m.options.settings.Version})
	default:
		m.do("add", "/metadata/annotations/"+strings.ReplaceAll(AnnotationInjected, "/", "~1"), m.options.settings.Version)
	}
}
