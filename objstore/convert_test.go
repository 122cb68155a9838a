package objstore_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// plainObjects puts objects into the upstream bucket as they were before byokd.
func (w *world) plainObjects(sizes map[string]int) map[string][]byte {
	w.t.Helper()
	direct := w.up.Client(objstore.TuneClient)
	bodies := map[string][]byte{}
	for key, n := range sizes {
		bodies[key] = pattern(n, len(key))[:n]
		_, err := direct.PutObject(w.t.Context(), &s3.PutObjectInput{Bucket: aws.String("acme-documents"), Key: aws.String(key), Body: bytes.NewReader(bodies[key]),
			ContentType: aws.String("text/x-kept"), Tagging: aws.String("a=b"), Metadata: map[string]string{"who": key, "canary": canary}})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	return bodies
}

var convertSizes = map[string]int{"empty": 0, "small": 30, "tiny/sealed-like": seal.ObjectHeaderSize + 28, "segment": segment, "dir/large": 9*segment + 5, "dir/zwei/ü": 70000}

// sealedAlike fails the test unless all objects read through byokd as they were,
// with everything around them.
func (w *world) sealedAlike(bodies map[string][]byte) {
	w.t.Helper()
	for key, want := range bodies {
		body, out, err := w.get(key, "")
		if err != nil || !bytes.Equal(body, want) {
			w.t.Errorf("%s: %d bytes of %d, %v", key, len(body), len(want), err)
			continue
		}
		if *out.ContentType != "text/x-kept" || out.Metadata["who"] != key || aws.ToInt32(out.TagCount) != 1 {
			w.t.Errorf("%s: %v, %v", key, *out.ContentType, out.Metadata)
		}
	}
	w.noPlaintext()
	if left := w.staged(); len(left) > 0 {
		w.t.Errorf("left aside: %v", left)
	}
}

// staged lists what lies aside in the upstream bucket.
func (w *world) staged() (left []string) {
	w.t.Helper()
	out, err := w.up.Client(objstore.TuneClient).ListObjectsV2(w.t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("acme-documents"), Prefix: aws.String(".byokd/sealing/")})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, o := range out.Contents {
		left = append(left, *o.Key)
	}
	return left
}

// allSealed reports whether a conversion has left nothing plain.
func allSealed(r objstore.ConvertReport) bool {
	return r.Failed == 0 && r.Plain == r.Converted && r.OldVersions == 0
}

func TestConvert(t *testing.T) {
	for _, kind := range []string{"", "large", "compressing"} {
		w := newWorld(t, worldOptions{compress: kind == "compressing"})
		large := kind == "large"
		if large { // sealed copies of more than four segments go upstream in parts
			w.proxy.Shrink(4*sealedSegment, 2*segment, 1<<40)
		}
		w.put("before", []byte("sealed already"))
		bodies := w.plainObjects(convertSizes)
		dry, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{DryRun: true})
		if err != nil || dry.Plain != int64(len(bodies)) || dry.Sealed != 1 || dry.Converted != 0 || allSealed(dry) {
			t.Fatalf("%+v, %v", dry, err)
		}
		for key, want := range bodies {
			if got := w.up.Object("acme-documents", key).Data; !bytes.Equal(got, want) {
				t.Fatalf("a dry run has changed %s", key)
			}
		}
		some, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{Prefix: "dir/"})
		if err != nil || some.Converted != 2 || !allSealed(some) {
			t.Fatalf("%+v, %v", some, err)
		}
		var last objstore.ConvertReport
		report, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{Progress: func(r objstore.ConvertReport) { last = r }})
		if err != nil || report.Converted != int64(len(bodies)-2) || report.Sealed != 3 || !allSealed(report) || last.Converted != report.Converted {
			t.Fatalf("%+v, %v", report, err)
		}
		w.sealedAlike(bodies)
		if large && !strings.HasSuffix(w.up.Object("acme-documents", "dir/large").ETag, `-5"`) {
			t.Errorf("the large object has ETag %s", w.up.Object("acme-documents", "dir/large").ETag)
		}
	}
}

// TestConvertFaults: the upstream fails at each step in turn, before or after the
// fact, or the run is killed there. No object is ever lost: at any time each reads
// as it was, plain upstream or sealed through byokd; the next run completes.
func TestConvertFaults(t *testing.T) {
	sizes := map[string]int{"one": 2*segment + 7}
	for _, kind := range []string{"refused", "persisted", "cut", "killed"} {
		w := newWorld(t, worldOptions{})
		w.put("before", nil) // so that the keyring is there
		for step := 1; ; step++ {
			bodies := w.plainObjects(sizes)
			ctx, kill := context.WithCancelCause(t.Context())
			n := 0
			fault := &s3test.Fault{Times: 0, Status: 503, Code: "SlowDown", Persist: kind == "persisted"}
			if kind == "cut" {
				fault = &s3test.Fault{CutAt: segment / 2}
			}
			fault.Match = func(*http.Request) bool {
				n++
				if kind == "killed" && n == step {
					kill(errors.New("killed"))
				}
				return kind != "killed" && n == step
			}
			w.up.Inject(fault)
			_, err := w.proxy.Convert(ctx, "documents", objstore.ConvertOptions{})
			kill(nil)
			w.up.Heal()
			if kind == "killed" && err == nil && n >= step && step < n {
				t.Errorf("%s at %d: success", kind, step)
			}
			if now := w.up.Object("acme-documents", "one"); now == nil {
				t.Fatalf("%s at %d: the object is gone", kind, step)
			} else if !bytes.Equal(now.Data, bodies["one"]) && !bytes.Equal(w.mustGet("one", ""), bodies["one"]) {
				t.Fatalf("%s at %d: the object is lost", kind, step)
			}
			report, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{})
			if err != nil || !allSealed(report) {
				t.Fatalf("after %s at %d: %+v, %v", kind, step, report, err)
			}
			w.sealedAlike(bodies)
			if n < step {
				if step < 10 {
					t.Errorf("only %d steps", step)
				}
				break
			}
		}
	}
}

// TestConvertLosesToAWriter: somebody replaces the object at each step of its
// conversion; his bytes stay, sealed in the end.
func TestConvertLosesToAWriter(t *testing.T) {
	for step := 1; ; step++ {
		w := newWorld(t, worldOptions{})
		w.plainObjects(map[string]int{"one": segment + 7})
		theirs := []byte(canary + " of the writer")
		n := 0
		w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool {
			if n++; n == step {
				w.up.ReplaceLocked("acme-documents", "one", &s3test.Stored{Data: theirs, ETag: fmt.Sprintf(`"%032d"`, step), Header: http.Header{}})
			}
			return false
		}})
		report, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{})
		w.up.Heal()
		if err != nil || !allSealed(report) {
			if report, err = w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{}); err != nil || !allSealed(report) {
				t.Fatalf("step %d: %+v, %v", step, report, err)
			}
		}
		if n < step {
			if step < 10 {
				t.Errorf("only %d steps", step)
			}
			return
		}
		if now := w.up.Object("acme-documents", "one").Data; bytes.Equal(now, theirs) { // written after the listing had passed
			if _, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if got := w.mustGet("one", ""); !bytes.Equal(got, theirs) {
			t.Errorf("step %d: the writer's bytes are lost: %d bytes", step, len(got))
		}
	}
}

// TestConvertNeedsConditions: an upstream that ignores If-Match is refused.
func TestConvertNeedsConditions(t *testing.T) {
	w := newWorld(t, worldOptions{})
	bodies := w.plainObjects(map[string]int{"one": 100})
	w.up.IgnoreConditions()
	if _, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{}); err == nil || !strings.Contains(err.Error(), "If-Match") {
		t.Errorf("%v", err)
	}
	if !bytes.Equal(w.up.Object("acme-documents", "one").Data, bodies["one"]) || len(w.staged()) > 0 {
		t.Error("something was written")
	}
}

// TestPlainObjectsAreRefused: an object that byokd has not sealed is not copied
// either; it is listed, and may be deleted.
func TestPlainObjectsAreRefused(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.plainObjects(map[string]int{"plain": 5 * segment})
	ctx, key := t.Context(), aws.String("plain")
	_, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: documents, Key: aws.String("copy"), CopySource: aws.String("documents/plain")})
	wantCode(t, err, http.StatusUnprocessableEntity, "NotSealed")
	_, err = w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: aws.String("backups"), Key: aws.String("copy"), CopySource: aws.String("documents/plain")})
	wantCode(t, err, http.StatusUnprocessableEntity, "NotSealed")
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("copy")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.client.UploadPartCopy(ctx, &s3.UploadPartCopyInput{Bucket: documents, Key: aws.String("copy"), UploadId: created.UploadId, PartNumber: aws.Int32(1), CopySource: aws.String("documents/plain")})
	wantCode(t, err, http.StatusUnprocessableEntity, "NotSealed")
	if list, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents}); err != nil || len(list.Contents) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: key}); err != nil || w.up.Object("acme-documents", "plain") != nil {
		t.Errorf("it cannot be deleted: %v", err)
	}
}

// TestConvertKeepsTheOnlyCopy finds what a run that was killed has left: the copy aside, and in the object's place bytes that
// begin as sealed ones and cannot be opened. The copy is all there is of the object, and stays.
func TestConvertKeepsTheOnlyCopy(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(2*segment, 1)
	w.put("o", body)
	sealed := w.up.Object("acme-documents", "o")
	sum := sha256.Sum256([]byte("o"))
	aside := ".byokd/sealing/" + hex.EncodeToString(sum[:])
	for what, at := range map[string]int{"version": 8, "bytes": 3 * segment / 2} {
		t.Run(what, func(t *testing.T) {
			copied, damaged := *sealed, *sealed
			damaged.Data = bytes.Clone(sealed.Data)
			damaged.Data[at] ^= 0xff
			w.up.Replace("acme-documents", aside, &copied)
			w.up.Replace("acme-documents", "o", &damaged)
			report, err := w.proxy.Convert(t.Context(), "documents", objstore.ConvertOptions{})
			if err != nil || report.Failed != 1 {
				t.Errorf("%+v, %v", report, err)
			}
			if left := w.staged(); len(left) != 1 {
				t.Errorf("left aside: %v", left)
			}
		})
	}
}
