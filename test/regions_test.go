//go:build linux

package test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

const backupRegion = "eu-west-1"

// TestRestoreInTheBackupRegion is the dual-region set-up of docs/OPERATIONS.md: a
// multi-Region key with its replica in the backup region, to which snapshots of the
// disk and the buckets are replicated. The primary is disabled and then deleted:
// the first region freezes for good and byokd there does not turn to the replica.
// In the backup region everything is readable under the replica.
func TestRestoreInTheBackupRegion(t *testing.T) {
	var replica string
	s := newStack(t, shipped, func(s *stack) {
		s.prepare = func() { replica = s.useMultiRegionKey() }
	})
	text := bytes.Repeat([]byte(s.canary+", written in the first region. "), 16<<10)
	if err := os.WriteFile(filepath.Join(s.mount, "journal"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	client := s.s3Client()
	if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String(bucketName), Key: aws.String("document"), Body: bytes.NewReader(text)}); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sync", "-f", s.mount).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.replicateTo("acme-documents-west")

	s.key(kmstest.KeyCommand{Do: "disable"})
	s.await("the freeze, with the hint that the replica is enabled", s.daemon, func() bool {
		r, ok := s.report()
		return ok && r.Keys[0].Gate == keyguard.Frozen && strings.Contains(r.Cause, "Still enabled: "+replica)
	})
	s.key(kmstest.KeyCommand{Do: "delete"})
	report := s.awaitState(metrics.StateFinal)
	if !strings.Contains(report.NextStep, "the same key of a multi-Region set in another region") {
		t.Errorf("the next step of a deleted primary: %s", report.NextStep)
	}
	s.stopDaemon()

	s.moveTo(backupRegion, replica, "acme-documents-west")
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	if got, err := os.ReadFile(filepath.Join(s.mount, "journal")); err != nil || !bytes.Equal(got, text) {
		t.Errorf("the restored disk gives %d bytes, %v", len(got), err)
	}
	out, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String(bucketName), Key: aws.String("document")})
	if err != nil {
		t.Fatalf("the replicated bucket: %v", err)
	}
	defer out.Body.Close()
	if got, err := io.ReadAll(out.Body); err != nil || !bytes.Equal(got, text) {
		t.Errorf("the replicated object has %d bytes, %v", len(got), err)
	}
	// And life goes on there.
	if err := os.WriteFile(filepath.Join(s.mount, "more"), text, 0o600); err != nil {
		t.Error(err)
	}
	if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String(bucketName), Key: aws.String("more"), Body: bytes.NewReader(text)}); err != nil {
		t.Error(err)
	}
	s.stopDaemon()
	s.assertSealed()
}

// useMultiRegionKey makes the stack's key a multi-Region one with a replica, whose ARN it returns.
func (s *stack) useMultiRegionKey() (replica string) {
	s.t.Helper()
	policy := kmstest.DocumentedPolicy(kmstest.DefaultAccount, kmstest.TenantRole)
	made, err := s.kms.CreateKey(s.t.Context(), &kms.CreateKeyInput{MultiRegion: aws.Bool(true), Policy: &policy})
	if err != nil {
		s.t.Fatal(err)
	}
	s.arn = *made.KeyMetadata.Arn
	copied, err := s.kms.ReplicateKey(s.t.Context(), &kms.ReplicateKeyInput{KeyId: &s.arn, ReplicaRegion: aws.String(backupRegion), Policy: &policy})
	if err != nil {
		s.t.Fatal(err)
	}
	return *copied.ReplicaKeyMetadata.Arn
}

// replicateTo copies the disk's sealed files, as a snapshot would, and the sealed
// objects into another bucket, as S3's replication would.
func (s *stack) replicateTo(bucket string) {
	s.t.Helper()
	if out, err := exec.Command("cp", "-a", s.lower, s.lower+"-west").CombinedOutput(); err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	cloud := s3.New(s3.Options{Region: backupRegion, BaseEndpoint: &s.cloud, UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(kmstest.TenantAccessKey, kmstest.TenantSecret, "")})
	ctx, from := s.t.Context(), "acme-documents"
	if _, err := cloud.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket}); err != nil {
		s.t.Fatal(err)
	}
	list, err := cloud.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &from})
	if err != nil || len(list.Contents) == 0 {
		s.t.Fatalf("%d objects, %v", len(list.Contents), err)
	}
	for _, o := range list.Contents {
		if _, err := cloud.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &bucket, Key: o.Key, CopySource: aws.String(from + "/" + *o.Key)}); err != nil {
			s.t.Fatalf("%s: %v", *o.Key, err)
		}
	}
}

// moveTo configures byokd for the backup region.
func (s *stack) moveTo(region, arn, bucket string) {
	s.t.Helper()
	text, err := os.ReadFile(s.dir + "/byokd.yaml")
	if err != nil {
		s.t.Fatal(err)
	}
	moved := strings.NewReplacer("region: eu-central-1", "region: "+region, s.arn, arn, s.lower+`"`, s.lower+`-west"`,
		"{bucket: acme-documents,", "{bucket: "+bucket+",", "documents: {upstream", "documents: {sealedAs: acme-documents, upstream").Replace(string(text))
	if err := os.WriteFile(s.dir+"/byokd.yaml", []byte(moved), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.arn, s.lower = arn, s.lower+"-west"
}
