package inject

// Prefix of every label and annotation of byokd.
const Prefix = "byokd.io/"

// LabelInject, on a pod with the value "true", asks for byokd. "false" is the same as no label; every other value
// is denied.
const LabelInject = Prefix + "inject"

// Annotations of a pod. All are optional.
const (
	AnnotationProfile         = Prefix + "profile"            // name of a profile
	AnnotationConfig          = Prefix + "config"             // ConfigMap with the key byokd.yaml
	AnnotationVolume          = Prefix + "volume"             // name of the pod's volume to seal
	AnnotationContainers      = Prefix + "containers"         // who may mount the plain files
	AnnotationMountMode       = Prefix + "mount-mode"         // csi or privileged
	AnnotationImage           = Prefix + "image"              // image of the sidecar
	AnnotationCPU             = Prefix + "cpu"                // of the sidecar
	AnnotationMemory          = Prefix + "memory"             // of the sidecar, request and limit
	AnnotationFrozenReadiness = Prefix + "frozen-readiness"   // "false": ready while frozen, too
	AnnotationCredentials     = Prefix + "credentials-secret" // Secret whose keys become files in /etc/byokd
	AnnotationInjected        = Prefix + "injected"           // set by the mutation: the version that made it
)

// Names of what is put into pods. Policies (deploy/policies) and the node driver rely on them.
const (
	SidecarName   = "byokd"
	ConfigVolume  = "byokd-config"
	RunVolume     = "byokd-run"
	MountVolume   = "byokd-mount"
	AdminPortName = "byokd-admin"
	AdminPort     = 9180
	CSIDriver     = "csi.byokd.io"
)

// Mount modes: who mounts the encrypted filesystem.
const (
	ModeCSI        = "csi"        // the node driver; sidecar and pod need no privilege
	ModePrivileged = "privileged" // the sidecar, which is privileged for it
)

// Paths inside the sidecar.
const (
	sealedPath     = "/sealed"
	configPath     = "/etc/byokd"
	configFile     = configPath + "/byokd.yaml"
	runPath        = "/run/byokd"
	controlSocket  = runPath + "/control.sock"
	mountSocket    = runPath + "/mount.sock"
	privilegedPath = "/mnt/byokd"
	mountSubPath   = "mount" // in the Memory emptyDir of ModePrivileged: never the emptyDir's own root
	program        = "/usr/bin/byokd"
)

// sidecarID is the user and group of the sidecar in ModeCSI. It is the same for all pods: the sealed files belong to it, and
// a pod whose own user changes must still find them readable.
const sidecarID = 65532
