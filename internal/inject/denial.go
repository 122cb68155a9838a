package inject

import "fmt"

// Reason says in one word why a pod was denied or warned about, for metrics and Events. The set is fixed.
type Reason string

// Why a pod is denied.
const (
	ReasonLabel             Reason = "label"              // byokd.io/inject is neither true nor false
	ReasonUnknownAnnotation Reason = "unknown_annotation" // under our prefix
	ReasonAnnotation        Reason = "annotation"         // a value that makes no sense
	ReasonImage             Reason = "image"              // from a repository that is not allowed
	ReasonNoVolume          Reason = "no_volume"          // the volume to seal is not in the pod
	ReasonVolumeKind        Reason = "volume_kind"        // it is no claim
	ReasonBlockVolume       Reason = "block_volume"       // a container uses it as a device
	ReasonSecondVolume      Reason = "second_volume"      // another volume of the pod is the same claim
	ReasonNotMounted        Reason = "not_mounted"        // nobody mounts it
	ReasonContainers        Reason = "containers"         // who mounts it and who may differ
	ReasonNameTaken         Reason = "name_taken"         // something of the pod is called as ours
	ReasonHostAccess        Reason = "host_access"        // the pod reaches the node, and so the claim
	ReasonSharedProcesses   Reason = "shared_processes"   // its containers reach into the sidecar
	ReasonUserNamespace     Reason = "user_namespace"     // the mount cannot be mapped
	ReasonWindows           Reason = "windows"
	ReasonRequest           Reason = "request" // not an admission review of a pod
)

// Why a pod is warned about.
const (
	ReasonLivenessProbe   Reason = "liveness_probe"
	ReasonStartupProbe    Reason = "startup_probe"
	ReasonPreStop         Reason = "pre_stop"
	ReasonHeadlessService Reason = "headless_service"
	ReasonSubPath         Reason = "sub_path"
	ReasonPlainVolume     Reason = "plain_volume"
	ReasonDataPath        Reason = "data_path"
	ReasonPrivileged      Reason = "privileged_container"
	ReasonOrderedPods     Reason = "ordered_pods"
)

// Denial is a pod that cannot be injected as it is. Its text is for whoever wrote the pod.
type Denial struct {
	Reason Reason
	text   string
}

func (d *Denial) Error() string { return d.text }

func deny(reason Reason, format string, args ...any) *Denial {
	return &Denial{reason, fmt.Sprintf(format, args...)}
}

// Warning is something about a pod that will hurt when the key is away. At most warningLimit bytes.
type Warning struct {
	Reason Reason
	Text   string
}

// warningLimit is what the API server passes on of one warning.
const warningLimit = 256

func warn(reason Reason, format string, args ...any) Warning {
	text := fmt.Sprintf(format, args...)
	if len(text) > warningLimit {
		text = text[:warningLimit-3] + "..."
	}
	return Warning{reason, text}
}
