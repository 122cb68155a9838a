package inject

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Settings are the injector's, the same for all pods.
type Settings struct {
	// Version of this program, written into AnnotationInjected.
	Version string
	// Image of the sidecar where the pod names none.
	Image string
	// Repositories of images that pods may name besides that of Image.
	Repositories []string
	// CPU request and Memory (request and limit) of the sidecar where the pod says nothing.
	CPU, Memory resource.Quantity
	// RestartAll makes the death of a sidecar in ModePrivileged restart the pod's containers in place. The API knows
	// that since Kubernetes 1.36.
	RestartAll bool
	// LocalhostSeccomp is the sidecar's seccomp profile in ModeCSI, a path below kubelet's directory of them; empty for
	// the runtime's default.
	LocalhostSeccomp string
}

// MinMemory is the least that a sidecar can work with: below, it would be killed under load.
const MinMemory = "128Mi"

// options are what a pod's annotations ask for, completed.
type options struct {
	profile        profile
	profileNamed   bool
	config         string
	volume         string
	containers     []string // nil: all that mount the volume
	mode           string
	image          string // "" when the pod names none
	cpu, memory    *resource.Quantity
	frozenReady    bool
	credentials    string
	settings       Settings
	injectedBefore bool
}

// annotations lists the known ones.
func annotations() []string {
	return []string{AnnotationConfig, AnnotationContainers, AnnotationCPU, AnnotationCredentials, AnnotationFrozenReadiness,
		AnnotationImage, AnnotationInjected, AnnotationMemory, AnnotationMountMode, AnnotationProfile, AnnotationVolume}
}

// Wanted tells whether a pod with these labels asks for byokd. A value that is neither true nor false is denied.
func Wanted(labels map[string]string) (bool, error) {
	value, given := labels[LabelInject]
	switch {
	case !given || value == "false":
		return false, nil
	case value == "true":
		return true, nil
	}
	return false, deny(ReasonLabel, "the label %s is %q: say \"true\" to have byokd injected, or \"false\"", LabelInject, value)
}

// parseOptions reads the annotations of a pod. Those of others are none of ours.
func parseOptions(given map[string]string, s Settings) (options, error) {
	known := annotations()
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if strings.HasPrefix(name, Prefix) && !slices.Contains(known, name) {
			return options{}, deny(ReasonUnknownAnnotation, "the annotation %s is unknown; known are %s", name, strings.Join(known, ", "))
		}
	}
	o := options{settings: s, config: "byokd", mode: ModeCSI}
	_, o.injectedBefore = given[AnnotationInjected]
	for _, read := range []func(map[string]string) error{o.readProfile, o.readNames, o.readContainers, o.readSwitches, o.readSizes} {
		if err := read(given); err != nil {
			return options{}, err
		}
	}
	return o, nil
}

func (o *options) readProfile(given map[string]string) (err error) {
	name, named := given[AnnotationProfile]
	if named && !slices.Contains(Profiles(), name) {
		return deny(ReasonAnnotation, "%s: there is no profile %q; known are %s", AnnotationProfile, name, strings.Join(Profiles(), ", "))
	}
	if !named {
		name = defaultProfile
	}
	o.profileNamed = named
	o.profile, err = loadProfile(name)
	o.volume = o.profile.Volume
	return err
}

// readNames reads the names of Kubernetes objects and parts of the pod.
func (o *options) readNames(given map[string]string) error {
	for _, n := range []struct {
		annotation string
		into       *string
		check      func(string) []string
	}{
		{AnnotationConfig, &o.config, validation.IsDNS1123Subdomain},
		{AnnotationCredentials, &o.credentials, validation.IsDNS1123Subdomain},
		{AnnotationVolume, &o.volume, validation.IsDNS1123Label},
	} {
		value, ok := given[n.annotation]
		if !ok {
			continue
		}
		if faults := n.check(value); len(faults) > 0 {
			return deny(ReasonAnnotation, "%s: %q is not a name: %s", n.annotation, value, faults[0])
		}
		*n.into = value
	}
	image, ok := given[AnnotationImage]
	if !ok {
		return nil
	}
	o.image = image
	return o.checkImage(AnnotationImage, image)
}

// checkImage refuses an image from elsewhere: whoever may write pods could else have any program given the claim, the
// role and the S3 credentials in byokd's name.
func (o *options) checkImage(where, image string) error {
	allowed := append([]string{repositoryOf(o.settings.Image)}, o.settings.Repositories...)
	if !slices.Contains(allowed, repositoryOf(image)) {
		return deny(ReasonImage, "%s: the image %q is not from %s; another repository has to be allowed at the injector (--allow-image-repository)",
			where, image, strings.Join(allowed, ", "))
	}
	return nil
}

// repositoryOf is an image without tag and digest.
func repositoryOf(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if colon := strings.LastIndexByte(image, ':'); colon > strings.LastIndexByte(image, '/') {
		image = image[:colon]
	}
	return image
}

func (o *options) readContainers(given map[string]string) error {
	value, ok := given[AnnotationContainers]
	if !ok {
		return nil
	}
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		if faults := validation.IsDNS1123Label(name); len(faults) > 0 {
			return deny(ReasonAnnotation, "%s: %q is not the name of a container: %s", AnnotationContainers, name, faults[0])
		}
		o.containers = append(o.containers, name)
	}
	return nil
}

func (o *options) readSwitches(given map[string]string) error {
	if mode, ok := given[AnnotationMountMode]; ok {
		if mode != ModeCSI && mode != ModePrivileged {
			return deny(ReasonAnnotation, "%s: %q is neither %s nor %s", AnnotationMountMode, mode, ModeCSI, ModePrivileged)
		}
		o.mode = mode
	}
	if readiness, ok := given[AnnotationFrozenReadiness]; ok {
		if readiness != "true" && readiness != "false" {
			return deny(ReasonAnnotation, "%s: %q is neither true nor false", AnnotationFrozenReadiness, readiness)
		}
		o.frozenReady = readiness == "false"
	}
	return nil
}

func (o *options) readSizes(given map[string]string) error {
	for annotation, into := range map[string]**resource.Quantity{AnnotationCPU: &o.cpu, AnnotationMemory: &o.memory} {
		value, ok := given[annotation]
		if !ok {
			continue
		}
		q, err := resource.ParseQuantity(value)
		if err != nil || q.Sign() <= 0 {
			return deny(ReasonAnnotation, "%s: %q is not a quantity above zero, such as 100m or 256Mi", annotation, value)
		}
		*into = &q
	}
	if least := resource.MustParse(MinMemory); o.memory != nil && o.memory.Cmp(least) < 0 {
		return deny(ReasonAnnotation, "%s: %s is less than the %s that byokd needs", AnnotationMemory, o.memory, MinMemory)
	}
	return nil
}

// GuaranteedCPU is what the sidecar of a pod of the class Guaranteed gets, unless the pod says otherwise: there, the request
// is the limit, and a freeze that has to flush under a small one would take too long.
const GuaranteedCPU = "1"

// resources returns what the sidecar gets: its memory is request and limit, its CPU a limit only in a pod of the class
// Guaranteed, which would lose that class otherwise.
func (o *options) resources(guaranteed bool) corev1.ResourceRequirements {
	cpu, memory := o.settings.CPU, o.settings.Memory
	if least := resource.MustParse(GuaranteedCPU); guaranteed && cpu.Cmp(least) < 0 {
		cpu = least
	}
	if o.cpu != nil {
		cpu = *o.cpu
	}
	if o.memory != nil {
		memory = *o.memory
	}
	r := corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: memory},
	}
	if guaranteed {
		r.Limits[corev1.ResourceCPU] = cpu
	}
	return r
}
