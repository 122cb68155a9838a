//go:build linux

package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// unprivileged starts a program as nobody, without any capability and without a way
// to one.
var unprivileged = []string{"setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--regid=65534", "--clear-groups"}

// node is a node driver with a directory that is laid out as kubelet's.
type node struct {
	s       *stack
	kubelet string
	target  string
	run     string // the pod's in-memory volume, once it is mounted
	admin   string
	process *process
}

const (
	testPodUID = "0c5fd3e5-6a9f-4d0e-9a55-4a2b5a0f2c11"
	testVolume = "csi-0123456789abcdef"
)

// mountedByNode has a node driver mount, and byokd serve the mount unprivileged.
func mountedByNode(n *node) option {
	return func(s *stack) {
		n.s, n.kubelet = s, s.dir+"/kubelet"
		s.launch = unprivileged
		pod := n.kubelet + "/pods/" + testPodUID + "/volumes/"
		n.target = pod + "kubernetes.io~csi/byokd-mount/mount"
		run := pod + "kubernetes.io~empty-dir/byokd-run"
		s.socket = s.dir + "/run/mount.sock" // as in the sidecar, where the path is short enough for a socket's
		s.prepare = func() {
			for _, dir := range []string{run, filepath.Dir(n.target), s.dir + "/csi"} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					s.t.Fatal(err)
				}
			}
			if err := os.Symlink(run, s.dir+"/run"); err != nil {
				s.t.Fatal(err)
			}
			n.start()
			s.t.Cleanup(n.stop)
			if err := n.publish(); err == nil || !strings.Contains(err.Error(), "not there yet") {
				s.t.Fatalf("published though the in-memory volume is not mounted: %v", err)
			}
			if err := unix.Mount("tmpfs", run, "tmpfs", 0, "mode=0777"); err != nil {
				s.t.Fatal(err)
			}
			n.run = run
			if err := n.publish(); err != nil {
				s.t.Fatal(err)
			}
			s.mount = n.target
		}
	}
}

func (n *node) start() {
	s := n.s
	s.t.Helper()
	n.admin = freeEndpoint(s.t)
	n.process = s.start("byokd node", nil, s.byokd, "node", "--endpoint=unix://"+s.dir+"/csi/csi.sock", "--node-name=here",
		"--kubelet-dir="+n.kubelet, "--admin-listen="+strings.TrimPrefix(n.admin, "http://"))
	s.await("the node driver", n.process, func() bool {
		return exec.Command("curl", "-sf", n.admin+"/readyz").Run() == nil
	})
}

// stop unpublishes and ends the driver.
func (n *node) stop() {
	if err := n.unpublish(); err != nil {
		n.s.t.Error(err)
	}
	n.process.signal(syscall.SIGTERM)
	if !n.process.wait(patience) || n.process.code() != 0 {
		n.s.t.Errorf("the node driver did not stop cleanly\n%s", n.process.tail())
		n.process.signal(syscall.SIGKILL)
	}
	if n.run != "" {
		if err := unix.Unmount(n.run, 0); err != nil { // busy if something of the driver is left in it
			n.s.t.Error(err)
			_ = unix.Unmount(n.run, unix.MNT_DETACH)
		}
	}
}

func (n *node) client() (csi.NodeClient, func()) {
	n.s.t.Helper()
	conn, err := grpc.NewClient("unix://"+n.s.dir+"/csi/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.s.t.Fatal(err)
	}
	return csi.NewNodeClient(conn), func() { conn.Close() }
}

func (n *node) publish() error {
	client, end := n.client()
	defer end()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := client.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: testVolume, TargetPath: n.target,
		VolumeCapability: &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}},
		VolumeContext: map[string]string{"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": testPodUID,
			"csi.storage.k8s.io/pod.name": "zeebe-0", "csi.storage.k8s.io/pod.namespace": "acme", "runVolume": "byokd-run", "volume": "data"}})
	return err
}

// unpublish calls the driver, and again while it says that it is busy with the volume,
// as kubelet does.
func (n *node) unpublish() (err error) {
	client, end := n.client()
	defer end()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n.s.await("the driver to unpublish", n.process, func() bool {
		_, err = client.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: testVolume, TargetPath: n.target})
		return status.Code(err) != codes.Aborted
	})
	return err
}

// TestNodeDriver is mode C without containers: a node driver mounts and passes the
// mount to a byokd that has no privilege at all; freeze, thaw, a killed caller, the
// death of byokd, of the driver, and unpublishing while frozen.
func TestNodeDriver(t *testing.T) {
	requireProgram(t, "setpriv")
	requireProgram(t, "curl")
	var n node
	s := newStack(t, shipped, mountedByNode(&n))
	assertPrivileges(s, 0)
	if err := n.publish(); err != nil {
		t.Errorf("published again: %v", err)
	}
	as := func(script string) *exec.Cmd {
		cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-ec", script)
		cmd.Dir = "/"
		return cmd
	}
	shell := func(script string) string {
		t.Helper()
		text, err := as("cd " + n.target + "; " + script).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", script, err, text)
		}
		return string(text)
	}
	shell("mkdir -p a/b; dd if=/dev/urandom of=a/b/data bs=1M count=8 status=none; sync a/b/data; sha256sum a/b/data > sums; ln -s a/b/data link; mv sums sums2")
	// Users of their own, though byokd is nobody.
	if failed := s.needing(); len(failed) > 0 {
		t.Errorf("a byokd without privileges does not do these for others: %v", failed)
	}
	// Frozen: the root answers, a reader waits and can be killed, and goes on at the thaw.
	s.key(kmstest.KeyCommand{Do: "disable"})
	s.awaitGate(keyguard.Frozen)
	if err := unix.Statfs(n.target, &unix.Statfs_t{}); err != nil {
		t.Errorf("statfs while frozen: %v", err)
	}
	killed, waits := as("cat "+n.target+"/a/b/data > /dev/null"), as("cd "+n.target+"; sha256sum -c sums2")
	for _, cmd := range []*exec.Cmd{killed, waits} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	s.await("a call that waits", s.daemon, func() bool { return parked(s) > 0 })
	if err := killed.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = killed.Wait() // it would hang here
	s.key(kmstest.KeyCommand{Do: "enable"})
	s.awaitState(metrics.StateReady)
	if err := waits.Wait(); err != nil {
		t.Errorf("what waited through the freeze: %v", err)
	}
	// byokd dies: calls wait for the next one.
	waits = as("cd " + n.target + "; sha256sum -c sums2; echo after > after; mkdir made")
	s.daemon.signal(syscall.SIGKILL)
	s.daemon.wait(patience)
	if err := waits.Start(); err != nil {
		t.Fatal(err)
	}
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	if err := waits.Wait(); err != nil {
		t.Errorf("what waited for the next byokd: %v", err)
	}
	shell(`[ "$(cat after)" = after ]; sha256sum -c sums2`)
	// The driver dies: the mount goes on, and the next driver is told what it needs.
	n.process.signal(syscall.SIGKILL)
	n.process.wait(patience)
	shell("sha256sum -c sums2; echo without a driver > alone")
	n.start()
	s.await("byokd to be connected again", s.daemon, func() bool {
		text, _ := exec.Command("curl", "-sf", n.admin+"/metrics").Output()
		return bytes.Contains(text, []byte(`byokd_node_mounts{state="served"} 1`))
	})
	s.daemon.signal(syscall.SIGKILL)
	s.daemon.wait(patience)
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	shell(`[ "$(cat alone)" = "without a driver" ]`)
	// The pod is deleted while frozen: nobody waits for anybody.
	s.key(kmstest.KeyCommand{Do: "disable"})
	s.awaitGate(keyguard.Frozen)
	began := time.Now()
	for range 2 { // and once more, as kubelet may
		if err := n.unpublish(); err != nil {
			t.Errorf("unpublish while frozen: %v", err)
		}
	}
	t.Logf("unpublished while frozen in %v", time.Since(began))
	if mounted(n.target) {
		t.Error("it is still mounted")
	}
	if !s.daemon.wait(patience) {
		t.Error("byokd did not see the end of its mount")
	}
}

// parked is how many calls wait in byokd.
func parked(s *stack) (count int) {
	_, body := s.get("/metrics")
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "byokd_fs_parked_calls") {
			_, _ = fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &count)
		}
	}
	return count
}
