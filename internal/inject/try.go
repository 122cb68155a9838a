package inject

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// LabelRevision, on a pod with byokd's label, names the injector that is to be asked, where there are several.
const LabelRevision = Prefix + "revision"

// trialName is that of the pods of a trial, and what nothing in a cluster is called.
const trialName = "byokd-trial"

// Trial is one thing that has been tried, and how it went: nil when as it should.
type Trial struct {
	What string
	Err  error
}

// Try asks an API server, by dry run, what becomes of pods in a namespace: it creates nothing and needs the right to
// create pods there. A revision names the injector to ask, empty the one without a name.
func Try(ctx context.Context, config *rest.Config, namespace, revision string) ([]Trial, error) {
	kube, err := newKubeClients(config)
	if err != nil {
		return nil, err
	}
	dryRun := func(pod *corev1.Pod) (*corev1.Pod, error) {
		created := &corev1.Pod{}
		err := kube.core.Post().Namespace(namespace).Resource("pods").Param("dryRun", metav1.DryRunAll).Body(pod).Do(ctx).Into(created)
		return created, err
	}
	return []Trial{
		{"a labelled pod gets the sidecar", tryInjection(dryRun, trialPod(namespace, revision, nil))},
		{"a misspelt annotation is denied by the webhook", tryRefusal(dryRun, trialPod(namespace, revision, map[string]string{Prefix + "trial": ""}), "byokd.io/trial is unknown")},
		{"a labelled pod without the sidecar is denied by the policy", tryRefusal(dryRun, trialPod(namespace, "no-such-revision-"+trialName, nil), "no sidecar byokd")},
	}, nil
}

type dryRun func(*corev1.Pod) (*corev1.Pod, error)

func tryInjection(create dryRun, pod *corev1.Pod) error {
	created, err := create(pod)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(created.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == SidecarName }) {
		return fmt.Errorf("it comes out as it went in: no webhook was asked. Is the namespace %s excluded? kubectl get mutatingwebhookconfiguration byokd-inject -o yaml", pod.Namespace)
	}
	return nil
}

// tryRefusal wants a pod to be refused, and for this cause: a refusal for another proves nothing.
func tryRefusal(create dryRun, pod *corev1.Pod, cause string) error {
	_, err := create(pod)
	switch {
	case err == nil:
		return fmt.Errorf("it would be created")
	case !strings.Contains(err.Error(), cause):
		return fmt.Errorf("it is denied, but for another cause: %w", err)
	}
	return nil
}

// trialPod is one that Pod Security restricted allows.
func trialPod(namespace, revision string, annotations map[string]string) *corev1.Pod {
	yes, no := true, false
	labels := map[string]string{LabelInject: "true"}
	if revision != "" {
		labels[LabelRevision] = revision
	}
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: trialName, Namespace: namespace, Labels: labels, Annotations: annotations},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken: &no,
			SecurityContext:              &corev1.PodSecurityContext{RunAsNonRoot: &yes, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Containers: []corev1.Container{{
				Name: "trial", Image: "byokd.invalid/" + trialName,
				VolumeMounts:    []corev1.VolumeMount{{Name: "data", MountPath: "/data"}},
				SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
				Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1m"), corev1.ResourceMemory: resource.MustParse("1Mi")},
					Limits:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1m"), corev1.ResourceMemory: resource.MustParse("1Mi")},
				},
			}},
			Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: trialName}}}},
		},
	}
}
