package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/awskey"
	"github.com/byokd/byokd/internal/keypolicy"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/objstore/s3test"
)

// preflightSite is a site on which everything passes.
func preflightSite(t *testing.T) *site {
	t.Helper()
	asTenant(t)
	s := newSite(t)
	up := s3test.New("sealed-documents")
	t.Cleanup(up.Close)
	s.configure(t, map[string]string{"http://127.0.0.1:9": up.URL()})
	return s
}

// checks runs preflight and returns the results by group and name.
func (s *site) checks(t *testing.T, want int) map[string]awskey.Check {
	t.Helper()
	code, out, errs := byokd(t, nil, "preflight", "--config", s.config, "-o", "json")
	if code != want {
		t.Errorf("exit code %d, want %d\n%s%s", code, want, out, errs)
	}
	var report struct {
		Passed bool
		Groups checkGroups
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if report.Passed != (want == exitOK) {
		t.Errorf("passed %v with exit code %d", report.Passed, code)
	}
	found := map[string]awskey.Check{}
	for _, g := range report.Groups {
		for _, c := range g.Checks {
			found[g.Name+"/"+c.Name] = c
		}
	}
	return found
}

// Every permission of the documented policy is tried, and nothing fails where nothing is wrong.
func TestPreflightPasses(t *testing.T) {
	needMounts(t)
	s := preflightSite(t)
	found := s.checks(t, exitOK)
	for _, action := range []string{"DescribeKey", "GenerateDataKeyWithoutPlaintext", "GenerateDataKey", "Decrypt", "Encrypt", "ReEncrypt*", "CreateGrant", "ListGrants", "RevokeGrant"} {
		if c := found["key primary/kms:"+action]; c.Result != awskey.Pass {
			t.Errorf("kms:%s: %+v", action, c)
		}
	}
	for _, name := range []string{"identity/credentials", "identity/clock", "key primary/region", "key primary/state", "key primary/kind", "bucket documents/upstream",
		"machine//dev/fuse", "machine/fs.fuse timeouts", "machine/S3 credentials", "volume/lower directory", "volume/lower filesystem", "volume/mount point"} {
		if c := found[name]; c.Result != awskey.Pass {
			t.Errorf("%s: %+v", name, c)
		}
	}
	keys, err := s.kms.Keys()
	if err != nil || len(keys) != 1 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	for _, call := range s.kms.Calls() { // nothing was changed, and no plaintext was asked for
		if call.Error == "" && !strings.Contains("GetCallerIdentity DescribeKey GenerateDataKeyWithoutPlaintext ListGrants", call.Operation) {
			t.Errorf("%s was carried out", call.Operation)
		}
	}
	code, table, _ := byokd(t, nil, "preflight", "--config", s.config)
	if code != exitOK || !strings.Contains(table, "KEY PRIMARY  "+s.arn) || !strings.Contains(table, "Everything that is required passes.") {
		t.Errorf("%d\n%s", code, table)
	}

	// Beside a running byokd, too.
	p := s.start(t)
	p.awaitState(t, exitOK)
	found = s.checks(t, exitOK)
	if c := found["volume/mount point"]; !strings.Contains(c.Detail, "a byokd serves there") {
		t.Errorf("%+v", c)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if c := s.checks(t, exitOK)["volume/lower directory"]; !strings.Contains(c.Detail, "a volume") {
		t.Errorf("%+v", c)
	}
}

// Each thing that may be wrong fails by its name, with a next step.
func TestPreflightFails(t *testing.T) {
	needMounts(t)
	role := kmstest.TenantRole
	for name, test := range map[string]struct {
		spoil  func(t *testing.T, s *site)
		check  string
		result awskey.Result
		words  string // in detail and next step
	}{
		"disabled": {func(t *testing.T, s *site) { must(t, s.kms.Disable(s.arn)) }, "key primary/state", awskey.Fail, "enable-key --key-id"},
		"deletion": {func(t *testing.T, s *site) { must(t, s.kms.ScheduleDeletion(s.arn, 7*24*time.Hour)) }, "key primary/state", awskey.Fail, "cancel-key-deletion"},
		"no such key": {func(t *testing.T, s *site) {
			s.configure(t, map[string]string{s.arn: s.arn[:len(s.arn)-4] + "0000"})
		}, "key primary/kms:DescribeKey", awskey.Fail, "Correct the key ARN"},
		"no Decrypt":         {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "Decrypt", role)) }, "key primary/kms:Decrypt", awskey.Fail, "byokd key policy --account 111122223333 --role " + role},
		"no GenerateDataKey": {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "GenerateDataKey", role)) }, "key primary/kms:GenerateDataKey", awskey.Fail, "put-key-policy"},
		"no probe":           {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "GenerateDataKeyWithoutPlaintext", role)) }, "key primary/kms:GenerateDataKeyWithoutPlaintext", awskey.Fail, "not allowed"},
		"no DescribeKey":     {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "DescribeKey", role)) }, "key primary/kms:DescribeKey", awskey.Warn, "cannot be explained"},
		"no ReEncrypt":       {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "ReEncrypt*", role)) }, "key primary/kms:ReEncrypt*", awskey.Warn, "only `byokd key rewrap` needs it"},
		"no grants":          {func(t *testing.T, s *site) { must(t, s.kms.Deny(s.arn, "RevokeGrant", role)) }, "key primary/kms:RevokeGrant", awskey.Warn, "EBS"},
		"other region": {func(t *testing.T, s *site) {
			arn, err := s.kms.CreateKey("eu-west-1", "", "", false)
			must(t, err)
			text, err := os.ReadFile(s.config)
			must(t, err)
			s.write(t, s.config, strings.Replace(string(text), "keys: {primary:", fmt.Sprintf("keys: {other: {arn: %q, endpoint: %q}, primary:", arn, s.endpoint), 1), 0o600)
			s.configureBuckets(t, "key: other, ")
		}, "key other/region", awskey.Pass, "eu-west-1"},
		"foreign files": {func(t *testing.T, s *site) { s.write(t, s.lower+"/accounts.db", "x", 0o600) }, "volume/lower directory", awskey.Fail, "accounts.db"},
		"mount in use":  {func(t *testing.T, s *site) { s.write(t, s.mount+"/x", "x", 0o600) }, "volume/mount point", awskey.Fail, "not empty"},
		"no mount":      {func(t *testing.T, s *site) { must(t, os.Remove(s.mount)) }, "volume/mount point", awskey.Pass, "will be made"},
		"nowhere to make the mount": {func(t *testing.T, s *site) {
			text, err := os.ReadFile(s.config)
			must(t, err)
			s.write(t, s.config, strings.Replace(string(text), s.mount, s.mount+"/deep/below", 1), 0o600)
		}, "volume/mount point", awskey.Fail, "mkdir -p "},
		"no bucket": {func(t *testing.T, s *site) {
			text, err := os.ReadFile(s.config)
			must(t, err)
			s.write(t, s.config, strings.Replace(string(text), "bucket: sealed-documents", "bucket: absent", 1), 0o600)
		}, "bucket documents/upstream", awskey.Fail, "--bucket absent"},
		"credentials for all": {func(t *testing.T, s *site) { must(t, os.Chmod(s.credentials, 0o644)) }, "machine/S3 credentials", awskey.Fail, "chmod 600"},
	} {
		t.Run(name, func(t *testing.T) {
			s := preflightSite(t)
			test.spoil(t, s)
			want := exitOK
			if test.result == awskey.Fail {
				want = exitChecks
			}
			c := s.checks(t, want)[test.check]
			if c.Result != test.result || !strings.Contains(c.Detail+c.NextStep, test.words) {
				t.Errorf("%s: %+v", test.check, c)
			}
		})
	}
}

// A lower directory that a byokd serves is one's own where that byokd has mounted it at the configured place, and another's
// elsewhere: byokd would not start.
func TestPreflightOfADirectoryInUse(t *testing.T) {
	needMounts(t)
	s := preflightSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	if c := s.checks(t, exitOK)["volume/lower directory"]; c.Result != awskey.Pass {
		t.Errorf("beside the byokd that serves it: %+v", c)
	}
	text, err := os.ReadFile(s.config)
	must(t, err)
	elsewhere := s.mount + "2"
	s.write(t, s.config, strings.Replace(string(text), `"`+s.mount+`"`, `"`+elsewhere+`"`, 1), 0o600)
	if c := s.checks(t, exitChecks)["volume/lower directory"]; c.Result != awskey.Fail || !strings.Contains(c.Detail, "in use by another byokd, which mounts it elsewhere than at "+elsewhere) {
		t.Errorf("with another mount point: %+v", c)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if c := s.checks(t, exitOK)["volume/lower directory"]; c.Result != awskey.Pass {
		t.Errorf("after its stop: %+v", c)
	}
}

// A KMS that does not answer ends a preflight: what was asked fails, and what could only wait as long is not asked.
func TestPreflightWithoutAnswer(t *testing.T) {
	needMounts(t)
	s := preflightSite(t)
	s.kms.Hang("ListGrants") // the network may fail at any call
	if c := s.checks(t, exitChecks)["key primary/kms:ListGrants"]; c.Result != awskey.Fail || !strings.Contains(c.Detail, "deadline exceeded") {
		t.Errorf("a call without an answer: %+v", c)
	}
	s.kms.Clear()
	s.kms.Cut()
	since := len(s.kms.Calls())
	found := s.checks(t, exitChecks)
	if c := found["key primary/kms:DescribeKey"]; c.Result != awskey.Fail || !strings.Contains(c.NextStep, "Check DNS, network policy") {
		t.Errorf("%+v", c)
	}
	for _, action := range []string{"GenerateDataKeyWithoutPlaintext", "Decrypt", "RevokeGrant"} {
		if c := found["key primary/kms:"+action]; c.Result != awskey.Skip || !strings.Contains(c.Detail, "Unreachable") {
			t.Errorf("kms:%s: %+v", action, c)
		}
	}
	for _, call := range s.kms.Calls()[since:] {
		if call.Service == "kms" && call.Operation != "DescribeKey" {
			t.Errorf("%s was asked of a KMS that does not answer", call.Operation)
		}
	}
}

// configureBuckets puts the bucket under a key of its own.
func (s *site) configureBuckets(t *testing.T, key string) {
	t.Helper()
	text, err := os.ReadFile(s.config)
	must(t, err)
	changed := strings.Replace(string(text), "documents: {upstream", "documents: {"+key+"upstream", 1)
	s.write(t, s.config, strings.Replace(changed, "volume: {", "volume: {key: primary, ", 1), 0o600)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestKeyVerify(t *testing.T) {
	asTenant(t)
	s := newSite(t)
	verify := func(arn string, args ...string) (int, string) {
		code, out, errs := byokd(t, nil, append([]string{"key", "verify", "--endpoint", s.endpoint, "--key", arn}, args...)...)
		return code, out + errs
	}
	if code, out := verify(s.arn, "--region", "eu-central-1"); code != exitOK || !strings.Contains(out, kmstest.TenantRole) {
		t.Errorf("%d %s", code, out)
	}
	if code, out := verify(s.arn, "--region", "eu-west-1"); code != exitChecks || !strings.Contains(out, "the key is in eu-central-1, the cluster in eu-west-1") {
		t.Errorf("%d %s", code, out)
	}
	if code, out := verify("alias/x"); code != exitUsage {
		t.Errorf("%d %s", code, out)
	}
}

func TestIdentity(t *testing.T) {
	asTenant(t)
	s := newSite(t)
	if code, out, errs := byokd(t, nil, "identity", "--endpoint", s.endpoint); code != exitOK || out != kmstest.TenantRole+"\n" {
		t.Errorf("%d %s %s", code, out, errs)
	}
	// AWS leaves the path of a role out; IRSA's environment has it.
	full := "arn:aws:iam::111122223333:role/tenants/eu/byokd-tenant"
	if _, out, _ := byokd(t, []string{"AWS_ROLE_ARN=" + full}, "identity", "--endpoint", s.endpoint); out != full+"\n" {
		t.Errorf("with AWS_ROLE_ARN: %s", out)
	}
	if _, out, _ := byokd(t, []string{"AWS_ROLE_ARN=arn:aws:iam::111122223333:role/other"}, "identity", "--endpoint", s.endpoint); out != kmstest.TenantRole+"\n" {
		t.Errorf("with another role's AWS_ROLE_ARN: %s", out)
	}
	var id awskey.Identity
	if _, out, _ := byokd(t, nil, "identity", "--endpoint", s.endpoint, "-o", "json"); json.Unmarshal([]byte(out), &id) != nil || id.Account != "111122223333" {
		t.Errorf("%s", out)
	}
	if code, _, errs := byokd(t, nil, "identity", "--endpoint", "http://127.0.0.1:9"); code != exitFailure || errs == "" {
		t.Errorf("%d %s", code, errs)
	}
}

// TestUnderEachDocumentedPolicy: byokd serves volume and bucket, freezes and thaws under the newest policy of the
// documentation and under the smaller ones; only the newest allows a rewrap.
func TestUnderEachDocumentedPolicy(t *testing.T) {
	for _, name := range []string{"newest", "minimal", "oldest"} {
		t.Run(name, func(t *testing.T) {
			s := newMoveSite(t)
			policy := documentedPolicy(t, name)
			must(t, s.kms.PutPolicy(s.first, policy))
			must(t, s.kms.PutPolicy(s.second, policy))
			p := s.start(t)
			p.awaitState(t, exitOK)
			s.write(t, p, "before")
			must(t, s.kms.Disable(s.first))
			p.awaitState(t, exitFrozen)
			must(t, s.kms.Enable(s.first))
			p.awaitState(t, exitOK)
			s.mustRead(t, p, "before")
			p.stop(t)
			p = s.start(t)
			p.awaitState(t, exitOK)
			s.mustRead(t, p, "before")
			if found := s.checks(t, exitOK); found["key primary/kms:Decrypt"].Result != awskey.Pass {
				t.Errorf("preflight: %+v", found["key primary/kms:Decrypt"])
			}
			if name == "newest" {
				s.rewrap(t, exitOK, "--to", s.second)
			} else if _, errs := s.rewrap(t, exitFrozen, "--to", s.second); !strings.Contains(errs, "kms:ReEncrypt") {
				t.Errorf("a rewrap says %s", errs)
			}
			s.mustRead(t, p, "before")
			p.stop(t)
		})
	}
}

func documentedPolicy(t *testing.T, name string) string {
	t.Helper()
	kinds := map[string]keypolicy.Kind{"newest": keypolicy.Full, "minimal": keypolicy.Minimal}
	kind, ours := kinds[name]
	if ours {
		text, err := keypolicy.Text(kind, kmstest.DefaultAccount, kmstest.TenantRole)
		must(t, err)
		return text
	}
	text, err := os.ReadFile("../../internal/keypolicy/testdata/" + name + ".json")
	must(t, err)
	return strings.NewReplacer("<camunda-accountId>:role/<tenant-IAM-role>", strings.TrimPrefix(kmstest.TenantRole, "arn:aws:iam::"),
		"<customer-aws-account>", kmstest.DefaultAccount).Replace(string(text))
}

// The command makes what the package makes; here what is the command's own.
func TestKeyCreateAndPolicy(t *testing.T) {
	asTenant(t)
	t.Setenv("AWS_ACCESS_KEY_ID", kmstest.AdminAccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", kmstest.AdminSecret)
	s := newSite(t)
	create := func(args ...string) (int, string, string) {
		return byokd(t, nil, append([]string{"key", "create", "--endpoint", s.endpoint, "--region", "eu-west-1", "--role", kmstest.TenantRole}, args...)...)
	}
	code, out, errs := create("--dry-run")
	if code != exitOK || out != "" || !strings.Contains(errs, "would create a key in eu-west-1") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	code, out, errs = create("--replica-region", "eu-north-1", "--tag", "team=storage")
	if code != exitOK || strings.Count(out, "arn:aws:kms:") != 2 || !strings.HasPrefix(out, "eu-west-1  arn:") {
		t.Fatalf("%d %s %s", code, out, errs)
	}
	arn := strings.Fields(out)[1]
	if code, again, _ := create("--replica-region", "eu-north-1", "--tag", "team=storage"); code != exitOK || again != out {
		t.Errorf("%d %s", code, again)
	}
	for args, want := range map[string]int{"--replica-region eu-west-1": exitUsage, "--alias alias/x": exitUsage, "--role x": exitUsage} {
		if code, _, errs := create(strings.Fields(args)...); code != want || errs == "" {
			t.Errorf("%s: %d %s", args, code, errs)
		}
	}
	asTenant(t) // and byokd may use it
	if code, out, errs := byokd(t, nil, "key", "verify", "--endpoint", s.endpoint, "--key", arn); code != exitOK {
		t.Errorf("%d %s %s", code, out, errs)
	}
	code, out, _ = byokd(t, nil, "key", "policy", "--account", "111122223333", "--role", kmstest.TenantRole)
	if want, err := s.kms.Policy(arn); code != exitOK || err != nil || !keypolicy.Same(out, want) {
		t.Errorf("%d %s, want %s", code, out, want)
	}
	if code, _, errs := byokd(t, nil, "key", "policy", "--account", "1", "--role", kmstest.TenantRole); code != exitUsage || !strings.Contains(errs, "12 digits") {
		t.Errorf("%d %s", code, errs)
	}
}
