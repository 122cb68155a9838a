package objstore_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore/s3test"
)

// reads are the ways to ask for the checksum of an object, with what each says of CRC32,
// CRC32C, CRC64NVME and SHA-256, and their type. The download is compared by the SDK, too.
func (w *world) reads(client *s3.Client, bucket, key string, whole []byte) map[string][]string {
	w.t.Helper()
	ctx := w.t.Context()
	texts := func(kind types.ChecksumType, sums ...*string) (all []string) {
		for _, s := range sums {
			all = append(all, aws.ToString(s))
		}
		return append(all, string(kind))
	}
	head, err := client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled})
	if err != nil {
		w.t.Fatal(err)
	}
	got, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled})
	if err != nil {
		w.t.Fatal(err)
	}
	body, err := io.ReadAll(got.Body)
	if err := got.Body.Close(); err != nil {
		w.t.Fatal(err)
	}
	if err != nil || !bytes.Equal(body, whole) {
		w.t.Fatalf("%s reads wrong: %v", key, err)
	}
	attributes, err := client.GetObjectAttributes(ctx, &s3.GetObjectAttributesInput{Bucket: &bucket, Key: &key, ObjectAttributes: []types.ObjectAttributes{types.ObjectAttributesChecksum}})
	if err != nil {
		w.t.Fatal(err)
	}
	a := aws.ToString
	sums := attributes.Checksum
	if sums == nil {
		sums = &types.Checksum{}
	}
	if head.TagCount != nil || got.TagCount != nil {
		w.t.Errorf("%s has %v or %v tags that no client set", a(&key), head.TagCount, got.TagCount)
	}
	return map[string][]string{
		"HeadObject":          texts(head.ChecksumType, head.ChecksumCRC32, head.ChecksumCRC32C, head.ChecksumCRC64NVME, head.ChecksumSHA256),
		"GetObject":           texts(got.ChecksumType, got.ChecksumCRC32, got.ChecksumCRC32C, got.ChecksumCRC64NVME, got.ChecksumSHA256),
		"GetObjectAttributes": texts(sums.ChecksumType, sums.ChecksumCRC32, sums.ChecksumCRC32C, sums.ChecksumCRC64NVME, sums.ChecksumSHA256),
	}
}

// returns checks that every way to read an object returns one checksum.
func (w *world) returns(client *s3.Client, bucket, key string, whole []byte, want []string) {
	w.t.Helper()
	for how, got := range w.reads(client, bucket, key, whole) {
		if !slices.Equal(got, want) {
			w.t.Errorf("%s of %s/%s: %q, want %q", how, bucket, key, got, want)
		}
	}
}

// summedUpload uploads an object in parts with checksums, and returns its bytes and what
// CompleteMultipartUpload said of its checksum.
func (w *world) summedUpload(key string, algorithm types.ChecksumAlgorithm, kind types.ChecksumType, tags string, sizes ...int) ([]byte, []string) {
	w.t.Helper()
	ctx := w.t.Context()
	in := &s3.CreateMultipartUploadInput{Bucket: documents, Key: &key, ChecksumAlgorithm: algorithm, ChecksumType: kind, Metadata: map[string]string{"who": "me"}}
	if tags != "" {
		in.Tagging = &tags
	}
	created, err := w.client.CreateMultipartUpload(ctx, in)
	if err != nil {
		w.t.Fatal(err)
	}
	if created.ChecksumAlgorithm != algorithm || created.ChecksumType != kind {
		w.t.Errorf("begun with %s %s instead of %s %s", created.ChecksumAlgorithm, created.ChecksumType, algorithm, kind)
	}
	var whole []byte
	done := &types.CompletedMultipartUpload{}
	for i, n := range sizes {
		body := pattern(n, i+1)
		whole = append(whole, body...)
		number := aws.Int32(int32(i + 1))
		out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: &key, UploadId: created.UploadId, PartNumber: number, Body: bytes.NewReader(body), ChecksumAlgorithm: algorithm})
		if err != nil {
			w.t.Fatal(err)
		}
		done.Parts = append(done.Parts, types.CompletedPart{PartNumber: number, ETag: out.ETag,
			ChecksumCRC32: out.ChecksumCRC32, ChecksumCRC32C: out.ChecksumCRC32C, ChecksumCRC64NVME: out.ChecksumCRC64NVME, ChecksumSHA256: out.ChecksumSHA256})
	}
	listed, err := w.client.ListParts(ctx, &s3.ListPartsInput{Bucket: documents, Key: &key, UploadId: created.UploadId})
	if err != nil || listed.ChecksumAlgorithm != algorithm || listed.ChecksumType != kind {
		w.t.Fatalf("%+v %v", listed, err)
	}
	for i, p := range listed.Parts {
		want := done.Parts[i]
		if a := aws.ToString; a(p.ETag) != a(want.ETag) || a(p.ChecksumCRC32) != a(want.ChecksumCRC32) || a(p.ChecksumCRC32C) != a(want.ChecksumCRC32C) ||
			a(p.ChecksumCRC64NVME) != a(want.ChecksumCRC64NVME) || a(p.ChecksumSHA256) != a(want.ChecksumSHA256) {
			w.t.Errorf("part %d is listed as %+v, was uploaded as %+v", i+1, p, want)
		}
	}
	// The kind is not said again: byokd knows how it was begun.
	out, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: &key, UploadId: created.UploadId, MultipartUpload: done})
	if err != nil {
		w.t.Fatal(err)
	}
	var said []string
	for _, s := range []*string{out.ChecksumCRC32, out.ChecksumCRC32C, out.ChecksumCRC64NVME, out.ChecksumSHA256} {
		said = append(said, aws.ToString(s))
	}
	return whole, append(said, string(out.ChecksumType))
}

// base64Of is the checksum of a body as S3 writes it.
func base64Of(state hash.Hash, body []byte) string {
	state.Write(body)
	return base64.StdEncoding.EncodeToString(state.Sum(nil))
}

// TestChecksumsOfObjectsInParts: an object that was uploaded in parts returns its checksum,
// also from another byokd, and where its parts had to be sealed anew; a copy has that of
// the whole, and not that of the parts it has no more.
func TestChecksumsOfObjectsInParts(t *testing.T) {
	w := newWorld(t, worldOptions{})
	other := w.another(startGuard(t, w.kms))
	nvme := crc64.MakeTable(0x9a6c9329ac4bc9b5)
	for name, test := range map[string]struct {
		algorithm types.ChecksumAlgorithm
		kind      types.ChecksumType
		at        int
		full      func() hash.Hash // nil for a composite one
		sizes     []int
	}{
		"crc32":            {types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, 0, func() hash.Hash { return crc32.NewIEEE() }, []int{2 * segment, 2 * segment, 10}},
		"crc32c":           {types.ChecksumAlgorithmCrc32c, types.ChecksumTypeFullObject, 1, func() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }, []int{segment, 3*segment - 1}},
		"crc64nvme":        {types.ChecksumAlgorithmCrc64nvme, types.ChecksumTypeFullObject, 2, func() hash.Hash { return crc64.New(nvme) }, []int{2 * segment, segment, 7}},
		"one part":         {types.ChecksumAlgorithmCrc64nvme, types.ChecksumTypeFullObject, 2, func() hash.Hash { return crc64.New(nvme) }, []int{77}},
		"misaligned":       {types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, 0, func() hash.Hash { return crc32.NewIEEE() }, []int{segment + 1, segment + 1, 5}},
		"crc32 of parts":   {types.ChecksumAlgorithmCrc32, types.ChecksumTypeComposite, 0, nil, []int{2 * segment, 10}},
		"sha256":           {types.ChecksumAlgorithmSha256, types.ChecksumTypeComposite, 3, nil, []int{2 * segment, 2 * segment, 10}},
		"sha256 misplaced": {types.ChecksumAlgorithmSha256, types.ChecksumTypeComposite, 3, nil, []int{segment + 9, segment + 1, 10}},
	} {
		t.Run(name, func(t *testing.T) {
			w := *w
			w.t = t
			whole, said := w.summedUpload(name, test.algorithm, test.kind, "", test.sizes...)
			if test.full != nil && said[test.at] != base64Of(test.full(), whole) || test.full == nil && !strings.HasSuffix(said[test.at], "-"+string(rune('0'+len(test.sizes)))) {
				t.Fatalf("completed with %q", said)
			}
			w.returns(w.client, "documents", name, whole, said)
			w.returns(other, "documents", name, whole, said)
			for _, to := range []string{"documents", "backups"} {
				if _, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: &to, Key: aws.String(name + " copied"), CopySource: aws.String("documents/" + url.PathEscape(name))}); err != nil {
					t.Fatal(err)
				}
				if test.full != nil {
					w.returns(w.client, to, name+" copied", whole, said)
				}
			}
			part, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: &name, Range: aws.String("bytes=0-9"), ChecksumMode: types.ChecksumModeEnabled})
			if err != nil || part.ChecksumType != "" || part.TagCount != nil {
				t.Fatalf("a range: %+v %v", part, err)
			}
			part.Body.Close()
			w.noPlaintext()
		})
	}
}

// TestOwnTagIsHidden: clients neither see nor lose the tag that holds a checksum, and
// set none of that name.
func TestOwnTagIsHidden(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	whole, said := w.summedUpload("o", types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, "mine=1&yours=2", segment, 9)
	tags := func() (set []string) {
		t.Helper()
		out, err := w.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: documents, Key: aws.String("o")})
		if err != nil {
			t.Fatal(err)
		}
		for _, tag := range out.TagSet {
			set = append(set, *tag.Key+"="+*tag.Value)
		}
		head, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String("o"), ChecksumMode: types.ChecksumModeEnabled})
		if err != nil || int(aws.ToInt32(head.TagCount)) != len(set) || aws.ToString(head.ChecksumCRC32) != said[0] {
			t.Fatalf("%+v %v", head, err)
		}
		return set
	}
	if got := tags(); !slices.Equal(got, []string{"mine=1", "yours=2"}) {
		t.Errorf("the client sees %q", got)
	}
	set := func(name string) error {
		_, err := w.client.PutObjectTagging(ctx, &s3.PutObjectTaggingInput{Bucket: documents, Key: aws.String("o"), Tagging: &types.Tagging{TagSet: []types.Tag{{Key: &name, Value: aws.String("v")}}}})
		return err
	}
	if err := set("new"); err != nil {
		t.Fatal(err)
	}
	if got := tags(); !slices.Equal(got, []string{"new=v"}) {
		t.Errorf("the client sees %q", got)
	}
	wantCode(t, set("byokd-checksum"), http.StatusBadRequest, "InvalidTag")
	_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: aws.String("other"), Tagging: aws.String("byokd-checksum=v")})
	wantCode(t, err, http.StatusBadRequest, "InvalidTag")
	if _, err := w.client.DeleteObjectTagging(ctx, &s3.DeleteObjectTaggingInput{Bucket: documents, Key: aws.String("o")}); err != nil {
		t.Fatal(err)
	}
	if got := tags(); len(got) != 0 {
		t.Errorf("the client sees %q", got)
	}
	w.returns(w.client, "documents", "o", whole, said)
}

// TestOwnTagDamage: a checksum that is another object's, or damaged, or gone, is not
// returned; the object reads all the same.
func TestOwnTagDamage(t *testing.T) {
	w := newWorld(t, worldOptions{})
	none := []string{"", "", "", "", ""}
	whole, _ := w.summedUpload("a", types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, "", segment, 9)
	w.summedUpload("b", types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, "", segment, 10)
	right, another := w.up.Object("acme-documents", "a"), w.up.Object("acme-documents", "b")
	for name, tags := range map[string]string{
		"of another object": another.Tags,
		"a changed letter":  right.Tags[:len(right.Tags)-3] + "AAA",
		"no text":           "byokd-checksum=",
		"clear":             "byokd-checksum=" + url.QueryEscape("crc32:"+base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, 7))),
	} {
		t.Run(name, func(t *testing.T) {
			damaged := *right
			damaged.Tags = tags
			w.up.Replace("acme-documents", "a", &damaged)
			w := *w
			w.t = t
			w.returns(w.another(w.guard), "documents", "a", whole, none)
		})
	}
}

// TestUploadsWhoseTagsAreRefused: where the upstream lets byokd set no tag, uploads
// succeed without a checksum, and the log tells what is missing, once.
func TestUploadsWhoseTagsAreRefused(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.URL.Query().Has("tagging") }, Status: http.StatusForbidden, Code: "AccessDenied"})
	for _, key := range []string{"a", "b"} {
		whole, said := w.summedUpload(key, types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject, "", segment, 9)
		if said[0] != base64Of(crc32.NewIEEE(), whole) {
			t.Errorf("completed with %q", said)
		}
		w.returns(w.client, "documents", key, whole, []string{"", "", "", "", ""})
	}
	if told := w.log.FilterMessageSnippet("s3:PutObjectTagging").Len(); told != 1 {
		t.Errorf("told %d times:\n%v", told, w.log.All())
	}
}

// TestUpstreamThatKnowsNoTags: a service that overlooks the word tagging would replace an
// object by the document that sets its tags; nothing is set there.
func TestUpstreamThatKnowsNoTags(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("as it was"))
	sealed := w.up.Object("acme-documents", "o").Data
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == http.MethodGet && r.URL.Query().Has("tagging") }, Change: func([]byte) []byte { return sealed }})
	before := w.up.Calls(http.MethodPut)
	set := &types.Tagging{TagSet: []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}}
	if _, err := w.client.PutObjectTagging(t.Context(), &s3.PutObjectTaggingInput{Bucket: documents, Key: aws.String("o"), Tagging: set}); err == nil {
		t.Error("tags were set")
	}
	if after := w.up.Calls(http.MethodPut); after != before {
		t.Errorf("%d requests were sent that would replace the object", after-before)
	}
}

// TestChecksumsThatAnUploadWasBegunWith: parts and the request to complete agree with how
// an upload was begun, or are refused before there is an object.
func TestChecksumsThatAnUploadWasBegunWith(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key, body := t.Context(), aws.String("o"), pattern(100, 1)
	quiet := w.newClient(func(o *s3.Options) { o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired })
	begin := func(algorithm types.ChecksumAlgorithm, kind types.ChecksumType) *s3.UploadPartInput {
		t.Helper()
		out, err := quiet.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key, ChecksumAlgorithm: algorithm, ChecksumType: kind})
		if err != nil {
			t.Fatal(err)
		}
		return &s3.UploadPartInput{Bucket: documents, Key: key, UploadId: out.UploadId, PartNumber: aws.Int32(1), Body: bytes.NewReader(body)}
	}
	_, err := quiet.UploadPart(ctx, begin(types.ChecksumAlgorithmSha256, types.ChecksumTypeComposite))
	wantCode(t, err, http.StatusBadRequest, "InvalidRequest")
	in := begin(types.ChecksumAlgorithmCrc32c, types.ChecksumTypeFullObject)
	in.ChecksumAlgorithm = types.ChecksumAlgorithmSha1
	_, err = quiet.UploadPart(ctx, in)
	wantCode(t, err, http.StatusBadRequest, "InvalidRequest")

	in = begin(types.ChecksumAlgorithmCrc32c, types.ChecksumTypeFullObject)
	part, err := quiet.UploadPart(ctx, in)
	want := base64Of(crc32.New(crc32.MakeTable(crc32.Castagnoli)), body)
	if err != nil || aws.ToString(part.ChecksumCRC32C) != want {
		t.Fatalf("%+v %v", part, err)
	}
	listed, err := quiet.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: documents})
	if err != nil || !slices.ContainsFunc(listed.Uploads, func(u types.MultipartUpload) bool {
		return *u.UploadId == *in.UploadId && u.ChecksumAlgorithm == types.ChecksumAlgorithmCrc32c && u.ChecksumType == types.ChecksumTypeFullObject
	}) {
		t.Fatalf("%+v %v", listed, err)
	}
	done := &s3.CompleteMultipartUploadInput{Bucket: documents, Key: key, UploadId: in.UploadId, ChecksumType: types.ChecksumTypeComposite,
		MultipartUpload: &types.CompletedMultipartUpload{Parts: []types.CompletedPart{{PartNumber: aws.Int32(1), ETag: part.ETag}}}}
	_, err = quiet.CompleteMultipartUpload(ctx, done)
	wantCode(t, err, http.StatusBadRequest, "InvalidRequest")
	if w.up.Object("acme-documents", "o") != nil {
		t.Fatal("a refused request completed the upload")
	}
	done.ChecksumType = ""
	if out, err := quiet.CompleteMultipartUpload(ctx, done); err != nil || aws.ToString(out.ChecksumCRC32C) != want {
		t.Fatalf("%+v %v", out, err)
	}

	// A part that is copied gets the checksum that its upload was begun with.
	in = begin(types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject)
	copied, err := quiet.UploadPartCopy(ctx, &s3.UploadPartCopyInput{Bucket: documents, Key: key, UploadId: in.UploadId, PartNumber: aws.Int32(1), CopySource: aws.String("documents/o"), CopySourceRange: aws.String("bytes=0-49")})
	if err != nil || aws.ToString(copied.CopyPartResult.ChecksumCRC32) != base64Of(crc32.NewIEEE(), body[:50]) {
		t.Fatalf("%+v %v", copied, err)
	}
	done.UploadId, done.MultipartUpload.Parts[0].ETag = in.UploadId, copied.CopyPartResult.ETag
	if _, err := quiet.CompleteMultipartUpload(ctx, done); err != nil {
		t.Fatal(err)
	}
	w.returns(w.client, "documents", "o", body[:50], []string{base64Of(crc32.NewIEEE(), body[:50]), "", "", "", "FULL_OBJECT"})
}

// TestReplacedWhileItsChecksumIsKept: another object may take the place of one whose
// checksum is being kept in its tags. It keeps its own tags as long as that can be told;
// where it cannot, it is logged.
func TestReplacedWhileItsChecksumIsKept(t *testing.T) {
	isHeader := func(r *http.Request) bool { return r.Method == http.MethodGet && r.Header.Get("Range") != "" }
	isTags := func(method string) func(*http.Request) bool {
		return func(r *http.Request) bool { return r.Method == method && r.URL.Query().Has("tagging") }
	}
	isHead := func(r *http.Request) bool { return r.Method == http.MethodHead }
	for name, c := range map[string]struct {
		at    func(*http.Request) bool // the request at whose beginning it is replaced
		mixed bool
	}{
		"before its header is read":   {at: isHeader},
		"before its tags are read":    {at: isTags(http.MethodGet)},
		"after its tags were read":    {at: isHead},
		"when its tags are to be set": {at: isTags(http.MethodPut), mixed: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, worldOptions{})
			other := &s3test.Stored{Data: []byte("theirs"), ETag: `"00000000000000000000000000000007"`, Header: http.Header{}, Tags: "whose=theirs"}
			replaced := false
			w.up.Inject(&s3test.Fault{Status: http.StatusTeapot, Match: func(r *http.Request) bool {
				if !replaced && strings.HasSuffix(r.URL.Path, "/o") && c.at(r) {
					w.up.ReplaceLocked("acme-documents", "o", other)
					replaced = true
				}
				return false
			}})
			w.uploadSummed("o", types.ChecksumAlgorithmCrc32, 2*segment, 99)
			w.up.Heal()
			if !replaced {
				t.Fatal("nothing was replaced")
			}
			tags := w.up.Object("acme-documents", "o").Tags
			if (tags == "whose=theirs") == c.mixed {
				t.Errorf("the tags of the other object are %q", tags)
			}
			if told := w.log.FilterMessageSnippet("tags of an object may be those").Len(); (told == 1) != c.mixed {
				t.Errorf("it is told %d times", told)
			}
		})
	}
}

// uploadSummed uploads an object in parts with a full-object checksum.
func (w *world) uploadSummed(key string, algorithm types.ChecksumAlgorithm, sizes ...int) {
	w.t.Helper()
	ctx := w.t.Context()
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: &key, ChecksumAlgorithm: algorithm, ChecksumType: types.ChecksumTypeFullObject})
	if err != nil {
		w.t.Fatal(err)
	}
	var parts []completed
	for i, n := range sizes {
		out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: &key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(pattern(n, i)), ChecksumAlgorithm: algorithm})
		if err != nil {
			w.t.Fatal(err)
		}
		parts = append(parts, completed{int32(i + 1), *out.ETag})
	}
	if _, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: &key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)}); err != nil {
		w.t.Fatal(err)
	}
}
