package inject

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	"go.uber.org/zap"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Path is where the webhook answers.
const Path = "/inject"

// maxReview bounds a review: the API server takes objects up to 3 MiB, and sends one here.
const maxReview = 8 << 20

// serviceTimeout bounds the look at a pod's headless service, for a warning only, within the 5 s that the API server
// waits for all of it.
const serviceTimeout = time.Second

// Outcome is what became of a review.
type Outcome string

// The outcomes.
const (
	OutcomeInjected  Outcome = "injected"
	OutcomeUnchanged Outcome = "unchanged" // injected before, or not asked for
	OutcomeDenied    Outcome = "denied"
)

// Outcomes lists them.
func Outcomes() []Outcome { return []Outcome{OutcomeInjected, OutcomeUnchanged, OutcomeDenied} }

// Observer is told what happens. Its methods are called from many goroutines.
type Observer interface {
	// Reviewed is called for each review; reason is empty unless it was denied.
	Reviewed(outcome Outcome, reason Reason, took time.Duration)
	// Warned is called for each warning.
	Warned(reason Reason)
	// Certified is called when certificates are taken up: the server's and the authority's last second.
	Certified(server, authority time.Time)
	// Renewed is called after each look at the certificates; err is nil when they are in order.
	Renewed(err error)
}

// Cluster is what reviews need of the cluster.
type Cluster interface {
	// Service returns a service, nil where there is none.
	Service(ctx context.Context, namespace, name string) (*corev1.Service, error)
	// Tell writes an Event about an object; kind is corev1.EventTypeNormal or EventTypeWarning. It does not wait.
	Tell(about *corev1.ObjectReference, kind, reason, text string)
}

// Reviewer answers admission reviews. Safe for concurrent use.
type Reviewer struct {
	Settings Settings
	Cluster  Cluster
	Observer Observer
	Log      *zap.Logger
}

// ServeHTTP answers one review.
func (v *Reviewer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); kind != "application/json" {
		http.Error(w, "an admission review as application/json is expected", http.StatusUnsupportedMediaType)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	var review admissionv1.AdmissionReview
	err = json.Unmarshal(body, &review)
	if err != nil || review.Request == nil || review.APIVersion != admissionv1.SchemeGroupVersion.String() {
		http.Error(w, "not an admission review of "+admissionv1.SchemeGroupVersion.String(), http.StatusBadRequest)
		return
	}
	answer := admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: v.Review(r.Context(), review.Request)}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		v.Log.Debug("an answer was not delivered", zap.Error(err))
	}
}

// Review decides about one request.
func (v *Reviewer) Review(ctx context.Context, request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	began := time.Now()
	pod, result, err := v.mutate(request)
	answer := &admissionv1.AdmissionResponse{UID: request.UID, Allowed: true}
	if err != nil {
		reason := ReasonRequest
		var denial *Denial
		if errors.As(err, &denial) {
			reason = denial.Reason
		}
		v.Log.Info("denied", zap.String("namespace", request.Namespace), zap.String("pod", nameOf(pod)), zap.String("reason", string(reason)), zap.Error(err))
		v.tell(request, pod, corev1.EventTypeWarning, "ByokdDenied", err.Error())
		v.Observer.Reviewed(OutcomeDenied, reason, time.Since(began))
		answer.Allowed = false
		answer.Result = &metav1.Status{Status: metav1.StatusFailure, Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Message: err.Error()}
		return answer
	}
	if len(result.Patch) == 0 {
		v.Observer.Reviewed(OutcomeUnchanged, "", time.Since(began))
		return answer
	}
	patch, err := json.Marshal(result.Patch)
	if err != nil {
		panic(err) // made of Kubernetes' own types
	}
	kind := admissionv1.PatchTypeJSONPatch
	answer.Patch, answer.PatchType = patch, &kind
	for _, w := range append(result.Warnings, v.serviceWarnings(ctx, request.Namespace, pod)...) {
		answer.Warnings = append(answer.Warnings, w.Text)
		v.Observer.Warned(w.Reason)
		v.tell(request, pod, corev1.EventTypeWarning, "ByokdWarning", w.Text)
	}
	v.tell(request, pod, corev1.EventTypeNormal, "ByokdInjected", "byokd "+v.Settings.Version+" injected into "+nameOf(pod))
	v.Log.Info("injected", zap.String("namespace", request.Namespace), zap.String("pod", nameOf(pod)), zap.Strings("warnings", answer.Warnings))
	v.Observer.Reviewed(OutcomeInjected, "", time.Since(began))
	return answer
}

// mutate asks what becomes of the pod of a request. The pod is nil where there is none.
func (v *Reviewer) mutate(request *admissionv1.AdmissionRequest) (*corev1.Pod, Result, error) {
	pods := metav1.GroupVersionResource{Version: "v1", Resource: "pods"}
	if request.Resource != pods || request.SubResource != "" || request.Operation != admissionv1.Create {
		return nil, Result{}, deny(ReasonRequest, "byokd is to be asked about CREATE of pods only, not about %s of %s/%s: mend the webhook configuration",
			request.Operation, request.Resource.Resource, request.SubResource)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(request.Object.Raw, &pod); err != nil {
		return nil, Result{}, deny(ReasonRequest, "the pod cannot be read: %v", err)
	}
	wanted, err := Wanted(pod.Labels)
	if err != nil || !wanted {
		return &pod, Result{}, err
	}
	result, err := Mutate(Pod{Annotations: pod.Annotations, Spec: &pod.Spec, Name: pod.Name}, v.Settings)
	return &pod, result, err
}

// serviceWarnings looks at the service that gives the pod its DNS name. Nothing depends on it.
func (v *Reviewer) serviceWarnings(ctx context.Context, namespace string, pod *corev1.Pod) []Warning {
	if pod.Spec.Subdomain == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, serviceTimeout)
	defer cancel()
	service, err := v.Cluster.Service(ctx, namespace, pod.Spec.Subdomain)
	if err != nil {
		v.Log.Warn("a pod's headless service cannot be looked at", zap.String("namespace", namespace), zap.String("service", pod.Spec.Subdomain), zap.Error(err))
	}
	if service == nil {
		return nil
	}
	return WarnOfService(service)
}

// tell writes an Event at the pod's owner: the pod itself does not exist yet, and warnings in the answer are seen by
// the owner's controller only. A dry run leaves no trace.
func (v *Reviewer) tell(request *admissionv1.AdmissionRequest, pod *corev1.Pod, kind, reason, text string) {
	if pod == nil || request.DryRun != nil && *request.DryRun {
		return
	}
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return // whoever creates a pod by hand sees the answer itself
	}
	v.Cluster.Tell(&corev1.ObjectReference{APIVersion: owner.APIVersion, Kind: owner.Kind, Namespace: request.Namespace, Name: owner.Name, UID: owner.UID},
		kind, reason, text)
}

func nameOf(pod *corev1.Pod) string {
	switch {
	case pod == nil:
		return ""
	case pod.Name != "":
		return pod.Name
	}
	return fmt.Sprintf("%s…", pod.GenerateName)
}
