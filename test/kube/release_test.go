package kube

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/release"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	chartDir = "../../deploy/helm/byokd"
	system   = "byokd-system"
)

// helm is Helm, with all rights in a cluster. Nothing becomes ready here, so nothing is waited for.
type helm struct {
	*kube
	kubeconfig, cache string
	address           string // of injectors: that of a Service cannot be one of loopback
}

// newHelm starts an API server that is its alone: releases share names of the whole cluster with the manifests of the other
// tests. It reaches webhooks by their Services, as in a cluster.
func newHelm(t *testing.T) *helm {
	t.Helper()
	address := ownAddress(t)
	missing := available()
	if missing == "" && address == "" {
		missing = "this machine has no IPv4 address but that of loopback: no Service can lead to it"
	}
	skipFor(t, missing)
	k := &kube{}
	t.Cleanup(func() {
		if err := k.stop(); err != nil {
			t.Error(err)
		}
	})
	if err := k.boot("enable-aggregator-routing"); err != nil {
		t.Fatal(err)
	}
	return &helm{kube: k, kubeconfig: k.administrator(t), cache: t.TempDir(), address: address}
}

// configuration is that of one command: a new one knows what the one before has changed.
func (h *helm) configuration(t *testing.T) *action.Configuration {
	t.Helper()
	namespace := system
	flags := genericclioptions.NewConfigFlags(false)
	flags.KubeConfig, flags.Namespace, flags.CacheDir = &h.kubeconfig, &namespace, &h.cache
	c := &action.Configuration{}
	if err := c.Init(flags, system, "secret", func(string, ...any) {}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (h *helm) install(t *testing.T, name string, values map[string]any, edits ...func(*action.Install)) (*release.Release, error) {
	t.Helper()
	chart, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	install := action.NewInstall(h.configuration(t))
	install.ReleaseName, install.Namespace, install.CreateNamespace = name, system, true
	for _, edit := range edits {
		edit(install)
	}
	return install.RunWithContext(t.Context(), chart, values)
}

func (h *helm) mustInstall(t *testing.T, name string, values map[string]any, edits ...func(*action.Install)) *release.Release {
	t.Helper()
	r, err := h.install(t, name, values, edits...)
	if err != nil {
		t.Fatalf("helm install: %v", err)
	}
	h.isDeployed(t, r)
	return r
}

func (h *helm) upgrade(t *testing.T, name string, values map[string]any, edits ...func(*action.Upgrade)) *release.Release {
	t.Helper()
	chart, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	upgrade := action.NewUpgrade(h.configuration(t))
	upgrade.Namespace = system
	for _, edit := range edits {
		edit(upgrade)
	}
	r, err := upgrade.RunWithContext(t.Context(), name, chart, values)
	if err != nil {
		t.Fatalf("helm upgrade: %v", err)
	}
	h.isDeployed(t, r)
	return r
}

func (h *helm) rollback(t *testing.T, name string, revision int) *release.Release {
	t.Helper()
	c := h.configuration(t)
	rollback := action.NewRollback(c)
	rollback.Version = revision
	if err := rollback.Run(name); err != nil {
		t.Fatalf("helm rollback: %v", err)
	}
	r, err := c.Releases.Deployed(name)
	if err != nil {
		t.Fatal(err)
	}
	h.isDeployed(t, r)
	return r
}

// uninstall returns what Helm says at the end.
func (h *helm) uninstall(t *testing.T, name string) string {
	t.Helper()
	response, err := action.NewUninstall(h.configuration(t)).Run(name)
	if err != nil {
		t.Fatalf("helm uninstall: %v", err)
	}
	return response.Info
}

// test is `helm test`, with a kubelet for its pod.
func (h *helm) test(t *testing.T, name string) error {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.runTestPod(ctx, t) }()
	defer func() { stop(); <-done }()
	test := action.NewReleaseTesting(h.configuration(t))
	test.Namespace, test.Timeout = system, patience
	_, err := test.Run(name)
	return err
}

// runTestPod waits for a pod of `helm test` and runs what it says, with its rights.
func (h *helm) runTestPod(ctx context.Context, t *testing.T) {
	pods := h.clients.CoreV1().Pods(system)
	list, err := pods.Watch(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=test"})
	if err != nil {
		t.Error(err)
		return
	}
	defer list.Stop()
	for event := range list.ResultChan() {
		p, ok := event.Object.(*corev1.Pod)
		if !ok || p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodPending {
			continue
		}
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, h.program, append(slices.Clone(p.Spec.Containers[0].Args), "--kubeconfig", h.kubeconfigOf(t, p.Spec.ServiceAccountName))...)
		cmd.Stdout, cmd.Stderr = &out, &out
		p.Status.Phase = corev1.PodSucceeded
		if err := cmd.Run(); err != nil {
			t.Logf("%s: %v\n%s", p.Name, err, &out)
			p.Status.Phase = corev1.PodFailed
		}
		if _, err := pods.UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
			t.Error(err)
		}
		return
	}
}

// isDeployed holds a release against the cluster: every object is there and has all that the chart says, fields that the API
// server does not know and drops included.
func (h *helm) isDeployed(t *testing.T, r *release.Release) {
	t.Helper()
	if r.Info.Status != release.StatusDeployed {
		t.Errorf("%s is %s", r.Name, r.Info.Status)
	}
	objects, err := parseObjects([]byte(r.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) < 8 {
		t.Fatalf("%d objects: the search is broken", len(objects))
	}
	for _, want := range objects {
		got := &unstructured.Unstructured{}
		got.SetGroupVersionKind(want.GroupVersionKind())
		if err := h.client.Get(t.Context(), client.ObjectKeyFromObject(want), got); err != nil {
			t.Errorf("%s %s: %v", want.GetKind(), want.GetName(), err)
			continue
		}
		if at, ok := covers(got.Object, want.Object); !ok {
			t.Errorf("%s %s: %s is not as the chart has it", want.GetKind(), want.GetName(), at)
		}
		if owner := got.GetAnnotations()["meta.helm.sh/release-name"]; owner != r.Name {
			t.Errorf("%s %s belongs to the release %q", want.GetKind(), want.GetName(), owner)
		}
	}
}

// covers tells whether everything of want is in got, and where it is not.
func covers(got, want any) (at string, ok bool) {
	switch want := want.(type) {
	case map[string]any:
		if len(want) == 0 && got == nil {
			return "", true
		}
		has, ok := got.(map[string]any)
		if !ok {
			return "", false
		}
		for name, value := range want {
			if at, ok := covers(has[name], value); !ok {
				return "." + name + at, false
			}
		}
		return "", true
	case []any:
		has, _ := got.([]any)
		if len(has) != len(want) {
			return "", false
		}
		for i, value := range want {
			if at, ok := covers(has[i], value); !ok {
				return "[" + strconv.Itoa(i) + "]" + at, false
			}
		}
		return "", true
	case nil:
		return "", true
	}
	return "", reflect.DeepEqual(got, want) || fmt.Sprint(got) == fmt.Sprint(want) // 1 of YAML and 1 of JSON
}

// inventory is everything in the cluster that has byokd in its name or lies in its namespace: kinds and names with their
// resource versions. Events and addresses of Services are the cluster's.
func (h *helm) inventory(t *testing.T) map[string]string {
	t.Helper()
	lists, err := h.clients.Discovery().ServerPreferredResources()
	if err != nil {
		t.Fatal(err)
	}
	quiet := rest.CopyConfig(h.config)
	quiet.WarningHandler = rest.NoWarnings{} // of kinds that are going to be removed
	reader, err := metadata.NewForConfig(quiet)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, list := range lists {
		group, err := schema.ParseGroupVersion(list.GroupVersion)
		if err != nil {
			t.Fatal(err)
		}
		for _, resource := range list.APIResources {
			if !slices.Contains(resource.Verbs, "list") || slices.Contains([]string{"events", "endpoints", "endpointslices"}, resource.Name) {
				continue
			}
			found, err := reader.Resource(group.WithResource(resource.Name)).List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatalf("%s: %v", resource.Name, err)
			}
			for _, o := range found.Items {
				if strings.Contains(o.Name, "byokd") || o.Namespace == system {
					all[resource.Kind+" "+o.Name] = string(o.UID) + " " + o.ResourceVersion
				}
			}
		}
	}
	return all
}

// names are what an inventory lists.
func names(inventory map[string]string) []string { return slices.Sorted(maps.Keys(inventory)) }

// unchanged compares what was there with what is there.
func unchanged(t *testing.T, before, after map[string]string) {
	t.Helper()
	for name, version := range before {
		if after[name] != version {
			t.Errorf("%s was %q, now %q", name, version, after[name])
		}
	}
}

// runDeployed starts the injector that a Deployment describes, with its arguments and rights, behind its Service. What differs:
// it listens where the API server of a test reaches it.
func (h *helm) runDeployed(t *testing.T, name string) *injector {
	t.Helper()
	d := &appsv1.Deployment{}
	if err := h.client.Get(t.Context(), client.ObjectKey{Namespace: system, Name: name}, d); err != nil {
		t.Fatal(err)
	}
	pod := d.Spec.Template.Spec
	c := pod.Containers[0]
	if c.Args[0] != "inject" {
		t.Fatalf("the Deployment runs %q", c.Args)
	}
	var args []string
	for _, arg := range c.Args[1:] {
		for _, e := range c.Env {
			arg = strings.ReplaceAll(arg, "$("+e.Name+")", e.Value)
		}
		args = append(args, arg)
	}
	i := h.runInjector(t, append(args, "--kubeconfig", h.kubeconfigOf(t, pod.ServiceAccountName), "--listen", net.JoinHostPort(h.address, "0"))...)
	h.route(t, name, i)
	return i
}

// route makes a running injector the one address of a Service.
func (h *helm) route(t *testing.T, service string, i *injector) {
	t.Helper()
	_, text, err := net.SplitHostPort(i.webhook)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	name, port, ready := "https", int32(number), true
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: service, Namespace: system, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{h.address}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}}}
	if err := h.client.Delete(t.Context(), slice.DeepCopy()); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	if err := h.client.Create(t.Context(), slice); err != nil {
		t.Fatal(err)
	}
}

// ownAddress is an address of this machine that is not loopback's, empty where there is none.
func ownAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if network, ok := a.(*net.IPNet); ok && network.IP.To4() != nil && network.IP.IsGlobalUnicast() {
			return network.IP.String()
		}
	}
	return ""
}
