package chart

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// parts are the directories of the Kustomize base with the values of the chart that they equal, and the files that each
// has of the rendering: what a part needs of it.
var parts = []struct {
	dir    string
	values string // of testdata; empty: the defaults
	keep   func(file string) bool
}{
	{"base", "", func(string) bool { return true }},
	{"monitoring", "monitoring", func(file string) bool { return strings.HasPrefix(file, "monitoring-") }},
}

// TestKustomizeEqualsTheChart: the files of each part are the chart's rendering, letter by letter, and what Kustomize builds
// of them are the same objects, with the namespace beside them.
func TestKustomizeEqualsTheChart(t *testing.T) {
	for _, part := range parts {
		t.Run(part.dir, func(t *testing.T) {
			var values map[string]any
			if part.values != "" {
				values = valuesFile(t, part.values)
			}
			dir := filepath.Join("../../deploy/kustomize", part.dir)
			var want []string
			for file, text := range mustRender(t, values) {
				if !strings.HasSuffix(file, ".yaml") || strings.HasPrefix(file, "tests/") || !part.keep(file) {
					continue
				}
				text = strings.TrimPrefix(strings.Trim(text, "\n"), "---\n") + "\n"
				text = strings.ReplaceAll(text, "managed-by: Helm", "managed-by: Kustomize")
				golden(t, filepath.Join(dir, file), text)
				want = append(want, sorted(t, decode(t, text))...)
			}
			got := slices.DeleteFunc(sorted(t, decode(t, build(t, dir))), func(object string) bool {
				return strings.Contains(object, "kind: Namespace\n")
			})
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				for _, object := range want {
					if !slices.Contains(got, object) {
						t.Errorf("Kustomize does not build this of the chart:\n%s", object)
					}
				}
				t.Errorf("Kustomize builds %d objects, the chart has %d; list every file in %s/kustomization.yaml", len(got), len(want), dir)
			}
		})
	}
}

// TestKustomizeNamespace: the node driver is privileged, which a namespace with Pod Security has to allow.
func TestKustomizeNamespace(t *testing.T) {
	for _, object := range decode(t, build(t, "../../deploy/kustomize/base")) {
		if n, ok := object.(*corev1.Namespace); ok {
			if n.Name != namespace || n.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
				t.Errorf("%s: %v", n.Name, n.Labels)
			}
			return
		}
	}
	t.Error("there is no namespace")
}

// TestOverlay: the example sets the image of all containers and of the sidecars.
func TestOverlay(t *testing.T) {
	text := build(t, "../../deploy/kustomize/overlay")
	decode(t, text)
	if strings.Contains(text, "byokd:dev") {
		t.Error("an image stays that of the base")
	}
	if n := strings.Count(text, "ghcr.io/byokd/byokd:v0.1.0"); n != 3 { // injector, sidecars, node driver
		t.Errorf("the image is set %d times", n)
	}
}

func build(t *testing.T, dir string) string {
	t.Helper()
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := built.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sorted writes objects in a form that can be compared.
func sorted(t *testing.T, objects []runtime.Object) (all []string) {
	t.Helper()
	for _, object := range objects {
		all = append(all, string(bytes.TrimSpace([]byte(mustYAML(t, object)))))
	}
	slices.Sort(all)
	return all
}
