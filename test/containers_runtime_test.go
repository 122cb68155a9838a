//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
)

// requireContainers skips where runc is missing or may not make containers, and
// fails where BYOKD_REQUIRE names it.
func requireContainers(t *testing.T) {
	t.Helper()
	requireFUSE(t)
	switch text, err := trialContainer(t, t.TempDir()); {
	case err == nil:
	case strings.Contains(os.Getenv("BYOKD_REQUIRE"), "runc"):
		t.Fatalf("BYOKD_REQUIRE names runc: %v: %s", err, text)
	default:
		t.Skipf("needs runc, and a machine that lets it make containers: %v: %s", err, text)
	}
}

// trialContainer runs the least of a container.
func trialContainer(t *testing.T, dir string) (text []byte, err error) {
	spec := &specs.Spec{Version: specs.Version, Process: &specs.Process{Cwd: "/", Args: []string{"/usr/bin/true"}, NoNewPrivileges: true}, Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
			Seccomp: readProfile(t, "../deploy/seccomp/byokd.json")}}
	if err := errors.Join(os.Mkdir(dir+"/rootfs", 0o755), addPrograms(spec, dir+"/rootfs")); err != nil {
		return nil, err
	}
	config, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(dir+"/config.json", config, 0o600)
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return exec.CommandContext(ctx, "runc", "--root", dir+"/runc", "run", "--bundle", dir, fmt.Sprintf("byokd-trial-%d", os.Getpid())).CombinedOutput()
}

// addPrograms puts this machine's programs into a container.
func addPrograms(spec *specs.Spec, rootfs string) error {
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/usr", Type: "bind", Source: "/usr", Options: []string{"rbind", "ro"}})
	for _, dir := range []string{"bin", "lib", "lib64", "sbin"} {
		if err := os.Symlink("usr/"+dir, rootfs+"/"+dir); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// capabilityNames are Linux' capabilities, by number.
var capabilityNames = strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
	NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
	SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
	WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

// capabilities are all that a privileged container has: those that root has here.
func capabilities(t *testing.T) (all []string) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, field, _ := strings.Cut(string(status), "CapBnd:\t")
	mask, err := strconv.ParseUint(strings.SplitN(field, "\n", 2)[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range capabilityNames {
		if mask&(1<<i) != 0 {
			all = append(all, "CAP_"+name)
		}
	}
	return all
}

// bundle makes the runtime's configuration of a container of the pod, as kubelet and
// containerd make it of the container's specification. The one difference: containers
// share the machine's network, in place of one of the pod.
func (p *pod) bundle(c *corev1.Container) (dir string) {
	t := p.s.t
	t.Helper()
	dir = filepath.Join(p.dir, c.Name)
	rootfs := dir + "/rootfs"
	if err := os.MkdirAll(rootfs+"/tmp", 0o755); err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{
		Version:  specs.Version,
		Process:  p.process(c),
		Root:     &specs.Root{Path: rootfs, Readonly: c.SecurityContext.ReadOnlyRootFilesystem != nil && *c.SecurityContext.ReadOnlyRootFilesystem},
		Hostname: "pod",
		Linux: &specs.Linux{
			CgroupsPath: fmt.Sprintf("/byokd-test-%d-pod%s-%s", os.Getpid(), testPodUID, c.Name), // kubelet's has the pod's uid, too
			Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}},
		},
	}
	system := []string{"nosuid", "noexec", "nodev", "ro"}
	if privileged(c) {
		system[3] = "rw"
		zero := uint32(0)
		fuse := specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, UID: &zero, GID: &zero}
		spec.Linux.Devices = []specs.LinuxDevice{fuse}
		spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
	} else {
		spec.Linux.MaskedPaths = []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"}
		spec.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
		spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}}
	}
	spec.Linux.Seccomp = p.seccomp(spec, c)
	spec.Mounts = []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: system},
	}
	p.image(c, spec)
	for _, m := range c.VolumeMounts {
		spec.Mounts = append(spec.Mounts, p.volumeMount(m, spec))
	}
	text, err := json.MarshalIndent(spec, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/config.json", text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func privileged(c *corev1.Container) bool {
	return c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
}

// process is what a container runs, and as whom.
func (p *pod) process(c *corev1.Container) *specs.Process {
	security := c.SecurityContext
	proc := &specs.Process{
		Cwd: "/", Args: slices.Concat(c.Command, c.Args), Env: []string{"PATH=/usr/sbin:/usr/bin"},
		NoNewPrivileges: security.AllowPrivilegeEscalation != nil && !*security.AllowPrivilegeEscalation,
		User:            specs.User{UID: uint32(*security.RunAsUser), GID: uint32(*security.RunAsGroup)},
		Capabilities:    &specs.LinuxCapabilities{},
	}
	if c.Command == nil { // the image's entry point
		proc.Args = append([]string{"/usr/bin/byokd"}, c.Args...)
	}
	if privileged(c) {
		all := capabilities(p.s.t)
		proc.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	}
	if s := p.spec.SecurityContext; s != nil && s.FSGroup != nil {
		proc.User.AdditionalGids = []uint32{uint32(*s.FSGroup)}
	}
	for _, e := range c.Env {
		proc.Env = append(proc.Env, e.Name+"="+e.Value)
	}
	return proc
}

// seccomp is the container's profile: the runtime's default, or byokd's own. Of that
// one, what is refused kills: refused softly, it might not be noticed.
func (p *pod) seccomp(spec *specs.Spec, c *corev1.Container) *specs.LinuxSeccomp {
	t := p.s.t
	t.Helper()
	if wanted := c.SecurityContext.SeccompProfile; p.localhostProfile != "" && (wanted != nil && wanted.Type == corev1.SeccompProfileTypeLocalhost || privileged(c)) {
		profile := readProfile(t, p.localhostProfile)
		profile.DefaultAction, profile.DefaultErrnoRet = specs.ActKillProcess, nil
		return profile
	}
	if privileged(c) {
		return nil
	}
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		t.Fatal(err)
	}
	return profile
}

// readProfile reads a seccomp profile as containerd does.
func readProfile(t *testing.T, file string) *specs.LinuxSeccomp {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var profile specs.LinuxSeccomp
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&profile); err != nil {
		t.Fatal(err)
	}
	return &profile
}

// image puts into a container what its image has: byokd's has byokd, the workload's
// is this machine's programs.
func (p *pod) image(c *corev1.Container, spec *specs.Spec) {
	if c.Image == sidecarImage {
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/usr/bin/byokd", Type: "bind", Source: p.s.byokd, Options: []string{"bind", "ro"}})
		return
	}
	if err := addPrograms(spec, spec.Root.Path); err != nil {
		p.s.t.Fatal(err)
	}
}

// volumeMount is a bind mount of a volume's directory.
func (p *pod) volumeMount(m corev1.VolumeMount, spec *specs.Spec) specs.Mount {
	source, known := p.volumes[m.Name]
	if !known {
		p.s.t.Fatalf("the pod has no volume %s", m.Name)
	}
	options := []string{"rbind", "rprivate"}
	if m.MountPropagation != nil {
		switch *m.MountPropagation {
		case corev1.MountPropagationHostToContainer:
			options[1] = "rslave"
			if spec.Linux.RootfsPropagation == "" {
				spec.Linux.RootfsPropagation = "rslave"
			}
		case corev1.MountPropagationBidirectional:
			options[1], spec.Linux.RootfsPropagation = "rshared", "rshared"
		}
	}
	if m.ReadOnly {
		options = append(options, "ro")
	}
	return specs.Mount{Destination: m.MountPath, Type: "bind", Source: filepath.Join(source, m.SubPath), Options: options}
}

// runc calls the runtime, and returns what it says.
func (p *pod) runc(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	text, err := exec.CommandContext(ctx, "runc", slices.Concat([]string{"--root", p.dir + "/runc"}, args)...).CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return strings.TrimSpace(string(text)), err
}
