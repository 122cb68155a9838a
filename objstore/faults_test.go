package objstore_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// faultWorld is a world in which every operation is tried under every fault.
// Object x is written, objects s (simple) and m (multipart) are read.
type faultWorld struct {
	*world
	bodies map[string][]byte
	kept   map[string]*s3test.Stored
}

// operation is what is tried. It returns an error, or nil after it has checked
// what it got; writes are checked afterwards.
type operation struct {
	name string
	run  func(w *faultWorld, ctx context.Context) error
	// after is what x may hold afterwards: when the operation succeeded the first
	// of them, when it failed any. nil: there is no x.
	after [][]byte
}

var (
	oldX   = pattern(3*segment+1, 50)
	newX   = pattern(2*segment+77, 51)
	largeX = pattern(11*segment+3, 52) // exceeds one upstream request
	partsX = [][]byte{pattern(2*segment, 53), pattern(2*segment, 54), pattern(9, 55)}
	oddX   = [][]byte{pattern(segment+5, 56), pattern(2*segment+1, 57)}
)

func putOf(body []byte) func(w *faultWorld, ctx context.Context) error {
	return func(w *faultWorld, ctx context.Context) error {
		_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: aws.String("x"), Body: bytes.NewReader(body), Metadata: map[string]string{"a": "b"}})
		return err
	}
}

func getOf(key string, from, to int) func(w *faultWorld, ctx context.Context) error {
	return func(w *faultWorld, ctx context.Context) error {
		in := &s3.GetObjectInput{Bucket: documents, Key: &key}
		want := w.bodies[key]
		if to > 0 {
			in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", from, to-1))
			want = want[from:to]
		}
		out, err := w.client.GetObject(ctx, in)
		if err != nil {
			return err
		}
		defer out.Body.Close()
		got, err := io.ReadAll(out.Body)
		if !bytes.HasPrefix(want, got) {
			w.t.Errorf("wrong bytes were returned")
		}
		if err == nil && len(got) != len(want) {
			w.t.Errorf("a short success: %d bytes of %d", len(got), len(want))
		}
		return err
	}
}

func copyOf(bucket, key string, change func(*s3.CopyObjectInput)) func(w *faultWorld, ctx context.Context) error {
	return func(w *faultWorld, ctx context.Context) error {
		in := &s3.CopyObjectInput{Bucket: documents, Key: aws.String("x"), CopySource: aws.String(bucket + "/" + key)}
		if change != nil {
			change(in)
		}
		_, err := w.client.CopyObject(ctx, in)
		return err
	}
}

func uploadOf(parts [][]byte) func(w *faultWorld, ctx context.Context) error {
	return func(w *faultWorld, ctx context.Context) error {
		created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("x")})
		if err != nil {
			return err
		}
		var done []completed
		for i, body := range parts {
			out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: aws.String("x"), UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(body)})
			if err != nil {
				return err
			}
			done = append(done, completed{int32(i + 1), *out.ETag})
		}
		_, err = w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: aws.String("x"), UploadId: created.UploadId, MultipartUpload: completedParts(done)})
		return err
	}
}

func faultOperations(bodies map[string][]byte) []operation {
	replace := func(in *s3.CopyObjectInput) {
		in.MetadataDirective, in.Metadata = types.MetadataDirectiveReplace, map[string]string{"n": "v"}
	}
	concat := func(parts [][]byte) []byte { return slices.Concat(parts...) }
	return []operation{
		{"put", putOf(newX), [][]byte{newX, oldX}},
		{"put empty", putOf(nil), [][]byte{{}, oldX}},
		{"put large", putOf(largeX), [][]byte{largeX, oldX}},
		{"get", getOf("s", 0, 0), [][]byte{oldX}},
		{"get multipart", getOf("m", 0, 0), [][]byte{oldX}},
		{"get range", getOf("s", segment-1, 3*segment), [][]byte{oldX}},
		{"get range of multipart", getOf("m", 2*segment-1, 4*segment+3), [][]byte{oldX}},
		{"head", func(w *faultWorld, ctx context.Context) error {
			out, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String("m")})
			if err == nil && *out.ContentLength != int64(len(bodies["m"])) {
				w.t.Errorf("length %d", *out.ContentLength)
			}
			return err
		}, [][]byte{oldX}},
		{"copy", copyOf("documents", "s", nil), [][]byte{bodies["s"], oldX}},
		{"copy multipart", copyOf("documents", "m", nil), [][]byte{bodies["m"], oldX}},
		{"copy from another bucket", copyOf("backups", "b", nil), [][]byte{bodies["b"], oldX}},
		{"replace own metadata", copyOf("documents", "x", replace), [][]byte{oldX}},
		{"upload", uploadOf(partsX), [][]byte{concat(partsX), oldX}},
		{"upload of odd parts", uploadOf(oddX), [][]byte{concat(oddX), oldX}},
		{"delete", func(w *faultWorld, ctx context.Context) error {
			_, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("x")})
			return err
		}, [][]byte{nil, oldX}},
		{"delete many", func(w *faultWorld, ctx context.Context) error {
			out, err := w.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: aws.String("x")}}}})
			if err == nil && len(out.Errors) > 0 {
				err = fmt.Errorf("%s", *out.Errors[0].Code)
			}
			return err
		}, [][]byte{nil, oldX}},
	}
}

// upstreamFaults are the ways in which the upstream fails in one request.
func upstreamFaults() map[string]s3test.Fault {
	flip := func(b []byte) []byte {
		for i := 5; i < len(b); i += 997 {
			b[i] ^= 1
		}
		return b
	}
	return map[string]s3test.Fault{
		"refused":          {Times: 1, Status: 503, Code: "SlowDown"},
		"forbidden":        {Status: 403, Code: "AccessDenied"},
		"failing from now": {Status: 500, Code: "InternalError"},
		"lost answer":      {Times: 1, Status: 500, Code: "InternalError", Persist: true},
		"reset":            {Times: 1, Reset: true},
		"reset for good":   {Reset: true},
		"reset after":      {Times: 1, Reset: true, Persist: true},
		"cut":              {Times: 1, CutAt: 100},
		"cut for good":     {CutAt: segment + 2000},
		"flipped":          {Times: 1, Change: flip},
		"flipped for good": {Change: flip},
	}
}

// TestEveryFaultAtEveryStep tries each operation with each fault in its first,
// second, … request to the upstream. Whatever happens: bytes that were read are
// right and complete or the read failed; what is stored is the old object or the
// new one, whole; and a success is what it says.
func TestEveryFaultAtEveryStep(t *testing.T) {
	w := &faultWorld{world: newWorld(t, worldOptions{}), bodies: map[string][]byte{}, kept: map[string]*s3test.Stored{}}
	w.proxy.Shrink(8*sealedSegment, 4*segment, 1<<40)
	w.bodies["s"], w.bodies["m"] = pattern(7*segment+9, 40), w.upload("m", 2*segment, 2*segment, 2*segment, 5)
	w.bodies["x"], w.bodies["b"] = oldX, pattern(segment+1, 41)
	w.put("s", w.bodies["s"])
	w.put("x", oldX)
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("backups"), Key: aws.String("b"), Body: bytes.NewReader(w.bodies["b"])}); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"s", "m", "x"} {
		w.kept[key] = w.up.Object("acme-documents", key)
	}
	cases := 0
	for name, fault := range upstreamFaults() {
		for _, op := range faultOperations(w.bodies) {
			for step := int64(1); w.faultAt(name, fault, op, step); step++ {
				cases++
			}
		}
	}
	t.Logf("%d cases", cases)
	if cases < 300 {
		t.Error("too few requests were made: the faults do not strike")
	}
	w.noPlaintext()
}

// faultAt runs an operation with a fault in its step-th request, and reports
// whether there was one.
func (w *faultWorld) faultAt(name string, fault s3test.Fault, op operation, step int64) bool {
	w.t.Helper()
	for key, o := range w.kept {
		copied := *o
		w.up.Replace("acme-documents", key, &copied)
	}
	var n atomic.Int64
	fault.Match = func(*http.Request) bool {
		now := n.Add(1)
		return now == step || now > step && fault.Times == 0
	}
	w.up.Inject(&fault)
	err := op.run(w, w.t.Context())
	w.up.Heal()
	where := fmt.Sprintf("%s, %s in request %d (%v)", op.name, name, step, err)
	may := op.after
	if err == nil {
		may = may[:1]
	}
	got, _, readErr := w.get("x", "")
	if o := w.up.Object("acme-documents", "x"); o == nil {
		got = nil
	} else if readErr != nil {
		w.t.Errorf("%s: x cannot be read: %v", where, readErr)
		return n.Load() >= step
	}
	if !slices.ContainsFunc(may, func(want []byte) bool { return bytes.Equal(got, want) }) {
		w.t.Errorf("%s: x holds %d bytes that it must not", where, len(got))
	}
	return n.Load() >= step
}

// TestBrokenDownload: the client of a read that cannot be finished sees it broken
// off, and the log names object, segment and reason.
func TestBrokenDownload(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(40*segment, 1)
	w.put("dir/object", body)
	o := w.up.Object("acme-documents", "dir/object")
	o.Data[1024+33*sealedSegment+100] ^= 1
	w.up.Replace("acme-documents", "dir/object", o)
	got, out, err := w.get("dir/object", "")
	if err == nil || out == nil && len(got) > 0 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	await(t, "the log line", func() bool { return w.log.FilterMessage("sealed bytes failed authentication").Len() > 0 })
	line := w.log.FilterMessage("sealed bytes failed authentication").All()[0].ContextMap()
	if line["key"] != "dir/object" || !strings.Contains(fmt.Sprint(line["error"]), "part 1") || !strings.Contains(fmt.Sprint(line["error"]), "segment 33") {
		t.Errorf("the log says %v", line)
	}

	w.put("dir/cut", body)
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == http.MethodGet && r.Header.Get("Range") == "" }, CutAt: 20 * segment})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == http.MethodGet }, Status: 500, Code: "InternalError"})
	if got, _, err = w.get("dir/cut", ""); err == nil {
		t.Fatalf("%d bytes", len(got))
	}
	await(t, "the log line", func() bool { return w.log.FilterMessage("request failed").Len() > 0 })
	lines := w.log.FilterMessage("request failed").All()
	line = lines[len(lines)-1].ContextMap()
	if line["key"] != "dir/cut" || !strings.Contains(fmt.Sprint(line["error"]), "segments from 16") || !strings.Contains(fmt.Sprint(line["error"]), "InternalError") {
		t.Errorf("the log says %v", line)
	}
}

// TestSlowUpstream: an upstream that pauses in the midst of an answer delays a
// read and does not break it.
func TestSlowUpstream(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(30*segment, 1)
	w.put("o", body)
	release := make(chan struct{})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == http.MethodGet }, Times: 1, StallAt: 11*sealedSegment + 9, Release: release})
	out, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String("o")})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Body.Close()
	first := make([]byte, 8*segment)
	if _, err := io.ReadFull(out.Body, first); err != nil {
		t.Fatal(err)
	}
	close(release)
	rest, err := io.ReadAll(out.Body)
	if err != nil || !bytes.Equal(append(first, rest...), body) {
		t.Errorf("%d bytes, %v", len(first)+len(rest), err)
	}
}

// What only the operator can mend, a bucket that is not there or rights that byokd lacks, stands in the log: once a
// minute, however many clients meet it.
func TestRefusalsOfTheUpstreamAreTold(t *testing.T) {
	for code, status := range map[string]int{"NoSuchBucket": 404, "AccessDenied": 403, "ExpiredToken": 400, "InvalidObjectState": 403, "NoSuchKey": 404} {
		t.Run(code, func(t *testing.T) {
			w := newWorld(t, worldOptions{})
			w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == http.MethodGet }, Status: status, Code: code})
			for range 3 {
				if _, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("documents"), Key: aws.String("k")}); err == nil {
					t.Fatal("an upstream that refuses was not noticed")
				}
			}
			w.server.Close() // requests are logged after their answers
			want := 1
			if code == "InvalidObjectState" || code == "NoSuchKey" { // about the object
				want = 0
			}
			lines := w.log.FilterMessageSnippet("the upstream bucket refuses byokd").All()
			if len(lines) != want {
				t.Fatalf("told %d times, want %d: %v", len(lines), want, lines)
			}
			if e, ok := w.events.find(objstore.OpGetObject); !ok || e.UpstreamFailed != (want > 0) {
				t.Errorf("the observer was told %+v", e)
			}
			if want > 0 && (lines[0].ContextMap()["bucket"] != "documents" || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["error"]), code)) {
				t.Errorf("%v", lines[0].ContextMap())
			}
		})
	}
}

// A request counts as failed by the upstream when that cannot be used: not when it refuses what only some clients ask for,
// nor what is the client's own fault, nor when the key is away.
func TestUpstreamFailures(t *testing.T) {
	once := func(o *s3.Options) { o.RetryMaxAttempts = 1 }
	put := func(w *world) error {
		_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: aws.String("k"), Body: strings.NewReader("x")}, once)
		return err
	}
	remove := func(w *world) error {
		_, err := w.client.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: aws.String("documents"), Key: aws.String("k")}, once)
		return err
	}
	tags := func(w *world) error {
		_, err := w.client.GetObjectTagging(t.Context(), &s3.GetObjectTaggingInput{Bucket: aws.String("documents"), Key: aws.String("k")}, once)
		return err
	}
	for name, test := range map[string]struct {
		ask   func(*world) error
		op    objstore.Op
		fault s3test.Fault
		want  bool
	}{
		"no bucket":            {put, objstore.OpPutObject, s3test.Fault{Status: 404, Code: "NoSuchBucket"}, true},
		"no bucket to delete":  {remove, objstore.OpDeleteObject, s3test.Fault{Status: 404, Code: "NoSuchBucket"}, true},
		"put denied":           {put, objstore.OpPutObject, s3test.Fault{Status: 403, Code: "AccessDenied"}, true},
		"delete denied":        {remove, objstore.OpDeleteObject, s3test.Fault{Status: 403, Code: "AccessDenied"}, false}, // under retention, say
		"tags denied":          {tags, objstore.OpGetObjectTagging, s3test.Fault{Status: 403, Code: "AccessDenied"}, false},
		"credentials":          {tags, objstore.OpGetObjectTagging, s3test.Fault{Status: 403, Code: "InvalidAccessKeyId"}, true},
		"internal error":       {put, objstore.OpPutObject, s3test.Fault{Status: 500, Code: "InternalError"}, true},
		"slow down":            {put, objstore.OpPutObject, s3test.Fault{Status: 503, Code: "SlowDown"}, false},
		"connection broken":    {put, objstore.OpPutObject, s3test.Fault{Reset: true}, true},
		"a body that is wrong": {put, objstore.OpPutObject, s3test.Fault{Status: 400, Code: "InvalidRequest"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, worldOptions{})
			w.up.Inject(&test.fault)
			if err := test.ask(w); err == nil {
				t.Fatal("an upstream that refuses was not noticed")
			}
			w.server.Close() // requests are reported after their answers
			if e, ok := w.events.find(test.op); !ok || e.UpstreamFailed != test.want {
				t.Errorf("the observer was told %+v", e)
			}
		})
	}
}
