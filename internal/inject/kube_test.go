package inject

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

const (
	secretPath  = "/api/v1/namespaces/byokd-system/secrets/byokd-inject-tls"
	webhookPath = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/byokd-inject"
)

// restServer keeps objects by path, with versions, and carries JSON patches out, as an API server does. test/kube has
// the real one.
type restServer struct {
	mu      sync.Mutex
	objects map[string]map[string]any
	events  []corev1.Event
}

func (a *restServer) put(path string, object map[string]any) {
	meta, _ := object["metadata"].(map[string]any)
	if meta == nil {
		meta = map[string]any{}
	}
	version, _ := strconv.Atoi(asString(meta["resourceVersion"]))
	meta["resourceVersion"] = strconv.Itoa(version + 1)
	object["metadata"] = meta
	a.objects[path] = object
}

func asString(v any) string { s, _ := v.(string); return s }

func (a *restServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	object := a.objects[r.URL.Path]
	switch {
	case r.URL.Path == "/version":
		answer(w, 200, map[string]any{"gitVersion": "v1.36.3"})
	case r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/events"):
		var e corev1.Event
		if json.Unmarshal(body, &e) == nil {
			a.events = append(a.events, e)
		}
		answer(w, 201, e)
	case r.Method == http.MethodPost:
		var made map[string]any
		if json.Unmarshal(body, &made) != nil {
			fail(w, 400, metav1.StatusReasonBadRequest)
			return
		}
		path := r.URL.Path + "/" + asString(made["metadata"].(map[string]any)["name"])
		if a.objects[path] != nil {
			fail(w, 409, metav1.StatusReasonAlreadyExists)
			return
		}
		a.put(path, made)
		answer(w, 201, made)
	case object == nil:
		fail(w, 404, metav1.StatusReasonNotFound)
	case r.Method == http.MethodGet:
		answer(w, 200, object)
	case r.Method == http.MethodPatch && r.Header.Get("Content-Type") == "application/json-patch+json":
		text, _ := json.Marshal(object)
		patch, err := jsonpatch.DecodePatch(body)
		if err == nil {
			text, err = patch.Apply(text)
		}
		var changed map[string]any
		if err != nil || json.Unmarshal(text, &changed) != nil {
			fail(w, 422, metav1.StatusReasonInvalid)
			return
		}
		a.put(r.URL.Path, changed)
		answer(w, 200, changed)
	default:
		fail(w, 405, metav1.StatusReasonMethodNotAllowed)
	}
}

func answer(w http.ResponseWriter, code int, object any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object)
}

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	answer(w, code, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: string(reason)})
}

func kubeOf(t *testing.T) (*restServer, *Kube) {
	t.Helper()
	a := &restServer{objects: map[string]map[string]any{}}
	a.put(webhookPath, map[string]any{"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
		"webhooks": []any{map[string]any{"name": "a", "clientConfig": map[string]any{}}, map[string]any{"name": "b", "clientConfig": map[string]any{}}}})
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	k, err := NewKube(&rest.Config{Host: server.URL}, Objects{Namespace: "byokd-system", Secret: "byokd-inject-tls", Webhook: "byokd-inject"}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return a, k
}

// Whether the Secret is there and empty, as the chart makes it, or not there at all: what is written is read again, and
// of two writers that have read the same, one is refused.
func TestKubeIsAStore(t *testing.T) {
	for _, made := range []bool{true, false} {
		a, k := kubeOf(t)
		ctx := t.Context()
		if made {
			a.put(secretPath, map[string]any{"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": "byokd-inject-tls", "labels": map[string]any{"a": "b"}}})
		}
		data, version, err := k.Certificates(ctx)
		if err != nil || len(data) > 0 || (version != "") != made {
			t.Fatal(data, version, err)
		}
		if err := k.SetCertificates(ctx, map[string][]byte{"k": []byte("v")}, version); err != nil {
			t.Fatal(err)
		}
		if err := k.SetCertificates(ctx, map[string][]byte{"k": []byte("w")}, version); !errors.Is(err, ErrConflict) {
			t.Errorf("a second writer: %v", err)
		}
		if data, _, err = k.Certificates(ctx); err != nil || string(data["k"]) != "v" {
			t.Error(data, err)
		}
		if meta := a.objects[secretPath]["metadata"].(map[string]any); made && meta["labels"] == nil {
			t.Error("the labels of the chart are gone")
		}

		bundle, version, err := k.Trust(ctx)
		if err != nil || bundle != nil {
			t.Fatal(bundle, err)
		}
		if err := k.SetTrust(ctx, []byte("PEM"), version); err != nil {
			t.Fatal(err)
		}
		if err := k.SetTrust(ctx, []byte("old"), version); !errors.Is(err, ErrConflict) {
			t.Errorf("a late writer: %v", err)
		}
		if bundle, _, err = k.Trust(ctx); err != nil || string(bundle) != "PEM" {
			t.Error(bundle, err)
		}
	}
}

func TestKubeIsACluster(t *testing.T) {
	a, k := kubeOf(t)
	if v, err := k.Version(t.Context()); err != nil || v != "v1.36.3" {
		t.Error(v, err)
	}
	if s, err := k.Service(t.Context(), "ns", "db"); s != nil || err != nil {
		t.Error(s, err)
	}
	a.put("/api/v1/namespaces/ns/services/db", map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"name": "db"}, "spec": map[string]any{"clusterIP": "None"}})
	if s, err := k.Service(t.Context(), "ns", "db"); err != nil || len(WarnOfService(s)) != 1 {
		t.Error(s, err)
	}
	k.Tell(&corev1.ObjectReference{APIVersion: "apps/v1", Kind: "StatefulSet", Namespace: "ns", Name: "db", UID: "u"}, corev1.EventTypeWarning, "ByokdDenied", "why")
	deadline := time.Now().Add(time.Minute)
	for {
		a.mu.Lock()
		events := a.events
		a.mu.Unlock()
		if len(events) == 1 && events[0].Reason == "ByokdDenied" && events[0].InvolvedObject.UID == "u" && events[0].Source.Component == "byokd-inject" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", events)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A whole look, through the REST client.
func TestRotatorOverREST(t *testing.T) {
	a, k := kubeOf(t)
	rotator := &Rotator{Store: k, Names: serverNames, Observer: &observed{}, Log: zaptest.NewLogger(t), Now: time.Now}
	rotator.look(t.Context())
	if err := rotator.Ready(); err != nil {
		t.Fatal(err)
	}
	bundle, _, err := k.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := trusts(t, bundle, rotator.present.Load(), time.Now()); err != nil {
		t.Error(err)
	}
	a.mu.Lock()
	delete(a.objects, webhookPath)
	a.mu.Unlock()
	rotator.look(t.Context())
	if rotator.failure.Load() == nil || rotator.Ready() != nil {
		t.Errorf("without a configuration: %v; ready: %v", rotator.failure.Load(), rotator.Ready())
	}
}
