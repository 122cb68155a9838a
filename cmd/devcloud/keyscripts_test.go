package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/byokd/byokd/internal/keypolicy"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// The two scripts of deploy/scripts that make a key, run by the real aws command line against a devcloud. Each
// defect of the published scripts that they are to replace has its test here.

const (
	singleScript = "create-byok-kms-key-single-region.sh"
	multiScript  = "create-byok-kms-key-multi-region.sh"
	scriptRole   = "arn:aws:iam::444455556666:role/tenants/acme"
)

// scripts runs them against one devcloud.
type scripts struct {
	*awsCLI
	dir string // of the scripts: theirs, or copies
}

func newScripts(t *testing.T, args ...string) *scripts {
	t.Helper()
	c := serveCloud(t, t.TempDir(), args...)
	dir, err := filepath.Abs("../../deploy/scripts")
	if err != nil {
		t.Fatal(err)
	}
	return &scripts{awsCLI: needAWS(t, c), dir: dir}
}

// run runs a script in an empty directory with nothing but these variables, and expects it to leave that empty.
func (s *scripts) run(name string, variables map[string]string, args ...string) (code int, out, messages string) {
	s.t.Helper()
	empty := s.t.TempDir()
	cmd := exec.CommandContext(s.t.Context(), filepath.Join(s.dir, name), args...)
	cmd.Dir = empty
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.home, "TMPDIR=" + empty, "AWS_ENDPOINT_URL=" + s.c.endpoint,
		"AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1"}
	if root := os.Getenv("PYENV_ROOT"); root != "" {
		cmd.Env = append(cmd.Env, "PYENV_ROOT="+root)
	}
	for name, value := range variables {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	if left, err := os.ReadDir(empty); err != nil || len(left) > 0 {
		s.t.Errorf("%s leaves %v behind, %v", name, left, err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// values are what a user sets.
func values(more map[string]string) map[string]string {
	all := map[string]string{"AWS_ACCESS_KEY_ID": kmstest.AdminAccessKey, "AWS_SECRET_ACCESS_KEY": kmstest.AdminSecret,
		"YOUR_ACCOUNT_ID": kmstest.DefaultAccount, "TENANT_ROLE_ARN": scriptRole, "ALIAS_NAME": "acme", "TAGS": "team=storage cost=42"}
	for name, value := range more {
		all[name] = value
	}
	return all
}

var printedARN = regexp.MustCompile(`(?m)ey ARN \(([a-z0-9-]+)\): (arn:aws:kms:\S+)$`)

// made runs a script that must succeed, and returns the ARNs that it prints by region.
func (s *scripts) made(name string, variables map[string]string) map[string]string {
	s.t.Helper()
	code, out, messages := s.run(name, variables)
	if code != 0 {
		s.t.Fatalf("%s: exit code %d\n%s%s", name, code, out, messages)
	}
	arns := map[string]string{}
	for _, m := range printedARN.FindAllStringSubmatch(out, -1) {
		arns[m[1]] = m[2]
	}
	return arns
}

func (s *scripts) keys() []kmstest.KeyInfo {
	s.t.Helper()
	status, err := s.c.control().Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return status.Keys
}

// mustBeComplete looks at a key with the aws command line.
func (s *scripts) mustBeComplete(arn, region string, kind keypolicy.Kind, multi bool) {
	s.t.Helper()
	in := func(args ...string) map[string]any {
		return s.ok(kmstest.AdminAccessKey, append(args, "--region", region)...)
	}
	key := in("kms", "describe-key", "--key-id", "alias/acme")["KeyMetadata"].(map[string]any)
	if key["Arn"] != arn || key["KeyState"] != "Enabled" || key["KeySpec"] != "SYMMETRIC_DEFAULT" || key["MultiRegion"] != multi || key["Description"] == "" {
		s.t.Errorf("alias/acme in %s is %v, want %s", region, key, arn)
	}
	if on := in("kms", "get-key-rotation-status", "--key-id", arn)["KeyRotationEnabled"]; on != true {
		s.t.Errorf("rotation of %s: %v", arn, on)
	}
	want, err := keypolicy.Text(kind, kmstest.DefaultAccount, scriptRole)
	if err != nil {
		s.t.Fatal(err)
	}
	if got := in("kms", "get-key-policy", "--key-id", arn, "--policy-name", "default")["Policy"].(string); !keypolicy.Same(got, want) {
		s.t.Errorf("policy of %s:\n%s", arn, got)
	}
	tags := map[string]string{}
	for _, one := range in("kms", "list-resource-tags", "--key-id", arn)["Tags"].([]any) {
		tag := one.(map[string]any)
		tags[tag["TagKey"].(string)] = tag["TagValue"].(string)
	}
	if !reflect.DeepEqual(tags, map[string]string{"byokd:alias": "acme", "team": "storage", "cost": "42"}) {
		s.t.Errorf("tags of %s: %v", arn, tags)
	}
}

func TestSingleRegionKeyScript(t *testing.T) {
	s := newScripts(t)
	code, _, messages := s.run(singleScript, values(nil), "--dry-run")
	if code != 0 || !strings.Contains(messages, "would create a key in eu-central-1") || len(s.keys()) != 0 {
		t.Fatalf("dry run: exit code %d, %d keys\n%s", code, len(s.keys()), messages)
	}
	arns := s.made(singleScript, values(nil))
	if len(arns) != 1 || len(s.keys()) != 1 {
		t.Fatalf("it prints %v, and there are %d keys", arns, len(s.keys()))
	}
	s.mustBeComplete(arns["eu-central-1"], "eu-central-1", keypolicy.Full, false)
	if again := s.made(singleScript, values(nil)); !reflect.DeepEqual(again, arns) || len(s.keys()) != 1 {
		t.Errorf("again: it prints %v, and there are %d keys", again, len(s.keys()))
	}
	// The region is not fixed: run again for the backups' region, here with the smaller policy.
	there := s.made(singleScript, values(map[string]string{"REGION": "eu-west-1", "MINIMAL_POLICY": "yes"}))
	if len(s.keys()) != 2 {
		t.Fatalf("%d keys", len(s.keys()))
	}
	s.mustBeComplete(there["eu-west-1"], "eu-west-1", keypolicy.Minimal, false)
}

// The replica is waited for until it can be used, and has its alias.
func TestMultiRegionKeyScript(t *testing.T) {
	s := newScripts(t, "--replica-delay", "2s")
	if code, _, messages := s.run(multiScript, values(nil), "--dry-run"); code != 0 || !strings.Contains(messages, "would replicate it to eu-west-1") || len(s.keys()) != 0 {
		t.Fatalf("dry run: exit code %d, %d keys\n%s", code, len(s.keys()), messages)
	}
	arns := s.made(multiScript, values(nil))
	if len(arns) != 2 || !strings.Contains(arns["eu-west-1"], ":eu-west-1:") || arns["eu-west-1"] != strings.Replace(arns["eu-central-1"], "eu-central-1", "eu-west-1", 1) {
		t.Fatalf("it prints %v", arns)
	}
	for region, arn := range arns {
		s.mustBeComplete(arn, region, keypolicy.Full, true)
	}
	if again := s.made(multiScript, values(nil)); !reflect.DeepEqual(again, arns) || len(s.keys()) != 2 {
		t.Errorf("again: it prints %v, and there are %d keys", again, len(s.keys()))
	}
	// A single-Region key of that alias cannot be replicated, and none is made in its place.
	s.made(singleScript, values(map[string]string{"ALIAS_NAME": "single"}))
	if code, _, messages := s.run(multiScript, values(map[string]string{"ALIAS_NAME": "single"})); code == 0 || !strings.Contains(messages, "cannot be replicated") || len(s.keys()) != 3 {
		t.Errorf("exit code %d, %d keys\n%s", code, len(s.keys()), messages)
	}
}

// A run that fails at any of its steps is completed by the next, which makes no second key.
func TestKeyScriptIsCompleted(t *testing.T) {
	for _, operation := range []string{"CreateAlias", "EnableKeyRotation", "ReplicateKey"} {
		t.Run(operation, func(t *testing.T) {
			s := newScripts(t)
			if _, err := s.c.control().Inject(t.Context(), kmstest.Fault{Kind: kmstest.FaultError, Operations: []string{operation}, Status: 400, Code: "LimitExceededException", Message: "no"}); err != nil {
				t.Fatal(err)
			}
			if code, out, messages := s.run(multiScript, values(nil)); code == 0 || strings.Contains(out, "ARN") || !strings.Contains(messages, "LimitExceededException") {
				t.Errorf("it goes on: exit code %d\n%s%s", code, out, messages)
			}
			if _, err := s.c.control().Clear(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			arns := s.made(multiScript, values(nil))
			if len(s.keys()) != 2 || len(arns) != 2 {
				t.Errorf("%d keys, it prints %v", len(s.keys()), arns)
			}
			for region, arn := range arns {
				s.mustBeComplete(arn, region, keypolicy.Full, true)
			}
		})
	}
}

// The values may be set in the file, as the documentation says: credentials in it are used, though nobody exported
// them, and the others end up in the policy.
func TestKeyScriptWithValuesInTheFile(t *testing.T) {
	s := newScripts(t)
	text, err := os.ReadFile(filepath.Join(s.dir, singleScript))
	if err != nil {
		t.Fatal(err)
	}
	edited := string(text)
	for name, value := range values(nil) {
		line := regexp.MustCompile(`(?m)^` + name + `=.*$`)
		if !line.MatchString(edited) {
			t.Fatalf("no line %s= to be edited", name)
		}
		edited = line.ReplaceAllLiteralString(edited, fmt.Sprintf("%s=%q", name, value))
	}
	s.dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(s.dir, singleScript), []byte(edited), 0o700); err != nil {
		t.Fatal(err)
	}
	arns := s.made(singleScript, nil)
	s.mustBeComplete(arns["eu-central-1"], "eu-central-1", keypolicy.Full, false)
}

// What is missing or wrong is told before AWS is asked for anything that changes.
func TestKeyScriptRefuses(t *testing.T) {
	s := newScripts(t)
	for name, test := range map[string]struct {
		change map[string]string
		words  string
	}{
		"no account":        {map[string]string{"YOUR_ACCOUNT_ID": ""}, "YOUR_ACCOUNT_ID"},
		"placeholder":       {map[string]string{"YOUR_ACCOUNT_ID": "<YOUR_ACCOUNT_ID>"}, "12 digits"},
		"role placeholder":  {map[string]string{"TENANT_ROLE_ARN": "<tenant-role-arn>"}, "TENANT_ROLE_ARN"},
		"a user":            {map[string]string{"TENANT_ROLE_ARN": "arn:aws:iam::111122223333:user/x"}, "TENANT_ROLE_ARN"},
		"region":            {map[string]string{"REGION": "Frankfurt"}, "name of a region"},
		"same region":       {map[string]string{"REPLICA_REGION": "eu-central-1"}, "same as REGION"},
		"alias":             {map[string]string{"ALIAS_NAME": "alias/x"}, "without alias/"},
		"tag":               {map[string]string{"TAGS": "team"}, "NAME=VALUE"},
		"wrong credentials": {map[string]string{"AWS_SECRET_ACCESS_KEY": "wrong"}, "does not accept the credentials"},
		"another account":   {map[string]string{"YOUR_ACCOUNT_ID": "999999999999"}, "belong to account 111122223333"},
		"no permission":     {map[string]string{"AWS_ACCESS_KEY_ID": kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY": kmstest.TenantSecret}, "AccessDenied"},
	} {
		if code, out, messages := s.run(multiScript, values(test.change)); code != 1 && name != "no permission" || code == 0 || out != "" || !strings.Contains(messages, test.words) {
			t.Errorf("%s: exit code %d\n%s%s", name, code, out, messages)
		}
	}
	if code, _, messages := s.run(singleScript, values(nil), "--fast"); code != 2 || !strings.Contains(messages, "--dry-run") {
		t.Errorf("an unknown flag: %d %s", code, messages)
	}
	if n := len(s.keys()); n != 0 {
		t.Errorf("%d keys were made", n)
	}
}

// Customers download one of the scripts: each stands alone, and what they do alike is the same text. A script
// that fails stops, and none of its lines sleeps but to ask again.
func TestKeyScriptsText(t *testing.T) {
	var parts []string
	for _, name := range []string{singleScript, multiScript} {
		text, err := os.ReadFile(filepath.Join("../../deploy/scripts", name))
		if err != nil {
			t.Fatal(err)
		}
		top, below, found := strings.Cut(string(text), "# ---- below this line the two scripts are the same")
		if !found || !strings.Contains(top, "set -euo pipefail") {
			t.Errorf("%s has no marked part or goes on after failures", name)
		}
		for _, variable := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "YOUR_ACCOUNT_ID", "ALIAS_NAME", "REGION"} {
			if !strings.Contains(top, "\n"+variable+"=") {
				t.Errorf("%s has no %s, which the documentation names", name, variable)
			}
		}
		if strings.Count(below, "sleep") != 1 || strings.Contains(below, "file://") {
			t.Errorf("%s sleeps without asking, or writes a policy file", name)
		}
		parts = append(parts, below)
	}
	if parts[0] != parts[1] {
		t.Error("what the scripts have in common differs")
	}
}
