package inject

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// observed remembers what an Observer is told.
type observed struct {
	mu       sync.Mutex
	reviews  []string
	warnings []Reason
}

func (o *observed) Reviewed(outcome Outcome, reason Reason, _ time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reviews = append(o.reviews, strings.TrimSpace(string(outcome)+" "+string(reason)))
}

func (o *observed) Warned(reason Reason) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.warnings = append(o.warnings, reason)
}
func (o *observed) Certified(time.Time, time.Time) {}
func (o *observed) Renewed(error)                  {}

// headless answers about one service, or fails.
type headless struct {
	*cluster
	service *corev1.Service
	err     error
}

func (h *headless) Service(context.Context, string, string) (*corev1.Service, error) {
	return h.service, h.err
}

func (h *headless) Tell(about *corev1.ObjectReference, kind, reason, _ string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, about.Kind+" "+about.Name+" "+kind+" "+reason)
}

// owned makes the pod one of a StatefulSet.
func owned(p *corev1.Pod) {
	yes := true
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", UID: "u", Controller: &yes}}
}

func requestFor(t *testing.T, p *corev1.Pod) *admissionv1.AdmissionRequest {
	t.Helper()
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return &admissionv1.AdmissionRequest{UID: "1", Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"}, Operation: admissionv1.Create,
		Namespace: "ns", Object: runtime.RawExtension{Raw: raw}}
}

func TestReview(t *testing.T) {
	yes := true
	liveness := func(p *corev1.Pod) { p.Spec.Containers[0].LivenessProbe = &corev1.Probe{} }
	subdomain := func(p *corev1.Pod) { p.Spec.Subdomain = "db" }
	closed := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "db"}, Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}}
	for _, c := range []struct {
		name     string
		pod      *corev1.Pod
		edit     func(*admissionv1.AdmissionRequest)
		service  *corev1.Service
		err      error
		review   string
		warnings []Reason
		events   []string
	}{
		{name: "injected", pod: podOf(owned), review: "injected", events: []string{"StatefulSet db Normal ByokdInjected"}},
		{name: "by hand", pod: podOf(), review: "injected"},
		{name: "warned", pod: podOf(owned, liveness), review: "injected", warnings: []Reason{ReasonLivenessProbe},
			events: []string{"StatefulSet db Warning ByokdWarning", "StatefulSet db Normal ByokdInjected"}},
		{name: "headless service", pod: podOf(subdomain), service: closed, review: "injected", warnings: []Reason{ReasonHeadlessService}},
		{name: "no such service", pod: podOf(subdomain), review: "injected"},
		{name: "services cannot be read", pod: podOf(subdomain), err: errors.New("forbidden"), review: "injected"},
		{name: "denied", pod: podOf(owned, annotated("byokd.io/x", "")), review: "denied unknown_annotation", events: []string{"StatefulSet db Warning ByokdDenied"}},
		{name: "dry run", pod: podOf(owned, liveness), edit: func(r *admissionv1.AdmissionRequest) { r.DryRun = &yes }, review: "injected", warnings: []Reason{ReasonLivenessProbe}},
		{name: "no label", pod: podOf(func(p *corev1.Pod) { p.Labels = nil }), review: "unchanged"},
		{name: "label with a typo", pod: podOf(func(p *corev1.Pod) { p.Labels[LabelInject] = "ture" }), review: "denied label"},
		{name: "update", pod: podOf(), edit: func(r *admissionv1.AdmissionRequest) { r.Operation = admissionv1.Update }, review: "denied request"},
		{name: "subresource", pod: podOf(), edit: func(r *admissionv1.AdmissionRequest) { r.SubResource = "ephemeralcontainers" }, review: "denied request"},
		{name: "another resource", pod: podOf(), edit: func(r *admissionv1.AdmissionRequest) { r.Resource.Resource = "deployments" }, review: "denied request"},
		{name: "no pod", pod: podOf(), edit: func(r *admissionv1.AdmissionRequest) { r.Object.Raw = []byte(`{"spec":3}`) }, review: "denied request"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, o := &headless{&cluster{}, c.service, c.err}, &observed{}
			r := requestFor(t, c.pod)
			if c.edit != nil {
				c.edit(r)
			}
			v := &Reviewer{Settings: settings(), Cluster: h, Observer: o, Log: zap.NewNop()}
			got := v.Review(t.Context(), r)
			if !slices.Equal(o.reviews, []string{c.review}) || !slices.Equal(o.warnings, c.warnings) || !slices.Equal(h.events, c.events) {
				t.Errorf("%q %q %q", o.reviews, o.warnings, h.events)
			}
			if got.UID != r.UID || got.Allowed == strings.HasPrefix(c.review, "denied") || len(got.Warnings) != len(c.warnings) || (len(got.Patch) > 0) != (c.review == "injected") {
				t.Errorf("%+v", got)
			}
			if !got.Allowed && got.Result.Message == "" {
				t.Error("denied without a word")
			}
		})
	}
}

func TestReviewsOverHTTP(t *testing.T) {
	v := &Reviewer{Settings: settings(), Cluster: &headless{cluster: &cluster{}}, Observer: &observed{}, Log: zap.NewNop()}
	server := httptest.NewServer(v)
	defer server.Close()
	review, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Request: requestFor(t, podOf())})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, kind string
		body       []byte
		status     int
	}{
		{"a review", "application/json", review, 200},
		{"a charset", "application/json; charset=utf-8", review, 200},
		{"text", "text/plain", review, 415},
		{"no JSON", "application/json", []byte("{"), 400},
		{"no request", "application/json", []byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`), 400},
		{"an old version", "application/json", bytes.Replace(review, []byte("k8s.io/v1"), []byte("k8s.io/v1beta1"), 1), 400},
		{"too large", "application/json", append(review[:len(review)-1:len(review)-1], bytes.Repeat([]byte(" "), maxReview)...), 413},
	} {
		t.Run(c.name, func(t *testing.T) {
			answer, err := http.Post(server.URL, c.kind, bytes.NewReader(c.body))
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			if answer.StatusCode != c.status {
				t.Fatal(answer.Status)
			}
			var got admissionv1.AdmissionReview
			if c.status == 200 && (json.NewDecoder(answer.Body).Decode(&got) != nil || got.Response == nil || !got.Response.Allowed || got.Kind != "AdmissionReview" || got.Response.UID != "1") {
				t.Errorf("%+v", got)
			}
		})
	}
}

// A review of anything ends in an answer, and one that lets a labelled pod pass leaves no path past the sidecar.
func FuzzReview(f *testing.F) {
	seed, err := json.Marshal(podOf())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"metadata":{"labels":{"byokd.io/inject":"true"},"annotations":{"byokd.io/injected":""}},"spec":{"initContainers":[{"name":"byokd"}],"containers":[{"volumeMounts":[{"name":"data"}]}],"volumes":[{"name":"data","ephemeral":{}}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		v := &Reviewer{Settings: settings(), Cluster: &headless{cluster: &cluster{}}, Observer: &observed{}, Log: zap.NewNop()}
		r := &admissionv1.AdmissionRequest{Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"}, Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: raw}}
		answer := v.Review(t.Context(), r)
		var before corev1.Pod
		if !answer.Allowed || json.Unmarshal(raw, &before) != nil || before.Labels[LabelInject] != "true" {
			return
		}
		object := raw
		if len(answer.Patch) > 0 {
			var patch []Operation
			if err := json.Unmarshal(answer.Patch, &patch); err != nil {
				t.Fatal(err)
			}
			if object, err = Apply(raw, patch); err != nil {
				return // a field in a spelling that Go takes and the API server does not
			}
		}
		var after corev1.Pod
		if err := json.Unmarshal(object, &after); err != nil {
			t.Fatal(err)
		}
		if ways := plainPaths(&after); ways != nil {
			t.Errorf("%v\n%s", ways, object)
		}
	})
}

// A stop is first told, then ends what has begun.
func TestServerStops(t *testing.T) {
	c := &cluster{}
	rotator := rotatorOf(t, c, time.Now)
	rotator.look(t.Context())
	slow := &slowCluster{headless: headless{cluster: c}, asked: make(chan struct{}), answer: make(chan struct{})}
	s := &Server{Reviewer: &Reviewer{Settings: settings(), Cluster: slow, Observer: &observed{}, Log: zap.NewNop()},
		Certificate: rotator.Certificate, Ready: rotator.Ready, Metrics: http.NotFoundHandler(), Log: zap.NewNop()}
	webhook, admin := listenLocal(t), listenLocal(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, webhook, admin) }()

	health := "http://" + admin.Addr().String()
	for path, want := range map[string]int{"/livez": 200, "/readyz": 200, "/": 404} {
		if got := status(t, health+path); got != want {
			t.Errorf("%s: %d", path, got)
		}
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.trust)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
	body, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: requestFor(t, podOf(func(p *corev1.Pod) { p.Spec.Subdomain = "slow" }))})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		answer, err := client.Post("https://"+webhook.Addr().String()+Path, "application/json", bytes.NewReader(body))
		if err == nil {
			_, err = io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
		}
		answered <- err
	}()
	<-slow.asked
	stop()
	close(slow.answer)
	if err := <-answered; err != nil {
		t.Errorf("a review that had begun was cut: %v", err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", webhook.Addr().String()); err == nil {
		t.Error("still listening")
	}
}

// slowCluster holds a review until it is told to answer.
type slowCluster struct {
	headless
	asked, answer chan struct{}
}

func (s *slowCluster) Service(context.Context, string, string) (*corev1.Service, error) {
	close(s.asked)
	<-s.answer
	return nil, nil
}

func listenLocal(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func status(t *testing.T, url string) int {
	t.Helper()
	answer, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	return answer.StatusCode
}
