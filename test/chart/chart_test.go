package chart

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	sigsyaml "sigs.k8s.io/yaml"
)

// TestGolden holds what the chart makes of several values. What it makes of its defaults is held by the Kustomize base.
func TestGolden(t *testing.T) {
	for _, name := range []string{"everything", "revision", "privileged-only"} {
		t.Run(name, func(t *testing.T) {
			text := manifests(mustRender(t, valuesFile(t, name)))
			decode(t, text)
			golden(t, filepath.Join("testdata", name+".yaml"), text)
		})
	}
}

// golden compares text with a file, or writes it with -update.
func golden(t *testing.T, file, text string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) == text {
		return
	}
	wanted := strings.Split(string(want), "\n")
	for i, line := range strings.Split(text, "\n") {
		if i >= len(wanted) || wanted[i] != line {
			t.Fatalf("%s:%d: now %q; if that is right: go test . -update", file, i+1, line)
		}
	}
	t.Fatalf("%s: now ends earlier; if that is right: go test . -update", file)
}

func TestLint(t *testing.T) {
	result := lint.AllWithKubeVersion(chartDir, nil, namespace, nil)
	for _, message := range result.Messages {
		if message.Severity >= support.WarningSev {
			t.Errorf("%s: %v", message.Path, message.Err)
		}
	}
}

// TestEveryObjectIsOurs: names, namespaces and labels by which everything of byokd is found.
func TestEveryObjectIsOurs(t *testing.T) {
	for _, object := range decode(t, manifests(mustRender(t, valuesFile(t, "everything")))) {
		about, err := meta.Accessor(object)
		if err != nil {
			t.Fatal(err)
		}
		kind := object.GetObjectKind().GroupVersionKind().Kind
		if about.GetLabels()["app.kubernetes.io/name"] != "byokd" {
			t.Errorf("%s %s: labels %v", kind, about.GetName(), about.GetLabels())
		}
		if n := about.GetNamespace(); n != "" && n != namespace && about.GetAnnotations()["helm.sh/hook"] != "test" {
			t.Errorf("%s %s is in namespace %s", kind, about.GetName(), n)
		}
		if !strings.Contains(about.GetName(), "byokd") {
			t.Errorf("%s %s has a name that may be somebody else's", kind, about.GetName())
		}
	}
}

// TestPodSecurity asks the API server's own code: the injector is restricted, the node driver privileged and nothing more.
func TestPodSecurity(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	restricted := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	found := 0
	for _, object := range decode(t, manifests(mustRender(t, nil))) {
		var template corev1.PodTemplateSpec
		unprivileged := true
		switch o := object.(type) {
		case *appsv1.Deployment:
			template = o.Spec.Template
		case *appsv1.DaemonSet:
			template, unprivileged = o.Spec.Template, false
		case *corev1.Pod:
			template = corev1.PodTemplateSpec{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
		default:
			continue
		}
		found++
		verdict := policy.AggregateCheckResults(evaluator.EvaluatePod(restricted, &template.ObjectMeta, &template.Spec))
		if verdict.Allowed != unprivileged {
			t.Errorf("%s: restricted allows it: %v: %s", template.Labels, verdict.Allowed, verdict.ForbiddenDetail())
		}
		privileged := 0
		for _, c := range template.Spec.Containers {
			if s := c.SecurityContext; s != nil && s.Privileged != nil && *s.Privileged {
				privileged++
			}
		}
		if unprivileged && privileged > 0 || privileged > 1 {
			t.Errorf("%s: %d privileged containers", template.Labels, privileged)
		}
	}
	if found < 2 {
		t.Errorf("looked at %d pods", found)
	}
}

// TestARevisionStandsBeside: a second release with a revision has no object in common with the first.
func TestARevisionStandsBeside(t *testing.T) {
	seen := map[string]bool{}
	for i, values := range []map[string]any{nil, valuesFile(t, "revision")} {
		for _, object := range decode(t, manifests(mustRender(t, values))) {
			id := identity(t, object)
			if i == 1 && seen[id] {
				t.Errorf("%s is in both releases", id)
			}
			seen[id] = true
			if _, driver := object.(*storagev1.CSIDriver); driver && i == 1 {
				t.Error("a revision brings a node driver")
			}
		}
	}
}

func identity(t *testing.T, object runtime.Object) string {
	t.Helper()
	about, err := meta.Accessor(object)
	if err != nil {
		t.Fatal(err)
	}
	return object.GetObjectKind().GroupVersionKind().String() + " " + about.GetNamespace() + "/" + about.GetName()
}

// sources are the files that the chart brings along, each with the one that it is a copy of: Helm's charts can refer to nothing
// outside of them.
var sources = map[string]string{
	"files/alerts.yaml":    "../../deploy/alerts/byokd.rules.yaml",
	"files/dashboard.json": "../../deploy/dashboards/byokd.json",
	"files/policies.yaml":  "../../deploy/policies/sealed-pods.yaml",
}

func TestCopiesAreEqual(t *testing.T) {
	for copied, source := range sources {
		golden(t, filepath.Join(chartDir, copied), string(read(t, source)))
	}
}

// TestNothingIsLostInRendering: what a cluster gets is what deploy/alerts, deploy/dashboards and deploy/policies have.
func TestNothingIsLostInRendering(t *testing.T) {
	files := mustRender(t, valuesFile(t, "everything"))
	var rule struct{ Spec any }
	unmarshal(t, []byte(files["monitoring-prometheusrule.yaml"]), &rule)
	var rules any
	unmarshal(t, read(t, sources["files/alerts.yaml"]), &rules)
	if a, b := mustYAML(t, rule.Spec), mustYAML(t, rules); a != b {
		t.Errorf("the PrometheusRule is not the rules:\n%s", a)
	}
	var dashboard corev1.ConfigMap
	unmarshal(t, []byte(files["monitoring-dashboard.yaml"]), &dashboard)
	if got, want := strings.TrimSpace(dashboard.Data["byokd.json"]), strings.TrimSpace(string(read(t, sources["files/dashboard.json"]))); got != want {
		t.Error("the dashboard in the ConfigMap is another one")
	}
	got, want := decode(t, files["policy.yaml"]), decode(t, string(read(t, sources["files/policies.yaml"])))
	if len(got) != len(want) || len(want) < 2 {
		t.Fatalf("%d policies and bindings, %d in the source", len(got), len(want))
	}
	for i, object := range got {
		about, err := meta.Accessor(object)
		if err != nil {
			t.Fatal(err)
		}
		about.SetLabels(nil)
		about.SetAnnotations(nil)
		if a, b := mustYAML(t, object), mustYAML(t, want[i]); a != b {
			t.Errorf("%s is\n%s\nthe source says\n%s", about.GetName(), a, b)
		}
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func unmarshal(t *testing.T, text []byte, into any) {
	t.Helper()
	if err := sigsyaml.Unmarshal(text, into); err != nil {
		t.Fatal(err)
	}
}

func mustYAML(t *testing.T, value any) string {
	t.Helper()
	text, err := sigsyaml.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestNotes: what Helm says after an installation fits what was installed.
func TestNotes(t *testing.T) {
	for text, want := range map[string]struct{ says, silent string }{
		`{}`:                           {"pod-security.kubernetes.io/enforce=privileged", "WARNING"},
		`policy: {enabled: false}`:     {"WARNING: policy.enabled is false", "one injector only"},
		`injector: {replicas: 1}`:      {"WARNING: one injector only", "policy.enabled"},
		`node: {enabled: false}`:       {"byokd.io/mount-mode: privileged", "enforce=privileged"},
		`{revision: next}`:             {"byokd.io/revision: next", "enforce=privileged"},
		`test: {namespace: somewhere}`: {"helm test byokd --namespace byokd-system", "WARNING"},
	} {
		var values map[string]any
		unmarshal(t, []byte(text), &values)
		notes := mustRender(t, values)["NOTES.txt"]
		if !strings.Contains(notes, want.says) || strings.Contains(notes, want.silent) {
			t.Errorf("%s: it should say %q and not %q:\n%s", text, want.says, want.silent, notes)
		}
	}
}

// TestOneReplicaCanBeDrained: a budget of one would keep a node with the only injector from ever being drained.
func TestOneReplicaCanBeDrained(t *testing.T) {
	var values map[string]any
	unmarshal(t, []byte(`injector: {replicas: 1}`), &values)
	if text, ok := mustRender(t, values)["inject-pdb.yaml"]; ok {
		t.Errorf("there is a budget:\n%s", text)
	}
}
