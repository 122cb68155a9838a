package kube

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
)

// TestSanity runs Kubernetes' own conformance suite for CSI drivers against byokd node.
// What it leaves out needs a controller, which a driver of inline volumes has not:
// docs/CONFORMANCE.md.
func TestSanity(t *testing.T) {
	if os.Geteuid() != 0 {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "kube") {
			t.Fatal("BYOKD_REQUIRE names kube, but this is not root")
		}
		t.Skip("byokd node needs root")
	}
	dir := t.TempDir()
	program, socket, kubelet := dir+"/byokd", dir+"/csi.sock", dir+"/kubelet"
	if out, err := exec.Command("go", "-C", "../..", "build", "-o", program, "./cmd/byokd").CombinedOutput(); err != nil {
		t.Fatalf("byokd cannot be built: %v\n%s", err, out)
	}
	const uid = "0c5fd3e5-6a9f-4d0e-9a55-4a2b5a0f2c11"
	volumes := filepath.Join(kubelet, "pods", uid, "volumes/kubernetes.io~csi/byokd-mount")
	if err := os.MkdirAll(volumes, 0o755); err != nil {
		t.Fatal(err)
	}
	node := exec.Command(program, "node", "--endpoint=unix://"+socket, "--node-name=here", "--kubelet-dir="+kubelet, "--admin-listen=127.0.0.1:0")
	node.Stdout, node.Stderr = os.Stderr, os.Stderr
	node.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = node.Process.Signal(syscall.SIGTERM)
		if err := node.Wait(); err != nil {
			t.Errorf("byokd node: %v", err)
		}
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if info, err := os.Stat(socket); err == nil && info.Mode().Type() == os.ModeSocket {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("byokd node does not listen")
		}
	}
	config := sanity.NewTestConfig()
	config.Address = "unix://" + socket
	config.TargetPath, config.StagingPath = volumes, dir+"/staging"
	config.CreateTargetDir = func(string) (string, error) { return filepath.Join(volumes, "mount"), nil } // kubelet makes its parent
	config.RemoveTargetPath = func(string) error { return nil }
	config.TestVolumeParameters = map[string]string{"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": uid, "runVolume": "byokd-run"}
	suite, report := ginkgo.GinkgoConfiguration()
	suite.SkipStrings = []string{`\[Controller Server\]`}
	report.NoColor, report.Succinct = true, true
	gomega.RegisterFailHandler(ginkgo.Fail)
	tests := sanity.GinkgoTest(&config)
	defer tests.Finalize()
	ginkgo.RunSpecs(t, "csi-sanity", suite, report)
}
