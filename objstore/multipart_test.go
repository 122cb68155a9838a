package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

func TestMultipartSizesAndParts(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := w.upload("multi", 2*segment, 2*segment, 10)
	head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("multi")})
	if err != nil || *head.ContentLength != int64(len(body)) || !strings.HasSuffix(*head.ETag, `-3"`) || head.Metadata["kind"] != "multipart" {
		t.Fatalf("head %+v %v", head, err)
	}
	list, err := w.client.ListObjects(t.Context(), &s3.ListObjectsInput{Bucket: documents})
	if err != nil || *list.Contents[0].Size != int64(len(body)) {
		t.Fatalf("list %+v %v", list, err)
	}
	part, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String("multi"), PartNumber: aws.Int32(3)})
	if err != nil || *part.ContentLength != 10 || *part.PartsCount != 3 || *part.ContentRange != fmt.Sprintf("bytes %d-%d/%d", 4*segment, 4*segment+9, 4*segment+10) {
		t.Fatalf("part %+v %v", part, err)
	}
	part.Body.Close()
	attributes, err := w.client.GetObjectAttributes(t.Context(), &s3.GetObjectAttributesInput{Bucket: documents, Key: aws.String("multi"), ObjectAttributes: []types.ObjectAttributes{"ETag", "ObjectSize", "ObjectParts", "StorageClass"}})
	if err != nil || *attributes.ObjectSize != int64(len(body)) || *attributes.ObjectParts.TotalPartsCount != 3 {
		t.Fatalf("attributes %+v %v", attributes, err)
	}
	w.noPlaintext()
}

// TestMisalignedParts uploads parts that are no multiples of a segment: their
// object is sealed anew, so that its length is right in every place.
func TestMisalignedParts(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := w.upload("odd", 2*segment+1, 2*segment+1, segment, 7)
	check := func() {
		t.Helper()
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("odd")})
		if err != nil || *head.ContentLength != int64(len(body)) || head.Metadata["kind"] != "multipart" {
			t.Fatalf("head %+v %v", head, err)
		}
		if got := w.mustGet("odd", ""); !bytes.Equal(got, body) {
			t.Fatal("wrong bytes")
		}
		for _, r := range [][2]int{{0, 9}, {2 * segment, 2*segment + 5}, {4*segment + 2, 5*segment + 1}} {
			if got := w.mustGet("odd", fmt.Sprintf("bytes=%d-%d", r[0], r[1])); !bytes.Equal(got, body[r[0]:r[1]+1]) {
				t.Fatalf("range %v is wrong", r)
			}
		}
	}
	check()
	list, err := w.client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: documents})
	if err != nil || *list.Contents[0].Size != int64(len(body)) {
		t.Fatalf("list %+v %v", list, err)
	}
	// The second step fails: the client is told so, and what it completed reads right.
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "PUT" && !r.URL.Query().Has("uploadId") }, Status: 503, Code: "SlowDown"})
	body, err = w.tryUpload("odd", 2*segment+1, 2*segment+1, segment, 7)
	if err == nil {
		t.Fatal("acknowledged although sealing anew failed")
	}
	check()
	w.noPlaintext()
}

// TestEmptyParts: a part that holds nothing can only be the last one. An upload with another
// is refused, as by S3, before it takes the place of what is there.
func TestEmptyParts(t *testing.T) {
	for _, compress := range []bool{false, true} {
		w := newWorld(t, worldOptions{compress: compress})
		for _, sizes := range [][]int{{0}, {2 * segment, 0}} {
			if body := w.upload("o", sizes...); !bytes.Equal(w.mustGet("o", ""), body) {
				t.Errorf("%v: wrong bytes", sizes)
			}
		}
		w.put("o", []byte(canary))
		for _, sizes := range [][]int{{0, 0}, {0, 5}, {0, 2 * segment}, {2 * segment, 0, 5}, {77, 0, 0}, {0, 0, 0}} {
			_, err := w.tryUpload("o", sizes...)
			wantCode(t, err, http.StatusBadRequest, "EntityTooSmall")
			if got := w.mustGet("o", ""); string(got) != canary {
				t.Errorf("%v: what was there reads as %d bytes", sizes, len(got))
			}
		}
	}
}

// TestLargeObjects shrinks the most that the upstream takes in one request: a put
// becomes a multipart object, and so does a copy.
func TestLargeObjects(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.proxy.Shrink(3*segment, 2*segment, time.Hour)
	for _, n := range []int{3*segment - 2000, 3 * segment, 4 * segment, 7*segment + 5} {
		key, body := fmt.Sprint("large", n), pattern(n, 1)
		w.put(key, body)
		if got := w.mustGet(key, ""); !bytes.Equal(got, body) {
			t.Fatalf("%d bytes: wrong", n)
		}
		if _, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: aws.String("backups"), Key: &key, CopySource: aws.String("documents/" + key)}); err != nil {
			t.Fatal(err)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String("backups"), Key: &key})
		if err != nil || *head.ContentLength != int64(n) {
			t.Fatalf("%d bytes: copied %+v %v", n, head, err)
		}
	}
	// A checksum that is wrong, and an upstream that fails, leave nothing behind.
	body := pattern(7*segment, 1)
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("bad"), Body: bytes.NewReader(body), ContentMD5: aws.String("AAAAAAAAAAAAAAAAAAAAAA==")})
	wantCode(t, err, http.StatusBadRequest, "BadDigest")
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.URL.Query().Get("partNumber") == "2" }, Status: 500, Code: "InternalError"})
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("bad"), Body: bytes.NewReader(body)}); err == nil {
		t.Fatal("acknowledged although a part failed")
	}
	if w.up.Object("acme-documents", "bad") != nil || w.up.Uploads() != 0 {
		t.Fatalf("left behind: %v, %d uploads", w.up.Object("acme-documents", "bad") != nil, w.up.Uploads())
	}
	w.noPlaintext()
}

// TestLongAnswers has a copy take longer than the time between signs of life:
// blanks come first, then the result or the failure.
func TestLongAnswers(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.proxy.Shrink(5<<30, 1<<30, time.Millisecond)
	w.upload("src", 2*segment, 9)
	for _, fail := range []bool{false, true} {
		stall := &s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "GET" && r.Header.Get("Range") == "" }, Times: 1, StallAt: 1, Release: make(chan struct{})}
		w.up.Inject(stall)
		if fail {
			w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "PUT" }, Status: 403, Code: "AccessDenied"})
		}
		r := w.request("PUT", "/documents/dst", nil, 0)
		r.Header.Set("X-Amz-Copy-Source", "documents/src")
		r.Header.Del("Authorization")
		w.sign(r, "UNSIGNED-PAYLOAD")
		response, err := http.DefaultClient.Do(r) // returns with the first sign of life
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response, err)
		}
		close(stall.Release)
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		want := "<CopyObjectResult"
		if fail {
			want = "<Error><Code>AccessDenied</Code>"
		}
		if err != nil || !strings.HasPrefix(string(text), "<?xml") || !strings.Contains(string(text), want) {
			t.Fatalf("answer %q %v", text, err)
		}
		if e, _ := w.events.find(objstore.OpCopyObject); (e.Code != "") != fail {
			t.Errorf("event %+v", e)
		}
		w.events.forget()
		w.up.Heal()
	}
}

func TestUploadListings(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("dir/up")
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	part, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: key, UploadId: created.UploadId, PartNumber: aws.Int32(7), Body: bytes.NewReader(pattern(1234, 1))})
	if err != nil {
		t.Fatal(err)
	}
	parts, err := w.client.ListParts(ctx, &s3.ListPartsInput{Bucket: documents, Key: key, UploadId: created.UploadId})
	if err != nil || len(parts.Parts) != 1 || *parts.Parts[0].Size != 1234 || *parts.Parts[0].ETag != *part.ETag {
		t.Fatalf("parts %+v %v", parts, err)
	}
	uploads, err := w.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: documents})
	if err != nil || len(uploads.Uploads) != 1 || *uploads.Uploads[0].UploadId != *created.UploadId {
		t.Fatalf("uploads %+v %v", uploads, err)
	}
	if _, err := w.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: documents, Key: key, UploadId: created.UploadId}); err != nil || w.up.Uploads() != 0 {
		t.Fatalf("abort: %v, %d left", err, w.up.Uploads())
	}
}

func TestUploadPartCopy(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	src := w.upload("src", 2*segment, 3*segment, 11)
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: aws.String("backups"), Key: aws.String("dst")})
	if err != nil {
		t.Fatal(err)
	}
	var parts []completed
	for i, rng := range []string{fmt.Sprintf("bytes=%d-%d", 100, 100+4*segment-1), ""} {
		in := &s3.UploadPartCopyInput{Bucket: aws.String("backups"), Key: aws.String("dst"), UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), CopySource: aws.String("documents/src")}
		if rng != "" {
			in.CopySourceRange = &rng
		}
		out, err := w.client.UploadPartCopy(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, completed{int32(i + 1), *out.CopyPartResult.ETag})
	}
	if _, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: aws.String("backups"), Key: aws.String("dst"), UploadId: created.UploadId, MultipartUpload: completedParts(parts)}); err != nil {
		t.Fatal(err)
	}
	out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String("backups"), Key: aws.String("dst")})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Body.Close()
	var got bytes.Buffer
	if _, err := got.ReadFrom(out.Body); err != nil || !bytes.Equal(got.Bytes(), slices.Concat(src[100:100+4*segment], src)) {
		t.Fatalf("%d bytes, %v", got.Len(), err)
	}
	w.noPlaintext()
}

// TestImpossibleLength uploads parts that are no multiples of a segment, and whose sealed lengths together are such as no
// object of multiples has: the upload becomes an object like any other.
func TestImpossibleLength(t *testing.T) {
	for _, sizes := range [][]int{{70989, 3786, 51977}, {segment - 28, segment - 28}, {1, 1}, {3*segment + 1, segment - 29, 1}} {
		w := newWorld(t, worldOptions{})
		body := w.upload("o", sizes...)
		if got := w.mustGet("o", ""); !bytes.Equal(got, body) {
			t.Errorf("%v: the object is wrong", sizes)
		}
	}
}
