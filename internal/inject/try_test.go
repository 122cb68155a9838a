package inject

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// apiServer does to pods what one with our webhook and policy does, or what is left when either is missing.
func apiServer(t *testing.T, webhook, policy bool) *rest.Config {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.URL.Path != "/api/v1/namespaces/apps/pods" || r.URL.Query().Get("dryRun") != "All" {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		var pod corev1.Pod
		if err := json.Unmarshal(body, &pod); err != nil {
			t.Errorf("%v: %s", err, body)
		}
		refuse := func(text string) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			if err := json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
				Status: metav1.StatusFailure, Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Message: text}); err != nil {
				t.Error(err)
			}
		}
		injected := false
		if webhook && pod.Labels[LabelRevision] == "" {
			settings := Settings{Version: "v1", Image: "byokd:1", CPU: resource.MustParse("100m"), Memory: resource.MustParse("384Mi")}
			result, err := Mutate(Pod{Annotations: pod.Annotations, Spec: &pod.Spec, Name: pod.Name}, settings)
			if err != nil {
				refuse(err.Error())
				return
			}
			if body, err = Apply(body, result.Patch); err != nil {
				t.Error(err)
			}
			injected = true
		}
		if policy && !injected {
			refuse("the pod has the label byokd.io/inject and no sidecar byokd")
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		if _, err := w.Write(body); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(server.Close)
	return &rest.Config{Host: server.URL}
}

func TestTry(t *testing.T) {
	for name, c := range map[string]struct {
		webhook, policy bool
		want            [3]string // what each trial says; empty: as it should be
	}{
		"all in force":        {true, true, [3]string{"", "", ""}},
		"no policy":           {true, false, [3]string{"", "", "it would be created"}},
		"no webhook":          {false, true, [3]string{"no sidecar byokd", "for another cause", ""}},
		"neither one nor two": {false, false, [3]string{"no webhook was asked", "it would be created", "it would be created"}},
	} {
		t.Run(name, func(t *testing.T) {
			trials, err := Try(t.Context(), apiServer(t, c.webhook, c.policy), "apps", "")
			if err != nil {
				t.Fatal(err)
			}
			if len(trials) != len(c.want) {
				t.Fatalf("%d trials", len(trials))
			}
			for i, trial := range trials {
				switch want := c.want[i]; {
				case want == "" && trial.Err != nil:
					t.Errorf("%s: %v", trial.What, trial.Err)
				case want != "" && (trial.Err == nil || !strings.Contains(trial.Err.Error(), want)):
					t.Errorf("%s: %v, want %q", trial.What, trial.Err, want)
				}
			}
		})
	}
}
