package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/byokd/byokd/keyguard/kmstest"
)

func sdk(t *testing.T, c *cloud, region, key, secret string) aws.Config {
	t.Helper()
	cfg, err := config.LoadDefaultConfig(t.Context(), config.WithRegion(region), config.WithBaseEndpoint(c.endpoint),
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
		config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(key, secret, "")))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func tenantS3(t *testing.T, c *cloud) *s3.Client {
	return s3.NewFromConfig(sdk(t, c, kmstest.DefaultRegion, kmstest.TenantAccessKey, kmstest.TenantSecret))
}

func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return fmt.Sprint(err)
}

func describe(t *testing.T, c *cloud) (arn, state string) {
	t.Helper()
	out, err := kms.NewFromConfig(sdk(t, c, kmstest.DefaultRegion, "test", "test")).DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: aws.String(setupAlias)})
	if err != nil {
		t.Fatal(err)
	}
	return *out.KeyMetadata.Arn, string(out.KeyMetadata.KeyState)
}

func TestSetupIsIdempotentAndStateSurvivesAKill(t *testing.T) {
	dir := t.TempDir()
	c := serveCloud(t, dir, "--setup")
	arn, state := describe(t, c)
	if state != "Enabled" || !strings.Contains(c.output.String(), arn+"  alias/byokd  Enabled") {
		t.Errorf("%s %s\n%s", arn, state, c.output)
	}
	text, err := c.control().Policy(t.Context(), arn)
	if err != nil || text != kmstest.DocumentedPolicy("111122223333", "arn:aws:iam::111122223333:role/byokd-tenant") {
		t.Errorf("policy %s %v", text, err)
	}
	store := tenantS3(t, c)
	put(t, store, "acme-documents", "a", []byte("kept"))
	if out, exit := command(t, c.endpoint, "setup"); exit != 0 || !strings.Contains(out, arn) || !strings.Contains(out, "acme-backups") {
		t.Errorf("again: exit %d\n%s", exit, out)
	}
	if _, exit := command(t, c.endpoint, "key", "disable"); exit != 0 {
		t.Error("cannot disable")
	}
	c.kill()

	c = serveCloud(t, dir, "--setup")
	if again, state := describe(t, c); again != arn || state != "Disabled" {
		t.Errorf("after kill -9: %s %s, was %s Disabled", again, state, arn)
	}
	if got := get(t, tenantS3(t, c), "acme-documents", "a"); string(got) != "kept" {
		t.Errorf("object is %q", got)
	}
	status, err := c.control().Status(t.Context())
	if err != nil || len(status.Keys) != 1 {
		t.Errorf("%+v %v", status, err)
	}
	if code := c.stop(); code != 0 || !strings.Contains(c.output.String(), "devcloud: stopped") {
		t.Errorf("SIGTERM: exit %d\n%s", code, c.output)
	}
}

func TestSetupFinishesWhatWasInterrupted(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	admin := kms.NewFromConfig(sdk(t, c, kmstest.DefaultRegion, "test", "test"))
	arn, _ := describe(t, c)
	if _, err := admin.DeleteAlias(t.Context(), &kms.DeleteAliasInput{AliasName: aws.String(setupAlias)}); err != nil {
		t.Fatal(err)
	}
	if _, exit := command(t, c.endpoint, "setup"); exit != 0 {
		t.Fatal("setup failed")
	}
	if again, _ := describe(t, c); again != arn {
		t.Errorf("made another key %s instead of naming %s", again, arn)
	}
}

func TestASecondServerIsRefused(t *testing.T) {
	dir := t.TempDir()
	c := serveCloud(t, dir)
	if out, exit := command(t, "", "serve", "--dir", dir, "--listen", "127.0.0.1:0"); exit != exitFailed || !strings.Contains(out, "in use by another process") {
		t.Errorf("same directory: exit %d\n%s", exit, out)
	}
	address := strings.TrimPrefix(c.endpoint, "http://")
	if out, exit := command(t, "", "serve", "--dir", t.TempDir(), "--listen", address); exit != exitFailed || !strings.Contains(out, address+" is taken, perhaps by another devcloud") {
		t.Errorf("same address: exit %d\n%s", exit, out)
	}
	if !strings.Contains(c.output.String(), "none yet: devcloud setup makes alias/byokd") {
		t.Errorf("without --setup: %s", c.output)
	}
}

func TestSIGTERMEndsHangingCalls(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	if _, exit := command(t, c.endpoint, "fault", "hang"); exit != 0 {
		t.Fatal("no fault")
	}
	done := make(chan error, 1)
	go func() {
		_, err := kms.NewFromConfig(sdk(t, c, kmstest.DefaultRegion, "test", "test")).ListKeys(context.Background(), &kms.ListKeysInput{})
		done <- err
	}()
	for held := 0; held == 0; {
		status, err := c.control().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held = status.Held
	}
	if code := c.stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
	if err := <-done; err == nil {
		t.Error("a hanging call succeeded")
	}
}

func put(t *testing.T, c *s3.Client, bucket, key string, body []byte) string {
	t.Helper()
	out, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(body), Metadata: map[string]string{"kind": "test"}})
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	return *out.ETag
}

func get(t *testing.T, c *s3.Client, bucket, key string) []byte {
	t.Helper()
	out, err := c.GetObject(t.Context(), &s3.GetObjectInput{Bucket: &bucket, Key: &key})
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	defer out.Body.Close()
	body, err := io.ReadAll(out.Body)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func TestObjects(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	store, bucket := tenantS3(t, c), aws.String("acme-documents")
	ctx := t.Context()
	names := []string{"plain", "dir/sub/x", "sp ace", "ümläut", "a+b&c=d", "per%cent", "ti~lde!*'()", "semi;colon,comma"}
	for _, name := range names {
		body := []byte("body of " + name)
		put(t, store, *bucket, name, body)
		if got := get(t, store, *bucket, name); !bytes.Equal(got, body) {
			t.Errorf("%q holds %q", name, got)
		}
		head, err := store.HeadObject(ctx, &s3.HeadObjectInput{Bucket: bucket, Key: &name})
		if err != nil || *head.ContentLength != int64(len(body)) || head.Metadata["kind"] != "test" {
			t.Errorf("head %q: %+v %v", name, head, err)
		}
	}
	list, err := store.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: bucket})
	if err != nil || len(list.Contents) != len(names) {
		t.Errorf("listed %d of %d: %v", len(list.Contents), len(names), err)
	}
	part, err := store.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: aws.String("plain"), Range: aws.String("bytes=5-6")})
	if err != nil {
		t.Fatal(err)
	}
	if body, _ := io.ReadAll(part.Body); string(body) != "of" {
		t.Errorf("range holds %q", body)
	}
	if _, err := store.CopyObject(ctx, &s3.CopyObjectInput{Bucket: aws.String("acme-backups"), Key: aws.String("copy"), CopySource: aws.String("acme-documents/plain")}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, store, "acme-backups", "copy"); string(got) != "body of plain" {
		t.Errorf("copy holds %q", got)
	}
	_, err = store.PutObject(ctx, &s3.PutObjectInput{Bucket: bucket, Key: aws.String("plain"), Body: strings.NewReader("x"), IfNoneMatch: aws.String("*")})
	if code(err) != "PreconditionFailed" {
		t.Errorf("If-None-Match: %v", err)
	}
	var ids []types.ObjectIdentifier
	for _, name := range names {
		ids = append(ids, types.ObjectIdentifier{Key: aws.String(name)})
	}
	deleted, err := store.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: bucket, Delete: &types.Delete{Objects: ids}})
	if err != nil || len(deleted.Deleted) != len(names) {
		t.Errorf("%+v %v", deleted, err)
	}
	if _, err := store.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: aws.String("plain")}); code(err) != "NoSuchKey" {
		t.Errorf("deleted: %v", err)
	}
}

func TestMultipart(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	store, bucket, key, ctx := tenantS3(t, c), aws.String("acme-backups"), aws.String("big"), t.Context()
	body := make([]byte, 5<<20+1234)
	rand.Read(body)
	up, err := store.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: bucket, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	var parts []types.CompletedPart
	for i, piece := range [][]byte{body[:5<<20], body[5<<20:]} {
		out, err := store.UploadPart(ctx, &s3.UploadPartInput{Bucket: bucket, Key: key, UploadId: up.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(piece)})
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, types.CompletedPart{ETag: out.ETag, PartNumber: aws.Int32(int32(i + 1))})
	}
	done, err := store.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: bucket, Key: key, UploadId: up.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
	if err != nil || !strings.HasSuffix(strings.Trim(*done.ETag, `"`), "-2") {
		t.Fatalf("%+v %v", done, err)
	}
	if got := get(t, store, *bucket, *key); !bytes.Equal(got, body) {
		t.Error("the object is not what was uploaded")
	}
}

func TestS3KnowsItsCallers(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	list := func(region, key, secret string) string {
		_, err := s3.NewFromConfig(sdk(t, c, region, key, secret)).ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("acme-documents")})
		if err == nil {
			return ""
		}
		return code(err)
	}
	for _, row := range []struct{ region, key, secret, want string }{
		{"eu-central-1", "test", "test", ""},
		{"eu-central-1", kmstest.TenantAccessKey, kmstest.TenantSecret, ""},
		{"eu-west-1", kmstest.TenantAccessKey, kmstest.TenantSecret, ""},
		{"us-east-1", "test", "test", ""},
		{"eu-central-1", "test", "wrong", "SignatureDoesNotMatch"},
		{"eu-central-1", "nobody", "test", "InvalidAccessKeyId"},
	} {
		if got := list(row.region, row.key, row.secret); got != row.want {
			t.Errorf("%s in %s: %q, want %q", row.key, row.region, got, row.want)
		}
	}
}

func TestPresignedLinks(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	store := tenantS3(t, c)
	put(t, store, "acme-documents", "sp ace/ü", []byte("linked"))
	link, err := s3.NewPresignClient(store).PresignGetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("acme-documents"), Key: aws.String("sp ace/ü")})
	if err != nil {
		t.Fatal(err)
	}
	fetch := func(url string) (int, string) {
		response, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(body)
	}
	if status, body := fetch(link.URL); status != 200 || body != "linked" {
		t.Errorf("%d %s", status, body)
	}
	if status, _ := fetch(strings.Replace(link.URL, "X-Amz-Signature=", "X-Amz-Signature=0", 1)); status != 403 {
		t.Errorf("a changed link: %d", status)
	}
}

func TestS3Faults(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	store := tenantS3(t, c)
	try := func() string {
		_, err := store.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("acme-documents"), Key: aws.String("x"), Body: strings.NewReader("x")})
		if err == nil {
			return ""
		}
		return code(err)
	}
	for _, row := range []struct {
		fault kmstest.Fault
		want  string
	}{
		{kmstest.Fault{Kind: "throttle", Service: "s3"}, "SlowDown"},
		{kmstest.Fault{Kind: "error", Service: "*"}, "InternalError"},
		{kmstest.Fault{Kind: "throttle", Service: "s3", Operations: []string{"GET"}}, ""},
		{kmstest.Fault{Kind: "throttle"}, ""},
	} {
		if _, err := c.control().Inject(t.Context(), row.fault); err != nil {
			t.Fatal(err)
		}
		if got := try(); got != row.want {
			t.Errorf("%+v: %q", row.fault, got)
		}
		if _, err := c.control().Clear(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBrowsersGetThePageAndSDKsTheBuckets(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	ask := func(change func(*http.Request)) (*http.Response, string) {
		r, err := http.NewRequestWithContext(t.Context(), "GET", c.endpoint+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		change(r)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return response, string(body)
	}
	html := func(r *http.Request) { r.Header.Set("Accept", "text/html,application/xhtml+xml") }
	response, body := ask(html)
	policy := response.Header.Get("Content-Security-Policy")
	if response.StatusCode != 200 || !strings.Contains(body, "<h1>devcloud</h1>") || !strings.Contains(policy, "frame-ancestors 'none'") || !strings.Contains(policy, "default-src 'none'") {
		t.Errorf("%d %v %.200s", response.StatusCode, response.Header, body)
	}
	for _, external := range []string{"http-equiv", "src=\"http", "href=\"http", "@import"} {
		if strings.Contains(body, external) {
			t.Errorf("the page contains %q", external)
		}
	}
	if response, _ := ask(func(r *http.Request) { html(r); r.Host = "evil.example" }); response.StatusCode != 403 {
		t.Errorf("a rebound name gets %d", response.StatusCode)
	}
	if response, body := ask(func(*http.Request) {}); response.StatusCode != 403 || !strings.Contains(body, "<Error>") {
		t.Errorf("an anonymous S3 call: %d %s", response.StatusCode, body)
	}
	out, err := tenantS3(t, c).ListBuckets(t.Context(), &s3.ListBucketsInput{})
	if err != nil || len(out.Buckets) != 2 {
		t.Errorf("%+v %v", out, err)
	}
}

// TestADisconnectedPutIsNotStored holds that the proxy passes a client's end on.
func TestADisconnectedPutIsNotStored(t *testing.T) {
	c := serveCloud(t, t.TempDir(), "--setup")
	store := tenantS3(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	reader, writer := io.Pipe()
	link, err := s3.NewPresignClient(store).PresignPutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("acme-documents"), Key: aws.String("half")})
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(ctx, "PUT", link.URL, reader)
	if err != nil {
		t.Fatal(err)
	}
	r.ContentLength = 1 << 20
	done := make(chan error, 1)
	go func() {
		response, err := http.DefaultClient.Do(r)
		if err == nil {
			response.Body.Close()
			err = fmt.Errorf("status %d", response.StatusCode)
		}
		done <- err
	}()
	if _, err := writer.Write(make([]byte, 64<<10)); err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = writer.CloseWithError(context.Canceled) // the client may be in the midst of reading the body
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the put ended with %v", err)
	}
	deadline := time.Now().Add(2 * time.Second)
	for time.Now().Before(deadline) { // nothing may appear, however late
		if out, err := store.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String("acme-documents"), Key: aws.String("half")}); err == nil {
			t.Fatalf("half an object was stored: %d bytes", *out.ContentLength)
		}
	}
}

// Other pods reach AWS by TLS, and nothing else; the certificate outlives a restart, so that nobody has to trust a new one.
func TestTLSForOthers(t *testing.T) {
	dir := t.TempDir()
	c := serveCloud(t, dir, "--setup", "--tls-listen", "127.0.0.1:0", "--tls-name", "devcloud.byokd-try.svc,localhost")
	var printed string
	for range 2 {
		out, exit := command(t, "", "certificate", "--dir", dir)
		if exit != 0 || printed != "" && out != printed {
			t.Fatalf("exit %d\n%s\nbefore\n%s", exit, out, printed)
		}
		printed = out
		address := c.tlsAddress()
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM([]byte(printed))
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "devcloud.byokd-try.svc"}}}
		cfg := sdk(t, c, kmstest.DefaultRegion, kmstest.TenantAccessKey, kmstest.TenantSecret)
		cfg.BaseEndpoint, cfg.HTTPClient = aws.String("https://"+address), client
		if _, err := kms.NewFromConfig(cfg).DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: aws.String(setupAlias)}); err != nil {
			t.Error(err)
		}
		if _, err := s3.NewFromConfig(cfg, func(o *s3.Options) { o.UsePathStyle = true }).HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: aws.String("acme-documents")}); err != nil {
			t.Error(err)
		}
		response, err := client.Get("https://" + address + kmstest.ControlPath + "status")
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusForbidden {
			t.Errorf("the control interface answers others: %s", response.Status)
		}
		c.stop()
		c = serveCloud(t, dir, "--tls-listen", "127.0.0.1:0", "--tls-name", "devcloud.byokd-try.svc,localhost")
	}
}

// tlsAddress is where it serves others.
func (c *cloud) tlsAddress() string {
	for line := range strings.Lines(c.output.String()) {
		if rest, ok := strings.CutPrefix(line, "tls "); ok {
			address, _, _ := strings.Cut(strings.TrimSpace(rest), ",")
			return strings.TrimPrefix(address, "https://")
		}
	}
	c.t.Fatalf("no address for TLS in\n%s", c.output)
	return ""
}
