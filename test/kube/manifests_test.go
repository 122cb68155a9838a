package kube

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

const (
	renderings = "../chart/testdata"
	// operatorModule has the custom resources of the Prometheus operator, as files.
	operatorModule = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
)

// monitoringResources lets the API server know PodMonitors and PrometheusRules.
func (k *kube) monitoringResources(t *testing.T) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", operatorModule).Output()
	if err != nil {
		t.Fatalf("%s cannot be had: %v", operatorModule, err)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, kind := range []string{"podmonitors", "prometheusrules"} {
		files = append(files, filepath.Join(module.Dir, "example/prometheus-operator-crd/monitoring.coreos.com_"+kind+".yaml"))
	}
	if _, err := envtest.InstallCRDs(k.config, envtest.CRDInstallOptions{Paths: files, ErrorIfPathMissing: true, MaxTime: patience}); err != nil {
		t.Fatal(err)
	}
}

// accepted asks the API server, by dry run and strictly, whether it would take an object over one that may be there.
func (k *kube) accepted(t *testing.T, o *unstructured.Unstructured) {
	t.Helper()
	if o.GetKind() == "MutatingWebhookConfiguration" { // that of this cluster has an address of ours in the place of a service
		o.SetName(o.GetName() + "-of-the-chart")
	}
	strict := client.WithFieldValidation(k.client, metav1.FieldValidationStrict)
	if err := strict.Patch(t.Context(), o, client.Apply, client.DryRunAll, client.ForceOwnership, client.FieldOwner("test")); err != nil {
		t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
	}
}

// TestTheAPIServerTakesTheChart: what the chart makes of several values, alerts and dashboard among them.
func TestTheAPIServerTakesTheChart(t *testing.T) {
	k := cluster(t)
	k.monitoringResources(t)
	files, err := filepath.Glob(filepath.Join(renderings, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, file := range files {
		if strings.HasSuffix(file, ".values.yaml") {
			continue
		}
		objects, err := readObjects(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			k.accepted(t, o)
			kinds[o.GetKind()] = true
		}
	}
	for _, kind := range []string{"PodMonitor", "PrometheusRule", "MutatingWebhookConfiguration", "ValidatingAdmissionPolicy", "DaemonSet", "CSIDriver"} {
		if !kinds[kind] {
			t.Errorf("no %s among the renderings", kind)
		}
	}
}

// TestInjectCheck is `helm test`, with the rights that the chart gives it.
func TestInjectCheck(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	objects, err := readObjects(filepath.Join(renderings, "everything.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	for _, o := range objects {
		if o.GetAnnotations()["helm.sh/hook"] != "test" || o.GetKind() == "Pod" {
			continue
		}
		made++
		if err := k.client.Create(t.Context(), o); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	if made != 3 { // ServiceAccount, Role, RoleBinding
		t.Fatalf("%d objects beside the pod of helm test", made)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), k.program, "inject", "check", "--kubeconfig", k.kubeconfigOf(t, "byokd-inject-test"))
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil || strings.Count(out.String(), "ok ") != 3 {
		t.Errorf("byokd inject check: %v\n%s", err, &out)
	}
}
