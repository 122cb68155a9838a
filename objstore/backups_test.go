package objstore_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// TestZeebeBackupStore is what Zeebe's S3 backup store sends for a backup: its
// manifest by compare-and-swap, segment files, listing in pages, deletion.
func TestZeebeBackupStore(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	put := func(key, body string, tune func(*s3.PutObjectInput)) (*s3.PutObjectOutput, error) {
		in := &s3.PutObjectInput{Bucket: documents, Key: &key, Body: strings.NewReader(body)}
		tune(in)
		return w.client.PutObject(ctx, in)
	}
	manifest, plain := "1/2/3/manifest.json", func(*s3.PutObjectInput) {}
	_, _, err := w.get(manifest, "")
	wantCode(t, err, http.StatusNotFound, "NoSuchKey")
	first, err := put(manifest, `{"statusCode":"IN_PROGRESS"}`, func(in *s3.PutObjectInput) { in.IfNoneMatch = aws.String("*") })
	if err != nil {
		t.Fatal(err)
	}
	_, err = put(manifest, "other", func(in *s3.PutObjectInput) { in.IfNoneMatch = aws.String("*") })
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	for i, size := range []int{0, 1, segment, 3*segment + 7} {
		key := fmt.Sprintf("1/2/3/segments/journal-%d.log", i)
		if _, err := put(key, string(pattern(size, i)), func(in *s3.PutObjectInput) { in.ContentLength = aws.Int64(int64(size)) }); err != nil {
			t.Fatal(err)
		}
	}
	second, err := put(manifest, `{"statusCode":"COMPLETED"}`, func(in *s3.PutObjectInput) { in.IfMatch = first.ETag })
	if err != nil || *second.ETag == *first.ETag {
		t.Fatalf("%+v %v", second, err)
	}
	_, err = put(manifest, "late", func(in *s3.PutObjectInput) { in.IfMatch = first.ETag })
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	if got := w.mustGet(manifest, ""); string(got) != `{"statusCode":"COMPLETED"}` {
		t.Fatalf("the manifest is %s", got)
	}
	if _, err := put("index.json", "{}", plain); err != nil {
		t.Fatal(err)
	}
	seen := 0
	pages := s3.NewListObjectsV2Paginator(w.client, &s3.ListObjectsV2Input{Bucket: documents, Prefix: aws.String("1/2/3/"), MaxKeys: aws.Int32(2)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var ids []types.ObjectIdentifier
		for _, o := range page.Contents {
			ids = append(ids, types.ObjectIdentifier{Key: o.Key})
		}
		seen += len(ids)
		out, err := w.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: ids, Quiet: aws.Bool(true)}})
		if err != nil || len(out.Deleted)+len(out.Errors) > 0 {
			t.Fatalf("%+v %v", out, err)
		}
	}
	if seen != 5 {
		t.Errorf("%d objects were listed and deleted", seen)
	}
}

// TestSearchRepositories is what the S3 repositories of Elasticsearch and OpenSearch
// send: registration, a snapshot of small and large blobs, resumed reads, clean-up.
func TestSearchRepositories(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	small, large := pattern(5000, 1), pattern(5<<20+12345, 2)
	in := &s3.PutObjectInput{Bucket: documents, Key: aws.String("repo/tests-1/master.dat"), Body: bytes.NewReader(small), ACL: types.ObjectCannedACLPrivate,
		StorageClass: types.StorageClassStandardIa, ServerSideEncryption: types.ServerSideEncryptionAwsKms}
	out, err := w.client.PutObject(ctx, in)
	if err != nil || out.ServerSideEncryption != "" {
		t.Fatalf("the upstream did not say that it encrypts with KMS, yet: %+v %v", out, err)
	}
	w.searchUpload(t, "repo/indices/0/__large", large)

	// A read goes on where it broke off, under the ETag it began with, with an end
	// far beyond the object's.
	head, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String("repo/indices/0/__large")})
	if err != nil || *head.ContentLength != int64(len(large)) {
		t.Fatalf("%+v %v", head, err)
	}
	const from = 3<<20 + 1
	resumed, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: aws.String("repo/indices/0/__large"), IfMatch: head.ETag, Range: aws.String(fmt.Sprintf("bytes=%d-9223372036854775806", from))})
	if err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(resumed.Body)
	if err != nil || !bytes.Equal(rest, large[from:]) {
		t.Fatalf("%d bytes, %v", len(rest), err)
	}
	_, _, err = w.get("repo/tests-1/master.dat", "bytes=5000-9223372036854775806")
	wantCode(t, err, http.StatusRequestedRangeNotSatisfiable, "InvalidRange")

	// Listing by both versions; OpenSearch asks for attributes and single parts.
	v1, err := w.client.ListObjects(ctx, &s3.ListObjectsInput{Bucket: documents, Prefix: aws.String("repo/"), Delimiter: aws.String("/")})
	if err != nil || len(v1.CommonPrefixes) != 2 || len(v1.Contents) != 0 {
		t.Fatalf("%+v %v", v1, err)
	}
	attributes, err := w.client.GetObjectAttributes(ctx, &s3.GetObjectAttributesInput{Bucket: documents, Key: aws.String("repo/indices/0/__large"), ObjectAttributes: []types.ObjectAttributes{types.ObjectAttributesObjectParts, types.ObjectAttributesObjectSize}})
	if err != nil || *attributes.ObjectSize != int64(len(large)) || *attributes.ObjectParts.TotalPartsCount != 2 {
		t.Fatalf("%+v %v", attributes, err)
	}
	part, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: aws.String("repo/indices/0/__large"), PartNumber: aws.Int32(2), ExpectedBucketOwner: aws.String("111122223333")})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(part.Body); err != nil || !bytes.Equal(got, large[5<<20:]) {
		t.Fatalf("part 2: %d bytes, %v", len(got), err)
	}
	// Elasticsearch signs a purpose that S3 does not know.
	response, err := http.DefaultClient.Do(w.request("GET", "/documents/repo/tests-1/master.dat?x-purpose=SnapshotData", nil, 0))
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response, err)
	}
	response.Body.Close()
	uploads, err := w.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: documents, Prefix: aws.String("repo/")})
	if err != nil || len(uploads.Uploads) != 0 {
		t.Fatalf("%+v %v", uploads, err)
	}
	w.noPlaintext()
}

// searchUpload uploads two parts at once with their checksums, to a place that has
// to be free; a damaged part is refused, and the upload id that is listed is the one
// that was given.
func (w *world) searchUpload(t *testing.T, key string, body []byte) {
	t.Helper()
	ctx := t.Context()
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: &key, ChecksumAlgorithm: types.ChecksumAlgorithmCrc32, StorageClass: types.StorageClassStandardIa})
	if err != nil {
		t.Fatal(err)
	}
	uploads, err := w.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: documents, Prefix: aws.String("repo/")})
	if err != nil || len(uploads.Uploads) != 1 || *uploads.Uploads[0].UploadId != *created.UploadId {
		t.Fatalf("%+v %v", uploads, err)
	}
	upload := func(ctx context.Context, number int32, piece []byte, tune func(*s3.UploadPartInput)) (*s3.UploadPartOutput, error) {
		in := &s3.UploadPartInput{Bucket: documents, Key: &key, UploadId: created.UploadId, PartNumber: &number, Body: bytes.NewReader(piece), ChecksumAlgorithm: types.ChecksumAlgorithmCrc32}
		tune(in)
		return w.client.UploadPart(ctx, in)
	}
	_, err = upload(ctx, 1, body[:5<<20], func(in *s3.UploadPartInput) { in.ChecksumCRC32 = aws.String("AAAAAA==") })
	wantCode(t, err, http.StatusBadRequest, "BadDigest")
	parts := make([]types.CompletedPart, 2)
	var both sync.WaitGroup
	for i, piece := range [][]byte{body[:5<<20], body[5<<20:]} {
		both.Go(func() {
			number := int32(i + 1)
			out, err := upload(ctx, number, piece, func(*s3.UploadPartInput) {})
			if err != nil {
				t.Error(err)
				return
			}
			parts[i] = types.CompletedPart{PartNumber: &number, ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32}
		})
	}
	both.Wait()
	complete := &s3.CompleteMultipartUploadInput{Bucket: documents, Key: &key, UploadId: created.UploadId, IfNoneMatch: aws.String("*"), MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}}
	if _, err := w.client.CompleteMultipartUpload(ctx, complete); err != nil {
		t.Fatal(err)
	}
}
