package objstore_test

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"go.uber.org/zap"

	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// lockedUntil is when the locks of these tests end.
var lockedUntil = time.Date(2042, 3, 4, 5, 6, 7, 0, time.UTC)

// uploadLocked uploads parts with a lock and an ACL through byokd, up to the request that
// completes them.
func (w *world) uploadLocked(key string, sizes ...int) (complete *s3.CompleteMultipartUploadInput, whole []byte) {
	w.t.Helper()
	created, err := w.client.CreateMultipartUpload(w.t.Context(), &s3.CreateMultipartUploadInput{
		Bucket: documents, Key: &key, Metadata: map[string]string{"kind": "locked"}, Tagging: aws.String("a=b"),
		ObjectLockMode: types.ObjectLockModeCompliance, ObjectLockRetainUntilDate: &lockedUntil, ObjectLockLegalHoldStatus: types.ObjectLockLegalHoldStatusOn,
		GrantRead: aws.String(`uri="http://acs.amazonaws.com/groups/global/AllUsers", id="f00d"`), GrantFullControl: aws.String(`id="5e57"`),
		WebsiteRedirectLocation: aws.String("/elsewhere"),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	var parts []completed
	for i, n := range sizes {
		body := pattern(n, i+1)[:n]
		whole = append(whole, body...)
		out, err := w.client.UploadPart(w.t.Context(), &s3.UploadPartInput{Bucket: documents, Key: &key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(body)})
		if err != nil {
			w.t.Fatal(err)
		}
		parts = append(parts, completed{int32(i + 1), *out.ETag})
	}
	return &s3.CompleteMultipartUploadInput{Bucket: documents, Key: &key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)}, whole
}

// isLocked fails the test unless a version upstream has the lock, the ACL and the redirect
// of uploadLocked.
func isLocked(t *testing.T, o *s3test.Stored) {
	t.Helper()
	if o == nil {
		t.Fatal("there is no object")
	}
	until, err := time.Parse(time.RFC3339, o.Header.Get("X-Amz-Object-Lock-Retain-Until-Date"))
	if o.Header.Get("X-Amz-Object-Lock-Mode") != "COMPLIANCE" || err != nil || !until.Equal(lockedUntil) || o.Header.Get("X-Amz-Object-Lock-Legal-Hold") != "ON" {
		t.Errorf("the lock is %v", o.Header)
	}
	if o.Header.Get("X-Amz-Website-Redirect-Location") != "/elsewhere" {
		t.Errorf("it is redirected to %q", o.Header.Get("X-Amz-Website-Redirect-Location"))
	}
	if read := o.Grants.Get("X-Amz-Grant-Read"); !strings.Contains(read, "AllUsers") || !strings.Contains(read, "f00d") {
		t.Errorf("it may be read by %q", read)
	}
}

// readsLocked fails the test unless the locked object reads through byokd as it was written.
func (w *world) readsLocked(key string, want []byte) {
	w.t.Helper()
	got, out, err := w.get(key, "")
	if err != nil || !bytes.Equal(got, want) {
		w.t.Fatalf("%s: %d bytes of %d, %v", key, len(got), len(want), err)
	}
	if out.ObjectLockMode != types.ObjectLockModeCompliance || aws.ToInt32(out.TagCount) != 1 || out.Metadata["kind"] != "locked" {
		w.t.Errorf("%s: lock %q, %d tags, metadata %v", key, out.ObjectLockMode, aws.ToInt32(out.TagCount), out.Metadata)
	}
	w.noPlaintext()
}

// TestSealedAnewStaysLocked: an upload whose parts have to be sealed anew comes out with
// the lock and the ACL that it was begun with, whatever byokd may read of them, or it is
// refused before it is an object.
func TestSealedAnewStaysLocked(t *testing.T) {
	misaligned := []int{2*segment + 1, segment, 77}
	denied := func(subresources ...string) *s3test.Fault {
		return &s3test.Fault{Status: http.StatusForbidden, Code: "AccessDenied", Match: func(r *http.Request) bool {
			for _, sub := range subresources {
				if r.Method == http.MethodGet && r.URL.Query().Has(sub) {
					return true
				}
			}
			return false
		}}
	}
	for name, c := range map[string]struct {
		sizes    []int
		fault    *s3test.Fault
		another  bool // the upload is completed by a byokd that did not begin it
		compress bool
		refused  bool
	}{
		"misaligned":                             {sizes: misaligned},
		"in a bucket that compresses":            {sizes: misaligned, compress: true},
		"another byokd":                          {sizes: misaligned, another: true},
		"without a right to read the settings":   {sizes: misaligned, another: true, fault: denied("object-lock", "versioning")},
		"without a right to read locks":          {sizes: misaligned, fault: denied("object-lock", "retention", "legal-hold")},
		"another, without a right to read locks": {sizes: misaligned, another: true, fault: denied("retention", "legal-hold"), refused: true},
		"another, without any of these rights":   {sizes: misaligned, another: true, fault: denied("object-lock", "versioning", "retention", "legal-hold"), refused: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, worldOptions{compress: c.compress})
			w.up.Lock("acme-documents")
			complete, whole := w.uploadLocked("o", c.sizes...)
			if c.fault != nil {
				w.up.Inject(c.fault)
			}
			client := w.client
			if c.another {
				client = w.another(w.guard)
			}
			_, err := client.CompleteMultipartUpload(t.Context(), complete)
			w.up.Heal()
			if c.refused {
				if err == nil || !strings.Contains(err.Error(), "s3:GetObjectRetention") || !strings.Contains(err.Error(), "64 KiB") {
					t.Errorf("the answer is %v", err)
				}
				if len(w.up.Versions("acme-documents", "o")) > 0 || w.up.Uploads() != 1 {
					t.Error("what was refused is an object")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			versions := w.up.Versions("acme-documents", "o")
			if len(versions) != 2 {
				t.Fatalf("%d versions", len(versions))
			}
			for _, o := range versions {
				isLocked(t, o)
			}
			w.readsLocked("o", whole)
			if told := w.log.FilterMessageSnippet("its first form stays").FilterField(zap.String("first_version", versions[0].Version)).Len() +
				w.log.FilterMessageSnippet("its first form stays").FilterField(zap.String("first_version", versions[1].Version)).Len(); !c.another && told != 1 {
				t.Errorf("what stays locked is told %d times", told)
			}
		})
	}
}

// TestSealedAnewWithoutLocks: where a bucket has no versions, nobody is asked about
// locks.
func TestSealedAnewWithoutLocks(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.upload("o", 2*segment+1, segment, 77)
	if n := w.up.Calls("GET retention") + w.up.Calls("GET object-lock"); n > 0 {
		t.Errorf("%d requests about locks", n)
	}
}

// TestLockThatCannotBeReadInTime: when the lock is refused only after the upload was
// completed, the object stays as it was completed, locked, and the client is told.
func TestLockThatCannotBeReadInTime(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Lock("acme-documents")
	complete, whole := w.uploadLocked("o", 2*segment+1, segment, 77)
	w.up.Inject(&s3test.Fault{Status: http.StatusForbidden, Code: "AccessDenied", Match: func(r *http.Request) bool {
		return r.Method == http.MethodGet && r.URL.Query().Has("retention") && r.URL.Query().Has("versionId")
	}})
	if _, err := w.client.CompleteMultipartUpload(t.Context(), complete); err == nil {
		t.Error("the upload is completed")
	}
	w.up.Heal()
	versions := w.up.Versions("acme-documents", "o")
	if len(versions) != 1 {
		t.Fatalf("%d versions", len(versions))
	}
	isLocked(t, versions[0])
	w.readsLocked("o", whole)
}

// TestCopyWithLock: a copy has the lock that its request asks for, and no other, as in
// S3, however byokd makes it.
func TestCopyWithLock(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Lock("acme-documents")
	bodies := map[string][]byte{"simple": pattern(3*segment+1, 1)}
	w.put("simple", bodies["simple"])
	bodies["parts"] = w.upload("parts", 2*segment, 99)
	for source, want := range bodies {
		for _, locked := range []bool{false, true} {
			in := &s3.CopyObjectInput{Bucket: documents, Key: aws.String("copy"), CopySource: aws.String("documents/" + source)}
			if locked {
				in.ObjectLockMode, in.ObjectLockRetainUntilDate = types.ObjectLockModeGovernance, &lockedUntil
			}
			if _, err := w.client.CopyObject(t.Context(), in); err != nil {
				t.Fatalf("%s: %v", source, err)
			}
			got, out, err := w.get("copy", "")
			if err != nil || !bytes.Equal(got, want) || (out.ObjectLockMode == types.ObjectLockModeGovernance) != locked {
				t.Errorf("the copy of %s: %d bytes, lock %q, %v", source, len(got), out.ObjectLockMode, err)
			}
		}
	}
}

// TestConvertKeepsLocks: what was plain and locked is sealed and locked, in one request
// or in parts.
func TestConvertKeepsLocks(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Lock("acme-documents")
	body := pattern(2*segment+7, 3)
	direct := w.up.Client()
	_, err := direct.PutObject(t.Context(), &s3.PutObjectInput{
		Bucket: aws.String("acme-documents"), Key: aws.String("o"), Body: bytes.NewReader(body), ChecksumAlgorithm: types.ChecksumAlgorithmCrc32,
		Metadata: map[string]string{"kind": "locked"}, Tagging: aws.String("a=b"),
		ObjectLockMode: types.ObjectLockModeCompliance, ObjectLockRetainUntilDate: &lockedUntil, ObjectLockLegalHoldStatus: types.ObjectLockLegalHoldStatusOn,
		GrantRead: aws.String(`uri="http://acs.amazonaws.com/groups/global/AllUsers", id="f00d"`), GrantFullControl: aws.String(`id="5e57"`),
		WebsiteRedirectLocation: aws.String("/elsewhere"),
	})
	if err != nil {
		t.Fatal(err)
	}
	report, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{})
	if err != nil || report.Converted != 1 || report.Failed != 0 || report.OldVersions != 1 {
		t.Fatalf("%+v, %v", report, err)
	}
	versions := w.up.Versions("acme-documents", "o")
	isLocked(t, versions[len(versions)-1])
	got, out, err := w.get("o", "")
	if err != nil || !bytes.Equal(got, body) || out.Metadata["kind"] != "locked" {
		t.Errorf("%d bytes, %v, %v", len(got), out, err)
	}
	if left := w.staged(); len(left) > 0 {
		t.Errorf("left aside: %v", left)
	}
}
