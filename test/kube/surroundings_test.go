package kube

import (
	"crypto/tls"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// administrator writes a kubeconfig with all rights.
func (k *kube) administrator(t *testing.T) string {
	t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: k.config.Host, CertificateAuthorityData: k.config.CAData}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: k.config.CertData, ClientKeyData: k.config.KeyData}
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// statefulSet makes one; nobody makes its pods here.
func (k *kube) statefulSet(t *testing.T, namespace string) *appsv1.StatefulSet {
	t.Helper()
	labels := map[string]string{"app": "db"}
	p := podIn(namespace)
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: namespace},
		Spec: appsv1.StatefulSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: p.Spec}}}
	if err := k.client.Create(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	return set
}

func ownedBy(set *appsv1.StatefulSet) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(set, appsv1.SchemeGroupVersion.WithKind("StatefulSet"))}
	}
}

// events are those of a StatefulSet, as kubectl describe finds them.
func (k *kube) events(t *testing.T, set *appsv1.StatefulSet) (all []corev1.Event) {
	t.Helper()
	var list corev1.EventList
	if err := k.client.List(t.Context(), &list, client.InNamespace(set.Namespace)); err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Items {
		if e.InvolvedObject.UID == set.UID && e.InvolvedObject.Name == set.Name {
			all = append(all, e)
		}
	}
	return all
}

// certificateOf is what a listener presents, whoever made it.
func certificateOf(t *testing.T, address string) []byte {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].Raw
}
