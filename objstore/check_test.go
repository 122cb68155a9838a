package objstore_test

import (
	"bytes"
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

// checkAll checks the bucket of a world.
func (w *world) checkAll() (objstore.CheckProgress, []objstore.CheckFault, error) {
	var faults []objstore.CheckFault
	done, err := objstore.Check(w.t.Context(), objstore.CheckOptions{Upstream: w.upstream(), Place: documentsBinding.Resource, Keys: plainKeys{w.kms},
		Fault: func(f objstore.CheckFault) { faults = append(faults, f) }})
	return done, faults, err
}

// place is what is expected of a fault.
func place(f objstore.CheckFault) string {
	return fmt.Sprintf("%s %s part %d segment %d offset %d", f.Key, f.Reason, f.Part, f.Segment, f.Offset)
}

// TestCheck: each kind of tampering is found in the object that was damaged, at its place, and nowhere else.
func TestCheck(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("a", pattern(20*segment+100, 1))
	w.put("b", pattern(20*segment+100, 2))
	w.upload("m", 4*segment, 4*segment, 4*segment, 9)
	w.upload("n", 4*segment, 4*segment, 4*segment, 9)
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("with"), Body: strings.NewReader("x"), Metadata: map[string]string{"who": "me"}})
	if err != nil {
		t.Fatal(err)
	}
	plain := int64(2*(20*segment+100) + 2*(12*segment+9) + 1)
	sound := func() {
		t.Helper()
		objects, sealed, err := objstore.CheckSize(t.Context(), objstore.CheckOptions{Upstream: w.upstream()})
		if done, faults, failed := w.checkAll(); failed != nil || err != nil || len(faults) > 0 || done != (objstore.CheckProgress{Objects: objects, Sealed: sealed, Plain: plain}) || objects != 5 {
			t.Errorf("%+v, %v, %v; %d objects, %d bytes, %v", done, faults, failed, objects, sealed, err)
		}
	}
	sound()
	original := map[string]*s3test.Stored{}
	for _, key := range []string{"a", "b", "m", "n", "with"} {
		original[key] = w.up.Object("acme-documents", key)
	}
	want := map[string]string{
		"first byte of the header":      "a not_sealed part 1 segment -1 offset 0",
		"bit in the first segment":      "a damaged part 1 segment 0 offset 0",
		"bit in the last segment":       fmt.Sprintf("a damaged part 1 segment 20 offset %d", 20*segment),
		"bit in segment 11":             fmt.Sprintf("a damaged part 1 segment 11 offset %d", 11*segment),
		"swapped segments":              fmt.Sprintf("a damaged part 1 segment 3 offset %d", 3*segment),
		"cut at a segment":              "a truncated part 1 segment -1 offset 0",
		"cut to nothing":                "a not_sealed part 1 segment -1 offset 0",
		"foreign segment":               fmt.Sprintf("a damaged part 1 segment 5 offset %d", 5*segment),
		"plain object":                  "a not_sealed part 1 segment -1 offset 0",
		"bit in the third part":         fmt.Sprintf("m damaged part 3 segment 0 offset %d", 8*segment),
		"swapped second and third part": fmt.Sprintf("m mixed part 3 segment -1 offset %d", 8*segment),
		"part of another upload":        fmt.Sprintf("m mixed part 2 segment -1 offset %d", 4*segment),
	}
	for _, c := range tamperings(original) {
		o := *original[c.key]
		o.Data = c.change(bytes.Clone(o.Data))
		w.up.Replace("acme-documents", c.key, &o)
		done, faults, err := w.checkAll()
		if err != nil || len(faults) != 1 || done.Faults != 1 || done.Objects != 5 || faults[0].Key != c.key || faults[0].Err == nil {
			t.Errorf("%s: %+v, %v, %v", c.name, done, faults, err)
		} else if got := place(faults[0]); want[c.name] != "" && got != want[c.name] {
			t.Errorf("%s: %s, want %s", c.name, got, want[c.name])
		}
		delete(want, c.name)
		w.up.Replace("acme-documents", c.key, original[c.key])
	}
	if len(want) > 0 {
		t.Errorf("not tried: %v", want)
	}
	sound()

	o := w.up.Object("acme-documents", "with")
	text := []byte(o.Header.Get("X-Amz-Meta-Byokd"))
	text[60] ^= 1
	o.Header.Set("X-Amz-Meta-Byokd", string(text))
	w.up.Replace("acme-documents", "with", o)
	if _, faults, err := w.checkAll(); err != nil || len(faults) != 1 || place(faults[0]) != "with metadata part 0 segment -1 offset 1" {
		t.Errorf("metadata: %v, %v", faults, err)
	}
	w.up.Replace("acme-documents", "with", original["with"])

	// What the store refuses of one object is a fault of that; a store that is away ends the check.
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/b") }, Status: 403, Code: "InvalidObjectState"})
	if _, faults, err := w.checkAll(); err != nil || len(faults) != 1 || place(faults[0]) != "b unreadable part 0 segment -1 offset 0" {
		t.Errorf("refused: %v, %v", faults, err)
	}
	w.up.Heal()
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/b") }, Status: 404, Code: "NoSuchKey"})
	if done, faults, err := w.checkAll(); err != nil || len(faults) != 0 || done.Changed != 1 || done.Objects != 4 {
		t.Errorf("deleted meanwhile: %+v, %v, %v", done, faults, err)
	}
	w.up.Heal()
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/b") }, Status: 403, Code: "ExpiredToken"})
	if _, faults, err := w.checkAll(); err == nil || len(faults) != 0 {
		t.Errorf("no credentials any more: %v, %v", faults, err)
	}
}

// TestCheckCompressed: a damaged segment of a compressed object is named, too.
func TestCheckCompressed(t *testing.T) {
	w := newWorld(t, worldOptions{compress: true})
	w.put("c", bytes.Repeat([]byte("compressible "), 20*segment/13))
	o := w.up.Object("acme-documents", "c")
	at := int64(seal.ObjectHeaderSize)
	for range 7 {
		n, err := seal.PackedLength(o.Data[at:])
		if err != nil {
			t.Fatal(err)
		}
		at += int64(seal.PackedPrefix + n)
	}
	o.Data[at+seal.PackedPrefix] ^= 1
	w.up.Replace("acme-documents", "c", o)
	_, faults, err := w.checkAll()
	if err != nil || len(faults) != 1 || place(faults[0]) != fmt.Sprintf("c damaged part 1 segment 7 offset %d", 7*segment) {
		t.Errorf("%v, %v", faults, err)
	}
}
