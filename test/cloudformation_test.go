package test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/byokd/byokd/internal/keypolicy"
)

func TestCloudFormationIsLinted(t *testing.T) {
	templates, err := filepath.Glob("../deploy/aws/*.yaml")
	if err != nil || len(templates) < 4 {
		t.Fatalf("%v: %v", templates, err)
	}
	cfnLint, err := exec.LookPath("cfn-lint")
	if err != nil {
		cfnLint, err = exec.LookPath("../.cache/moto/bin/cfn-lint") // comes with moto, see prepare.sh
	}
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "cfn-lint") {
			t.Fatalf("BYOKD_REQUIRE names cfn-lint: %v", err)
		}
		t.Skip("cfn-lint is not installed (PyPI: cfn-lint)")
	}
	// Regions with and without every service, so that nothing is used that only the first has.
	out, err := exec.Command(cfnLint, append([]string{"--regions", "eu-central-1", "eu-west-1", "us-east-1", "--include-checks", "I", "--"}, templates...)...).CombinedOutput()
	if err != nil || len(strings.TrimSpace(string(out))) > 0 {
		t.Errorf("cfn-lint: %v\n%s", err, out)
	}
}

// template is the part of a CloudFormation template that is looked at here.
type template struct {
	Resources map[string]struct {
		Type                string
		DeletionPolicy      string `yaml:"DeletionPolicy"`
		UpdateReplacePolicy string `yaml:"UpdateReplacePolicy"`
		Properties          map[string]any
	} `yaml:"Resources"`
	Outputs map[string]any `yaml:"Outputs"`
}

func readTemplate(t *testing.T, name string) (template, string) {
	t.Helper()
	text, err := os.ReadFile("../deploy/aws/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var read struct {
		Resources map[string]map[string]any `yaml:"Resources"`
	}
	if err := yaml.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	var out template
	if err := yaml.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	for id, resource := range read.Resources {
		one := out.Resources[id]
		one.Type, _ = resource["Type"].(string)
		one.Properties, _ = resource["Properties"].(map[string]any)
		out.Resources[id] = one
	}
	return out, string(text)
}

// A key must outlive its stack, and its policy is the documented one, letter by letter.
func TestCloudFormationKeys(t *testing.T) {
	const account, role = "111122223333", "arn:aws:iam::444455556666:role/byokd-tenant"
	want, err := keypolicy.Text(keypolicy.Full, account, role)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"key.yaml", "replica-key.yaml"} {
		all, _ := readTemplate(t, name)
		key := all.Resources["Key"]
		if key.DeletionPolicy != "Retain" || key.UpdateReplacePolicy != "Retain" {
			t.Errorf("%s: deleting the stack would delete the key, and the data with it: %q, %q", name, key.DeletionPolicy, key.UpdateReplacePolicy)
		}
		if key.Type == "AWS::KMS::Key" && key.Properties["EnableKeyRotation"] != true {
			t.Errorf("%s: no rotation: %v", name, key.Properties["EnableKeyRotation"])
		}
		if key.Properties["PendingWindowInDays"] == nil {
			t.Errorf("%s: no deletion window", name)
		}
		policy, err := json.Marshal(key.Properties["KeyPolicy"])
		if err != nil {
			t.Fatal(err)
		}
		filled := strings.NewReplacer(`{"Ref":"TenantRoleArn"}`, `"`+role+`"`,
			`{"Fn::Sub":"arn:${AWS::Partition}:iam::${AWS::AccountId}:root"}`, `"arn:aws:iam::`+account+`:root"`).Replace(string(policy))
		if !keypolicy.Same(filled, want) {
			t.Errorf("%s: the key policy is\n%s\nthe documented one\n%s", name, filled, want)
		}
	}
}

// What the customer is asked to watch is watched.
func TestCloudFormationWatchesTheKey(t *testing.T) {
	all, text := readTemplate(t, "monitoring.yaml")
	for _, call := range []string{"DisableKey", "ScheduleKeyDeletion", "CancelKeyDeletion", "PutKeyPolicy", "CreateGrant", "RevokeGrant",
		"DeleteImportedKeyMaterial", "KMS CMK Rotation", "KMS CMK Deletion", "KMS Imported Key Material Expiration"} {
		if !strings.Contains(text, call) {
			t.Errorf("%s is not watched", call)
		}
	}
	for _, alarm := range []string{"Denied", "Disabled", "Deletion", "PolicyChanged", "GrantsChanged", "Requests"} {
		a, m := all.Resources[alarm+"Alarm"], all.Resources[alarm+"Metric"]
		if a.Type != "AWS::CloudWatch::Alarm" || m.Type != "AWS::Logs::MetricFilter" {
			t.Errorf("%s: %q, %q", alarm, a.Type, m.Type)
			continue
		}
		transformation := m.Properties["MetricTransformations"].([]any)[0].(map[string]any)
		fed, err := json.Marshal(transformation["MetricName"])
		if err != nil {
			t.Fatal(err)
		}
		read, err := json.Marshal(a.Properties["MetricName"])
		if err != nil {
			t.Fatal(err)
		}
		if string(fed) != string(read) || transformation["MetricNamespace"] != a.Properties["Namespace"] {
			t.Errorf("%s: the alarm reads %s, the filter writes %s", alarm, read, fed)
		}
	}
}
