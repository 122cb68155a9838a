package objstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore/s3test"
)

// archive moves an object to an archive, as a lifecycle rule does.
func (w *world) archive(key string) {
	w.t.Helper()
	o := w.up.Object("acme-documents", key)
	o.Header.Set("X-Amz-Storage-Class", "GLACIER")
	w.up.Replace("acme-documents", key, o)
}

// TestArchivedObjects: of an archived object everything can be told but its bytes, by a
// byokd that has never seen it, too; it can be restored, and then reads as it was.
func TestArchivedObjects(t *testing.T) {
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compress %v", compress), func(t *testing.T) {
			w := newWorld(t, worldOptions{compress: compress})
			bodies := map[string][]byte{"simple": pattern(3*segment+1, 1), "empty": {}}
			for key, body := range bodies {
				w.put(key, body)
			}
			bodies["parts"] = w.upload("parts", 2*segment, 2*segment, 99)
			for key, want := range bodies {
				w.archive(key)
				w.archived(t, key, want)
				w.client = w.another(w.guard)
				w.archived(t, key, want)
			}
		})
	}
}

// archived takes one archived object through its restoration, and archives it again.
func (w *world) archived(t *testing.T, key string, want []byte) {
	t.Helper()
	head := func() *s3.HeadObjectOutput {
		t.Helper()
		out, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: &key})
		if err != nil || *out.ContentLength != int64(len(want)) || out.StorageClass != types.StorageClassGlacier {
			t.Fatalf("head of %s: %+v, %v", key, out, err)
		}
		return out
	}
	if out := head(); out.Restore != nil {
		t.Errorf("%s: restore %q", key, *out.Restore)
	}
	attributes, err := w.client.GetObjectAttributes(t.Context(), &s3.GetObjectAttributesInput{Bucket: documents, Key: &key, ObjectAttributes: []types.ObjectAttributes{types.ObjectAttributesObjectSize, types.ObjectAttributesStorageClass}})
	if err != nil || aws.ToInt64(attributes.ObjectSize) != int64(len(want)) || attributes.StorageClass != types.StorageClassGlacier {
		t.Errorf("attributes of %s: %+v, %v", key, attributes, err)
	}
	for _, rng := range []string{"", "bytes=0-1"} {
		var state *types.InvalidObjectState
		if _, _, err := w.get(key, rng); !errors.As(err, &state) || state.StorageClass != types.StorageClassGlacier {
			t.Errorf("get of %s %s: %v", key, rng, err)
		}
	}
	_, err = w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: documents, Key: aws.String("copy"), CopySource: aws.String("documents/" + key)})
	if err == nil || !strings.Contains(err.Error(), "InvalidObjectState") {
		t.Errorf("copy of %s: %v", key, err)
	}
	if strings.HasSuffix(w.up.Object("acme-documents", key).ETag, `-3"`) {
		w.archivedParts(t, key, len(want))
	}
	restore := &s3.RestoreObjectInput{Bucket: documents, Key: &key, RestoreRequest: &types.RestoreRequest{Days: aws.Int32(3), GlacierJobParameters: &types.GlacierJobParameters{Tier: types.TierBulk}}}
	if _, err := w.client.RestoreObject(t.Context(), restore); err != nil {
		t.Fatalf("restore of %s: %v", key, err)
	}
	if tier := w.up.Object("acme-documents", key).Tier; tier != "Bulk" {
		t.Errorf("%s is restored with tier %q", key, tier)
	}
	if out := head(); aws.ToString(out.Restore) != `ongoing-request="true"` {
		t.Errorf("%s: restore %q", key, aws.ToString(out.Restore))
	}
	if _, err := w.client.RestoreObject(t.Context(), restore); err == nil || !strings.Contains(err.Error(), "RestoreAlreadyInProgress") {
		t.Errorf("restore of %s once more: %v", key, err)
	}
	w.up.FinishRestores()
	if out := head(); !strings.HasPrefix(aws.ToString(out.Restore), `ongoing-request="false"`) {
		t.Errorf("%s: restore %q", key, aws.ToString(out.Restore))
	}
	got, out, err := w.get(key, "")
	if err != nil || !bytes.Equal(got, want) || out.StorageClass != types.StorageClassGlacier || !strings.HasPrefix(aws.ToString(out.Restore), `ongoing-request="false"`) {
		t.Errorf("%s: %d bytes of %d, %v", key, len(got), len(want), err)
	}
	o := w.up.Object("acme-documents", key)
	o.Header.Del("X-Amz-Restore")
	w.up.Replace("acme-documents", key, o)
}

// archivedParts asks for the parts of an archived object: two of two segments, and the rest. How
// long a part is that may be compressed stands in its header, which cannot be read.
func (w *world) archivedParts(t *testing.T, key string, size int) {
	t.Helper()
	_, packed := w.up.Object("acme-documents", key).Header["X-Amz-Meta-Byokd-Size"]
	for number, want := range map[int32][2]int{1: {0, 2 * segment}, 2: {2 * segment, 4 * segment}, 3: {4 * segment, size}} {
		out, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: &key, PartNumber: &number})
		if packed {
			if err == nil || !strings.Contains(err.Error(), "403") {
				t.Errorf("head of part %d of %s: %v", number, key, err)
			}
			continue
		}
		if err != nil || *out.ContentLength != int64(want[1]-want[0]) || *out.PartsCount != 3 || aws.ToString(out.ContentRange) != fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, size) {
			t.Errorf("head of part %d of %s: %+v, %v", number, key, out, err)
		}
	}
	if _, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: &key, PartNumber: aws.Int32(4)}); err == nil || !strings.Contains(err.Error(), "416") {
		t.Errorf("head of part 4 of %s: %v", key, err)
	}
}

// TestArchiveTiers: the archive tiers of INTELLIGENT_TIERING are told as S3 tells them.
func TestArchiveTiers(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for tier, want := range map[string]types.IntelligentTieringAccessTier{"ARCHIVE_ACCESS": types.IntelligentTieringAccessTierArchiveAccess, "DEEP_ARCHIVE_ACCESS": types.IntelligentTieringAccessTierDeepArchiveAccess} {
		w.put("o", []byte(canary))
		o := w.up.Object("acme-documents", "o")
		o.Header.Set("X-Amz-Storage-Class", "INTELLIGENT_TIERING")
		o.Header.Set("X-Amz-Archive-Status", tier)
		w.up.Replace("acme-documents", "o", o)
		var state *types.InvalidObjectState
		if _, _, err := w.get("o", ""); !errors.As(err, &state) || state.AccessTier != want || state.StorageClass != types.StorageClassIntelligentTiering {
			t.Errorf("%s: %v, tier %+v", tier, err, state)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("o")})
		if err != nil || string(head.ArchiveStatus) != tier || *head.ContentLength != int64(len(canary)) {
			t.Errorf("%s: %+v, %v", tier, head, err)
		}
	}
}

// TestRestoreSelectsNothing: what of RestoreObject would read, or write, bytes of an
// object never reaches the upstream.
func TestRestoreSelectsNothing(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte(canary))
	w.archive("o")
	for document, status := range map[string]int{
		`<RestoreRequest><Days>1</Days></RestoreRequest>`:                                                                     http.StatusAccepted,
		`<RestoreRequest><Days>1</Days><Type>SELECT</Type></RestoreRequest>`:                                                  http.StatusNotImplemented,
		`<RestoreRequest><Days>1</Days><OutputLocation><S3><BucketName>b</BucketName></S3></OutputLocation></RestoreRequest>`: http.StatusNotImplemented,
		`<RestoreRequest><SelectParameters><Expression>x</Expression></SelectParameters></RestoreRequest>`:                    http.StatusNotImplemented,
		`<RestoreRequest><Days>1</Days><Description>x</Description></RestoreRequest>`:                                         http.StatusNotImplemented,
		`<RestoreRequest><GlacierJobParameters><Tier>Bulk</Tier><OutputLocation/></GlacierJobParameters></RestoreRequest>`:    http.StatusNotImplemented,
		`<RestoreRequest><Days>1</Days><Days>2</Days></RestoreRequest>`:                                                       http.StatusBadRequest,
		`<RestoreRequest><Days>many</Days></RestoreRequest>`:                                                                  http.StatusBadRequest,
		`<RestoreRequest><Days>1</Days></RestoreRequest><RestoreRequest><Type>SELECT</Type></RestoreRequest>`:                 http.StatusBadRequest,
		`<!DOCTYPE x [<!ENTITY e "SELECT">]><RestoreRequest><Days>1</Days><Tier>&e;</Tier></RestoreRequest>`:                  http.StatusBadRequest,
		`<x><RestoreRequest/></x>`: http.StatusBadRequest,
		`<RestoreRequest>`:         http.StatusBadRequest,
		`hello`:                    http.StatusBadRequest,
		``:                         http.StatusBadRequest,
	} {
		o := w.up.Object("acme-documents", "o")
		o.Header.Del("X-Amz-Restore")
		w.up.Replace("acme-documents", "o", o)
		before := w.up.Calls("POST restore")
		response, err := http.DefaultClient.Do(w.request("POST", "/documents/o?restore", strings.NewReader(document), int64(len(document))))
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != status {
			t.Errorf("%s: %d %s (%v), want %d", document, response.StatusCode, text, err, status)
		}
		if asked := w.up.Calls("POST restore") - before; (asked == 1) != (status == http.StatusAccepted) {
			t.Errorf("%s: the upstream was asked %d times", document, asked)
		}
	}
}

// TestCreateBucketAdvice: that byokd may not create a bucket, and what to do, stands where
// clients print it.
func TestCreateBucketAdvice(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Inject(&s3test.Fault{Status: http.StatusNotFound, Code: "NoSuchBucket", Match: func(r *http.Request) bool { return r.Method == http.MethodHead }})
	w.up.Inject(&s3test.Fault{Status: http.StatusForbidden, Code: "AccessDenied", Match: func(r *http.Request) bool { return r.Method == http.MethodPut }})
	if _, err := w.client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: documents}); err == nil || !strings.Contains(err.Error(), "s3:CreateBucket") || !strings.Contains(err.Error(), "objects.buckets.documents.upstream") {
		t.Errorf("of one that byokd may not create: %v", err)
	}
}
