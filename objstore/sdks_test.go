package objstore_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSDKs runs the programs in test/clients: minio-go, and AWS' SDKs for Java and
// JavaScript with the defaults that applications have. Their dependencies come from
// the registries, so they run only where BYOKD_E2E asks for it (make e2e).
func TestSDKs(t *testing.T) {
	if os.Getenv("BYOKD_E2E") == "" {
		t.Skip("runs with make e2e")
	}
	clients, err := filepath.Abs("../test/clients")
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	for name, steps := range map[string][][]string{
		"minio": {{"go", "run", ".", "URL"}},
		"js":    {{"npm", "ci", "--no-audit", "--no-fund"}, {"node", "client.mjs", "URL"}},
		"java":  {{"mvn", "-q", "-B", "compile", "exec:java", "-Dexec.args=URL"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, worldOptions{})
			t.Setenv("GOFLAGS", "")
			for _, step := range steps {
				needTool(t, step[0], map[string]string{"go": "version"}[step[0]]+map[bool]string{true: "--version"}[step[0] != "go"])
				args := append([]string{}, step[1:]...)
				for i := range args {
					args[i] = strings.Replace(args[i], "URL", w.server.URL, 1)
				}
				t.Log(runTool(t, home, filepath.Join(clients, name), step[0], args...))
			}
			w.noPlaintext()
		})
	}
}
