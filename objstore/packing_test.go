package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
)

// text is n bytes that compress well; noise is n bytes that do not.
func text(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, `{"position": %d, "key": %d, "valueType": "JOB", "canary": %q}`+"\n", i, i*7919, canary)
	}
	return b.Bytes()[:n]
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// packedWorld is a world whose bucket documents compresses.
func packedWorld(t *testing.T) *world {
	return newWorld(t, worldOptions{compress: true})
}

// TestCompressed puts objects of every kind of length, the largest of them in three
// parts, and reads them whole, in ranges, through a byokd that does not compress
// and with Restore. Lengths are right everywhere.
func TestCompressed(t *testing.T) {
	w := packedWorld(t)
	bodies := map[string][]byte{"empty": nil, "one": []byte("x"), "noise": noise(3*segment + 5), "large": append(noise(15<<20), text(2<<20)...)}
	for _, n := range []int{segment - 1, segment, segment + 1, 8 * segment, 9*segment + 7, 3 << 20} {
		bodies[fmt.Sprint("text/", n)] = text(n)
	}
	for key, body := range bodies {
		if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String(key), Body: bytes.NewReader(body), Metadata: map[string]string{"a": ""}}); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
	}
	if o := w.up.Object("acme-documents", "large"); !strings.HasSuffix(o.ETag, `-3"`) {
		t.Errorf("the large object has ETag %s", o.ETag)
	}
	plain, sealed := len(bodies["text/3145728"]), w.up.Object("acme-documents", "text/3145728").Size
	t.Logf("%d bytes of text take %d bytes upstream, %d bytes of noise take %d", plain, sealed, len(bodies["noise"]), w.up.Object("acme-documents", "noise").Size)
	if sealed*3 > int64(plain) {
		t.Error("it is not compressed")
	}
	w.noPlaintext()
	uncompressing := w.another(w.guard)
	for _, client := range []*s3.Client{w.client, uncompressing} {
		w.packedReads(client, bodies)
	}
	for key, want := range bodies {
		var out bytes.Buffer
		if _, err := objstore.RestoreObject(t.Context(), w.upstream(), objstore.Ref{Key: key}, &out, plainKeys{w.kms}); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("restore %s: %d bytes of %d, %v", key, out.Len(), len(want), err)
		}
	}
	w.packedCopies(bodies)
}

// packedReads reads objects and their lengths in every way.
func (w *world) packedReads(client *s3.Client, bodies map[string][]byte) {
	w.t.Helper()
	ctx := w.t.Context()
	list, err := client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents})
	if err != nil || len(list.Contents) != len(bodies) {
		w.t.Fatalf("%v: %d objects", err, len(list.Contents))
	}
	for _, o := range list.Contents {
		if *o.Size != int64(len(bodies[*o.Key])) {
			w.t.Errorf("%s is listed with %d bytes, has %d", *o.Key, *o.Size, len(bodies[*o.Key]))
		}
	}
	for key, want := range bodies {
		head, err := client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String(key)})
		if err != nil || *head.ContentLength != int64(len(want)) || len(head.Metadata) != 1 {
			w.t.Errorf("head %s: %v, %v", key, head, err)
		}
		ranges := [][2]int{{0, len(want)}}
		for _, r := range [][2]int{{0, 1}, {1, 2}, {segment - 1, segment + 1}, {segment, 2 * segment}, {2*segment + 3, 2*segment + 4}, {len(want) - 1, len(want)}, {len(want) - segment - 9, len(want)}, {7 << 20, 14 << 20}} {
			if r[0] >= 0 && r[1] <= len(want) && r[0] < r[1] {
				ranges = append(ranges, r)
			}
		}
		for i, r := range ranges {
			in := &s3.GetObjectInput{Bucket: documents, Key: aws.String(key)}
			if i > 0 {
				in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r[0], r[1]-1))
			}
			out, err := client.GetObject(ctx, in)
			if err != nil {
				w.t.Errorf("%s %v: %v", key, r, err)
				continue
			}
			got, err := io.ReadAll(out.Body)
			if err != nil || !bytes.Equal(got, want[r[0]:r[1]]) {
				w.t.Errorf("%s %v: %d bytes, %v", key, r, len(got), err)
			}
			out.Body.Close()
		}
	}
}

// packedCopies copies compressed objects, and changes their metadata.
func (w *world) packedCopies(bodies map[string][]byte) {
	w.t.Helper()
	ctx := w.t.Context()
	for _, key := range []string{"text/3145728", "large"} {
		for _, client := range []*s3.Client{w.client, w.another(w.guard)} {
			for _, replace := range []bool{false, true} {
				in := &s3.CopyObjectInput{Bucket: documents, Key: aws.String("copy"), CopySource: aws.String("documents/" + key)}
				if replace {
					in.MetadataDirective, in.Metadata = types.MetadataDirectiveReplace, map[string]string{"new": "meta"}
				}
				if _, err := client.CopyObject(ctx, in); err != nil {
					w.t.Fatalf("copy %s: %v", key, err)
				}
				head, err := client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String("copy")})
				if err != nil || *head.ContentLength != int64(len(bodies[key])) || replace && head.Metadata["new"] != "meta" {
					w.t.Errorf("copy of %s: %v, %v", key, head, err)
				}
				if got := w.mustGet("copy", ""); !bytes.Equal(got, bodies[key]) {
					w.t.Errorf("copy of %s differs", key)
				}
			}
		}
	}
}

// TestCompressedTampering damages compressed objects: no read of them succeeds.
func TestCompressedTampering(t *testing.T) {
	w := packedWorld(t)
	body := text(12*segment + 9)
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("a"), Body: bytes.NewReader(body)}); err != nil {
		t.Fatal(err)
	}
	original := w.up.Object("acme-documents", "a")
	serial := 0
	for at := 0; at < len(original.Data); at += 1 + len(original.Data)/150 {
		for _, change := range []func(d []byte) []byte{
			func(d []byte) []byte { d[at] ^= 1; return d },
			func(d []byte) []byte { return d[:at] },
		} {
			o := *original
			serial++
			o.Data, o.ETag = change(bytes.Clone(original.Data)), fmt.Sprintf(`"%032d"`, serial)
			w.up.Replace("acme-documents", "a", &o)
			in := &s3.GetObjectInput{Bucket: documents, Key: aws.String("a")}
			out, err := w.client.GetObject(t.Context(), in)
			if err != nil {
				continue
			}
			if got, err := io.ReadAll(out.Body); err == nil || !bytes.HasPrefix(body, got) {
				t.Errorf("damage at %d: %d bytes, %v", at, len(got), err)
			}
			out.Body.Close()
		}
	}
	o := *original
	second := seal.ObjectHeaderSize
	n, err := seal.PackedLength(o.Data[second:])
	if err != nil {
		t.Fatal(err)
	}
	swapped := append(bytes.Clone(o.Data[:second]), o.Data[second+4+n:]...)
	o.Data, o.ETag = append(swapped, o.Data[second:second+4+n]...), `"f"`
	w.up.Replace("acme-documents", "a", &o)
	if _, _, err := w.get("a", ""); err == nil {
		t.Error("a segment was moved, and the read succeeds")
	}
}

// TestCompressedUploads: a wrong body never becomes an object, and a seal in place
// compresses too.
func TestCompressedUploads(t *testing.T) {
	w := packedWorld(t)
	wrong := &s3.PutObjectInput{Bucket: documents, Key: aws.String("w"), Body: bytes.NewReader(text(1 << 20)), ChecksumCRC32: aws.String("AAAAAA==")}
	if _, err := w.client.PutObject(t.Context(), wrong); err == nil {
		t.Error("a wrong checksum was accepted")
	}
	if w.up.Object("acme-documents", "w") != nil || w.up.Uploads() != 0 {
		t.Error("something is left of it")
	}
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("w"), Body: strings.NewReader("x"), Metadata: map[string]string{"byokd-size": "7"}})
	wantCode(t, err, http.StatusBadRequest, "InvalidArgument")
	in := func(key string, body []byte) *s3.PutObjectInput {
		return &s3.PutObjectInput{Bucket: documents, Key: &key, Body: bytes.NewReader(body)}
	}
	if _, err := w.client.PutObject(t.Context(), in("k", text(1<<20))); err != nil {
		t.Fatal(err)
	}
	if report, err := objstore.RewrapStatus(t.Context(), objstore.RewrapOptions{Upstream: w.upstream(), Binding: documentsBinding, From: w.kms, To: newMemoryKMSCalled("arn:x"), Scan: true}); err != nil || report.Objects != 1 || len(report.Unreadable) != 0 {
		t.Errorf("a scan of compressed objects: %+v, %v", report, err)
	}
}
