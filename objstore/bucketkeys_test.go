package objstore_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
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
	report, err := objstore.RewrapStatus(ctx, objstore.RewrapOptions{Upstream: w.upstream(), Binding: documentsBinding, To: w.kms, Scan: true})
	if err != nil || report.Found != 0 {
		t.Errorf("%d data keys of objects are in no keyring (%v)", report.Found, err)
	}
}
