package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// setTenant gives commands that run in this process the role of byokd.
func setTenant(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY": kmstest.TenantSecret,
		"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_REGION": "eu-central-1"} {
		t.Setenv(name, value)
	}
}

// bucketSite is a site with an upstream and no volume.
type bucketSite struct {
	*site
	up *s3test.Server
}

func newBucketSite(t *testing.T) *bucketSite {
	t.Helper()
	setTenant(t)
	s := &bucketSite{site: newSite(t), up: s3test.New("sealed-documents")}
	t.Cleanup(s.up.Close)
	s.configure(t, map[string]string{
		fmt.Sprintf("volume: {lower: %q, mount: %q}\n", s.lower, s.mount): "",
		"http://127.0.0.1:9": s.up.URL(),
	})
	return s
}

// fill lets a byokd seal some objects, and stops it.
func (s *bucketSite) fill(t *testing.T, bodies map[string][]byte) {
	t.Helper()
	p := s.start(t)
	p.awaitState(t, exitOK)
	_, endpoint := p.addresses()
	client := s3.New(s3.Options{BaseEndpoint: aws.String(endpoint), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("id", "secret", "")})
	for key, body := range bodies {
		if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: &key, Body: bytes.NewReader(body), ContentType: aws.String("text/plain"), Metadata: map[string]string{"name": key, "empty": ""}}); err != nil {
			t.Fatal(err)
		}
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// decrypt runs the command and expects its exit code.
func (s *bucketSite) decrypt(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, messages strings.Builder
	if got := run(t.Context(), append([]string{"decrypt"}, args...), nil, &out, &messages); got != code {
		t.Errorf("byokd decrypt %v ends with %d, want %d\n%s", args, got, code, &messages)
	}
	return out.String(), messages.String()
}

func TestDecrypt(t *testing.T) {
	s := newBucketSite(t)
	bodies := map[string][]byte{}
	for i, n := range []int{0, 5, 70000, 1 << 20} {
		bodies[fmt.Sprintf("backup/%d/data", i)] = bytes.Repeat([]byte{byte('a' + i)}, n)
	}
	bodies["backup/../escape"], bodies["backup/folder/"], bodies["other"] = []byte("x"), nil, []byte("other")
	s.fill(t, bodies)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	direct := []string{"--key", s.arn, "--kms-endpoint", s.endpoint, "--endpoint", s.up.URL()}

	// One object, by the configuration, by the key alone, and as a file.
	if got, _ := s.decrypt(t, exitOK, "s3://documents/backup/2/data", "--config", s.config); got != string(bodies["backup/2/data"]) {
		t.Errorf("%d bytes", len(got))
	}
	if got, _ := s.decrypt(t, exitOK, append(direct, "s3://sealed-documents/other")...); got != "other" {
		t.Errorf("%q", got)
	}
	sealed := s.up.Object("sealed-documents", "backup/3/data").Data
	s.write(t, at("sealed"), string(sealed), 0o600)
	s.write(t, at("ring"), string(s.up.Object("sealed-documents", objstore.KeyringObject).Data), 0o600)
	file := []string{at("sealed"), "--key", s.arn, "--kms-endpoint", s.endpoint}
	s.decrypt(t, exitOK, append(file, "--keyring", at("ring"), "-o", at("plain"))...)
	if got, err := os.ReadFile(at("plain")); err != nil || !bytes.Equal(got, bodies["backup/3/data"]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	s.decrypt(t, exitOK, append(file, "--context", "byokd:cluster=test-cluster,byokd:resource=bucket/sealed-documents")...)

	s.decrypt(t, exitOK, append(direct, "s3://sealed-documents/other", "--metadata", "-o", at("other"))...)
	if got, err := os.ReadFile(at("other.metadata.json")); err != nil || string(got) != "{\n  \"contentType\": \"text/plain\",\n  \"metadata\": {\n    \"empty\": \"\",\n    \"name\": \"other\"\n  }\n}\n" {
		t.Errorf("metadata: %s, %v", got, err)
	}

	// Refusals, each with its code and without an output.
	s.decrypt(t, exitUsage, file...)
	s.decrypt(t, exitUsage, at("sealed"))
	s.decrypt(t, exitFailure, append(file, "--keyring", at("ring"), "-o", at("plain"))...)
	if _, messages := s.decrypt(t, exitFailure, append(direct, "s3://sealed-documents/absent")...); !strings.Contains(messages, "s3://sealed-documents/absent: ") || !strings.Contains(messages, "--recursive") {
		t.Errorf("an absent object: %s", messages)
	}
	s.decrypt(t, exitDamaged, append(file, "--context", "byokd:cluster=another,byokd:resource=bucket/sealed-documents")...)
	other, err := s.kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, messages := s.decrypt(t, exitDamaged, at("sealed"), "--keyring", at("ring"), "--key", other, "--kms-endpoint", s.endpoint); !strings.Contains(messages, "--key "+s.arn) {
		t.Errorf("it does not say which key the object names: %s", messages)
	}
	for name, damaged := range map[string][]byte{"cut": sealed[:len(sealed)-1], "cut at a segment": sealed[:1024+65564], "empty": nil, "plain": []byte("hello"), "flipped": append(bytes.Clone(sealed[:5000]), bytes.Repeat([]byte{7}, len(sealed)-5000)...)} {
		s.write(t, at("damaged"), string(damaged), 0o600)
		if _, messages := s.decrypt(t, exitDamaged, at("damaged"), "--keyring", at("ring"), "--key", s.arn, "--kms-endpoint", s.endpoint, "-o", at("short")); messages == "" {
			t.Errorf("%s: nothing is said", name)
		}
		if left, err := filepath.Glob(at("short*")); err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left, %v", name, left, err)
		}
	}
	s.decryptPrefix(t, at("tree"), bodies)

	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	if _, messages := s.decrypt(t, exitFrozen, "s3://documents/other", "--config", s.config); !strings.Contains(messages, "External encryption key is not ready") || !strings.Contains(messages, "enable-key --key-id "+s.arn) {
		t.Errorf("a disabled key: %s", messages)
	}
}

// decryptPrefix restores a prefix that holds a key which leads out of the directory, twice, the second time
// with one object damaged.
func (s *bucketSite) decryptPrefix(t *testing.T, dir string, bodies map[string][]byte) {
	t.Helper()
	_, messages := s.decrypt(t, exitFailure, "s3://documents/backup/", "--config", s.config, "--recursive", "-o", dir)
	if !strings.Contains(messages, "1 of 6 objects could not be restored") || !strings.Contains(messages, "backup/../escape") {
		t.Errorf("it says: %s", messages)
	}
	for i := range 4 {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i), "data"))
		if err != nil || !bytes.Equal(got, bodies[fmt.Sprintf("backup/%d/data", i)]) {
			t.Errorf("%d: %d bytes, %v", i, len(got), err)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(dir), "escape")); err == nil {
		t.Error("an object was written outside of the directory")
	}
	o := s.up.Object("sealed-documents", "backup/1/data")
	o.Data[len(o.Data)-1] ^= 1
	s.up.Replace("sealed-documents", "backup/1/data", o)
	s.up.Remove("sealed-documents", "backup/../escape")
	if err := os.Remove(filepath.Join(dir, "1", "data")); err != nil {
		t.Fatal(err)
	}
	if _, said := s.decrypt(t, exitFailure, "s3://documents/bakcup/", "--config", s.config, "-r", "-o", filepath.Join(t.TempDir(), "nothing")); !strings.Contains(said, "s3://documents/bakcup/: there is no object") {
		t.Errorf("a mistyped prefix: %s", said)
	}
	if _, messages = s.decrypt(t, exitDamaged, "s3://documents/backup/", "--config", s.config, "-r", "--resume", "-o", dir); !strings.Contains(messages, "4 there already, 1 failed") {
		t.Errorf("it says: %s", messages)
	}
	if _, err := os.Stat(filepath.Join(dir, "1", "data")); err == nil {
		t.Error("a damaged object was restored")
	}
}

// An object that has the name of another's file of metadata is told, and neither is lost for the other.
func TestDecryptMetadataOfTwins(t *testing.T) {
	s := newBucketSite(t)
	s.fill(t, map[string][]byte{"twin": []byte("plain"), "twin" + metadataSuffix: []byte("an object"), "alone" + metadataSuffix: []byte("another")})
	dir := filepath.Join(t.TempDir(), "tree")
	for _, again := range [][]string{nil, {"--resume"}} {
		_, messages := s.decrypt(t, exitFailure, append([]string{"s3://documents/", "--config", s.config, "-r", "--metadata", "-o", dir}, again...)...)
		if !strings.Contains(messages, "byokd: twin.metadata.json: its file would have the name of the metadata of twin: restore this object alone, with -o") ||
			!strings.Contains(messages, "1 of 3 objects could not be restored") {
			t.Errorf("it says: %s", messages)
		}
	}
	for name, want := range map[string]string{"twin": "plain", "alone" + metadataSuffix: "another"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "twin"+metadataSuffix)); err != nil || !strings.Contains(string(got), "text/plain") {
		t.Errorf("the metadata of twin: %q, %v", got, err)
	}
}

// A key source asks KMS once for each data key, however many objects are restored.
func TestDecryptAsksOncePerDataKey(t *testing.T) {
	s := newBucketSite(t)
	bodies := map[string][]byte{}
	for i := range 30 {
		bodies[fmt.Sprint(i)] = []byte("x")
	}
	s.fill(t, bodies)
	before := s.kms.LastCall()
	s.decrypt(t, exitOK, "s3://documents/", "--config", s.config, "-r", "-o", t.TempDir())
	// The keyring's key and one data key, which the first of the workers may ask for at once.
	if n := len(s.kms.CallsSince(before)); n < 2 || n > 5 {
		t.Errorf("%d calls of KMS for %d objects under one data key", n, len(bodies))
	}
}

// A restore says that KMS does not answer while it asks again, and goes on once it does.
func TestDecryptWaitsForKMS(t *testing.T) {
	s := newBucketSite(t)
	s.fill(t, map[string][]byte{"key": []byte("plain")})
	s.kms.Hang("Decrypt")
	var out bytes.Buffer
	var messages toldOnce
	messages.first = func() { s.kms.Clear() }
	if code := run(t.Context(), []string{"decrypt", "s3://documents/key", "--config", s.config}, nil, &out, &messages); code != exitOK || out.String() != "plain" {
		t.Errorf("%d %q\n%s", code, &out, &messages)
	}
	if said := messages.String(); strings.Count(said, "KMS cannot be asked yet") != 1 {
		t.Errorf("it says %q", said)
	}
}

// toldOnce does something at the first line that it is told.
type toldOnce struct {
	bytes.Buffer
	first func()
}

func (w *toldOnce) Write(text []byte) (int, error) {
	if w.Len() == 0 {
		w.first()
	}
	return w.Buffer.Write(text)
}

// Whoever ends a restore is not told that KMS has failed.
func TestInterruptedDecryptBlamesNobody(t *testing.T) {
	stopped := &keyguard.KMSError{Op: "Decrypt", State: keyguard.Unreachable, Reason: keyguard.ReasonStopped, Err: context.Canceled}
	err := explainDecrypt(&keyRefusal{arn: "arn:aws:kms:eu-central-1:111122223333:key/1", err: stopped})
	var coded *exitError
	if !errors.As(err, &coded) || coded.code != exitFailure || !strings.HasPrefix(err.Error(), "interrupted: ") || strings.Contains(err.Error(), "Next step") {
		t.Errorf("%v", err)
	}
}

// TestDecryptIdleFlags: what a source has no use for is refused, and not left out without a word; what is said beside a
// configuration counts.
func TestDecryptIdleFlags(t *testing.T) {
	s := newBucketSite(t)
	s.fill(t, map[string][]byte{"o": []byte("plain")})
	dir := t.TempDir()
	sealed, lower, out := filepath.Join(dir, "sealed"), filepath.Join(dir, "lower"), filepath.Join(dir, "out")
	s.write(t, sealed, string(s.up.Object("sealed-documents", "o").Data), 0o600)
	must(t, os.Mkdir(lower, 0o700))
	for _, args := range [][]string{
		{"s3://documents/o", "--parts", "1"}, {"s3://documents/o", "--keyring", sealed}, {"s3://documents/o", "--resume"},
		{"s3://documents/", "--recursive", "--version-id", "v"}, {"s3://documents/", "--recursive", "--parts", "1"}, {"s3://documents/", "-r", "--zero-damaged"},
		{sealed, "--metadata"}, {sealed, "--version-id", "v"}, {sealed, "--endpoint", "http://127.0.0.1:1"}, {sealed, "--zero-damaged"},
		{lower, "--metadata"}, {lower, "--parts", "1"}, {lower, "--recursive"},
	} {
		flag := args[len(args)-1]
		if !strings.HasPrefix(flag, "-") {
			flag = args[len(args)-2]
		}
		if _, errs := s.decrypt(t, exitUsage, append(args, "--config", s.config, "-o", out)...); !strings.Contains(errs, flag) {
			t.Errorf("%v: %s", args, errs)
		}
	}
	if _, err := os.Lstat(out); err == nil {
		t.Error("something was written")
	}
	for _, args := range [][]string{{"s3://documents", "--socket", sealed}, {lower, "--current"}, {lower, "--endpoint", s.up.URL()}} {
		if code, _, errs := byokd(t, nil, append([]string{"check", "--config", s.config}, args...)...); code != exitUsage || !strings.Contains(errs, args[1]) {
			t.Errorf("check %v: %d %s", args, code, errs)
		}
	}
	s.configure(t, map[string]string{
		fmt.Sprintf("volume: {lower: %q, mount: %q}\n", s.lower, s.mount): "",
		"http://127.0.0.1:9": "http://127.0.0.1:1",
	})
	if got, _ := s.decrypt(t, exitOK, "s3://documents/o", "--config", s.config, "--endpoint", s.up.URL()); got != "plain" {
		t.Errorf("%q", got)
	}
}
