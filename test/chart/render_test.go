package chart

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	sigsyaml "sigs.k8s.io/yaml"
)

const (
	chartDir  = "../../deploy/helm/byokd"
	namespace = "byokd-system"
)

var update = flag.Bool("update", false, "write renderings anew: testdata/*.yaml and deploy/kustomize/*/*.yaml")

// render renders the chart, its schema checked first, into the content of each template by file name. Templates that come
// out empty are left out.
func render(values map[string]any) (map[string]string, error) {
	loaded, err := loader.Load(chartDir)
	if err != nil {
		return nil, err
	}
	options := chartutil.ReleaseOptions{Name: "byokd", Namespace: namespace, Revision: 1, IsInstall: true}
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = chartutil.KubeVersion{Version: "v1.36.0", Major: "1", Minor: "36"}
	all, err := chartutil.ToRenderValues(loaded, values, options, capabilities)
	if err != nil {
		return nil, err
	}
	rendered, err := engine.Render(loaded, all)
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for path, text := range rendered {
		if strings.TrimSpace(text) != "" {
			files[strings.TrimPrefix(path, "byokd/templates/")] = text
		}
	}
	return files, nil
}

func mustRender(t *testing.T, values map[string]any) map[string]string {
	t.Helper()
	files, err := render(values)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// manifests joins the manifests of a rendering in the order of their files, as `helm template` would.
func manifests(files map[string]string) string {
	var all strings.Builder
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".yaml") {
			all.WriteString("---\n# " + name + "\n" + strings.TrimPrefix(strings.Trim(files[name], "\n"), "---\n") + "\n")
		}
	}
	return all.String()
}

// valuesFile reads testdata/NAME.values.yaml.
func valuesFile(t *testing.T, name string) (values map[string]any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := sigsyaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	return values
}

// documents splits YAML into its documents, those without content left out.
func documents(t *testing.T, text string) (all [][]byte) {
	t.Helper()
	reader := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var content any
		if err := sigsyaml.Unmarshal(document, &content); err != nil {
			t.Fatalf("%v in:\n%s", err, document)
		}
		if content != nil {
			all = append(all, bytes.TrimSpace(document))
		}
	}
}

// decode reads objects strictly: unknown and doubled fields, wrong types and unknown kinds are errors.
func decode(t *testing.T, text string) (objects []runtime.Object) {
	t.Helper()
	known := runtime.NewScheme()
	if err := errors.Join(scheme.AddToScheme(known), monitoring.AddToScheme(known)); err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(known, serializer.EnableStrict).UniversalDeserializer()
	for _, document := range documents(t, text) {
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			t.Errorf("%v in:\n%s", err, document)
			continue
		}
		objects = append(objects, object)
	}
	return objects
}
