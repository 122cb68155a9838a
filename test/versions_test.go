//go:build linux

package test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// secure is a devcloud and a byokd that serves its buckets over TLS, by host name
// below s3.byokd.test and by path.
type secure struct {
	*stack
	roots *x509.CertPool
}

func newSecure(t *testing.T) *secure {
	t.Helper()
	byokd, err := shipped()
	if err != nil {
		t.Fatal(err)
	}
	s := &secure{&stack{t: t, dir: t.TempDir(), byokd: byokd, canary: newCanary()}, x509.NewCertPool()}
	t.Cleanup(s.leaveNothing)
	s.cloud, s.s3, s.admin = freeEndpoint(t), freeEndpoint(t), freeEndpoint(t)
	s.control = kmstest.Control{Endpoint: s.cloud}
	s.startCloud()
	s.certify(1)
	config := fmt.Sprintf(`
cluster: {id: acme-test, region: eu-central-1}
keys:
  primary: {arn: %q, endpoint: %q}
objects:
  listen: %s
  tls: {certificate: %q, key: %q}
  domains: [s3.byokd.test]
  credentials: {file: %q}
  buckets:
    documents: {upstream: {bucket: acme-documents, endpoint: %q}}
admin: {listen: %s}
audit: {file: %q}
stopTimeout: %v
`, s.arn, s.cloud, strings.TrimPrefix(s.s3, "http://"), s.dir+"/tls.crt", s.dir+"/tls.key", s.dir+"/s3-credentials", s.cloud,
		strings.TrimPrefix(s.admin, "http://"), s.dir+"/audit.jsonl", stopTimeout)
	for name, text := range map[string]string{"/byokd.yaml": config, "/s3-credentials": "byokd:byokd-secret\n"} {
		if err := os.WriteFile(s.dir+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	return s
}

// certify writes a new certificate and its key, which clients of this test trust.
func (s *secure) certify(serial int64) {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"s3.byokd.test", "*.s3.byokd.test"}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.roots.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	for name, block := range map[string]*pem.Block{"/tls.crt": {Type: "CERTIFICATE", Bytes: der}, "/tls.key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(s.dir+name, pem.EncodeToMemory(block), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// client addresses buckets by host name; every name leads to byokd.
func (s *secure) client() *s3.Client {
	address := strings.TrimPrefix(s.s3, "http://")
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.roots}, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}}
	s.t.Cleanup(transport.CloseIdleConnections)
	return s3.New(s3.Options{Region: "eu-central-1", BaseEndpoint: aws.String("https://s3.byokd.test"), Retryer: aws.NopRetryer{}, HTTPClient: &http.Client{Transport: transport},
		Credentials: credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", "")})
}

// TestVersionedBucketOverTLS makes a bucket versioned through byokd, over TLS and by
// host name, and uses its versions: each opens, with its own size, until it is
// deleted.
func TestVersionedBucketOverTLS(t *testing.T) {
	s := newSecure(t)
	client, ctx, bucket, key := s.client(), t.Context(), aws.String("documents"), aws.String("a report")
	if _, err := client.PutBucketVersioning(ctx, &s3.PutBucketVersioningInput{Bucket: bucket, VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled}}); err != nil {
		t.Fatal(err)
	}
	var ids []string
	content := func(i int) []byte { return bytes.Repeat([]byte(s.canary), 100+i) }
	for i := range 3 {
		out, err := client.PutObject(ctx, &s3.PutObjectInput{Bucket: bucket, Key: key, Body: bytes.NewReader(content(i))})
		if err != nil || out.VersionId == nil {
			t.Fatalf("%+v %v", out, err)
		}
		ids = append(ids, *out.VersionId)
	}
	deleted, err := client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: bucket, Key: key})
	if err != nil || !aws.ToBool(deleted.DeleteMarker) {
		t.Fatalf("%+v %v", deleted, err)
	}
	if _, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key}); err == nil {
		t.Error("a deleted object is there")
	}
	for i, id := range ids {
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key, VersionId: &id})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(out.Body)
		if err != nil || !bytes.Equal(got, content(i)) || *out.VersionId != id {
			t.Errorf("version %d: %d bytes, %v", i, len(got), err)
		}
	}
	listed, err := client.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{Bucket: bucket, Prefix: key})
	if err != nil || len(listed.Versions) != 3 || len(listed.DeleteMarkers) != 1 || !*listed.DeleteMarkers[0].IsLatest {
		t.Fatalf("%+v %v", listed, err)
	}
	for i, v := range listed.Versions { // newest first
		if *v.VersionId != ids[2-i] || *v.Size != int64(len(content(2-i))) {
			t.Errorf("listed as %d: %s, %d bytes", i, *v.VersionId, *v.Size)
		}
	}
	// An older version becomes the present one by a copy, and its own versions go for good.
	if _, err := client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: bucket, Key: key, CopySource: aws.String("documents/a%20report?versionId=" + ids[0])}); err != nil {
		t.Fatal(err)
	}
	if head, err := client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: bucket, Key: key}); err != nil || *head.ContentLength != int64(len(content(0))) {
		t.Fatalf("%+v %v", head, err)
	}
	if _, err := client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: bucket, Key: key, VersionId: &ids[1]}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key, VersionId: &ids[1]}); err == nil {
		t.Error("a deleted version is there")
	}
	// The check reads what is left: two of the old versions, and the copy.
	t.Setenv("AWS_ACCESS_KEY_ID", kmstest.TenantAccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", kmstest.TenantSecret)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	var report struct {
		Sound          bool
		Objects, Bytes int
	}
	code, text := s.command("check", "s3://documents", "--config", s.dir+"/byokd.yaml", "-o", "json")
	if err := json.Unmarshal([]byte(text), &report); err != nil || code != 0 || !report.Sound || report.Objects != 3 || report.Bytes != 2*len(content(0))+len(content(2)) {
		t.Errorf("byokd check ends with %d, %v:\n%s", code, err, text)
	}
	code, text = s.command("check", "s3://documents", "--config", s.dir+"/byokd.yaml", "-o", "json", "--current")
	if err := json.Unmarshal([]byte(text), &report); err != nil || code != 0 || report.Objects != 1 {
		t.Errorf("byokd check --current ends with %d, %v:\n%s", code, err, text)
	}
	s.summedVersions(t, client)
	s.settings(t, client)
	s.renewed(t)
}

// summedVersions uploads two versions of an object in parts: each keeps its checksum,
// which the SDK compares with what it downloads, and the tags that the client gave it.
func (s *secure) summedVersions(t *testing.T, client *s3.Client) {
	ctx, bucket, key := t.Context(), aws.String("documents"), aws.String("in parts")
	type version struct {
		id, crc string
		body    []byte
	}
	var versions []version
	for i := range 2 {
		body := bytes.Repeat([]byte(s.canary), (5<<20+1000*(i+1))/len(s.canary))
		created, err := client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: bucket, Key: key, Tagging: aws.String("round=" + strconv.Itoa(i)),
			ChecksumAlgorithm: types.ChecksumAlgorithmCrc32, ChecksumType: types.ChecksumTypeFullObject})
		if err != nil {
			t.Fatal(err)
		}
		var parts []types.CompletedPart
		for n, part := range [][]byte{body[:5<<20], body[5<<20:]} {
			number := aws.Int32(int32(n + 1))
			out, err := client.UploadPart(ctx, &s3.UploadPartInput{Bucket: bucket, Key: key, UploadId: created.UploadId, PartNumber: number, Body: bytes.NewReader(part), ChecksumAlgorithm: types.ChecksumAlgorithmCrc32})
			if err != nil {
				t.Fatal(err)
			}
			parts = append(parts, types.CompletedPart{PartNumber: number, ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32})
		}
		done, err := client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: bucket, Key: key, UploadId: created.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
		crc := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(body)))
		if err != nil || aws.ToString(done.ChecksumCRC32) != crc || done.VersionId == nil {
			t.Fatalf("%+v %v", done, err)
		}
		versions = append(versions, version{*done.VersionId, crc, body})
	}
	for i, v := range versions {
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key, VersionId: &v.id, ChecksumMode: types.ChecksumModeEnabled})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(out.Body)
		if err != nil || !bytes.Equal(got, v.body) || aws.ToString(out.ChecksumCRC32) != v.crc || out.ChecksumType != types.ChecksumTypeFullObject || aws.ToInt32(out.TagCount) != 1 {
			t.Errorf("version %d: %d bytes, checksum %v %s, %v tags, %v", i, len(got), out.ChecksumCRC32, out.ChecksumType, out.TagCount, err)
		}
		tags, err := client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: bucket, Key: key, VersionId: &v.id})
		if err != nil || len(tags.TagSet) != 1 || *tags.TagSet[0].Value != strconv.Itoa(i) {
			t.Errorf("version %d: %+v %v", i, tags, err)
		}
	}
}

// settings sets and reads rules of the bucket and of an object through byokd, and
// asks as a browser does what another site may do.
func (s *secure) settings(t *testing.T, client *s3.Client) {
	ctx, bucket, key := t.Context(), aws.String("documents"), aws.String("a report")
	_, err := client.GetBucketPolicy(ctx, &s3.GetBucketPolicyInput{Bucket: bucket})
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != "NoSuchBucketPolicy" {
		t.Errorf("the policy: %v", err)
	}
	if _, err := client.PutBucketTagging(ctx, &s3.PutBucketTaggingInput{Bucket: bucket, Tagging: &types.Tagging{TagSet: []types.Tag{{Key: aws.String("team"), Value: aws.String("x")}}}}); err != nil {
		t.Fatal(err)
	}
	tags, err := client.GetBucketTagging(ctx, &s3.GetBucketTaggingInput{Bucket: bucket})
	if err != nil || len(tags.TagSet) != 1 || *tags.TagSet[0].Value != "x" {
		t.Fatalf("%+v %v", tags, err)
	}
	if acl, err := client.GetObjectAcl(ctx, &s3.GetObjectAclInput{Bucket: bucket, Key: key}); err == nil && len(acl.Grants) == 0 {
		t.Errorf("%+v", acl)
	}
	rules := &types.CORSConfiguration{CORSRules: []types.CORSRule{{AllowedMethods: []string{"GET"}, AllowedOrigins: []string{"https://portal.test"}, AllowedHeaders: []string{"*"}}}}
	if _, err := client.PutBucketCors(ctx, &s3.PutBucketCorsInput{Bucket: bucket, CORSConfiguration: rules}); err != nil {
		t.Fatal(err)
	}
	ask := func(method, url, origin string) http.Header {
		r, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Origin", origin)
		if method == http.MethodOptions {
			r.Header.Set("Access-Control-Request-Method", "GET")
		}
		response, err := client.Options().HTTPClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.Header
	}
	const address, allow = "https://documents.s3.byokd.test/a%20report", "Access-Control-Allow-Origin"
	if got := ask(http.MethodOptions, address, "https://portal.test").Get(allow); got != "https://portal.test" {
		t.Errorf("the portal may not ask: %q", got)
	}
	if got := ask(http.MethodOptions, address, "https://other.test").Get(allow); got != "" {
		t.Errorf("another site may ask: %q", got)
	}
	link, err := s3.NewPresignClient(client).PresignGetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if got := ask(http.MethodGet, link.URL, "https://portal.test").Get(allow); got != "https://portal.test" {
		t.Errorf("the portal may not read: %q", got)
	}
}

// renewed replaces the certificate and waits until byokd serves the new one.
func (s *secure) renewed(t *testing.T) {
	s.certify(2)
	s.await("the new certificate", s.daemon, func() bool {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(s.s3, "http://"), &tls.Config{RootCAs: s.roots, ServerName: "s3.byokd.test"})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64() == 2
	})
}
