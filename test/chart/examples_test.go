package chart

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
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
	// As a program: this module does not depend on byokd's, whose dependencies would have to be repeated here.
	byokd := filepath.Join(t.TempDir(), "byokd")
	if out, err := exec.CommandContext(t.Context(), "go", "-C", "../..", "build", "-o", byokd, "./cmd/byokd").CombinedOutput(); err != nil {
		t.Fatalf("byokd cannot be built: %v\n%s", err, out)
	}
	sets := 0
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text := read(t, file)
			decode(t, string(text))
			var rendered, said bytes.Buffer
			cmd := exec.CommandContext(t.Context(), byokd, "render", "-f", file, "--image", "ghcr.io/byokd/byokd:v0.1.0")
			cmd.Stdout, cmd.Stderr = &rendered, &said
			if err := cmd.Run(); err != nil || said.Len() > 0 {
				t.Fatalf("byokd render: %v\n%s", err, &said)
			}
			for _, object := range decode(t, rendered.String()) {
				set, ok := object.(*appsv1.StatefulSet)
				if !ok {
					continue
				}
				template := set.Spec.Template
				if template.Labels["byokd.io/inject"] == "true" {
					sets++
					if first := template.Spec.InitContainers; len(first) == 0 || first[0].Name != "byokd" {
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
