package inject

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"
)

var update = flag.Bool("update", false, "rewrite the golden files of this package")

func settings() Settings {
	return Settings{Version: "v1.2.3", Image: "ghcr.io/byokd/byokd:v1.2.3", CPU: resource.MustParse("100m"), Memory: resource.MustParse("384Mi")}
}

// golden compares with a file, or rewrites it with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the rendering has changed; if that is meant, run: go test ./internal/inject -run TestRender -update\n%s should be:\n%s", file, got)
	}
}

func TestRender(t *testing.T) {
	files, err := filepath.Glob("testdata/render/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			out, findings, err := Render(bytes.NewReader(in), settings())
			if err != nil {
				t.Fatal(err)
			}
			var said strings.Builder
			for _, f := range findings {
				if f.Denial != nil {
					t.Fatalf("%s: denied: %v", f.Object, f.Denial)
				}
				fmt.Fprintf(&said, "%s injected=%v\n", f.Object, f.Injected)
				for _, w := range f.Warnings {
					fmt.Fprintf(&said, "  %s: %s\n", w.Reason, w.Text)
				}
			}
			name := strings.TrimSuffix(file, ".yaml")
			golden(t, name+".golden", string(out))
			golden(t, name+".warnings", said.String())

			// What was rendered once stays as it is, letter by letter.
			again, findings, err := Render(bytes.NewReader(out), settings())
			if err != nil || !bytes.Equal(again, out) {
				t.Errorf("a second rendering differs (%v):\n%s", err, again)
			}
			for _, f := range findings {
				if f.Injected || f.Denial != nil {
					t.Errorf("%s: injected=%v denied=%v the second time", f.Object, f.Injected, f.Denial)
				}
			}
		})
	}
}

func TestRenderTellsDenials(t *testing.T) {
	in := `apiVersion: v1
kind: Pod
metadata: {name: a, labels: {byokd.io/inject: "yes"}}
spec: {containers: [{name: a, image: a}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {byokd.io/inject: "true"}, annotations: {byokd.io/proflie: zeebe}}
spec: {containers: [{name: a, image: a}]}
`
	out, findings, err := Render(strings.NewReader(in), settings())
	if err != nil || out != nil {
		t.Fatalf("%s %v", out, err)
	}
	if len(findings) != 2 || findings[0].Denial == nil || findings[0].Denial.Reason != ReasonLabel || findings[0].Object != "Pod a" ||
		findings[1].Denial == nil || findings[1].Denial.Reason != ReasonUnknownAnnotation {
		t.Errorf("%+v", findings)
	}
	for _, bad := range []string{"a: [", "a: 1\na: 2\n", "apiVersion: v1\nkind: Pod\nmetadata: {labels: 3}\n", "- not\n- an object\n"} {
		if _, _, err := Render(strings.NewReader(bad), settings()); err == nil {
			t.Errorf("%q was rendered", bad)
		}
	}
}
