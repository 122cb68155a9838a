package chart

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const manual = "../../docs/KUBERNETES.md"

// TestDocumentedValuesExist: every value that the manual names is one of values.yaml.
func TestDocumentedValuesExist(t *testing.T) {
	var values map[string]any
	unmarshal(t, read(t, chartDir+"/values.yaml"), &values)
	found := 0
	previous := ""
	for _, m := range regexp.MustCompile("`((?:image|injector|policy|node|monitoring|priorityQuota|test)?(?:\\.[a-zA-Z]+)+)`").FindAllStringSubmatch(string(read(t, manual)), -1) {
		name := m[1]
		if strings.HasPrefix(name, ".") { // `injector.sidecar.memory`, `.cpu`
			name = previous[:strings.LastIndex(strings.TrimSuffix(previous, ".enabled"), ".")] + name
		}
		previous = name
		if !known(values, strings.Split(name, ".")) {
			t.Errorf("%s names the value %s, which values.yaml has not", manual, name)
		}
		found++
	}
	if found < 8 {
		t.Errorf("found %d values: the search is broken", found)
	}
}

func known(level any, path []string) bool {
	for _, key := range path {
		below, ok := level.(map[string]any)
		if !ok {
			return false
		}
		if level, ok = below[key]; !ok {
			return false
		}
	}
	return true
}

// TestDocumentedAnnotations: the manual's table has those that there are.
func TestDocumentedAnnotations(t *testing.T) {
	source := string(read(t, "../../internal/inject/names.go"))
	text := string(read(t, manual))
	found := 0
	for _, m := range regexp.MustCompile(`Annotation[A-Za-z]+ += Prefix \+ "([a-z-]+)"`).FindAllStringSubmatch(source, -1) {
		if !strings.Contains(text, "`byokd.io/"+m[1]+"`") {
			t.Errorf("%s does not name byokd.io/%s", manual, m[1])
		}
		found++
	}
	if found < 10 {
		t.Errorf("found %d annotations: the search is broken", found)
	}
}

// TestDocumentedFilesExist: paths of this repository, in the manual and in what the examples say of themselves.
func TestDocumentedFilesExist(t *testing.T) {
	examples, err := filepath.Glob("../../deploy/examples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range append(examples, manual) {
		for _, path := range regexp.MustCompile(`\b(?:deploy|docs)/[a-zA-Z0-9/_.-]+[a-zA-Z0-9]`).FindAllString(string(read(t, file)), -1) {
			if _, err := os.Stat("../../" + path); err != nil {
				t.Errorf("%s: %v", file, err)
			}
			found++
		}
	}
	if found < 15 {
		t.Errorf("found %d paths: the search is broken", found)
	}
}

// TestSymptomsAreOurWords: messages that the manual explains are those that users see.
func TestSymptomsAreOurWords(t *testing.T) {
	text := string(read(t, manual))
	sources := string(read(t, "../../deploy/policies/sealed-pods.yaml"))
	for _, file := range []string{"options.go", "admission.go"} {
		sources += string(read(t, "../../internal/inject/"+file))
	}
	for _, c := range []struct{ manual, source string }{
		{"the annotation byokd.io/… is unknown", "the annotation %s is unknown"},
		{"the pod has the label byokd.io/inject and no sidecar byokd", "the pod has the label byokd.io/inject and no sidecar byokd"},
		{"the sidecar byokd has lost its restartPolicy", "the sidecar byokd has lost its restartPolicy"},
		{"ByokdDenied", `"ByokdDenied"`},
	} {
		if err := missing(text, c.manual, sources, c.source); err != nil {
			t.Error(err)
		}
	}
}

func missing(manual, symptom, sources, message string) error {
	if !strings.Contains(manual, symptom) {
		return fmt.Errorf("the manual does not explain %q", symptom)
	}
	if !strings.Contains(sources, message) {
		return fmt.Errorf("nothing says %q", message)
	}
	return nil
}
