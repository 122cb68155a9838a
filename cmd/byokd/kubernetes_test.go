package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

const labelledPod = `apiVersion: v1
kind: Pod
metadata: {name: db, labels: {byokd.io/inject: "true"}, annotations: {ANNOTATION}}
spec:
  containers: [{name: db, image: db, volumeMounts: [{name: data, mountPath: /var/lib/db}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`

// rendered runs `byokd render` on the labelled pod.
func rendered(t *testing.T, annotation string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pod.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(labelledPod, "ANNOTATION", annotation)), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, said bytes.Buffer
	code = run(t.Context(), append([]string{"render", "-f", file, "--image", "ghcr.io/byokd/byokd:v1"}, args...), nil, &out, &said)
	return code, out.String(), said.String()
}

func TestRenderCommand(t *testing.T) {
	for _, c := range []struct {
		name, annotation string
		args             []string
		code             int
		out, says        string
	}{
		{"rendered", "", nil, exitOK, "name: byokd-mount", ""},
		{"two files", "", []string{"-f", "render.go"}, exitFailure, "", "not YAML"},
		{"denied", "byokd.io/profile: none", nil, exitDenied, "", "Pod db is denied: byokd.io/profile"},
		{"no such file", "", []string{"-f", "/does/not/exist"}, exitFailure, "", "/does/not/exist"},
		{"little memory", "", []string{"--sidecar-memory", "1Mi"}, exitUsage, "", "less than the 128Mi"},
		{"no quantity", "", []string{"--sidecar-cpu", "some"}, exitUsage, "", "--sidecar-cpu"},
		{"a wrong switch", "", []string{"--restart-all-containers", "yes"}, exitUsage, "", "none of on, off"},
		{"restart of all", "byokd.io/mount-mode: privileged", []string{"--restart-all-containers", "on"}, exitOK, "action: RestartAllContainers", ""},
		{"an image from elsewhere", "byokd.io/image: other/byokd:v1", nil, exitDenied, "", "--allow-image-repository"},
		{"an image that is allowed", "byokd.io/image: other/byokd:v1", []string{"--allow-image-repository", "other/byokd"}, exitOK, "image: other/byokd:v1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, out, said := rendered(t, c.annotation, c.args...)
			if code != c.code || !strings.Contains(out, c.out) || c.out == "" && out != "" || !strings.Contains(said, c.says) {
				t.Errorf("exit code %d\n%s\n%s", code, out, said)
			}
		})
	}
}

// What the injector puts into the sidecar's environment is what the configuration understands, and all that a pod needs.
func TestSidecarEnvironmentIsUnderstood(t *testing.T) {
	text, err := os.ReadFile("../../deploy/byokd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for mode, mount := range map[string]string{"csi": "/var/lib/db", "privileged": "/mnt/byokd/mount"} {
		code, out, said := rendered(t, "byokd.io/frozen-readiness: \"false\", byokd.io/profile: elasticsearch, byokd.io/mount-mode: "+mode)
		var pod corev1.Pod
		if err := yaml.UnmarshalStrict([]byte(out), &pod); err != nil || code != exitOK {
			t.Fatal(code, err, said)
		}
		var environ []string
		for _, e := range pod.Spec.InitContainers[0].Env {
			environ = append(environ, e.Name+"="+e.Value)
		}
		cfg, warnings, err := parseConfig("byokd.yaml", text, environ)
		if err != nil || len(warnings) > 0 {
			t.Fatalf("%v %q", err, warnings)
		}
		v, a := cfg.Volume, cfg.Admin
		if v.Lower != "/sealed" || v.Mount != mount || v.Role != "elasticsearch" || a.Listen != ":9180" || !a.AllowRemote || !a.ReadyWhileFrozen || a.Socket != "/run/byokd/control.sock" {
			t.Errorf("%+v %+v", v, a)
		}
		if want := map[string]string{"csi": "/run/byokd/mount.sock"}[mode]; v.MountSocket != want {
			t.Errorf("%s: the mount is taken from %q", mode, v.MountSocket)
		}
		if got := adminAddress("", environ); got != "localhost:9180" {
			t.Errorf("the probe asks %s", got)
		}
	}
}

func TestProbeCommand(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/livez" {
			return
		}
		http.Error(w, "External encryption key is not ready\nThe AWS KMS key … is disabled.", http.StatusServiceUnavailable)
	}))
	defer server.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	listen := func(s *httptest.Server) []string {
		return []string{"BYOKD_ADMIN_LISTEN=" + s.Listener.Addr().String()}
	}
	for _, c := range []struct {
		args    []string
		environ []string
		code    int
		says    string
	}{
		{[]string{"probe", "liveness"}, listen(server), exitOK, ""},
		{[]string{"probe", "startup"}, listen(server), exitFailure, "is disabled."},
		{[]string{"probe", "readiness", "--admin", server.Listener.Addr().String()}, listen(gone), exitFailure, "is disabled."},
		{[]string{"probe", "startup"}, listen(gone), exitNoAnswer, ""},
		{[]string{"probe", "health"}, nil, exitUsage, ""},
	} {
		var out, said bytes.Buffer
		if code := run(t.Context(), c.args, c.environ, &out, &said); code != c.code || !strings.Contains(out.String(), c.says) {
			t.Errorf("%v: exit code %d\n%s\n%s", c.args, code, out.String(), said.String())
		}
	}
}

func TestInjectNeedsACluster(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--image", "i:1"}, exitFailure, "say --kubeconfig"},
		{nil, exitUsage, "--image"},
		{[]string{"--image", "i:1", "--namespace", "A B"}, exitUsage, "--namespace"},
		{[]string{"--image", "i:1", "--log-level", "loud"}, exitUsage, "--log-level"},
		{[]string{"--image", "i:1", "--tls-cert", "c"}, exitUsage, "tls-key"},
	} {
		var out, said bytes.Buffer
		if code := run(t.Context(), append([]string{"inject"}, c.args...), nil, &out, &said); code != c.code || !strings.Contains(said.String(), c.says) {
			t.Errorf("%v: exit code %d\n%s", c.args, code, said.String())
		}
	}
}
