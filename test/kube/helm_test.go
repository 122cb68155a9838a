package kube

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/action"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// kept is what `helm uninstall` leaves: the policies, which go on refusing labelled pods, and the namespace.
var kept = []string{
	"Namespace byokd-system",
	"ValidatingAdmissionPolicy byokd-forgotten-labels", "ValidatingAdmissionPolicy byokd-sealed-pods",
	"ValidatingAdmissionPolicyBinding byokd-forgotten-labels", "ValidatingAdmissionPolicyBinding byokd-sealed-pods",
}

func imageValues(tag string) map[string]any {
	return map[string]any{"image": map[string]any{"tag": tag}}
}

// admitted waits until a labelled pod gets the sidecar of a release. Until then it is refused.
func (h *helm) admitted(t *testing.T, tag string, edits ...func(*corev1.Pod)) {
	t.Helper()
	namespace := h.namespace(t, "restricted")
	until(t, "a labelled pod gets its sidecar of "+tag, func() bool {
		p := podIn(namespace, edits...)
		if err := h.client.Create(t.Context(), p, client.DryRunAll); err != nil {
			return false
		}
		if sidecarOf(p) == nil {
			t.Fatal("a labelled pod was admitted as it is")
		}
		return sidecarOf(p).Image == "ghcr.io/byokd/byokd:"+tag
	})
	p := h.mustCreate(t, podIn(namespace, edits...))
	if mount := p.Spec.Containers[0].VolumeMounts[0]; mount.Name != "byokd-mount" {
		t.Errorf("the pod mounts %+v", mount)
	}
}

// refused waits until a labelled pod is refused with a text; what is not labelled passes.
func (h *helm) refused(t *testing.T, says string, edits ...func(*corev1.Pod)) {
	t.Helper()
	namespace := h.namespace(t, "")
	until(t, "a labelled pod is refused with: "+says, func() bool {
		err := h.try(t, podIn(namespace, edits...))
		if err == nil {
			t.Fatalf("a labelled pod was admitted, instead of: %s", says)
		}
		return strings.Contains(err.Error(), says)
	})
	h.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Name, p.Labels = "other", nil }))
}

// policyInForce waits until the API server has taken up a policy that was just made.
func (h *helm) policyInForce(t *testing.T) {
	t.Helper()
	namespace := h.namespace(t, "")
	until(t, "the policy is in force", func() bool { // no webhook is asked about this revision
		err := h.try(t, podIn(namespace, nextRevision))
		return err != nil && strings.Contains(err.Error(), "no sidecar byokd")
	})
}

func nextRevision(p *corev1.Pod) { p.Labels["byokd.io/revision"] = "next" }

func (h *helm) deployment(t *testing.T) *appsv1.Deployment {
	t.Helper()
	d := &appsv1.Deployment{}
	if err := h.client.Get(t.Context(), client.ObjectKey{Namespace: system, Name: "byokd-inject"}, d); err != nil {
		t.Fatal(err)
	}
	return d
}

// certificates are what the injector keeps in its Secret.
func (h *helm) certificates(t *testing.T) map[string][]byte {
	t.Helper()
	s := &corev1.Secret{}
	if err := h.client.Get(t.Context(), client.ObjectKey{Namespace: system, Name: "byokd-inject-tls"}, s); err != nil {
		t.Fatal(err)
	}
	return s.Data
}

// TestHelm is the life of the chart, from the first installation to the last trace.
func TestHelm(t *testing.T) {
	h := newHelm(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T, *helm)
	}{
		{"install", helmInstall},
		{"upgrade", helmUpgrade},
		{"forced upgrade", helmForcedUpgrade},
		{"rollback", helmRollback},
		{"side by side", helmSideBySide},
		{"uninstall", helmUninstall},
		{"reinstall", helmReinstall},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(t, h) }) {
			return
		}
	}
}

// Before any injector runs, labelled pods are refused; then they are injected, and `helm test` passes.
func helmInstall(t *testing.T, h *helm) {
	h.mustInstall(t, "byokd", imageValues("v1"))
	h.policyInForce(t)
	h.refused(t, `failed calling webhook "inject.byokd.io"`)
	if err := h.test(t, "byokd"); err == nil {
		t.Error("helm test passes without an injector")
	}
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v1")
	if err := h.test(t, "byokd"); err != nil {
		t.Errorf("helm test: %v", err)
	}
	if left := names(h.inventory(t)); slices.ContainsFunc(left, func(name string) bool { return strings.Contains(name, "byokd-inject-test") }) {
		t.Errorf("helm test has left: %q", left)
	}
}

// What the injector has written survives an upgrade, and so does what others have added; what they have changed against the chart
// does not. Policies that are switched off stay: what they refuse would otherwise be written in the clear.
func helmUpgrade(t *testing.T, h *helm) {
	first := h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v1")
	certificates := h.certificates(t)
	byHand := []byte(`{"metadata":{"annotations":{"example.com/by-hand":"yes"}},"spec":{"replicas":7}}`)
	if err := h.client.Patch(t.Context(), h.deployment(t), client.RawPatch(types.MergePatchType, byHand)); err != nil {
		t.Fatal(err)
	}
	h.upgrade(t, "byokd", map[string]any{
		"image":    map[string]any{"tag": "v2"},
		"injector": map[string]any{"replicas": 3, "timeoutSeconds": 7},
		"policy":   map[string]any{"enabled": false},
		"node":     map[string]any{"enabled": false},
	})
	h.admitted(t, "v1") // by the process that runs: its authority is still in the webhook configuration
	if d := h.deployment(t); *d.Spec.Replicas != 3 || d.Annotations["example.com/by-hand"] != "yes" {
		t.Errorf("%d replicas, annotations %v", *d.Spec.Replicas, d.Annotations)
	}
	for name, content := range h.certificates(t) {
		if string(certificates[name]) != string(content) {
			t.Errorf("%s of the certificates has changed", name)
		}
	}
	first.stop(t)
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v2")
	there := names(h.inventory(t))
	for _, name := range kept {
		if !slices.Contains(there, name) {
			t.Errorf("%s is gone", name)
		}
	}
	for _, name := range []string{"CSIDriver csi.byokd.io", "DaemonSet byokd-node", "NetworkPolicy byokd-node", "ServiceAccount byokd-node"} {
		if slices.Contains(there, name) {
			t.Errorf("%s is still there", name)
		}
	}
}

// --force puts the chart's objects in the place of those that are there, without certificates: the injector makes new ones.
func helmForcedUpgrade(t *testing.T, h *helm) {
	first := h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v2")
	h.upgrade(t, "byokd", imageValues("v3"), func(u *action.Upgrade) { u.Force = true })
	h.admitted(t, "v2") // by the process that runs
	first.stop(t)
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v3")
}

// A release that was made without policies leaves them to whoever deletes them; only then Helm 3 can go back from it to one with
// them.
func helmRollback(t *testing.T, h *helm) {
	h.rollback(t, "byokd", 2) // without policies and node driver
	h.deletePolicies(t)
	h.refused(t, `failed calling webhook "inject.byokd.io"`)
	h.rollback(t, "byokd", 1)
	h.policyInForce(t)
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v1")
	if err := h.test(t, "byokd"); err != nil {
		t.Errorf("helm test: %v", err)
	}
}

// deletePolicies is the command of docs/KUBERNETES.md.
func (h *helm) deletePolicies(t *testing.T) {
	t.Helper()
	const found = "app.kubernetes.io/name=byokd,app.kubernetes.io/component=policy"
	registration := h.clients.AdmissionregistrationV1()
	err := errors.Join(
		registration.ValidatingAdmissionPolicyBindings().DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: found}),
		registration.ValidatingAdmissionPolicies().DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: found}))
	if err != nil {
		t.Fatal(err)
	}
	if left := names(h.inventory(t)); slices.Contains(left, kept[1]) || slices.Contains(left, kept[3]) {
		t.Fatalf("left: %q", left)
	}
}

// A second injector touches nothing of the first, neither when it comes nor when it goes.
func helmSideBySide(t *testing.T, h *helm) {
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v1")
	h.refused(t, "no sidecar byokd", nextRevision)
	before := h.inventory(t)
	values := imageValues("v2")
	values["revision"] = "next"
	h.mustInstall(t, "byokd-next", values)
	next := h.runDeployed(t, "byokd-inject-next")
	h.admitted(t, "v2", nextRevision)
	h.admitted(t, "v1")
	for _, name := range []string{"byokd", "byokd-next"} {
		if err := h.test(t, name); err != nil {
			t.Errorf("helm test %s: %v", name, err)
		}
	}
	maps.DeleteFunc(before, func(name, _ string) bool { return strings.HasPrefix(name, "Secret sh.helm.release.") }) // tells when it was tested
	unchanged(t, before, h.inventory(t))

	next.stop(t)
	h.refused(t, `failed calling webhook "inject.byokd.io"`, nextRevision)
	h.admitted(t, "v1")
	h.uninstall(t, "byokd-next")
	h.refused(t, "no sidecar byokd", nextRevision)
	h.admitted(t, "v1")
	after := h.inventory(t)
	unchanged(t, before, after)
	for name := range after {
		if strings.Contains(name, "next") {
			t.Errorf("%s is left", name)
		}
	}
}

// After the end of the release labelled pods are refused, and nothing else is left.
func helmUninstall(t *testing.T, h *helm) {
	info := h.uninstall(t, "byokd")
	if strings.Count(info, "ValidatingAdmissionPolicy") != 4 {
		t.Errorf("helm uninstall says: %s", info)
	}
	if left := names(h.inventory(t)); !slices.Equal(left, kept) {
		t.Errorf("left: %q", left)
	}
	h.refused(t, "the pod has the label byokd.io/inject and no sidecar byokd")
	h.refused(t, "the pod has the label byokd.io/inject and no sidecar byokd", nextRevision)
}

// What was left does not stand in the way of a release of the same name; one of another has to say that it takes it over.
func helmReinstall(t *testing.T, h *helm) {
	if _, err := h.install(t, "other", imageValues("v4")); err == nil || !strings.Contains(err.Error(), "invalid ownership metadata") {
		t.Errorf("%v", err)
	}
	h.mustInstall(t, "byokd", imageValues("v4"))
	first := h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v4")
	first.stop(t)
	h.uninstall(t, "byokd")
	h.mustInstall(t, "other", imageValues("v5"), func(i *action.Install) { i.TakeOwnership = true })
	h.runDeployed(t, "byokd-inject")
	h.admitted(t, "v5")
	h.uninstall(t, "other")
	if left := names(h.inventory(t)); !slices.Equal(left, kept) {
		t.Errorf("left: %q", left)
	}
}
