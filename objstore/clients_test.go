package objstore_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// TestDocumentStore is what Camunda's document store sends, in its order.
func TestDocumentStore(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("store/0b5c")
	if _, err := w.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: documents}); err != nil {
		t.Fatal(err)
	}
	_, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: key})
	wantCode(t, err, 404, "")
	meta := map[string]string{"content-type": "application/pdf", "filename": canary + ".pdf", "expires-at": "", "processinstancekey": "2251799813685249"}
	if _, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: strings.NewReader(canary), Metadata: meta, Tagging: aws.String(""), ContentType: aws.String("application/pdf")}); err != nil {
		t.Fatal(err)
	}
	meta["contenthash"] = strings.Repeat("a", 64)
	if _, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: documents, Key: key, CopySource: aws.String("documents/store/0b5c"), MetadataDirective: types.MetadataDirectiveReplace, Metadata: meta}); err != nil {
		t.Fatal(err)
	}
	body, out, err := w.get(*key, "")
	if err != nil || string(body) != canary || len(out.Metadata) != len(meta) || out.Metadata["contenthash"] != meta["contenthash"] {
		t.Fatalf("%q %v %v", body, out, err)
	}
	w.noPlaintext()
	if _, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: key}); err != nil {
		t.Fatal(err)
	}
	_, _, err = w.get(*key, "")
	wantCode(t, err, 404, "NoSuchKey")
}

// boto3Script puts, reads, copies and lists with boto3's defaults.
const boto3Script = `
import base64, boto3, os, sys, zlib
from botocore.config import Config
from boto3.s3.transfer import TransferConfig
s3 = boto3.client('s3', endpoint_url=sys.argv[1], region_name='eu-central-1', aws_access_key_id='byokd',
    aws_secret_access_key='byokd-secret', config=Config(s3={'addressing_style': 'path'}))
for n in (0, 1, 65536, 1 << 20):
    d = os.urandom(n)
    s3.put_object(Bucket='documents', Key='b/%d' % n, Body=d, Metadata={'name': 'x', 'empty': ''})
    g = s3.get_object(Bucket='documents', Key='b/%d' % n)
    assert g['Body'].read() == d and g['ContentLength'] == n and g['Metadata'] == {'name': 'x', 'empty': ''}, n
d = os.urandom(20 << 20)
open(sys.argv[2] + '/in', 'wb').write(d)
s3.upload_file(sys.argv[2] + '/in', 'documents', 'b/big')
s3.download_file('documents', 'b/big', sys.argv[2] + '/out')
assert open(sys.argv[2] + '/out', 'rb').read() == d
s3.copy({'Bucket': 'documents', 'Key': 'b/big'}, 'backups', 'big')
assert s3.get_object(Bucket='backups', Key='big')['Body'].read() == d
up = s3.create_multipart_upload(Bucket='documents', Key='b/summed', ChecksumAlgorithm='CRC32', ChecksumType='FULL_OBJECT')['UploadId']
sent = [s3.upload_part(Bucket='documents', Key='b/summed', UploadId=up, PartNumber=i + 1, Body=d[i * (6 << 20):][:6 << 20], ChecksumAlgorithm='CRC32') for i in range(4)]
done = s3.complete_multipart_upload(Bucket='documents', Key='b/summed', UploadId=up, ChecksumType='FULL_OBJECT', MultipartUpload={'Parts': [
    {'PartNumber': i + 1, 'ETag': p['ETag'], 'ChecksumCRC32': p['ChecksumCRC32']} for i, p in enumerate(sent)]})
crc = base64.b64encode(zlib.crc32(d).to_bytes(4, 'big')).decode()
assert done['ChecksumCRC32'] == crc and done['ChecksumType'] == 'FULL_OBJECT', done
g = s3.get_object(Bucket='documents', Key='b/summed')
assert g['ChecksumCRC32'] == crc and g['ChecksumType'] == 'FULL_OBJECT' and g['Body'].read() == d, g
a = s3.get_object_attributes(Bucket='documents', Key='b/summed', ObjectAttributes=['Checksum', 'ObjectSize'])
assert a['Checksum']['ChecksumCRC32'] == crc and a['ObjectSize'] == len(d), a
s3.delete_object(Bucket='documents', Key='b/summed')
sizes = {o['Key']: o['Size'] for o in s3.list_objects_v2(Bucket='documents', Prefix='b/')['Contents']}
assert sizes == {'b/0': 0, 'b/1': 1, 'b/65536': 65536, 'b/1048576': 1 << 20, 'b/big': 20 << 20}, sizes
s3.delete_objects(Bucket='documents', Delete={'Objects': [{'Key': k} for k in sizes]})
assert 'Contents' not in s3.list_objects_v2(Bucket='documents')
`

// runTool runs a client where HOME is home, with byokd's credentials and nothing
// else of ours that concerns AWS: a CA bundle in the environment, for one, makes
// some clients refuse plain endpoints.
func runTool(t *testing.T, home, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "AWS_") }),
		"AWS_ACCESS_KEY_ID=byokd", "AWS_SECRET_ACCESS_KEY=byokd-secret", "AWS_DEFAULT_REGION=eu-central-1", "AWS_EC2_METADATA_DISABLED=true", "HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// needTool skips where a client is not installed, and fails where BYOKD_REQUIRE
// names s3clients.
func needTool(t *testing.T, name string, args ...string) {
	t.Helper()
	if err := exec.Command(name, args...).Run(); err != nil {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "s3clients") {
			t.Fatalf("%s is not here, and BYOKD_REQUIRE wants it: %v", name, err)
		}
		t.Skipf("%s is not here", name)
	}
}

// TestRealClients runs what people use S3 with, where it is installed; with
// BYOKD_REQUIRE=s3clients a missing one is a failure.
func TestRealClients(t *testing.T) {
	run := func(t *testing.T, dir, name string, args ...string) string {
		return runTool(t, dir, dir, name, args...)
	}
	need := needTool
	tree := func(t *testing.T) string {
		dir := t.TempDir()
		for i, n := range []int{0, 1, 100_000, 12 << 20} {
			if err := os.MkdirAll(filepath.Join(dir, "tree", "sub"), 0o700); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(dir, "tree", "sub", string(rune('a'+i)))
			if err := os.WriteFile(name, pattern(n, i), 0o600); err != nil {
				t.Fatal(err)
			}
			// S3 knows whole seconds: a file of this second would look newer than its copy.
			if err := os.Chtimes(name, time.Time{}, time.Now().Add(-time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	t.Run("boto3", func(t *testing.T) {
		need(t, "python3", "-c", "import boto3")
		w := newWorld(t, worldOptions{})
		run(t, t.TempDir(), "python3", "-c", boto3Script, w.server.URL, t.TempDir())
	})
	t.Run("aws", func(t *testing.T) {
		need(t, "aws", "--version")
		w, dir := newWorld(t, worldOptions{}), tree(t)
		endpoint := "--endpoint-url=" + w.server.URL
		run(t, dir, "aws", endpoint, "s3", "sync", "tree", "s3://documents/t")
		run(t, dir, "aws", endpoint, "s3", "sync", "s3://documents/t", "back")
		run(t, dir, "diff", "-r", "tree", "back")
		if again := run(t, dir, "aws", endpoint, "s3", "sync", "tree", "s3://documents/t"); again != "" {
			t.Errorf("a second sync had work to do: %s", again)
		}
		run(t, dir, "aws", endpoint, "s3", "cp", "s3://documents/t/sub/d", "s3://backups/d")
		w.noPlaintext()
	})
	t.Run("rclone", func(t *testing.T) {
		need(t, "rclone", "version")
		w, dir := newWorld(t, worldOptions{}), tree(t)
		remote := ":s3,provider=Other,access_key_id=byokd,secret_access_key=byokd-secret,region=eu-central-1,endpoint='" + w.server.URL + "',upload_cutoff=5M,chunk_size=5M:"
		run(t, dir, "rclone", "sync", "tree", remote+"documents/r")
		run(t, dir, "rclone", "check", "--download", "tree", remote+"documents/r")
		run(t, dir, "rclone", "check", "tree", remote+"documents/r")
		run(t, dir, "rclone", "copy", remote+"documents/r", remote+"backups/r")
		run(t, dir, "rclone", "check", "--download", "tree", remote+"backups/r")
		w.noPlaintext()
	})
	t.Run("s3cmd", func(t *testing.T) {
		need(t, "s3cmd", "--version")
		w, dir := newWorld(t, worldOptions{}), tree(t)
		host := strings.TrimPrefix(w.server.URL, "http://")
		s3cmd := func(args ...string) string {
			return run(t, dir, "s3cmd", append([]string{"--no-ssl", "--host=" + host, "--host-bucket=" + host, "--region=eu-central-1", "--access_key=byokd", "--secret_key=byokd-secret", "--multipart-chunk-size-mb=5"}, args...)...)
		}
		s3cmd("put", "--recursive", "tree/", "s3://documents/s/")
		if listed := s3cmd("ls", "--recursive", "s3://documents/s/"); strings.Count(listed, "s3://") != 4 || !strings.Contains(listed, " 12582912 ") {
			t.Errorf("listed: %s", listed)
		}
		if err := os.Mkdir(filepath.Join(dir, "back"), 0o700); err != nil {
			t.Fatal(err)
		}
		s3cmd("get", "--recursive", "s3://documents/s/", "back/")
		run(t, dir, "diff", "-r", "tree", "back")
		s3cmd("cp", "s3://documents/s/sub/d", "s3://backups/d")
		s3cmd("del", "--recursive", "--force", "s3://documents/s/")
		w.noPlaintext()
	})
	t.Run("restic", func(t *testing.T) {
		need(t, "restic", "version")
		w, dir := newWorld(t, worldOptions{}), tree(t)
		t.Setenv("RESTIC_PASSWORD", "of the test")
		restic := func(args ...string) string {
			return run(t, dir, "restic", append([]string{"--repo", "s3:" + w.server.URL + "/backups/restic", "--no-cache", "--option", "s3.bucket-lookup=path"}, args...)...)
		}
		restic("init")
		restic("backup", "tree")
		restic("check", "--read-data")
		restic("restore", "latest", "--target", "back")
		run(t, dir, "diff", "-r", "tree", "back/tree")
		restic("forget", "--keep-last", "1", "--prune")
	})
}
