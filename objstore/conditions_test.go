package objstore_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

const otherETag = `"00000000000000000000000000000000-0"`

// TestConditionalWrites makes a new object or replaces one by every operation that can,
// under conditions that hold and such that do not: then the object stays what it is.
func TestConditionalWrites(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, body := t.Context(), pattern(segment+3, 7)
	w.put("source", body)
	parts := w.upload("source of parts", segment, 9)
	copyOf := func(source string) func(key string, match, none *string) error {
		return func(key string, match, none *string) error {
			_, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: documents, Key: &key, CopySource: &source, IfMatch: match, IfNoneMatch: none})
			return err
		}
	}
	for name, write := range map[string]struct {
		do   func(key string, match, none *string) error
		want []byte
	}{
		"PutObject": {func(key string, match, none *string) error {
			_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: &key, Body: bytes.NewReader(body), IfMatch: match, IfNoneMatch: none})
			return err
		}, body},
		"CompleteMultipartUpload": {func(key string, match, none *string) error {
			return w.completeUnder(ctx, key, body, match, none)
		}, body},
		"CopyObject":          {copyOf("documents/source"), body},
		"CopyObject of parts": {copyOf("documents/source%20of%20parts"), parts},
	} {
		t.Run(name, func(t *testing.T) {
			key := "o " + name
			wantCode(t, write.do(key, aws.String(otherETag), nil), http.StatusNotFound, "NoSuchKey")
			if err := write.do(key, nil, aws.String("*")); err != nil {
				t.Fatalf("making it under If-None-Match: %v", err)
			}
			old := w.put(key, []byte("old")).ETag
			wantCode(t, write.do(key, nil, aws.String("*")), http.StatusPreconditionFailed, "PreconditionFailed")
			wantCode(t, write.do(key, aws.String(otherETag), nil), http.StatusPreconditionFailed, "PreconditionFailed")
			if got := w.mustGet(key, ""); string(got) != "old" {
				t.Fatal("a refused write replaced the object")
			}
			if err := write.do(key, old, nil); err != nil {
				t.Fatalf("replacing it under If-Match: %v", err)
			}
			if got := w.mustGet(key, ""); !bytes.Equal(got, write.want) {
				t.Fatal("the object is wrong")
			}
		})
	}
}

// completeUnder uploads an object in one part and completes it under conditions.
func (w *world) completeUnder(ctx context.Context, key string, body []byte, match, none *string) error {
	w.t.Helper()
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: &key})
	if err != nil {
		w.t.Fatal(err)
	}
	part, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: &key, UploadId: created.UploadId, PartNumber: aws.Int32(1), Body: bytes.NewReader(body)})
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: &key, UploadId: created.UploadId,
		IfMatch: match, IfNoneMatch: none, MultipartUpload: &types.CompletedMultipartUpload{Parts: []types.CompletedPart{{PartNumber: aws.Int32(1), ETag: part.ETag}}}})
	return err
}

// readConditions are the preconditions of a read.
type readConditions struct {
	match, none     *string
	modified, until *time.Time
}

// TestConditionalReads reads an object by every operation that takes conditions, a copy's
// source among them, where nothing but 412 says that one does not hold.
func TestConditionalReads(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx := t.Context()
	w.upload("parts", segment, 9)
	w.put("simple", pattern(segment+3, 7))
	before, after := aws.Time(time.Now().Add(-time.Hour)), aws.Time(time.Now().Add(time.Hour))
	for _, key := range []string{"simple", "parts"} {
		head, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		for name, test := range map[string]struct {
			readConditions
			status int // of a read; 0: it holds
		}{
			"its ETag":                    {readConditions{match: head.ETag}, 0},
			"another ETag":                {readConditions{match: aws.String(otherETag)}, http.StatusPreconditionFailed},
			"no other ETag":               {readConditions{none: aws.String(otherETag)}, 0},
			"not its ETag":                {readConditions{none: head.ETag}, http.StatusNotModified},
			"modified since before":       {readConditions{modified: before}, 0},
			"modified since later":        {readConditions{modified: after}, http.StatusNotModified},
			"unmodified since later":      {readConditions{until: after}, 0},
			"unmodified since before":     {readConditions{until: before}, http.StatusPreconditionFailed},
			"its ETag, whatever the date": {readConditions{match: head.ETag, until: before}, 0},
		} {
			t.Run(key+", "+name, func(t *testing.T) {
				for how, err := range w.readUnder(ctx, key, test.readConditions) {
					status := test.status
					if status == http.StatusNotModified && strings.HasPrefix(how, "CopyObject") {
						status = http.StatusPreconditionFailed
					}
					if status == 0 && err != nil {
						t.Errorf("%s: %v", how, err)
					}
					if status != 0 {
						wantCode(t, err, status, "")
					}
				}
			})
		}
	}
}

// readUnder reads an object in every way that takes conditions.
func (w *world) readUnder(ctx context.Context, key string, c readConditions) map[string]error {
	results := map[string]error{}
	for how, rng := range map[string]*string{"GetObject": nil, "GetObject of a range": aws.String("bytes=5-70000")} {
		out, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: &key, Range: rng, IfMatch: c.match, IfNoneMatch: c.none, IfModifiedSince: c.modified, IfUnmodifiedSince: c.until})
		if err == nil {
			err = out.Body.Close()
		}
		results[how] = err
	}
	_, results["HeadObject"] = w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: &key, IfMatch: c.match, IfNoneMatch: c.none, IfModifiedSince: c.modified, IfUnmodifiedSince: c.until})
	for _, bucket := range []string{"documents", "backups"} {
		_, results["CopyObject to "+bucket] = w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &bucket, Key: aws.String("copy"), CopySource: aws.String("documents/" + key),
			CopySourceIfMatch: c.match, CopySourceIfNoneMatch: c.none, CopySourceIfModifiedSince: c.modified, CopySourceIfUnmodifiedSince: c.until})
	}
	return results
}

// TestConditionalDeletesOfMany deletes objects under the condition that they are what the client knows: one that is not
// stays, and is told.
func TestConditionalDeletesOfMany(t *testing.T) {
	w := newWorld(t, worldOptions{})
	same := w.put("same", []byte("a")).ETag
	w.put("changed", []byte("b"))
	w.put("any", []byte("c"))
	out, err := w.client.DeleteObjects(t.Context(), &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{
		{Key: aws.String("same"), ETag: same}, {Key: aws.String("changed"), ETag: aws.String(otherETag)}, {Key: aws.String("any")},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Deleted) != 2 || len(out.Errors) != 1 || *out.Errors[0].Key != "changed" || *out.Errors[0].Code != "PreconditionFailed" {
		t.Errorf("deleted %d, refused %d", len(out.Deleted), len(out.Errors))
	}
	if string(w.mustGet("changed", "")) != "b" {
		t.Error("the object that had changed is another one")
	}
	for _, o := range []types.ObjectIdentifier{{Key: aws.String("changed"), Size: aws.Int64(7)}, {Key: aws.String("changed"), LastModifiedTime: aws.Time(time.Now())}} {
		_, err := w.client.DeleteObjects(t.Context(), &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{o}}})
		wantCode(t, err, http.StatusNotImplemented, "NotImplemented")
		w.mustGet("changed", "")
	}
}

// TestIfRange goes on with a download that was begun before: with the rest of the object where it is the same still, and
// with all of the one that has taken its place.
func TestIfRange(t *testing.T) {
	w := newWorld(t, worldOptions{})
	first := pattern(2*segment, 1)
	etag := *w.put("o", first).ETag
	head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("o")})
	if err != nil {
		t.Fatal(err)
	}
	date := head.LastModified.Format(http.TimeFormat)
	resume := func(validator string) (int, []byte) {
		r := w.request("GET", "/documents/o", nil, 0)
		r.Header.Set("Range", "bytes=100-")
		r.Header.Set("If-Range", validator)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, body
	}
	for _, validator := range []string{etag, date} {
		if status, body := resume(validator); status != http.StatusPartialContent || !bytes.Equal(body, first[100:]) {
			t.Errorf("the same object by %s: %d with %d bytes", validator, status, len(body))
		}
	}
	second := pattern(3*segment, 9)
	w.put("o", second)
	for _, validator := range []string{etag, "W/" + etag, time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat), "nonsense"} {
		if status, body := resume(validator); status != http.StatusOK || !bytes.Equal(body, second) {
			t.Errorf("another object by %s: %d with %d bytes", validator, status, len(body))
		}
	}
}

// TestExpires keeps what a client says of an object's end, which need be no date: caches take 0 for the past.
func TestExpires(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for _, value := range []string{"Wed, 21 Oct 2026 07:28:00 GMT", "0", "-1"} {
		r := w.request("PUT", "/documents/o", strings.NewReader("x"), 1)
		r.Header.Set("Expires", value)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if _, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: documents, Key: aws.String("copy"), CopySource: aws.String("documents/o")}); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"o", "copy"} {
			if _, out, err := w.get(key, ""); err != nil || aws.ToString(out.ExpiresString) != value {
				t.Errorf("%s: Expires %q of %q, %v", key, aws.ToString(out.ExpiresString), value, err)
			}
		}
	}
}

// TestCopyOntoItself: an object is copied onto itself to change what is not its bytes, and for nothing else.
func TestCopyOntoItself(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	same := func(change func(*s3.CopyObjectInput)) error {
		in := &s3.CopyObjectInput{Bucket: documents, Key: aws.String("o"), CopySource: aws.String("documents/o")}
		change(in)
		_, err := w.client.CopyObject(t.Context(), in)
		return err
	}
	wantCode(t, same(func(*s3.CopyObjectInput) {}), http.StatusBadRequest, "InvalidRequest")
	for what, change := range map[string]func(*s3.CopyObjectInput){
		"metadata":      func(in *s3.CopyObjectInput) { in.MetadataDirective = types.MetadataDirectiveReplace },
		"storage class": func(in *s3.CopyObjectInput) { in.StorageClass = types.StorageClassGlacierIr },
		"encryption":    func(in *s3.CopyObjectInput) { in.ServerSideEncryption = types.ServerSideEncryptionAes256 },
		"redirection":   func(in *s3.CopyObjectInput) { in.WebsiteRedirectLocation = aws.String("/elsewhere") },
	} {
		if err := same(change); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}
