package chart

import (
	"bytes"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"

	"github.com/byokd/byokd/internal/inject"
)

// TestExamples: the examples are valid, before and after byokd has been put into them, and then still satisfy Pod Security
// restricted, as their namespaces demand. cmd/byokd tests their configuration.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../../deploy/examples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "../../deploy/examples/try/devcloud.yaml", "../../deploy/examples/try/notebook.yaml")
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	restricted := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	settings := inject.Settings{Version: "v0.1.0", Image: "ghcr.io/byokd/byokd:v0.1.0", RestartAll: true,
		CPU: resource.MustParse("100m"), Memory: resource.MustParse("384Mi")}
	sets := 0
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text := read(t, file)
			decode(t, string(text))
			rendered, findings, err := inject.Render(bytes.NewReader(text), settings)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range findings {
				if f.Denial != nil || len(f.Warnings) > 0 {
					t.Errorf("%s: denied: %v, warned: %v", f.Object, f.Denial, f.Warnings)
				}
			}
			for _, object := range decode(t, string(rendered)) {
				set, ok := object.(*appsv1.StatefulSet)
				if !ok {
					continue
				}
				template := set.Spec.Template
				if template.Labels[inject.LabelInject] == "true" {
					sets++
					if first := template.Spec.InitContainers; len(first) == 0 || first[0].Name != inject.SidecarName {
						t.Errorf("%s: the first init container is not byokd", set.Name)
					}
				}
				if verdict := policy.AggregateCheckResults(evaluator.EvaluatePod(restricted, &template.ObjectMeta, &template.Spec)); !verdict.Allowed {
					t.Errorf("%s: %s", set.Name, verdict.ForbiddenDetail())
				}
			}
		})
	}
	if sets != 3 {
		t.Errorf("%d stateful sets with byokd", sets)
	}
}
