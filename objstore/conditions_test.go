package objstore_test

import (
	"bytes"
	"context"
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
