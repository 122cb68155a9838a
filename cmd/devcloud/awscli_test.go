package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// awsCLI runs the real command line against a cloud as one of its identities.
type awsCLI struct {
	t    *testing.T
	path string
	c    *cloud
	home string
}

// needAWS skips where the aws command line is missing, and fails where it is required.
func needAWS(t *testing.T, c *cloud) *awsCLI {
	t.Helper()
	path, err := exec.LookPath("aws")
	if err != nil {
		if slices.Contains(strings.FieldsFunc(os.Getenv("BYOKD_REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' }), "aws") {
			t.Fatal("BYOKD_REQUIRE names aws, but the aws command line is not installed")
		}
		t.Skip("the aws command line is not installed")
	}
	return &awsCLI{t: t, path: path, c: c, home: t.TempDir()}
}

func (a *awsCLI) run(who, region, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(a.t.Context(), a.path, args...)
	secret := kmstest.AdminSecret
	if who == kmstest.TenantAccessKey {
		secret = kmstest.TenantSecret
	}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + a.home, "AWS_PAGER=", "AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1",
		"AWS_ACCESS_KEY_ID=" + who, "AWS_SECRET_ACCESS_KEY=" + secret, "AWS_DEFAULT_REGION=" + region, "AWS_ENDPOINT_URL=" + a.c.endpoint}
	if root := os.Getenv("PYENV_ROOT"); root != "" {
		cmd.Env = append(cmd.Env, "PYENV_ROOT="+root)
	}
	cmd.Dir, cmd.Stdin = a.home, strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// ok runs a command that must succeed and returns its JSON answer.
func (a *awsCLI) ok(who string, args ...string) map[string]any {
	a.t.Helper()
	out, err := a.run(who, kmstest.DefaultRegion, "", args...)
	if err != nil {
		a.t.Fatalf("aws %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	var answer map[string]any
	if strings.TrimSpace(out) != "" && json.Unmarshal([]byte(out), &answer) != nil && args[0] != "s3" {
		a.t.Fatalf("aws %s: no JSON\n%s", strings.Join(args, " "), out)
	}
	return answer
}

// refused runs a command that must fail with a named error.
func (a *awsCLI) refused(who, want string, args ...string) {
	a.t.Helper()
	out, err := a.run(who, kmstest.DefaultRegion, "", args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(out, want) {
		a.t.Errorf("aws %s: %v, want %s in\n%s", strings.Join(args, " "), err, want, out)
	}
}

func TestAWSCommandLineOnKMS(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	a := needAWS(t, c)
	const admin, tenant, alias = kmstest.AdminAccessKey, kmstest.TenantAccessKey, "alias/byokd"
	if got := a.ok(tenant, "sts", "get-caller-identity")["Arn"]; got != "arn:aws:sts::111122223333:assumed-role/byokd-tenant/byokd" {
		t.Errorf("identity %v", got)
	}
	id := a.ok(admin, "kms", "describe-key", "--key-id", alias)["KeyMetadata"].(map[string]any)["KeyId"].(string)
	data := a.ok(tenant, "kms", "generate-data-key", "--key-id", alias, "--key-spec", "AES_256", "--encryption-context", "byokd:cluster=acme")
	wrapped := data["CiphertextBlob"].(string)
	decrypt := []string{"kms", "decrypt", "--key-id", id, "--ciphertext-blob", wrapped, "--encryption-context", "byokd:cluster=acme"}
	if runsV1 := !strings.Contains(a.version(), "aws-cli/2"); runsV1 { // v1 takes blobs as files only
		raw := filepath.Join(a.home, "blob")
		writeBase64(t, raw, wrapped)
		decrypt[5] = "fileb://" + raw
	}
	if got := a.ok(tenant, decrypt...)["Plaintext"]; got != data["Plaintext"] {
		t.Errorf("decrypted %v", got)
	}
	a.refused(tenant, "(DryRunOperationException)", append(decrypt, "--dry-run")...)
	a.refused(tenant, "(InvalidCiphertextException)", append(decrypt[:len(decrypt)-1:len(decrypt)-1], "byokd:cluster=other")...)
	a.refused(tenant, "(AccessDeniedException)", "kms", "disable-key", "--key-id", id)
	a.refused(admin, "(NotFoundException)", "kms", "disable-key", "--key-id", alias)

	a.ok(admin, "kms", "disable-key", "--key-id", id)
	a.refused(tenant, "(DisabledException)", decrypt...)
	a.ok(admin, "kms", "schedule-key-deletion", "--key-id", id, "--pending-window-in-days", "7")
	a.refused(tenant, "(KMSInvalidStateException)", decrypt...)
	a.ok(admin, "kms", "cancel-key-deletion", "--key-id", id)
	a.refused(tenant, "(DisabledException)", decrypt...)
	a.ok(admin, "kms", "enable-key", "--key-id", id)
	a.ok(admin, "kms", "rotate-key-on-demand", "--key-id", id)
	a.ok(admin, "kms", "enable-key-rotation", "--key-id", id)
	if got := a.ok(admin, "kms", "get-key-rotation-status", "--key-id", id)["KeyRotationEnabled"]; got != true {
		t.Errorf("rotation %v", got)
	}
	a.ok(tenant, decrypt...)

	policy := a.ok(admin, "kms", "get-key-policy", "--key-id", id)["Policy"].(string)
	a.ok(admin, "kms", "put-key-policy", "--key-id", id, "--policy", strings.Replace(policy, `"kms:Decrypt",`, "", 1))
	a.refused(tenant, "(AccessDeniedException)", decrypt...)
	a.ok(admin, "kms", "put-key-policy", "--key-id", id, "--policy", policy)
	a.ok(tenant, decrypt...)
	if keys := a.ok(admin, "kms", "list-aliases")["Aliases"].([]any); len(keys) != 1 {
		t.Errorf("%v", keys)
	}
}

func TestAWSCommandLineOnS3(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	a := needAWS(t, c)
	const who = kmstest.TenantAccessKey
	big := filepath.Join(a.home, "big") // above the 8 MiB from which aws uploads in parts
	content := bytes.Repeat([]byte("0123456789abcdef"), 9<<20/16)
	if err := os.WriteFile(big, content, 0o600); err != nil {
		t.Fatal(err)
	}
	a.ok(who, "s3", "cp", "--quiet", big, "s3://acme-documents/dir/big file")
	a.ok(who, "s3", "cp", "--quiet", "s3://acme-documents/dir/big file", "back")
	if got, err := os.ReadFile(filepath.Join(a.home, "back")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("came back with %d bytes: %v", len(got), err)
	}
	out, err := a.run(who, "eu-west-1", "", "s3", "ls", "--recursive", "s3://acme-documents")
	if err != nil || !strings.Contains(out, "dir/big file") {
		t.Errorf("%v %s", err, out)
	}
	a.ok(who, "s3", "cp", "--quiet", "s3://acme-documents/dir/big file", "s3://acme-backups/copy")
	a.ok(who, "s3", "rm", "--quiet", "--recursive", "s3://acme-documents")
	a.refused(who, "Not Found", "s3api", "head-object", "--bucket", "acme-documents", "--key", "dir/big file")
	if got := a.ok(who, "s3api", "head-object", "--bucket", "acme-backups", "--key", "copy")["ContentLength"]; got != float64(len(content)) {
		t.Errorf("the copy has %v bytes", got)
	}
}

func (a *awsCLI) version() string {
	out, err := a.run(kmstest.AdminAccessKey, kmstest.DefaultRegion, "", "--version")
	if err != nil {
		a.t.Fatalf("aws --version: %v\n%s", err, out)
	}
	return out
}

func writeBase64(t *testing.T, path, text string) {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}
