package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// TestKeyPeriods: one data key for so many objects, none per object.
func TestKeyPeriods(t *testing.T) {
	w := newWorld(t, worldOptions{keyObjects: 10})
	for i := range 25 {
		w.put(fmt.Sprint(i), []byte("x"))
	}
	if w.kms.created != 4 {
		t.Errorf("%d data keys for 25 objects, want 3 and that of the keyring", w.kms.created)
	}
	w.freeze()
	w.thaw()
	for i := range 25 {
		if got := w.mustGet(fmt.Sprint(i), ""); string(got) != "x" {
			t.Fatalf("object %d: %q", i, got)
		}
	}
	if w.kms.unwraps != 3 {
		t.Errorf("%d unwraps for 3 keys", w.kms.unwraps)
	}
}

// TestFreezeBound reads and writes flat out while the key is disabled: the last
// plain byte and the last acknowledgement come at most a second after the first
// refusal of KMS (here: after the key was disabled, and a probe interval).
func TestFreezeBound(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", pattern(64*segment, 1))
	ctx, cancel := context.WithCancel(t.Context())
	last := make(chan time.Time, 8)
	for range 4 {
		go func() {
			var latest time.Time
			for ctx.Err() == nil {
				out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: aws.String("o")})
				if err != nil {
					break
				}
				buf := make([]byte, 4096)
				for {
					n, err := out.Body.Read(buf)
					if n > 0 {
						latest = time.Now()
					}
					if err != nil {
						break
					}
				}
				out.Body.Close()
			}
			last <- latest
		}()
	}
	await(t, "that reads are under way", func() bool { return w.up.Calls("GET") > 20 })
	disabled := time.Now()
	w.freeze()
	frozen := time.Now()
	await(t, "that all readers wait", func() bool { return w.guard.Status().Waiting >= 4 })
	cancel()
	for range 4 {
		if latest := <-last; latest.Sub(disabled) > time.Second+100*time.Millisecond {
			t.Errorf("a plain byte came %v after the key was disabled (frozen after %v)", latest.Sub(disabled), frozen.Sub(disabled))
		}
	}
}

// TestTwoKeys: a freeze concerns the buckets of its key only, and an object under
// one key cannot be passed off as one of the other's.
func TestTwoKeys(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	w.up.Replace("acme-backups", "o", w.up.Object("acme-documents", "o"))
	_, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("backups"), Key: aws.String("o")})
	wantCode(t, err, http.StatusUnprocessableEntity, "SealBroken")
	if s := w.other.Status(); s.Gate != keyguard.Open {
		t.Errorf("a foreign wrapped key moved the gate to %v", s.Gate)
	}
	if !errors.Is(t.Context().Err(), nil) {
		t.Fatal("too slow")
	}
}

// TestBucketMadeAnew: a bucket that is deleted takes its keyring along, so that the objects of one that is made in its
// place stand under data keys of a keyring of its own.
func TestBucketMadeAnew(t *testing.T) {
	w := newWorld(t, worldOptions{compress: true, keyObjects: 3})
	ctx := t.Context()
	w.put("o", []byte("before"))
	_, err := w.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: documents})
	wantCode(t, err, http.StatusConflict, "BucketNotEmpty")
	w.put("o", []byte("still"))
	if _, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("o")}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: documents}); err != nil {
		t.Fatal(err)
	}
	_, err = w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: aws.String("o"), Body: strings.NewReader("x")})
	wantCode(t, err, http.StatusNotFound, "NoSuchBucket")
	if _, err := w.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: documents}); err != nil {
		t.Fatal(err)
	}
	for i := range 7 { // more than one data key lasts for
		w.put(fmt.Sprint(i), []byte("after"))
		if string(w.mustGet(fmt.Sprint(i), "")) != "after" {
			t.Error("the object is wrong")
		}
	}
	for _, own := range []string{objstore.KeyringObject, ".byokd/zstd"} {
		if w.up.Object("acme-documents", own) == nil {
			t.Errorf("the new bucket has no %s", own)
		}
	}
	w.allKeysListed()
}

// TestBucketDeletedUnderAWrite: while something is written into a bucket it is not taken away together with its keyring. The
// object would go into the one that is made in its place, under a data key that no keyring lists.
func TestBucketDeletedUnderAWrite(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	w.put("first", []byte("x"))
	if _, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("first")}); err != nil {
		t.Fatal(err)
	}
	want := pattern(40*segment, 3)
	body := newGated(want, 20*segment)
	puts := w.up.Calls("PUT")
	answered := make(chan error, 1)
	go func() {
		response, err := http.DefaultClient.Do(w.request("PUT", "/documents/o", body, int64(len(want))))
		if err == nil {
			err = response.Body.Close()
		}
		if err == nil && response.StatusCode != http.StatusOK {
			err = errors.New(response.Status)
		}
		answered <- err
	}()
	await(t, "that the upload is under way", func() bool { return w.up.Calls("PUT") > puts })
	_, err := w.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: documents})
	wantCode(t, err, http.StatusConflict, "OperationAborted")
	if err == nil {
		if _, err := w.client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: documents}); err != nil {
			t.Fatal(err)
		}
	}
	close(body.release)
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.mustGet("o", ""), want) {
		t.Error("the object is wrong")
	}
	w.allKeysListed()
	_, err = w.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: documents})
	wantCode(t, err, http.StatusConflict, "BucketNotEmpty")
}

// TestBucketThatStays: a bucket that cannot be deleted after all has its keyring again, under whose keys the parts of uploads
// stand that were begun.
func TestBucketThatStays(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	begun, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("o"), Metadata: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	part, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: aws.String("o"), UploadId: begun.UploadId, PartNumber: aws.Int32(1), Body: strings.NewReader("part")})
	if err != nil {
		t.Fatal(err)
	}
	before := w.up.Object("acme-documents", objstore.KeyringObject)
	var gone atomic.Bool // byokd's own objects
	w.up.Inject(&s3test.Fault{Status: http.StatusForbidden, Code: "AccessDenied", Match: func(r *http.Request) bool {
		if r.Method == http.MethodDelete && strings.HasSuffix(r.URL.Path, objstore.KeyringObject) {
			gone.Store(true)
			return false
		}
		return gone.Load() && r.Method == http.MethodDelete && strings.Trim(r.URL.Path, "/") == "acme-documents"
	}})
	_, err = w.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: documents})
	wantCode(t, err, http.StatusForbidden, "AccessDenied")
	if after := w.up.Object("acme-documents", objstore.KeyringObject); !gone.Load() || after == nil || !bytes.Equal(before.Data, after.Data) {
		t.Errorf("the keyring was taken away (%v) and is not what it was", gone.Load())
	}
	if _, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: aws.String("o"), UploadId: begun.UploadId,
		MultipartUpload: &types.CompletedMultipartUpload{Parts: []types.CompletedPart{{PartNumber: aws.Int32(1), ETag: part.ETag}}}}); err != nil {
		t.Fatal(err)
	}
	w.put("more", []byte("x"))
	if string(w.mustGet("o", "")) != "part" {
		t.Error("the object is wrong")
	}
	w.allKeysListed()
}

// allKeysListed checks that the keyring lists the data key of each object.
func (w *world) allKeysListed() {
	w.t.Helper()
	report, err := objstore.RewrapStatus(w.t.Context(), objstore.RewrapOptions{Upstream: w.upstream(), Binding: documentsBinding, To: w.kms, Scan: true})
	if err != nil || report.Found != 0 {
		w.t.Errorf("%d data keys of objects are in no keyring (%v)", report.Found, err)
	}
}
