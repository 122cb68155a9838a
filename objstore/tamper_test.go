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
	"github.com/aws/smithy-go"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

const sealedSegment = segment + seal.SegmentOverhead

// readTampered reads an object and fails the test if that succeeds, or yields a
// byte that is not of the object.
func (w *world) readTampered(name, key string, body []byte, rng string) {
	w.t.Helper()
	in := &s3.GetObjectInput{Bucket: documents, Key: &key}
	if rng != "" {
		in.Range = &rng
	}
	out, err := w.client.GetObject(w.t.Context(), in)
	if err != nil {
		var api smithy.APIError
		if !errors.As(err, &api) || api.ErrorCode() != "SealBroken" && api.ErrorCode() != "NotSealed" {
			w.t.Errorf("%s: %v", name, err)
		}
		return
	}
	defer out.Body.Close()
	got, err := io.ReadAll(out.Body)
	if err == nil {
		w.t.Errorf("%s %s: the read succeeded with %d bytes", name, rng, len(got))
	}
	// A first part that was taken away cannot be told from one that never was, so
	// with swapped ones authentic bytes leave before the order is found wrong.
	if rng == "" && name != "swapped parts" && !bytes.HasPrefix(body, got) {
		w.t.Errorf("%s: wrong bytes were returned", name)
	}
}

// tampering is one way to damage an object.
type tampering struct {
	name, key string
	change    func(d []byte) []byte
}

// tamperings damages "a" (20 segments and a bit) and "m" (three parts of four
// segments and a short one); "b" and "n" are their like.
func tamperings(original map[string]*s3test.Stored) []tampering {
	header := seal.ObjectHeaderSize
	at := func(i int) int { return header + i*sealedSegment }
	partSize := header + 4*sealedSegment
	return []tampering{
		{"first byte of the header", "a", func(d []byte) []byte { d[0] ^= 1; return d }},
		{"plain size in the header", "a", func(d []byte) []byte { d[23] ^= 1; return d }},
		{"key id in the header", "a", func(d []byte) []byte { d[40] ^= 1; return d }},
		{"salt in the header", "a", func(d []byte) []byte { d[60] ^= 1; return d }},
		{"wrapped key in the header", "a", func(d []byte) []byte { d[400] ^= 1; return d }},
		{"bit in the first segment", "a", func(d []byte) []byte { d[at(0)+100] ^= 1; return d }},
		{"bit in the last segment", "a", func(d []byte) []byte { d[len(d)-1] ^= 1; return d }},
		{"bit in segment 11", "a", func(d []byte) []byte { d[at(11)+9] ^= 1; return d }},
		{"swapped segments", "a", func(d []byte) []byte {
			c := bytes.Clone(d)
			copy(d[at(3):at(4)], c[at(4):at(5)])
			copy(d[at(4):at(5)], c[at(3):at(4)])
			return d
		}},
		{"cut in a segment", "a", func(d []byte) []byte { return d[:len(d)-10] }},
		{"cut at a segment", "a", func(d []byte) []byte { return d[:at(20)] }},
		{"cut to the header", "a", func(d []byte) []byte { return d[:header] }},
		{"cut to nothing", "a", func([]byte) []byte { return nil }},
		{"extended", "a", func(d []byte) []byte { return append(d, 1, 2, 3) }},
		{"extended by a segment", "a", func(d []byte) []byte { return append(d, d[at(0):at(1)]...) }},
		{"foreign header", "a", func(d []byte) []byte { copy(d[:header], original["b"].Data); return d }},
		{"foreign segment", "a", func(d []byte) []byte { copy(d[at(5):at(6)], original["b"].Data[at(5):]); return d }},
		{"plain object", "a", func(d []byte) []byte { return bytes.Repeat([]byte("plain"), len(d)/5) }},
		{"swapped parts", "m", func(d []byte) []byte {
			c := bytes.Clone(d)
			copy(d[:partSize], c[partSize:2*partSize])
			copy(d[partSize:2*partSize], c[:partSize])
			return d
		}},
		{"swapped second and third part", "m", func(d []byte) []byte {
			c := bytes.Clone(d)
			copy(d[2*partSize:3*partSize], c[partSize:2*partSize])
			copy(d[partSize:2*partSize], c[2*partSize:3*partSize])
			return d
		}},
		{"repeated part", "m", func(d []byte) []byte { copy(d[partSize:2*partSize], d[:partSize]); return d }},
		{"part of another upload", "m", func(d []byte) []byte {
			copy(d[partSize:2*partSize], original["n"].Data[partSize:2*partSize])
			return d
		}},
		{"bit in the third part", "m", func(d []byte) []byte { d[2*partSize+header+50] ^= 1; return d }},
		{"bit in the header of the last part", "m", func(d []byte) []byte { d[3*partSize+70] ^= 1; return d }},
	}
}

func TestTampering(t *testing.T) {
	w := newWorld(t, worldOptions{})
	size := 20*segment + 100
	body := pattern(size, 1)
	w.put("a", body)
	w.put("b", pattern(size, 2))
	multi := w.upload("m", 4*segment, 4*segment, 4*segment, 9)
	w.upload("n", 4*segment, 4*segment, 4*segment, 9)
	original := map[string]*s3test.Stored{}
	for _, key := range []string{"a", "b", "m", "n"} {
		original[key] = w.up.Object("acme-documents", key)
	}
	whole := map[string][]byte{"a": body, "m": multi}
	for _, c := range tamperings(original) {
		o := *original[c.key]
		o.Data = c.change(bytes.Clone(o.Data))
		w.up.Replace("acme-documents", c.key, &o)
		for _, fresh := range []bool{true, false} {
			if fresh { // a proxy that has not seen the object before
				o.ETag = fmt.Sprintf(`"%s%s"`, strings.Repeat("0", 32), map[bool]string{true: "-4", false: ""}[c.key == "m"])
			} else {
				o.ETag = original[c.key].ETag
			}
			w.up.Replace("acme-documents", c.key, &o)
			w.readTampered(c.name, c.key, whole[c.key], "")
		}
		w.up.Replace("acme-documents", c.key, original[c.key])
	}
	for key, want := range whole {
		if got := w.mustGet(key, ""); !bytes.Equal(got, want) {
			t.Errorf("%s is not readable as it was", key)
		}
	}
	if w.events.tampered == 0 {
		t.Error("the observer was not told")
	}
}

// TestTamperedRange reads ranges that touch damage, and ranges that do not.
func TestTamperedRange(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(10*segment, 1)
	w.put("r", body)
	o := w.up.Object("acme-documents", "r")
	o.Data[seal.ObjectHeaderSize+5*sealedSegment+77] ^= 1
	w.up.Replace("acme-documents", "r", o)
	w.readTampered("damaged segment", "r", body, fmt.Sprintf("bytes=%d-%d", 5*segment+3, 5*segment+4))
	w.readTampered("damaged segment among others", "r", body, fmt.Sprintf("bytes=%d-%d", segment, 7*segment))
	rng := fmt.Sprintf("bytes=%d-%d", 6*segment, 7*segment)
	if got := w.mustGet("r", rng); !bytes.Equal(got, body[6*segment:7*segment+1]) {
		t.Error("a range beside the damage is wrong")
	}
}

// TestTamperedMetadata changes the sealed metadata, and moves it to an object of
// the other bucket.
func TestTamperedMetadata(t *testing.T) {
	w := newWorld(t, worldOptions{})
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("m"), Body: strings.NewReader("x"), Metadata: map[string]string{"who": "me"}})
	if err != nil {
		t.Fatal(err)
	}
	o := w.up.Object("acme-documents", "m")
	text := []byte(o.Header.Get("X-Amz-Meta-Byokd"))
	text[60] ^= 1
	o.Header.Set("X-Amz-Meta-Byokd", string(text))
	w.up.Replace("acme-documents", "m", o)
	_, _, err = w.get("m", "")
	wantCode(t, err, http.StatusUnprocessableEntity, "SealBroken")
}

// TestForeignObjects: what was in the bucket before byokd is refused, not served.
func TestForeignObjects(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for _, data := range [][]byte{nil, []byte("short"), bytes.Repeat([]byte("x"), 100_000)} {
		w.up.Replace("acme-documents", "f", &s3test.Stored{Data: data, ETag: `"0123456789abcdef0123456789abcdef"`, Header: http.Header{}})
		_, _, err := w.get("f", "")
		wantCode(t, err, http.StatusUnprocessableEntity, "NotSealed")
		_, _, err = w.get("f", "bytes=0-1")
		wantCode(t, err, http.StatusUnprocessableEntity, "NotSealed")
		_, err = w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("f")})
		wantCode(t, err, http.StatusUnprocessableEntity, "")
	}
}

// TestUpstreamFaults: the upstream refuses, fails after the fact, cuts answers.
func TestUpstreamFaults(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(30*segment, 1)
	w.put("o", body)
	get := func(r *http.Request) bool { return r.Method == http.MethodGet }
	w.up.Inject(&s3test.Fault{Match: get, Times: 2, CutAt: 5*sealedSegment + 17})
	if got := w.mustGet("o", ""); !bytes.Equal(got, body) {
		t.Error("a read that was cut twice is wrong")
	}
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return get(r) && r.Header.Get("Range") == "" }, CutAt: 5*sealedSegment + 17})
	w.up.Inject(&s3test.Fault{Match: get, Status: http.StatusForbidden, Code: "AccessDenied"})
	if got, _, err := w.get("o", ""); err == nil {
		t.Errorf("a read that broke for good succeeded with %d bytes", len(got))
	}
	w.up.Heal()
	put := func(r *http.Request) bool { return r.Method == http.MethodPut }
	for _, f := range []struct {
		status     int
		code, want string
		wantStatus int
	}{
		{503, "SlowDown", "SlowDown", 503},
		{500, "InternalError", "InternalError", 500},
		{403, "AccessDenied", "AccessDenied", 403},
		{403, "InvalidAccessKeyId", "AccessDenied", 403},
		{409, "ConditionalRequestConflict", "ConditionalRequestConflict", 409},
		{400, "RequestTimeout", "SlowDown", 503},
	} {
		w.up.Inject(&s3test.Fault{Match: put, Times: 1, Status: f.status, Code: f.code})
		_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("p"), Body: bytes.NewReader(body)})
		wantCode(t, err, f.wantStatus, f.want)
	}
	if w.up.Object("acme-documents", "p") != nil {
		t.Error("a refused put left an object")
	}
	// Lost after success: the client learns of an error, and the object is whole.
	w.up.Inject(&s3test.Fault{Match: put, Times: 1, Status: 500, Code: "InternalError", Persist: true})
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("p"), Body: bytes.NewReader(body)}); err == nil {
		t.Error("acknowledged although the upstream had not")
	}
	if got := w.mustGet("p", ""); !bytes.Equal(got, body) {
		t.Error("what was persisted is wrong")
	}
	if _, found := w.events.find(objstore.OpPutObject); !found {
		t.Error("no event")
	}
}

// TestUpstreamGone: nobody answers below.
func TestUpstreamGone(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	w.up.Close()
	_, _, err := w.get("o", "")
	wantCode(t, err, http.StatusServiceUnavailable, "ServiceUnavailable")
	if !strings.Contains(err.Error(), "objects.buckets") {
		t.Errorf("the error does not say where to look: %v", err)
	}
}
