package chart

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// free are the values whose keys are the user's own or Kubernetes'.
var free = []string{"global", "injector.affinity", "podAnnotations", "podLabels", "nodeSelector", "serviceAccountAnnotations",
	"labels", "annotations"}

// TestUnknownValuesAreRefused adds a misspelt value at every level of values.yaml.
func TestUnknownValuesAreRefused(t *testing.T) {
	var defaults map[string]any
	unmarshal(t, read(t, chartDir+"/values.yaml"), &defaults)
	levels := 0
	var walk func(path []string, level map[string]any)
	walk = func(path []string, level map[string]any) {
		name := strings.Join(path, ".")
		if len(path) > 0 && (slices.Contains(free, name) || slices.Contains(free, path[len(path)-1])) {
			return
		}
		levels++
		if _, err := render(nested(path, map[string]any{"replicaz": 3})); err == nil || !strings.Contains(err.Error(), "replicaz") {
			t.Errorf("%s.replicaz: %v", name, err)
		}
		for key, below := range level {
			if deeper, ok := below.(map[string]any); ok {
				walk(append(slices.Clone(path), key), deeper)
			}
		}
	}
	walk(nil, defaults)
	if levels < 20 {
		t.Errorf("tried %d levels only", levels)
	}
}

// nested puts a value at a path.
func nested(path []string, value map[string]any) map[string]any {
	for _, key := range slices.Backward(path) {
		value = map[string]any{key: maps.Clone(value)}
	}
	return value
}

func TestWrongValuesAreRefused(t *testing.T) {
	for text, about := range map[string]string{
		`revision: Canary`:                                      "revision",
		`image: {digest: "sha256:1234"}`:                        "digest",
		`image: {repository: "ghcr.io/byokd/byokd@sha256:ab"}`:  "repository",
		`image: {pullPolicy: Sometimes}`:                        "pullPolicy",
		`imagePullSecrets: [{name: pull}]`:                      "imagePullSecrets",
		`injector: {replicas: 0}`:                               "replicas",
		`injector: {replicas: "2"}`:                             "replicas",
		`injector: {timeoutSeconds: 31}`:                        "timeoutSeconds",
		`injector: {failurePolicy: Ignore}`:                     "failurePolicy",
		`injector: {excludedNamespaces: [Kube_System]}`:         "excludedNamespaces",
		`injector: {sidecar: {memory: 256MB}}`:                  "memory",
		`injector: {log: {level: verbose}}`:                     "level",
		`injector: {resources: {limits: {cpus: 1}}}`:            "cpus",
		`injector: {podDisruptionBudget: {minAvailable: half}}`: "minAvailable",
		`injector: {networkPolicy: {apiServerPorts: []}}`:       "apiServerPorts",
		`injector: {tolerations: [{operator: Any}]}`:            "operator",
		`node: {kubeletDir: var/lib/kubelet}`:                   "kubeletDir",
		`node: {kubeletDir: /var/lib/kubelet/}`:                 "kubeletDir",
		`node: {enabled: "yes"}`:                                "enabled",
		`monitoring: {podMonitor: {interval: 30}}`:              "interval",
		`monitoring: {dashboard: {labels: {grafana: 1}}}`:       "labels",
		`policy: false`:                                         "policy",
	} {
		var values map[string]any
		unmarshal(t, []byte(text), &values)
		if _, err := render(values); err == nil || !strings.Contains(err.Error(), about) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
