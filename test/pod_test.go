//go:build linux

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/byokd/byokd/deploy/seccomp"
	"github.com/byokd/byokd/internal/inject"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// Containers of a pod as the webhook injects it, run by runc with the directories,
// mounts, users and limits that kubelet would give them.

const (
	sidecarImage = "ghcr.io/byokd/byokd:test"
	appUser      = 1001 // Camunda's
)

// pod is an injected pod on this machine.
type pod struct {
	s       *stack
	node    node // in mode csi
	mode    string
	dir     string
	spec    *corev1.PodSpec
	volumes map[string]string // directory of each volume
	app     *process
	begins  int // processes begun in it

	// localhostProfile is the file of byokd's own seccomp profile, "" for the runtime's
	// default. A privileged sidecar, which would have none, gets it, too.
	localhostProfile string
}

// inPod runs byokd as the sidecar of a pod.
func inPod(p *pod, mode string) option {
	return func(s *stack) {
		p.s, p.mode, p.dir = s, mode, s.dir+"/containers"
		p.inject()
		claims := map[string]string{"data": s.lower, inject.ConfigVolume: s.dir + "/config"}
		if mode == inject.ModeCSI {
			mountedByNode(&p.node)(s)
			prepare := s.prepare
			s.prepare = func() {
				p.shareKubelet(p.node.kubelet)
				prepare()
				if p.localhostProfile != "" {
					p.localhostProfile = filepath.Join(p.node.kubelet, "seccomp", seccomp.Path)
				}
				p.volumes[inject.RunVolume], p.volumes[inject.MountVolume] = p.node.run, p.node.target
			}
		} else {
			s.prepare = p.emptyDirs
		}
		p.volumes = claims
		s.launch, s.container = nil, p.startSidecar
	}
}

// inject has the webhook's mutation make the pod.
func (p *pod) inject() {
	t := p.s.t
	t.Helper()
	user, no, yes := int64(appUser), false, true
	given := &corev1.PodSpec{
		SecurityContext: &corev1.PodSecurityContext{FSGroup: &user},
		Volumes:         []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}}},
		Containers: []corev1.Container{{
			Name: "app", Image: "debian", Command: []string{"sh", "-c", `trap "exit 0" TERM; sleep infinity & wait`},
			VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}},
			SecurityContext: &corev1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, RunAsGroup: &user, AllowPrivilegeEscalation: &no,
				ReadOnlyRootFilesystem: &yes, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
		}},
	}
	annotations := map[string]string{inject.AnnotationMountMode: p.mode}
	settings := inject.Settings{Version: "test", Image: sidecarImage, CPU: resource.MustParse("100m"), Memory: resource.MustParse("384Mi")}
	if p.localhostProfile != "" {
		settings.LocalhostSeccomp = seccomp.Path
	}
	result, err := inject.Mutate(inject.Pod{Annotations: annotations, Spec: given}, settings)
	if err != nil {
		t.Fatal(err)
	}
	object, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}, "spec": given})
	if err == nil {
		object, err = inject.Apply(object, result.Patch)
	}
	var made corev1.Pod
	if err == nil {
		err = json.Unmarshal(object, &made)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.spec = &made.Spec
}

// shareKubelet makes a directory propagate mounts, as a node's root does.
func (p *pod) shareKubelet(dir string) {
	t := p.s.t
	t.Helper()
	err := errors.Join(os.MkdirAll(dir, 0o755), unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, ""))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// emptyDirs makes the pod's volumes in memory, without a node driver.
func (p *pod) emptyDirs() {
	t := p.s.t
	t.Helper()
	base := p.s.dir + "/kubelet"
	p.shareKubelet(base)
	for _, name := range []string{inject.RunVolume, inject.MountVolume} {
		dir := filepath.Join(base, name)
		if err := errors.Join(os.Mkdir(dir, 0o777), unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0777")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // EBUSY if a mount of byokd's were left in it, as it is for kubelet
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
		})
		p.volumes[name] = dir
	}
	p.s.mount = p.volumes[inject.MountVolume] + "/mount"
}

// configMap is the volume of configuration and Secret, readable by the pod's group.
func (p *pod) configMap() {
	t := p.s.t
	t.Helper()
	config, err := os.ReadFile(p.s.dir + "/byokd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(config), p.s.dir+"/s3-credentials", "/etc/byokd/s3-credentials")
	text = strings.Replace(text, "audit: {file:", "#", 1)
	dir := p.volumes[inject.ConfigVolume]
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"byokd.yaml": text, "s3-credentials": "byokd:byokd-secret\n",
		"aws-credentials": "[default]\naws_access_key_id = " + kmstest.TenantAccessKey + "\naws_secret_access_key = " + kmstest.TenantSecret + "\n"} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o640), os.Chown(path, 0, p.group()), os.Chmod(path, 0o440)); err != nil {
			t.Fatal(err)
		}
	}
}

// group is the pod's fsGroup.
func (p *pod) group() int { return int(*p.spec.SecurityContext.FSGroup) }

// sidecar is byokd's container.
func (p *pod) sidecar() *corev1.Container {
	c := p.spec.InitContainers[0].DeepCopy()
	for i := range c.Env { // the machine's network is not the pod's own
		if c.Env[i].Name == "BYOKD_ADMIN_LISTEN" {
			c.Env[i].Value = strings.TrimPrefix(p.s.admin, "http://")
		}
	}
	return c
}

// startSidecar starts byokd's container. The process is runc, which ends with it.
func (p *pod) startSidecar() *process {
	s := p.s
	p.configMap()
	// fsGroup, as kubelet applies it to a claim.
	if err := errors.Join(os.Chown(s.lower, 0, p.group()), os.Chmod(s.lower, 0o2770)); err != nil {
		s.t.Fatal(err)
	}
	for _, dir := range []string{filepath.Dir(s.dir), s.dir, filepath.Dir(s.byokd), s.byokd} {
		if err := os.Chmod(dir, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	started := s.start("the sidecar", nil, "runc", "--root", p.dir+"/runc", "run", "--bundle", p.bundle(p.sidecar()), inject.SidecarName)
	s.t.Cleanup(func() { p.remove(inject.SidecarName) })
	return started
}

// initOf is the number of a container's first process in this PID namespace, 0 while
// there is none.
func (p *pod) initOf(container string) int {
	text, err := p.runc("state", container)
	var state struct {
		Pid    int
		Status string
	}
	if err != nil || json.Unmarshal([]byte(text), &state) != nil || state.Status != "running" {
		return 0
	}
	return state.Pid
}

// startApp starts the workload's container, once the startup probe lets it.
func (p *pod) startApp() {
	s := p.s
	s.t.Helper()
	s.await("the startup probe", s.daemon, func() bool {
		_, healthy := p.probe("startup")
		return healthy
	})
	p.app = s.start("the workload", nil, "runc", "--root", p.dir+"/runc", "run", "--bundle", p.bundle(&p.spec.Containers[0]), "app")
	s.t.Cleanup(func() { p.remove("app") })
	s.await("the workload", p.app, func() bool {
		_, err := p.runc("exec", "app", "true")
		return err == nil
	})
}

// remove removes a container, if it is there.
func (p *pod) remove(name string) {
	if text, err := p.runc("delete", "--force", name); err != nil && !strings.Contains(text, "does not exist") {
		p.s.t.Errorf("delete %s: %v: %s", name, err, text)
	}
}

// shell runs a script in the workload's container.
func (p *pod) shell(script string) string {
	p.s.t.Helper()
	text, err := p.runc("exec", "--cwd", "/data", "app", "sh", "-ec", script)
	if err != nil {
		p.s.t.Errorf("%s: %v: %s", script, err, text)
	}
	return text
}

// begun is a process in the workload's container.
type begun struct {
	*process        // runc, which ends with it
	pidFile  string // its number in this PID namespace
}

// begin starts a script in the workload's container.
func (p *pod) begin(script string) begun {
	p.s.t.Helper()
	p.begins++
	pidFile := fmt.Sprintf("%s/pid-%d", p.dir, p.begins)
	return begun{p.s.start(script, nil, "runc", "--root", p.dir+"/runc", "exec", "--pid-file", pidFile, "--cwd", "/", "app", "sh", "-c", "exec "+script), pidFile}
}

// pidOf is the number of a process in this PID namespace.
func (p *pod) pidOf(b begun) (pid int) {
	p.s.t.Helper()
	p.s.await("a process of the workload", b.process, func() bool {
		text, err := os.ReadFile(b.pidFile)
		if err == nil {
			pid, err = strconv.Atoi(string(text))
		}
		return err == nil
	})
	return pid
}
