package objstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

type completed struct {
	number int32
	etag   string
}

func completedParts(parts []completed) *types.CompletedMultipartUpload {
	var list []types.CompletedPart
	for _, p := range parts {
		list = append(list, types.CompletedPart{PartNumber: &p.number, ETag: &p.etag})
	}
	return &types.CompletedMultipartUpload{Parts: list}
}

var documents = aws.String("documents")

// wantCode fails unless err is an S3 error with the given code and status.
func wantCode(t *testing.T, err error, status int, code string) {
	t.Helper()
	var api smithy.APIError
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) {
		t.Fatalf("error %v, want %d %s", err, status, code)
	}
	if got := response.HTTPStatusCode(); got != status {
		t.Fatalf("status %d (%v), want %d", got, err, status)
	}
	if errors.As(err, &api) && code != "" && api.ErrorCode() != code {
		t.Fatalf("code %s (%v), want %s", api.ErrorCode(), err, code)
	}
}

const segment = 64 << 10

func TestPutGetHeadSizes(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for _, n := range []int{0, 1, 1000, segment - 1, segment, segment + 1, 8 * segment, 8*segment + 1, 9*segment - 1, 3<<20 + 17} {
		key := fmt.Sprintf("size/%d", n)
		body := pattern(n, n)
		put := w.put(key, body)
		got, out, err := w.get(key, "")
		if err != nil || !bytes.Equal(got, body[:n]) {
			t.Fatalf("%d bytes: read %d, %v", n, len(got), err)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: &key})
		if err != nil || *head.ContentLength != int64(n) || *out.ContentLength != int64(n) {
			t.Fatalf("%d bytes: head %v, %v", n, head, err)
		}
		if *head.ETag != *put.ETag || *out.ETag != *put.ETag || !strings.HasSuffix(*put.ETag, `-0"`) {
			t.Fatalf("etags %s %s %s", *put.ETag, *head.ETag, *out.ETag)
		}
		if *head.ContentType != "application/octet-stream" {
			t.Fatalf("content type %q", *head.ContentType)
		}
	}
	list, err := w.client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: documents})
	if err != nil || len(list.Contents) != 10 {
		t.Fatalf("list: %v %v", list, err)
	}
	for _, o := range list.Contents {
		if fmt.Sprintf("size/%d", *o.Size) != *o.Key || !strings.HasSuffix(*o.ETag, `-0"`) {
			t.Errorf("listed %s as %d bytes, %s", *o.Key, *o.Size, *o.ETag)
		}
	}
	w.noPlaintext()
}

func TestRanges(t *testing.T) {
	w := newWorld(t, worldOptions{})
	simple := pattern(3*segment+100, 1)
	w.put("simple", simple)
	objects := map[string][]byte{
		"simple":  simple,
		"uniform": w.upload("uniform", 2*segment, 2*segment, 2*segment, 77),
		"uneven":  w.upload("uneven", 2*segment, 4*segment, segment, 3*segment, segment+5),
		"tricky":  w.upload("tricky", 2*segment, 3*segment, segment, segment, segment+5), // fits the prediction at its end only
		"one":     w.upload("one", 500),
	}
	for key, body := range objects {
		size := int64(len(body))
		for pass := range 2 { // the second time from cached layouts
			for _, r := range [][2]int64{{0, 0}, {0, 99}, {100, 200}, {segment - 1, segment}, {segment, 2*segment - 1}, {2*segment - 1, 2 * segment}, {2 * segment, 2*segment + 1}, {3*segment + 9, 5 * segment}, {size - 1, size - 1}, {size - 50, size + 1000}, {0, size}, {100, 1<<63 - 2}} {
				if r[0] < 0 || r[0] >= size {
					continue
				}
				got, out, err := w.get(key, fmt.Sprintf("bytes=%d-%d", r[0], r[1]))
				if err != nil {
					t.Fatalf("%s %v pass %d: %v", key, r, pass, err)
				}
				end := min(r[1], size-1)
				if !bytes.Equal(got, body[r[0]:end+1]) {
					t.Fatalf("%s %v pass %d: wrong bytes (%d)", key, r, pass, len(got))
				}
				if want := fmt.Sprintf("bytes %d-%d/%d", r[0], end, size); *out.ContentRange != want {
					t.Fatalf("%s: content range %q, want %q", key, *out.ContentRange, want)
				}
			}
			if got := w.mustGet(key, "bytes=-7"); !bytes.Equal(got, body[size-7:]) {
				t.Fatalf("%s: wrong suffix", key)
			}
			if got := w.mustGet(key, "bytes=5-"); !bytes.Equal(got, body[5:]) {
				t.Fatalf("%s: wrong rest", key)
			}
			if got := w.mustGet(key, ""); !bytes.Equal(got, body) {
				t.Fatalf("%s: wrong whole", key)
			}
			_, _, err := w.get(key, fmt.Sprintf("bytes=%d-", size))
			wantCode(t, err, http.StatusRequestedRangeNotSatisfiable, "InvalidRange")
			for _, ignored := range []string{"bytes=9-3", "items=0-1", "bytes=a-b"} {
				if got := w.mustGet(key, ignored); !bytes.Equal(got, body) {
					t.Fatalf("%s: range %s was not ignored", key, ignored)
				}
			}
		}
	}
	w.noPlaintext()
}

func TestListing(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for _, key := range []string{"a", "dir/1", "dir/2", "dir/sub/3", "z ü+&", "z\x01"} {
		w.put(key, []byte("x"))
	}
	w.up.Replace("acme-documents", ".byokd/keyring", w.up.Object("acme-documents", "a"))
	ctx := t.Context()
	v2, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents, Delimiter: aws.String("/"), EncodingType: types.EncodingTypeUrl})
	if err != nil || len(v2.CommonPrefixes) != 1 || *v2.CommonPrefixes[0].Prefix != "dir/" || len(v2.Contents) != 3 || *v2.KeyCount != 4 {
		t.Fatalf("%+v %v", v2, err)
	}
	var keys []string
	pages := s3.NewListObjectsV2Paginator(w.client, &s3.ListObjectsV2Input{Bucket: documents, MaxKeys: aws.Int32(2), Prefix: aws.String("dir/")})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range page.Contents {
			keys = append(keys, *o.Key)
		}
	}
	if !slices.Equal(keys, []string{"dir/1", "dir/2", "dir/sub/3"}) {
		t.Fatalf("paged %v", keys)
	}
	v1, err := w.client.ListObjects(ctx, &s3.ListObjectsInput{Bucket: documents, MaxKeys: aws.Int32(1)})
	if err != nil || v1.NextMarker == nil || !*v1.IsTruncated {
		t.Fatalf("%+v %v", v1, err)
	}
	v1, err = w.client.ListObjects(ctx, &s3.ListObjectsInput{Bucket: documents, Marker: aws.String("dir/sub/3")})
	if err != nil || len(v1.Contents) != 2 {
		t.Fatalf("%+v %v", v1, err)
	}
	_, _, err = w.get(".byokd/keyring", "")
	wantCode(t, err, http.StatusForbidden, "AccessDenied")
}

func TestDelete(t *testing.T) {
	w := newWorld(t, worldOptions{})
	etag := w.put("a", []byte("1")).ETag
	w.put("b", []byte("2"))
	ctx := t.Context()
	_, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("a"), IfMatch: aws.String(`"wrong"`)})
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	if _, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("a"), IfMatch: etag}); err != nil {
		t.Fatal(err)
	}
	out, err := w.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: aws.String("b")}, {Key: aws.String(".byokd/x")}}}})
	if err != nil || len(out.Deleted) != 1 || len(out.Errors) != 1 || *out.Errors[0].Code != "AccessDenied" {
		t.Fatalf("%+v %v", out, err)
	}
	if w.up.Object("acme-documents", "a") != nil || w.up.Object("acme-documents", "b") != nil {
		t.Fatal("objects are still there")
	}
}

func TestMetadata(t *testing.T) {
	for _, clearText := range []bool{false, true} {
		w := newWorld(t, worldOptions{clear: clearText})
		meta := map[string]string{"name": canary + ".pdf", "empty": "", "umlaut": "Übersicht"}
		_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{
			Bucket: documents, Key: aws.String("m"), Body: strings.NewReader("x"), Metadata: meta,
			ContentType: aws.String("application/pdf"), CacheControl: aws.String("no-store"), ContentDisposition: aws.String("attachment"),
			ContentLanguage: aws.String("de"), ContentEncoding: aws.String("identity"), Tagging: aws.String(""),
		})
		if err != nil {
			t.Fatal(err)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("m")})
		if err != nil {
			t.Fatal(err)
		}
		if _, present := head.Metadata["empty"]; !present || len(head.Metadata) != len(meta) || head.Metadata["name"] != meta["name"] {
			t.Fatalf("metadata %v", head.Metadata)
		}
		if *head.ContentType != "application/pdf" || *head.CacheControl != "no-store" || *head.ContentDisposition != "attachment" || *head.ContentLanguage != "de" {
			t.Fatalf("head %+v", head)
		}
		if sealed := w.up.Holds([]byte(canary)) == ""; sealed == clearText {
			t.Fatalf("clear %v, but sealed %v", clearText, sealed)
		}
	}
	w := newWorld(t, worldOptions{})
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("m"), Body: strings.NewReader("x"), Metadata: map[string]string{"long": strings.Repeat("x", 1500)}})
	wantCode(t, err, http.StatusBadRequest, "MetadataTooLarge")

	// A checksum takes no room from the client's entries.
	plain := w.newClient(func(o *s3.Options) { o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired })
	dropped := 0
	for n := 1200; n < 1500; n++ {
		put := func(c *s3.Client) bool {
			_, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("m"), Body: strings.NewReader("x"), Metadata: map[string]string{"long": strings.Repeat("x", n)}})
			return err == nil
		}
		fits := put(plain)
		if put(w.client) != fits {
			t.Fatalf("%d bytes of metadata fit without a checksum: %v", n, fits)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("m"), ChecksumMode: types.ChecksumModeEnabled})
		if err != nil {
			t.Fatal(err)
		}
		if fits && head.ChecksumCRC32 == nil {
			dropped++
		}
	}
	if dropped == 0 {
		t.Error("no length was found at which the checksum does not fit")
	}
}

func TestConditions(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("c")
	etag := w.put("c", []byte("one")).ETag
	_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: strings.NewReader("two"), IfNoneMatch: aws.String("*")})
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	_, err = w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: strings.NewReader("two"), IfMatch: aws.String(`"00000000000000000000000000000000-0"`)})
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	_, err = w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: key, IfNoneMatch: etag})
	wantCode(t, err, http.StatusNotModified, "")
	_, err = w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: key, IfNoneMatch: etag})
	wantCode(t, err, http.StatusNotModified, "")
	for _, rng := range []*string{nil, aws.String("bytes=0-1")} {
		if _, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: key, IfMatch: etag, Range: rng}); err != nil {
			t.Fatal(err)
		}
		_, err = w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: key, IfMatch: aws.String(`"nope-0"`), Range: rng})
		wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	}
	if _, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: strings.NewReader("two"), IfMatch: etag}); err != nil {
		t.Fatal(err)
	}
	if got := w.mustGet("c", ""); string(got) != "two" {
		t.Fatalf("read %q", got)
	}
}

// TestReplacedObject reads ranges of an object that changes under a cached layout.
func TestReplacedObject(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for i := range 4 {
		body := pattern(segment*(4-i)+i, i)
		w.put("r", body)
		for range 2 {
			if got := w.mustGet("r", "bytes=10-"); !bytes.Equal(got, body[10:]) {
				t.Fatalf("round %d: wrong bytes", i)
			}
		}
	}
}

func TestCopy(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	body := pattern(segment+9, 3)
	_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: aws.String("src ü+"), Body: bytes.NewReader(body), Metadata: map[string]string{"who": "me"}, Tagging: aws.String("a=b")})
	if err != nil {
		t.Fatal(err)
	}
	multi := w.upload("multi", 2*segment, 2*segment, 9)
	copyTo := func(bucket, key, source string, change func(*s3.CopyObjectInput)) (*s3.CopyObjectOutput, error) {
		in := &s3.CopyObjectInput{Bucket: &bucket, Key: &key, CopySource: &source}
		if change != nil {
			change(in)
		}
		return w.client.CopyObject(ctx, in)
	}
	check := func(bucket, key string, want []byte, who string) {
		t.Helper()
		out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		defer out.Body.Close()
		var got bytes.Buffer
		if _, err := got.ReadFrom(out.Body); err != nil || !bytes.Equal(got.Bytes(), want) || out.Metadata["who"] != who {
			t.Fatalf("%s/%s: %d bytes, %v, metadata %v", bucket, key, got.Len(), err, out.Metadata)
		}
	}
	source := "documents/src%20%C3%BC%2B"
	out, err := copyTo("documents", "copy", source, nil)
	if err != nil || !strings.HasSuffix(*out.CopyObjectResult.ETag, `-0"`) {
		t.Fatalf("%+v %v", out, err)
	}
	check("documents", "copy", body, "me")
	if _, err := copyTo("backups", "copy", source, nil); err != nil {
		t.Fatal(err)
	}
	check("backups", "copy", body, "me")
	tags, err := w.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: aws.String("backups"), Key: aws.String("copy")})
	if err != nil || len(tags.TagSet) != 1 {
		t.Fatalf("%+v %v", tags, err)
	}
	for _, to := range []string{"documents", "backups"} {
		if _, err := copyTo(to, "multi copy", "documents/multi", nil); err != nil {
			t.Fatal(err)
		}
		check(to, "multi copy", multi, "")
	}
	_, err = copyTo("documents", "copy", "documents/copy", nil)
	wantCode(t, err, http.StatusBadRequest, "InvalidRequest")
	for _, key := range []string{"copy", "multi"} {
		_, err = copyTo("documents", key, "documents/"+key, func(in *s3.CopyObjectInput) {
			in.MetadataDirective, in.Metadata = types.MetadataDirectiveReplace, map[string]string{"who": "you", "empty": ""}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	check("documents", "copy", body, "you")
	check("documents", "multi", multi, "you")
	_, err = copyTo("documents", "x", "documents/copy", func(in *s3.CopyObjectInput) { in.CopySourceIfMatch = aws.String(`"no-0"`) })
	wantCode(t, err, http.StatusPreconditionFailed, "PreconditionFailed")
	_, err = copyTo("documents", "x", "documents/none", nil)
	wantCode(t, err, http.StatusNotFound, "NoSuchKey")
	w.noPlaintext()
}

func TestBucketOperations(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	if _, err := w.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: documents}); err != nil {
		t.Fatal(err)
	}
	_, err := w.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: aws.String("nope")})
	wantCode(t, err, http.StatusNotFound, "")
	buckets, err := w.client.ListBuckets(ctx, &s3.ListBucketsInput{})
	if err != nil || len(buckets.Buckets) != 2 || *buckets.Buckets[0].Name != "backups" {
		t.Fatalf("%+v %v", buckets, err)
	}
	location, err := w.client.GetBucketLocation(ctx, &s3.GetBucketLocationInput{Bucket: documents})
	if err != nil || location.LocationConstraint != "eu-central-1" {
		t.Fatalf("%+v %v", location, err)
	}
	_, err = w.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: documents})
	wantCode(t, err, http.StatusConflict, "BucketAlreadyOwnedByYou")
	_, err = w.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: aws.String("nope")})
	wantCode(t, err, http.StatusForbidden, "AccessDenied")
	if !strings.Contains(err.Error(), "objects.buckets") { // of the answer clients print the message alone
		t.Errorf("what to do about a bucket that byokd does not serve: %v", err)
	}
	if _, err := w.client.GetBucketVersioning(ctx, &s3.GetBucketVersioningInput{Bucket: documents}); err != nil {
		t.Fatal(err)
	}
	_, err = w.client.PutBucketEncryption(ctx, &s3.PutBucketEncryptionInput{Bucket: documents, ServerSideEncryptionConfiguration: &types.ServerSideEncryptionConfiguration{Rules: []types.ServerSideEncryptionRule{}}})
	wantCode(t, err, http.StatusNotImplemented, "NotImplemented")
}

func TestTagging(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("t")
	w.put("t", []byte("x"))
	if _, err := w.client.PutObjectTagging(ctx, &s3.PutObjectTaggingInput{Bucket: documents, Key: key, Tagging: &types.Tagging{TagSet: []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}}}); err != nil {
		t.Fatal(err)
	}
	got, err := w.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: documents, Key: key})
	if err != nil || len(got.TagSet) != 1 || *got.TagSet[0].Value != "v" {
		t.Fatalf("%+v %v", got, err)
	}
	if _, err := w.client.DeleteObjectTagging(ctx, &s3.DeleteObjectTaggingInput{Bucket: documents, Key: key}); err != nil {
		t.Fatal(err)
	}
}

func TestChecksums(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("sum")
	body := pattern(3*segment+1, 5)
	for _, algorithm := range []types.ChecksumAlgorithm{types.ChecksumAlgorithmCrc32, types.ChecksumAlgorithmCrc32c, types.ChecksumAlgorithmCrc64nvme, types.ChecksumAlgorithmSha1, types.ChecksumAlgorithmSha256} {
		if _, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: bytes.NewReader(body), ChecksumAlgorithm: algorithm}); err != nil {
			t.Fatalf("%s: %v", algorithm, err)
		}
		w.checksumsKept(t, "sum", body, algorithm)
	}
	for name, change := range map[string]func(*s3.PutObjectInput){
		"crc32":  func(in *s3.PutObjectInput) { in.ChecksumCRC32 = aws.String("AAAAAA==") },
		"sha256": func(in *s3.PutObjectInput) { in.ChecksumSHA256 = aws.String(strings.Repeat("A", 43) + "=") },
		"md5":    func(in *s3.PutObjectInput) { in.ContentMD5 = aws.String("AAAAAAAAAAAAAAAAAAAAAA==") },
	} {
		bad := aws.String("bad-" + name)
		in := &s3.PutObjectInput{Bucket: documents, Key: bad, Body: bytes.NewReader(body)}
		change(in)
		_, err := w.client.PutObject(ctx, in)
		wantCode(t, err, http.StatusBadRequest, "BadDigest")
		if w.up.Object("acme-documents", *bad) != nil {
			t.Fatalf("%s: the bad upload became an object", name)
		}
	}
}

// checksumsKept checks that an object returns the checksum it was uploaded with,
// also after its metadata was replaced and after a copy to a bucket with another
// key, and never without being asked or for a part of it.
func (w *world) checksumsKept(t *testing.T, key string, body []byte, algorithm types.ChecksumAlgorithm) {
	t.Helper()
	ctx := t.Context()
	for _, to := range []string{"", "documents", "backups"} {
		bucket := aws.String("documents")
		if to != "" {
			bucket = aws.String(to)
			if _, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: bucket, Key: &key, CopySource: aws.String("documents/" + key), MetadataDirective: types.MetadataDirectiveReplace, Metadata: map[string]string{"new": "x"}}); err != nil {
				t.Fatal(err)
			}
		}
		head, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled})
		if err != nil {
			t.Fatal(err)
		}
		got := map[types.ChecksumAlgorithm]*string{types.ChecksumAlgorithmCrc32: head.ChecksumCRC32, types.ChecksumAlgorithmCrc32c: head.ChecksumCRC32C,
			types.ChecksumAlgorithmCrc64nvme: head.ChecksumCRC64NVME, types.ChecksumAlgorithmSha1: head.ChecksumSHA1, types.ChecksumAlgorithmSha256: head.ChecksumSHA256}[algorithm]
		if got == nil || head.ChecksumType != types.ChecksumTypeFullObject {
			t.Fatalf("%s in %s: %+v", algorithm, *bucket, head)
		}
		out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled})
		if err != nil {
			t.Fatal(err)
		}
		read, err := io.ReadAll(out.Body) // the SDK compares
		if err != nil || !bytes.Equal(read, body) || out.ChecksumType != types.ChecksumTypeFullObject {
			t.Fatalf("%s: %v", algorithm, err)
		}
		attributes, err := w.client.GetObjectAttributes(ctx, &s3.GetObjectAttributesInput{Bucket: bucket, Key: &key, ObjectAttributes: []types.ObjectAttributes{types.ObjectAttributesChecksum}})
		if err != nil || attributes.Checksum == nil {
			t.Fatalf("%+v %v", attributes, err)
		}
		quiet, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: bucket, Key: &key})
		if err != nil || quiet.ChecksumType != "" || len(quiet.Metadata) != len(head.Metadata) {
			t.Fatalf("%+v %v", quiet, err)
		}
		part, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: &key, Range: aws.String("bytes=0-9"), ChecksumMode: types.ChecksumModeEnabled})
		if err != nil || part.ChecksumType != "" {
			t.Fatalf("%+v %v", part, err)
		}
		part.Body.Close()
	}
}
