package objstore_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore/s3test"
)

// long skips what only make e2e has the time for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("BYOKD_E2E") == "" {
		t.Skip("runs with make e2e")
	}
}

// TestLongTenThousandParts uploads as many parts as S3 allows, and reads across
// their boundaries.
func TestLongTenThousandParts(t *testing.T) {
	long(t)
	const count = 10_000
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("parts")
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	parts := make([]completed, count)
	for i := range parts {
		out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(pattern(segment, i))})
		if err != nil {
			t.Fatal(err)
		}
		parts[i] = completed{int32(i + 1), *out.ETag}
	}
	listed := 0
	pages := s3.NewListPartsPaginator(w.client, &s3.ListPartsInput{Bucket: documents, Key: key, UploadId: created.UploadId})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		listed += len(page.Parts)
	}
	if listed != count {
		t.Fatalf("%d parts are listed", listed)
	}
	if _, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)}); err != nil {
		t.Fatal(err)
	}
	head, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: key})
	if err != nil || *head.ContentLength != count*segment {
		t.Fatalf("%+v %v", head, err)
	}
	for _, i := range []int{0, 1, 4999, count - 2} {
		got := w.mustGet("parts", fmt.Sprintf("bytes=%d-%d", (i+1)*segment-5, (i+1)*segment+4))
		if want := slices.Concat(pattern(segment, i)[segment-5:], pattern(segment, i+1)[:5]); !bytes.Equal(got, want) {
			t.Errorf("across the end of part %d: %q, want %q", i+1, got, want)
		}
	}
	out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: key, PartNumber: aws.Int32(count)})
	if err != nil || *out.PartsCount != count || *out.ContentLength != segment {
		t.Fatalf("the last part: %+v %v", out, err)
	}
	out.Body.Close()
	whole := w.mustGet("parts", "")
	for i := range count {
		if !bytes.Equal(whole[i*segment:(i+1)*segment], pattern(segment, i)) {
			t.Fatalf("part %d is wrong in the whole", i+1)
		}
	}
}

// TestLongHundredThousandKeys lists a bucket of that many objects in every way, and
// empties it.
func TestLongHundredThousandKeys(t *testing.T) {
	long(t)
	const count, size = 100_000, 1234
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	w.put("k/000000", pattern(size, 1))
	stored := w.up.Object("acme-documents", "k/000000")
	for i := 1; i < count; i++ { // sealed alike: only names and sizes matter here
		w.up.Replace("acme-documents", fmt.Sprintf("k/%06d", i), &s3test.Stored{Data: stored.Data, Size: stored.Size, ETag: stored.ETag, Header: stored.Header, Modified: stored.Modified})
	}
	last, n := "", 0
	see := func(objects []types.Object) {
		for _, o := range objects {
			if *o.Size != size || *o.Key <= last {
				t.Fatalf("%s after %s, %d bytes", *o.Key, last, *o.Size)
			}
			last = *o.Key
			n++
		}
	}
	pages := s3.NewListObjectsV2Paginator(w.client, &s3.ListObjectsV2Input{Bucket: documents, Prefix: aws.String("k/")})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		see(page.Contents)
	}
	if n != count {
		t.Fatalf("version 2 lists %d", n)
	}
	last, n = "", 0
	for marker := ""; ; marker = last {
		page, err := w.client.ListObjects(ctx, &s3.ListObjectsInput{Bucket: documents, Prefix: aws.String("k/"), Marker: &marker})
		if err != nil {
			t.Fatal(err)
		}
		see(page.Contents)
		if !*page.IsTruncated {
			break
		}
	}
	if n != count {
		t.Fatalf("version 1 lists %d", n)
	}
	for removed := 0; removed < count; {
		page, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents, Prefix: aws.String("k/")})
		if err != nil || len(page.Contents) == 0 {
			t.Fatalf("%d are left: %v", count-removed, err)
		}
		var ids []types.ObjectIdentifier
		for _, o := range page.Contents {
			ids = append(ids, types.ObjectIdentifier{Key: o.Key})
		}
		out, err := w.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: ids, Quiet: aws.Bool(true)}})
		if err != nil || len(out.Errors) > 0 || len(out.Deleted) > 0 {
			t.Fatalf("%+v %v", out, err)
		}
		removed += len(ids)
	}
	if page, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents}); err != nil || len(page.Contents) != 0 {
		t.Fatalf("%+v %v", page, err)
	}
}
