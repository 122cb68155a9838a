package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A node driver does not begin below a directory that kubelet does not know, nor make it.
func TestNodeNeedsKubeletsDirectory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kubelet := range []string{filepath.Join(dir, "missing"), file} {
		code, _, stderr := byokd(t, nil, "node", "--node-name=here", "--endpoint=unix://"+filepath.Join(dir, "csi.sock"),
			"--kubelet-dir="+kubelet, "--admin-listen=127.0.0.1:0")
		if code != exitUsage || !strings.Contains(stderr, kubelet) || !strings.Contains(stderr, "--kubelet-dir") {
			t.Errorf("%s: exit code %d, says %q", kubelet, code, stderr)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "missing")); !os.IsNotExist(err) {
		t.Errorf("the directory was made: %v", err)
	}
}
