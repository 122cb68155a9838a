package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"go.uber.org/zap"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
)

// Objects names what the injector reads and writes in its cluster.
type Objects struct {
	Namespace string // of the Secret
	Secret    string
	Webhook   string // MutatingWebhookConfiguration
}

// Kube is a Kubernetes API server, as Store and as Cluster. It is made of REST clients for the few kinds that are
// needed: the clients of all kinds would cost every byokd tens of MiB.
type Kube struct {
	objects      Objects
	core         *rest.RESTClient
	registration *rest.RESTClient
	scheme       *runtime.Scheme
	broadcaster  record.EventBroadcaster
	recorder     record.EventRecorder
}

// NewKube connects to an API server. Close ends it.
func NewKube(config *rest.Config, objects Objects, log *zap.Logger) (*Kube, error) {
	k, err := newKubeClients(config)
	if err != nil {
		return nil, err
	}
	k.objects = objects
	// It drops what is too much: ten Events at once for each object, then one in five minutes.
	k.broadcaster = record.NewBroadcasterWithCorrelatorOptions(record.CorrelatorOptions{BurstSize: 10})
	k.broadcaster.StartRecordingToSink(eventSink{k.core, log})
	k.recorder = k.broadcaster.NewRecorder(k.scheme, corev1.EventSource{Component: "byokd-inject"})
	return k, nil
}

// newKubeClients makes the clients alone, for requests that need no Events.
func newKubeClients(config *rest.Config) (*Kube, error) {
	k := &Kube{scheme: runtime.NewScheme()}
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, admissionregistrationv1.AddToScheme} {
		if err := add(k.scheme); err != nil {
			return nil, err
		}
	}
	codecs := serializer.NewCodecFactory(k.scheme).WithoutConversion()
	client := func(apiPath string, group schema.GroupVersion) (*rest.RESTClient, error) {
		c := rest.CopyConfig(config)
		c.APIPath, c.GroupVersion, c.NegotiatedSerializer = apiPath, &group, codecs
		return rest.RESTClientFor(c)
	}
	var err error
	if k.core, err = client("/api", corev1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	k.registration, err = client("/apis", admissionregistrationv1.SchemeGroupVersion)
	return k, err
}

// Close ends the writing of Events.
func (k *Kube) Close() { k.broadcaster.Shutdown() }

// Version asks the API server which Kubernetes it is.
func (k *Kube) Version(ctx context.Context) (string, error) {
	text, err := k.core.Get().AbsPath("/version").DoRaw(ctx)
	if err != nil {
		return "", err
	}
	var info version.Info
	if err := json.Unmarshal(text, &info); err != nil {
		return "", err
	}
	return info.GitVersion, nil
}

// Service is Cluster's.
func (k *Kube) Service(ctx context.Context, namespace, name string) (*corev1.Service, error) {
	service := &corev1.Service{}
	err := k.core.Get().Namespace(namespace).Resource("services").Name(name).Do(ctx).Into(service)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return service, nil
}

// Tell is Cluster's.
func (k *Kube) Tell(about *corev1.ObjectReference, kind, reason, text string) {
	k.recorder.Event(about, kind, reason, text)
}

// Certificates is Store's.
func (k *Kube) Certificates(ctx context.Context) (map[string][]byte, string, error) {
	secret := &corev1.Secret{}
	err := k.core.Get().Namespace(k.objects.Namespace).Resource("secrets").Name(k.objects.Secret).Do(ctx).Into(secret)
	if apierrors.IsNotFound(err) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", fmt.Errorf("the Secret %s/%s: %w", k.objects.Namespace, k.objects.Secret, err)
	}
	return secret.Data, secret.ResourceVersion, nil
}

// SetCertificates is Store's. It changes the data alone: labels and owner are those of whoever made the Secret.
func (k *Kube) SetCertificates(ctx context.Context, data map[string][]byte, version string) error {
	secrets := func(r *rest.Request) *rest.Request { return r.Namespace(k.objects.Namespace).Resource("secrets") }
	var err error
	if version == "" {
		err = secrets(k.core.Post()).Body(&corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
			ObjectMeta: metav1.ObjectMeta{Name: k.objects.Secret, Namespace: k.objects.Namespace}, Type: corev1.SecretTypeOpaque, Data: data}).Do(ctx).Error()
		if apierrors.IsAlreadyExists(err) {
			return ErrConflict
		}
	} else {
		patch, marshalErr := json.Marshal([]Operation{
			{"test", "/metadata/resourceVersion", version}, {"add", "/data", data}})
		if marshalErr != nil {
			return marshalErr
		}
		err = secrets(k.core.Patch(types.JSONPatchType)).Name(k.objects.Secret).Body(patch).Do(ctx).Error()
	}
	return k.failed("the Secret "+k.objects.Namespace+"/"+k.objects.Secret, err)
}

// Trust is Store's.
func (k *Kube) Trust(ctx context.Context) ([]byte, string, error) {
	configuration, err := k.webhooks(ctx)
	if err != nil {
		return nil, "", err
	}
	if len(configuration.Webhooks) == 0 {
		return nil, "", fmt.Errorf("the MutatingWebhookConfiguration %s has no webhooks", k.objects.Webhook)
	}
	bundle := configuration.Webhooks[0].ClientConfig.CABundle
	for _, w := range configuration.Webhooks {
		if !bytes.Equal(w.ClientConfig.CABundle, bundle) {
			bundle = nil
		}
	}
	return bundle, configuration.ResourceVersion, nil
}

func (k *Kube) webhooks(ctx context.Context) (*admissionregistrationv1.MutatingWebhookConfiguration, error) {
	configuration := &admissionregistrationv1.MutatingWebhookConfiguration{}
	err := k.registration.Get().Resource("mutatingwebhookconfigurations").Name(k.objects.Webhook).Do(ctx).Into(configuration)
	if err != nil {
		return nil, fmt.Errorf("the MutatingWebhookConfiguration %s: %w", k.objects.Webhook, err)
	}
	return configuration, nil
}

// SetTrust is Store's.
func (k *Kube) SetTrust(ctx context.Context, bundle []byte, version string) error {
	configuration, err := k.webhooks(ctx)
	if err != nil {
		return err
	}
	patch := []Operation{{"test", "/metadata/resourceVersion", version}}
	for i := range configuration.Webhooks {
		patch = append(patch, Operation{"add", fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i), bundle})
	}
	text, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	err = k.registration.Patch(types.JSONPatchType).Resource("mutatingwebhookconfigurations").Name(k.objects.Webhook).Body(text).Do(ctx).Error()
	return k.failed("the MutatingWebhookConfiguration "+k.objects.Webhook, err)
}

// failed translates the answer to a write. The test of a version that fails is Invalid.
func (k *Kube) failed(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsConflict(err), apierrors.IsInvalid(err):
		return fmt.Errorf("%s: %w (%w)", what, ErrConflict, err)
	}
	return fmt.Errorf("%s cannot be written: %w", what, err)
}

// eventSink writes the Events of core/v1.
type eventSink struct {
	core *rest.RESTClient
	log  *zap.Logger
}

func (s eventSink) request(r *rest.Request, e *corev1.Event) *rest.Request {
	return r.Namespace(e.Namespace).Resource("events")
}

func (s eventSink) finish(r *rest.Request) (*corev1.Event, error) {
	out := &corev1.Event{}
	if err := r.Do(context.Background()).Into(out); err != nil {
		s.log.Warn("an Event cannot be written", zap.Error(err))
		return nil, err
	}
	return out, nil
}

func (s eventSink) Create(e *corev1.Event) (*corev1.Event, error) {
	return s.finish(s.request(s.core.Post(), e).Body(e))
}

func (s eventSink) Update(e *corev1.Event) (*corev1.Event, error) {
	return s.finish(s.request(s.core.Put(), e).Name(e.Name).Body(e))
}

func (s eventSink) Patch(e *corev1.Event, data []byte) (*corev1.Event, error) {
	return s.finish(s.request(s.core.Patch(types.StrategicMergePatchType), e).Name(e.Name).Body(data))
}
