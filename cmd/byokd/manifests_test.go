package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/spf13/pflag"
)

// yamlFile reads all documents of a file.
func yamlFile(t *testing.T, file string) []map[string]any {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return yamlDocuments(t, file, text)
}

func yamlDocuments(t *testing.T, file string, text []byte) (all []map[string]any) {
	t.Helper()
	for document := range bytes.SplitSeq(append([]byte("\n"), text...), []byte("\n---\n")) {
		var content map[string]any
		if err := yaml.Unmarshal(document, &content); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if content != nil {
			all = append(all, content)
		}
	}
	return all
}

// containers calls do for every container of our image, wherever it stands.
func containers(value any, do func(container map[string]any)) {
	switch v := value.(type) {
	case map[string]any:
		if image, ok := v["image"].(string); ok && strings.HasPrefix(image, "ghcr.io/byokd/byokd") {
			do(v)
		}
		for _, below := range v {
			containers(below, do)
		}
	case []any:
		for _, below := range v {
			containers(below, do)
		}
	}
}

// words are the strings of a list that may be absent.
func words(list any) (all []string) {
	values, _ := list.([]any)
	for _, v := range values {
		all = append(all, v.(string))
	}
	return all
}

// checkCommand: the words are a command of this program with flags that it knows.
func checkCommand(t *testing.T, where string, args []string) {
	t.Helper()
	root := newCommand(nil)
	cmd, rest, err := root.Find(args)
	if err == nil && cmd.HasParent() {
		err = cmd.ParseFlags(rest)
	}
	if err == nil && len(cmd.Flags().Args()) > 0 {
		err = errors.New("it takes no further words: " + strings.Join(cmd.Flags().Args(), " "))
	}
	if err != nil && !errors.Is(err, pflag.ErrHelp) || cmd == nil || !cmd.HasParent() {
		t.Errorf("%s: byokd %s: %v", where, strings.Join(args, " "), err)
	}
}

// TestManifestsCallCommandsThatExist: what containers of our image run, in the chart's renderings and in the Kustomize base.
func TestManifestsCallCommandsThatExist(t *testing.T) {
	var files []string
	for _, pattern := range []string{"../../deploy/kustomize/*/*.yaml", "../../test/chart/testdata/*.yaml"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	seen := map[string]int{}
	for _, file := range files {
		for _, document := range yamlFile(t, file) {
			containers(document, func(c map[string]any) {
				if c["command"] != nil {
					t.Errorf("%s: a container with a command of its own: the image's entry point is byokd", file)
				}
				args := words(c["args"])
				checkCommand(t, file, args)
				if len(args) > 0 {
					seen[args[0]]++
				}
			})
		}
	}
	if seen["inject"] < 4 || seen["node"] < 2 {
		t.Errorf("found %v: the search is broken", seen)
	}
}

// TestExamples renders the examples as the webhook would inject them, and reads their configuration in the environment that
// the sidecar then has.
func TestExamples(t *testing.T) {
	for file, buckets := range map[string][]string{
		"zeebe.yaml":         {"backups", "documents"},
		"elasticsearch.yaml": {"snapshots"},
	} {
		t.Run(file, func(t *testing.T) {
			path := "../../deploy/examples/" + file
			var rendered, said bytes.Buffer
			if code := run(t.Context(), []string{"render", "-f", path, "--image", "ghcr.io/byokd/byokd:v0.1.0"}, nil, &rendered, &said); code != exitOK || said.Len() > 0 {
				t.Fatalf("exit code %d: %s", code, &said)
			}
			environ := sidecarEnvironment(t, path, rendered.Bytes())
			c := soundConfig(t, configMap(t, path), environ)
			var found []string
			for name := range c.Objects.Buckets {
				found = append(found, name)
			}
			slices.Sort(found)
			if !slices.Equal(found, buckets) || c.Volume.Role == "" || c.Volume.Lower != "/sealed" {
				t.Errorf("buckets %q, volume %+v", found, c.Volume)
			}
			if c.Objects.AllowRemote || c.Objects.Credentials.File != "/etc/byokd/s3-credentials" {
				t.Errorf("the S3 endpoint: %+v", c.Objects)
			}
		})
	}
}

// TestWalkThrough: the configuration that docs/KUBERNETES.md has made with a key's ARN, for a cluster on a laptop.
func TestWalkThrough(t *testing.T) {
	path := "../../deploy/examples/try/notebook.yaml"
	var rendered, said bytes.Buffer
	if code := run(t.Context(), []string{"render", "-f", path, "--image", "ghcr.io/byokd/byokd:dev"}, nil, &rendered, &said); code != exitOK || said.Len() > 0 {
		t.Fatalf("exit code %d: %s", code, &said)
	}
	text, err := os.ReadFile("../../deploy/examples/try/byokd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte(`"KEY_ARN"`), []byte("arn:aws:kms:eu-central-1:111122223333:key/9362f754-785c-4245-95e7-da49a91cb7bf"), 1)
	c := soundConfig(t, text, sidecarEnvironment(t, path, rendered.Bytes()))
	if c.Keys["primary"].Endpoint != "https://devcloud.byokd-try.svc:4567" || c.Objects != nil {
		t.Errorf("%+v", c)
	}
}

// soundConfig reads a configuration that must have no fault.
func soundConfig(t *testing.T, text []byte, environ []string) Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "byokd.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c, warnings, err := loadConfig(file, environ)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("%v, %q", err, warnings)
	}
	return c
}

// sidecarEnvironment finds the one sidecar of a manifest and checks what it runs.
func sidecarEnvironment(t *testing.T, file string, text []byte) (environ []string) {
	t.Helper()
	sidecars := 0
	for _, document := range yamlDocuments(t, file, text) {
		containers(document, func(c map[string]any) {
			sidecars++
			checkCommand(t, file, words(c["args"]))
			for _, v := range c["env"].([]any) {
				variable := v.(map[string]any)
				environ = append(environ, variable["name"].(string)+"="+variable["value"].(string))
			}
		})
	}
	if sidecars != 1 {
		t.Fatalf("%s: %d sidecars", file, sidecars)
	}
	return environ
}

// configMap is byokd.yaml of the ConfigMap byokd.
func configMap(t *testing.T, file string) []byte {
	t.Helper()
	for _, document := range yamlFile(t, file) {
		if metadata, ok := document["metadata"].(map[string]any); ok && document["kind"] == "ConfigMap" && metadata["name"] == "byokd" {
			return []byte(document["data"].(map[string]any)["byokd.yaml"].(string))
		}
	}
	t.Fatalf("%s has no ConfigMap byokd", file)
	return nil
}
