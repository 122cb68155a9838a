package kube

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// unasked is a namespace in which the webhook is not asked: there the policies stand alone, as where somebody has taken
// the webhook away or undone its work.
const unasked = "kube-system"

// Pods that would write plaintext, or could, are refused without any webhook.
func TestPoliciesRefuse(t *testing.T) {
	k := cluster(t)
	good := k.render(t, podIn(unasked))
	until(t, "the policies are in force", func() bool { return k.try(t, podIn(unasked)) != nil })
	if err := k.try(t, good); err != nil {
		t.Fatalf("a pod as it should be: %v", err)
	}
	yes := true
	sidecar := func(p *corev1.Pod) *corev1.Container { return &p.Spec.InitContainers[0] }
	mount := func(name string) []corev1.VolumeMount { return []corev1.VolumeMount{{Name: name, MountPath: "/x"}} }
	for name, c := range map[string]struct {
		edit func(*corev1.Pod)
		says string
	}{
		"no sidecar": {func(p *corev1.Pod) { p.Spec.InitContainers = nil }, "no sidecar byokd"},
		"sidecar among the containers": {func(p *corev1.Pod) {
			c := *sidecar(p)
			c.RestartPolicy, c.RestartPolicyRules = nil, nil
			p.Spec.Containers, p.Spec.InitContainers = append(p.Spec.Containers, c), nil
		}, "no sidecar byokd"},
		"restartPolicy stripped": {func(p *corev1.Pod) {
			c := sidecar(p)
			c.RestartPolicy, c.RestartPolicyRules, c.StartupProbe, c.ReadinessProbe, c.LivenessProbe = nil, nil, nil, nil, nil
		}, "has lost its restartPolicy"},
		"no startup probe":             {func(p *corev1.Pod) { sidecar(p).StartupProbe = nil }, "no startupProbe"},
		"another program":              {func(p *corev1.Pod) { sidecar(p).Command = []string{"sleep"} }, "does not run byokd"},
		"another command":              {func(p *corev1.Pod) { sidecar(p).Args = []string{"version"} }, "does not run byokd"},
		"no sealed volume":             {func(p *corev1.Pod) { sidecar(p).VolumeMounts[2].MountPath = "/elsewhere" }, "no volume at /sealed"},
		"a container mounts the claim": {func(p *corev1.Pod) { p.Spec.Containers[0].VolumeMounts = mount("data") }, "a container besides byokd mounts the sealed volume"},
		"by a part of it": {func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeMounts = mount("data")
			p.Spec.Containers[0].VolumeMounts[0].SubPath = "a"
		}, "a container besides byokd mounts the sealed volume"},
		"read-only": {func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeMounts = mount("data")
			p.Spec.Containers[0].VolumeMounts[0].ReadOnly = true
		}, "a container besides byokd mounts the sealed volume"},
		"an init container does": {func(p *corev1.Pod) {
			p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: "restore", Image: "r", VolumeMounts: mount("data")})
		}, "a container besides byokd mounts the sealed volume"},
		"another sidecar does": {func(p *corev1.Pod) {
			p.Spec.InitContainers = append([]corev1.Container{{Name: "early", Image: "r", RestartPolicy: sidecar(p).RestartPolicy, VolumeMounts: mount("data")}}, p.Spec.InitContainers...)
		}, "a container besides byokd mounts the sealed volume"},
		"as a device": {func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeDevices = []corev1.VolumeDevice{{Name: "data", DevicePath: "/dev/x"}}
		}, "as a device"},
		"by a second volume": {func(p *corev1.Pod) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "again", VolumeSource: p.Spec.Volumes[0].VolumeSource})
			p.Spec.Containers[0].VolumeMounts = mount("again")
		}, "another volume of the pod is the sealed claim"},
		"byokd's sockets":      {func(p *corev1.Pod) { p.Spec.Containers[0].VolumeMounts = mount("byokd-run") }, "byokd-config or byokd-run"},
		"byokd's credentials":  {func(p *corev1.Pod) { p.Spec.Containers[0].VolumeMounts = mount("byokd-config") }, "byokd-config or byokd-run"},
		"shared processes":     {func(p *corev1.Pod) { p.Spec.ShareProcessNamespace = &yes }, "reach into byokd"},
		"the node's processes": {func(p *corev1.Pod) { p.Spec.HostPID = true }, "reach into byokd"},
		"a label with a typo":  {func(p *corev1.Pod) { p.Labels["byokd.io/inject"] = "True" }, `the label byokd.io/inject is "True"`},
		"a forgotten label":    {func(p *corev1.Pod) { p.Labels = nil }, "not the label byokd.io/inject"},
		"other annotations": {func(p *corev1.Pod) {
			p.Annotations = map[string]string{"byokd.io/volume": "other", "byokd.io/injected": "v9"}
			p.Spec.Containers[0].VolumeMounts = mount("data")
		}, "a container besides byokd mounts the sealed volume"},
	} {
		t.Run(name, func(t *testing.T) {
			p := good.DeepCopy()
			c.edit(p)
			if err := k.try(t, p); err == nil || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy") || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
		})
	}
	for name, edit := range map[string]func(*corev1.Pod){
		"not wanted": func(p *corev1.Pod) {
			*p = *podIn(unasked, func(p *corev1.Pod) { p.Labels["byokd.io/inject"] = "false" })
		},
		"a mesh's init container before it": func(p *corev1.Pod) {
			p.Spec.InitContainers = append([]corev1.Container{{Name: "mesh-init", Image: "m"}}, p.Spec.InitContainers...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := good.DeepCopy()
			edit(p)
			if err := k.try(t, p); err != nil {
				t.Error(err)
			}
		})
	}
}

// A pod that runs does not get past its sidecar either.
func TestPoliciesHoldRunningPods(t *testing.T) {
	k := cluster(t)
	k.inject(t)
	namespace := k.namespace(t, "")
	p := k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Finalizers = []string{"example.com/wait"} }))
	pods := k.clients.CoreV1().Pods(namespace)

	t.Run("debug", func(t *testing.T) {
		for name, c := range map[string]struct {
			debug corev1.EphemeralContainer
			says  string // nothing: it passes
		}{
			"mounts the claim":        {debugger(func(c *corev1.EphemeralContainer) { c.VolumeMounts[0].Name = "data" }), "an ephemeral container mounts the sealed volume"},
			"mounts byokd's sockets":  {debugger(func(c *corev1.EphemeralContainer) { c.VolumeMounts[0].Name = "byokd-run" }), "an ephemeral container mounts the sealed volume"},
			"is in byokd's processes": {debugger(func(c *corev1.EphemeralContainer) { c.TargetContainerName = "byokd" }), "in the processes of byokd"},
			"uses it as a device": {debugger(func(c *corev1.EphemeralContainer) {
				c.VolumeMounts, c.VolumeDevices = nil, []corev1.VolumeDevice{{Name: "data", DevicePath: "/dev/x"}}
			}), "as a device"},
			"looks at the plain files": {debugger(func(c *corev1.EphemeralContainer) { c.TargetContainerName = "db" }), ""},
		} {
			t.Run(name, func(t *testing.T) {
				now, err := pods.Get(t.Context(), p.Name, metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				c.debug.Name = "debug-" + strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), "'", "")
				now.Spec.EphemeralContainers = append(now.Spec.EphemeralContainers, c.debug)
				_, err = pods.UpdateEphemeralContainers(t.Context(), p.Name, now, metav1.UpdateOptions{})
				if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
					t.Errorf("%v", err)
				}
			})
		}
	})

	update := func(edit func(*corev1.Pod)) error {
		now := &corev1.Pod{}
		if err := k.client.Get(t.Context(), client.ObjectKeyFromObject(p), now); err != nil {
			t.Fatal(err)
		}
		edit(now)
		return k.client.Update(t.Context(), now)
	}
	for name, edit := range map[string]func(*corev1.Pod){
		"the label is taken away": func(p *corev1.Pod) { delete(p.Labels, "byokd.io/inject") },
		"the label is changed":    func(p *corev1.Pod) { p.Labels["byokd.io/inject"] = "false" },
		"another sidecar image":   func(p *corev1.Pod) { p.Spec.InitContainers[0].Image = "evil" },
	} {
		t.Run(name, func(t *testing.T) {
			if err := update(edit); err == nil || !strings.Contains(err.Error(), "stays as it is") {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("annotations do not open it", func(t *testing.T) {
		if err := update(func(p *corev1.Pod) { p.Annotations["byokd.io/volume"] = "other" }); err != nil {
			t.Fatal(err)
		}
		now, err := pods.Get(t.Context(), p.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		now.Spec.EphemeralContainers = append(now.Spec.EphemeralContainers, debugger(func(c *corev1.EphemeralContainer) { c.Name, c.VolumeMounts[0].Name = "late", "data" }))
		if _, err := pods.UpdateEphemeralContainers(t.Context(), p.Name, now, metav1.UpdateOptions{}); err == nil {
			t.Error("the claim was mounted")
		}
	})
	t.Run("a label that comes late", func(t *testing.T) {
		plain := k.mustCreate(t, podIn(namespace, func(p *corev1.Pod) { p.Name, p.Labels = "plain", nil }))
		plain.Labels = map[string]string{"byokd.io/inject": "true"}
		if err := k.client.Update(t.Context(), plain); err == nil || !strings.Contains(err.Error(), "stays as it is") {
			t.Errorf("%v", err)
		}
	})
	t.Run("everyday updates pass", func(t *testing.T) {
		for name, edit := range map[string]func(*corev1.Pod){
			"image of the application": func(p *corev1.Pod) { p.Spec.Containers[0].Image = "db:2" },
			"labels of others":         func(p *corev1.Pod) { p.Labels["example.com/a"] = "b" },
			"the end of a finalizer":   func(p *corev1.Pod) { p.Finalizers = nil },
		} {
			if err := update(edit); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func debugger(edit func(*corev1.EphemeralContainer)) corev1.EphemeralContainer {
	c := corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Image: "busybox", VolumeMounts: []corev1.VolumeMount{{Name: "byokd-mount", MountPath: "/x"}}}}
	edit(&c)
	return c
}
