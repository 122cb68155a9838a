//go:build linux

package test

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/inject"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// freeze has the key disabled and waits until byokd is frozen.
func (p *pod) freeze() {
	p.s.key(kmstest.KeyCommand{Do: "disable"})
	p.s.awaitGate(keyguard.Frozen)
}

func (p *pod) thaw() {
	p.s.key(kmstest.KeyCommand{Do: "enable"})
	p.s.awaitState(metrics.StateReady)
}

const (
	writeSome = "mkdir -p a/b; dd if=/dev/urandom of=a/b/data bs=1M count=4 status=none; sync a/b/data; sha256sum a/b/data > sums"
	checkSome = "sha256sum -c sums"
)

// TestPodDefaultSeccomp is a pod in mode csi as it is by default.
func TestPodDefaultSeccomp(t *testing.T) {
	requireContainers(t)
	var p pod
	s := newStack(t, shipped, inPod(&p, inject.ModeCSI))
	p.startApp()
	p.assertUnprivileged()
	p.shell(writeSome)
	p.freeze()
	p.thaw()
	p.shell(checkSome)
	s.assertObjects("under the default profile")
	p.stopped()
}

// TestPodUnprivileged is a pod in mode csi: neither of its containers has a
// privilege, and each is in namespaces of its own. The sidecar's seccomp profile is
// byokd's own, from where the node driver puts it.
func TestPodUnprivileged(t *testing.T) {
	requireContainers(t)
	p := pod{localhostProfile: "installed by the node driver"}
	s := newStack(t, shipped, inPod(&p, inject.ModeCSI))
	p.startApp()
	p.assertUnprivileged()
	p.shell(writeSome)
	s.assertObjects("under byokd's profile")
	p.killsReader()
	p.shell(checkSome)

	// The sidecar dies: calls wait for the next.
	waits := p.begin(`sh -ec "cd /data; ` + checkSome + `; echo after > after"`)
	if text, err := p.runc("kill", inject.SidecarName, "KILL"); err != nil {
		t.Fatal(err, text)
	}
	s.daemon.wait(patience)
	other := p.begin("cat /data/a/b/data")
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	for _, w := range []begun{waits, other} {
		if !w.wait(patience) || w.code() != 0 {
			t.Errorf("%s waited for the next sidecar: %s", w.name, w.tail())
		}
	}
	p.shell(checkSome + `; [ "$(cat after)" = after ]`)
	p.deletedFrozen([]string{"app", inject.SidecarName}, []string{inject.SidecarName, "app"}, nil)
	p.deletedWriting()
	p.shell(checkSome)
	p.stopped()
}

// probe asks a probe of the sidecar as kubelet does, and returns what kubelet makes an
// Event of.
func (p *pod) probe(name string) (text string, healthy bool) {
	text, err := p.runc("exec", inject.SidecarName, "/usr/bin/byokd", "probe", name)
	return text, err == nil
}

// waitsForKey checks that a pod whose key is disabled at the start stays in Init, and
// says why.
func (p *pod) waitsForKey() {
	s := p.s
	s.t.Helper()
	var text string
	s.await("the startup probe to name the cause", s.daemon, func() bool {
		var healthy bool
		if text, healthy = p.probe("startup"); healthy {
			s.t.Fatalf("the startup probe passes though the key is disabled: %s", text)
		}
		return strings.Contains(text, s.arn) && strings.Contains(text, "disabled")
	})
	if text, healthy := p.probe("liveness"); !healthy {
		s.t.Errorf("kubelet would restart a sidecar that waits for its key: %s", text)
	}
}

// deletedWriting deletes a pod under load whose sidecar was killed before: processes
// that sync wait in the kernel for pages that nobody writes, in spite of SIGKILL.
func (p *pod) deletedWriting() {
	s := p.s
	s.t.Helper()
	var writers []begun
	for i := range 4 {
		name := "/data/w" + strconv.Itoa(i)
		writers = append(writers, p.begin(`sh -c "echo x > `+name+`.begun; while dd if=/dev/urandom of=`+name+` bs=64k count=16 conv=fsync status=none; do :; done"`))
	}
	s.await("writers", s.daemon, func() bool {
		_, err := p.runc("exec", "app", "sh", "-c", "cd /data && [ -s w0.begun ] && [ -s w1.begun ] && [ -s w2.begun ] && [ -s w3.begun ]")
		return err == nil
	})
	p.remove(inject.SidecarName)
	s.daemon.wait(patience)
	began := time.Now()
	s.await("the workload's container to be removed", nil, func() bool { // kubelet tries again, too
		text, err := p.runc("delete", "--force", "app")
		return err == nil || strings.Contains(text, "does not exist")
	})
	s.t.Logf("a writing workload deleted without a sidecar in %v", time.Since(began).Round(time.Millisecond))
	for _, w := range append(writers, begun{process: p.app}) {
		if !w.wait(patience) {
			s.t.Errorf("%s is left", w.name)
		}
	}
	p.republish()
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	p.startApp()
}

// assertUnprivileged looks at the running sidecar from outside.
func (p *pod) assertUnprivileged() {
	p.s.t.Helper()
	text, err := p.runc("exec", "app", "cat", "/proc/self/status")
	if err != nil {
		p.s.t.Fatal(err, text)
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(p.initOf(inject.SidecarName)) + "/status")
	if err != nil {
		p.s.t.Fatal(err)
	}
	for who, text := range map[string]string{"the workload": text, "the sidecar": string(status)} {
		for _, line := range []string{"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(text, line) {
				p.s.t.Errorf("%s lacks %q:\n%s", who, line, text)
			}
		}
	}
}

// killsReader kills one of two readers in a freeze, from this PID namespace; the other
// goes on at the thaw.
func (p *pod) killsReader() {
	s := p.s
	s.t.Helper()
	p.freeze()
	waits := p.begin(`sh -ec "cd /data; ` + checkSome + `"`)
	killed := p.begin("cat /data/a/b/data")
	pid := p.pidOf(killed)
	s.await("calls that wait", s.daemon, func() bool { return parked(s) >= 2 })
	if text, healthy := p.probe("readiness"); healthy || !strings.Contains(text, "disabled") {
		s.t.Errorf("readiness while frozen: %v, %q", healthy, text)
	}
	if text, healthy := p.probe("liveness"); !healthy {
		s.t.Errorf("liveness while frozen: %q", text)
	}
	began := time.Now()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	if !killed.wait(patience) {
		s.t.Error("a killed reader does not go")
	}
	s.t.Logf("a killed reader was gone after %v", time.Since(began).Round(time.Millisecond))
	p.thaw()
	if !waits.wait(patience) || waits.code() != 0 {
		s.t.Errorf("what waited through the freeze: %s", waits.tail())
	}
}

// deletedFrozen deletes the containers of a frozen pod, with calls that wait, one after
// the other or (nil) both at once, and starts the pod anew each time.
func (p *pod) deletedFrozen(orders ...[]string) {
	s := p.s
	s.t.Helper()
	for _, order := range orders {
		p.shell(checkSome)
		p.freeze()
		readers := []begun{p.begin("cat /data/a/b/data"), p.begin("ls -l /data/a/b"), p.begin("touch /data/new")}
		s.await("calls that wait", s.daemon, func() bool { return parked(s) > 0 }) // the others wait for this one
		began := time.Now()
		if order == nil {
			var both sync.WaitGroup
			for _, name := range []string{"app", inject.SidecarName} {
				both.Go(func() { p.remove(name) })
			}
			both.Wait()
		}
		for _, name := range order {
			p.remove(name)
		}
		s.t.Logf("containers deleted while frozen, order %v: in %v", order, time.Since(began).Round(time.Millisecond))
		for _, r := range append(readers, begun{process: s.daemon}, begun{process: p.app}) {
			if !r.wait(patience) {
				s.t.Errorf("order %v: %s is left", order, r.name)
			}
		}
		p.republish()
		s.startDaemon()
		p.waitsForKey()
		s.key(kmstest.KeyCommand{Do: "enable"})
		s.awaitState(metrics.StateReady)
		p.startApp()
	}
	p.shell(checkSome)
}

// republish is what kubelet does between two pods.
func (p *pod) republish() {
	if p.mode != inject.ModeCSI {
		return
	}
	if err := p.node.unpublish(); err != nil {
		p.s.t.Error(err)
	}
	if mounted(p.node.target) {
		p.s.t.Error("it is still mounted")
	}
	if err := p.node.publish(); err != nil {
		p.s.t.Fatal(err)
	}
}

// stopped ends a pod in order: the workload first.
func (p *pod) stopped() {
	p.app.signal(syscall.SIGTERM)
	if !p.app.wait(patience) || p.app.code() != 0 {
		p.s.t.Errorf("the workload: %s", p.app.tail())
	}
	p.s.stopDaemon()
}

// TestPodPrivileged is a pod in mode privileged: the sidecar mounts into a directory
// that the workload sees. It cannot see who calls, in another PID namespace, so a killed
// caller of a frozen mount goes with the sidecar or at the thaw.
//
// It has a keeper, and the seccomp profile, which kubelet would not apply here, for
// what a sidecar without privilege never does: mount, and replace its worker.
func TestPodPrivileged(t *testing.T) {
	requireContainers(t)
	p := pod{localhostProfile: "../deploy/seccomp/byokd.json"}
	s := newStack(t, shipped, inPod(&p, inject.ModePrivileged))
	p.startApp()
	p.shell(writeSome)
	s.assertObjects("under byokd's profile")
	if text, err := p.runc("exec", inject.SidecarName, "/usr/bin/byokd", "upgrade", "--socket", "/run/byokd/control.sock"); err != nil {
		t.Errorf("upgrade: %v: %s", err, text)
	}
	p.shell(checkSome)
	if text, err := p.runc("exec", inject.SidecarName, "/usr/bin/byokd", "check", "--config", "/etc/byokd/byokd.yaml"); err != nil {
		t.Errorf("check: %v: %s", err, text)
	}
	p.deletedFrozen([]string{inject.SidecarName, "app"}, nil)

	// The sidecar dies, and the mount with it: nobody waits, and the pod starts anew.
	p.remove(inject.SidecarName)
	s.daemon.wait(patience)
	if text, err := p.runc("exec", "app", "ls", "/data"); err == nil || !strings.Contains(text, "not connected") {
		t.Errorf("without a sidecar: %q, %v", text, err)
	}
	p.remove("app")
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	p.startApp()
	p.shell(checkSome)
	p.stopped()
	if text, err := exec.Command("ls", s.lower).CombinedOutput(); err != nil || strings.Contains(string(text), "sums") {
		t.Errorf("the claim: %s, %v", text, err)
	}
}
