package kube

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

func sidecarOf(p *corev1.Pod) *corev1.Container {
	if len(p.Spec.InitContainers) == 0 || p.Spec.InitContainers[0].Name != "byokd" {
		return nil
	}
	return &p.Spec.InitContainers[0]
}

func TestInjected(t *testing.T) {
	k := cluster(t)
	i := k.inject(t)
	namespace := k.namespace(t, "")
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: namespace}, Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{{Port: 1}}}}
	if err := k.client.Create(t.Context(), service); err != nil {
		t.Fatal(err)
	}
	p, told, err := k.create(t, podIn(namespace, func(p *corev1.Pod) {
		p.Spec.Subdomain = "db"
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
	}))
	if err != nil {
		t.Fatal(err)
	}
	sidecar := sidecarOf(p)
	if sidecar == nil || sidecar.Image != image || sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Fatalf("%+v", p.Spec.InitContainers)
	}
	if mount := p.Spec.Containers[0].VolumeMounts[0]; mount.Name != "byokd-mount" || mount.MountPath != "/data" {
		t.Errorf("%+v", mount)
	}
	if len(told) != 2 || !strings.Contains(told[0], "livenessProbe") || !strings.Contains(told[1], "publishNotReadyAddresses") {
		t.Errorf("warnings: %q", told)
	}
	if _, metrics := ask("http://" + i.admin + "/metrics"); !strings.Contains(metrics, `byokd_inject_reviews_total{outcome="injected",reason=""}`) ||
		!strings.Contains(metrics, `byokd_inject_warnings_total{reason="headless_service"} 1`) {
		t.Errorf("%s", metrics)
	}
	// Nobody else is asked about.
	other := k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Name, p.Labels = "other", nil }))
	if sidecarOf(other) != nil {
		t.Error("a pod without the label was injected")
	}
}

// The administrators' own check, which helm test runs, against the whole.
func TestCheckCommand(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	kubeconfig := k.administrator(t)
	out, err := exec.Command(k.program, "inject", "check", "--kubeconfig", kubeconfig, "--namespace", namespace).CombinedOutput()
	if err != nil || bytes.Count(out, []byte("ok ")) != 3 {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestDenied(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	for name, c := range map[string]struct {
		edit func(*corev1.Pod)
		says string
	}{
		"annotation": {func(p *corev1.Pod) { p.Annotations["byokd.io/proflie"] = "zeebe" }, "byokd.io/proflie is unknown; known are"},
		"label":      {func(p *corev1.Pod) { p.Labels["byokd.io/inject"] = "yes" }, `the label byokd.io/inject is "yes"`},
		"second volume": {func(p *corev1.Pod) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "again", VolumeSource: p.Spec.Volumes[0].VolumeSource})
		}, "the volume again is the same claim as data"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := k.create(t, podIn(namespace, c.edit))
			if err == nil || !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestDryRunLeavesNoTrace(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	set := k.statefulSet(t, namespace)
	p := podIn(namespace, ownedBy(set))
	if err := k.client.Create(t.Context(), p, client.DryRunAll); err != nil || sidecarOf(p) == nil {
		t.Fatalf("%v %+v", err, p.Spec.InitContainers)
	}
	if err := k.client.Get(t.Context(), client.ObjectKeyFromObject(p), &corev1.Pod{}); !apierrors.IsNotFound(err) {
		t.Errorf("the pod is there: %v", err)
	}
	// An Event of a real one comes after those that the dry run would have had.
	k.mustCreate(t, podIn(namespace, ownedBy(set)))
	until(t, "the Event of the real pod", func() bool { return len(k.events(t, set)) > 0 })
	if events := k.events(t, set); len(events) != 1 || events[0].Count != 1 {
		t.Errorf("%+v", events)
	}
}

// Who made a StatefulSet sees at it why its pods are denied or warned about.
func TestEventsAtTheOwner(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	set := k.statefulSet(t, namespace)
	if _, _, err := k.create(t, podIn(namespace, ownedBy(set), func(p *corev1.Pod) { p.Annotations["byokd.io/volume"] = "disk" })); err == nil {
		t.Fatal("not denied")
	}
	k.mustCreate(t, podIn(namespace, ownedBy(set), func(p *corev1.Pod) {
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
	}))
	until(t, "Events of all three kinds", func() bool {
		var reasons []string
		for _, e := range k.events(t, set) {
			reasons = append(reasons, e.Type+" "+e.Reason)
		}
		slices.Sort(reasons)
		return slices.Equal(reasons, []string{"Normal ByokdInjected", "Warning ByokdDenied", "Warning ByokdWarning"})
	})
}

// failurePolicy Fail: without an injector, labelled pods are refused and all others are not.
func TestInjectorDown(t *testing.T) {
	k := cluster(t)
	i := k.inject(t)
	namespace := k.namespace(t, "")
	i.stop(t)
	_, _, err := k.create(t, podIn(namespace))
	if err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("a labelled pod without an injector: %v", err)
	}
	k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Labels = nil }))
	k.inject(t)
	k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Name = "later" }))
}

func TestPodSecurity(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "restricted")
	k.mustCreate(t, podIn(namespace))
	privileged := func(p *corev1.Pod) { p.Name, p.Annotations["byokd.io/mount-mode"] = "privileged", "privileged" }
	if _, _, err := k.create(t, podIn(namespace, privileged)); err == nil || !strings.Contains(err.Error(), "PodSecurity") {
		t.Errorf("a privileged sidecar in a restricted namespace: %v", err)
	}
	p := k.mustCreate(t, podIn(k.namespace(t, "privileged"), privileged))
	if rules := sidecarOf(p).RestartPolicyRules; len(rules) != 1 || rules[0].Action != corev1.ContainerRestartRuleActionRestartAllContainers {
		t.Errorf("this API server knows the rule that restarts all containers, and it is not there: %+v", rules)
	}
}

// What `byokd render` writes and what the webhook makes are one, and the webhook changes nothing more.
func TestRenderedIsInjected(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	for _, mode := range []string{"csi", "privileged"} {
		edit := func(p *corev1.Pod) {
			p.Name, p.Annotations["byokd.io/mount-mode"] = mode, mode
			p.Spec.Containers[0].VolumeMounts[0].SubPath = "sub"
			p.Spec.InitContainers = []corev1.Container{{Name: "init", Image: "i:1", SecurityContext: p.Spec.Containers[0].SecurityContext, VolumeMounts: p.Spec.Containers[0].VolumeMounts}}
		}
		live := k.mustCreate(t, podIn(namespace, edit))
		rendered := k.mustCreate(t, k.render(t, podIn(namespace, edit, func(p *corev1.Pod) { p.Name = mode + "-rendered" })))
		if !equality.Semantic.DeepEqual(live.Spec, rendered.Spec) {
			t.Errorf("%s: the webhook made\n%+v\nrender\n%+v", mode, live.Spec, rendered.Spec)
		}
		again := k.mustCreate(t, bare(live, mode+"-again"))
		if !equality.Semantic.DeepEqual(live.Spec, again.Spec) {
			t.Errorf("%s: a second pass made\n%+v\nof\n%+v", mode, again.Spec, live.Spec)
		}
	}
}

// bare is a pod as somebody would create it once more.
func bare(p *corev1.Pod, name string) *corev1.Pod {
	p = p.DeepCopy()
	p.ObjectMeta = metav1.ObjectMeta{Name: name, Namespace: p.Namespace, Labels: p.Labels, Annotations: p.Annotations}
	p.Status = corev1.PodStatus{}
	return p
}

// Two replicas that begin at once share one certificate; a Secret that is emptied is filled again.
func TestReplicasShareTheirCertificate(t *testing.T) {
	k := cluster(t)
	first, second := k.startInjector(t), k.startInjector(t)
	if a, b := certificateOf(t, first.webhook), certificateOf(t, second.webhook); !bytes.Equal(a, b) {
		t.Error("two certificates")
	}
	namespace := k.namespace(t, "")
	for n, i := range []*injector{first, second} {
		k.pointAt(t, i)
		k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Name = "db-" + string(rune('0'+n)) }))
	}
	before := certificateOf(t, second.webhook)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "byokd-inject-tls", Namespace: "byokd-system"}}
	if err := k.client.Patch(t.Context(), secret, client.RawPatch("application/merge-patch+json", []byte(`{"data":null}`))); err != nil {
		t.Fatal(err)
	}
	until(t, "both take up a new certificate", func() bool {
		a, b := certificateOf(t, first.webhook), certificateOf(t, second.webhook)
		return bytes.Equal(a, b) && !bytes.Equal(a, before)
	})
	until(t, "the API server trusts it", func() bool { return k.try(t, podIn(namespace, func(p *corev1.Pod) { p.Name = "after" })) == nil })
}

// The examples of the manual are taken by the API server as they are, and their pods, in a restricted namespace.
func TestExamples(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	for _, name := range []string{"zeebe", "elasticsearch", "try/notebook"} {
		t.Run(name, func(t *testing.T) {
			namespace := k.namespace(t, "restricted")
			objects, err := readObjects("../../deploy/examples/" + name + ".yaml")
			if err != nil {
				t.Fatal(err)
			}
			strict := client.WithFieldValidation(k.client, metav1.FieldValidationStrict)
			sets := 0
			for _, o := range objects {
				if o.GetNamespace() != "" {
					o.SetNamespace(namespace)
				}
				if o.GetKind() == "Namespace" {
					if level := o.GetLabels()["pod-security.kubernetes.io/enforce"]; level != "restricted" && level != "" {
						t.Errorf("the example's namespace is %s", level)
					}
					continue
				}
				if o.GetKind() == "StatefulSet" {
					set := &appsv1.StatefulSet{}
					if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, set); err != nil {
						t.Fatal(err)
					}
					sets++
					k.podOf(t, set, namespace)
				}
				if err := strict.Create(t.Context(), o, client.DryRunAll); err != nil {
					t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
			}
			if sets == 0 {
				t.Error("no StatefulSet")
			}
		})
	}
}

// podOf creates the first pod of a StatefulSet, as its controller would.
func (k *kube) podOf(t *testing.T, set *appsv1.StatefulSet, namespace string) {
	t.Helper()
	p := &corev1.Pod{ObjectMeta: *set.Spec.Template.ObjectMeta.DeepCopy(), Spec: *set.Spec.Template.Spec.DeepCopy()}
	p.Name, p.Namespace, p.Spec.Subdomain = set.Name+"-0", namespace, set.Spec.ServiceName
	for _, claim := range set.Spec.VolumeClaimTemplates {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: claim.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim.Name + "-" + p.Name}}})
	}
	out, told, err := k.create(t, p)
	if err != nil {
		t.Error(err)
		return
	}
	if sidecarOf(out) == nil {
		t.Error("not injected")
	}
	if len(told) > 0 {
		t.Errorf("an example that is warned about: %q", told)
	}
}
