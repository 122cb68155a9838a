package objstore_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/objstore/s3test"
)

// TestBucketThatDemandsChecksums writes in every way to an upstream that takes no
// object and no part without a checksum, as S3 does where a bucket has a default
// retention.
func TestBucketThatDemandsChecksums(t *testing.T) {
	for _, compress := range []bool{false, true} {
		w := newWorld(t, worldOptions{checksums: true, compress: compress})
		w.proxy.Shrink(20*sealedSegment, 8*segment, 1<<40)
		bodies := map[string][]byte{"small": pattern(100, 1), "empty": {}, "medium": pattern(17*segment+5, 2), "large": pattern(50*segment+1, 3)}
		for key, body := range bodies {
			w.put(key, body)
		}
		bodies["parts"] = w.upload("parts", 2*segment, 2*segment, 99)
		bodies["odd"] = w.upload("odd", 2*segment+1, segment, 77)
		for _, source := range []string{"medium", "large", "parts"} {
			key := "copy of " + source
			bodies[key] = bodies[source]
			if _, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: documents, Key: &key, CopySource: aws.String("documents/" + source)}); err != nil {
				t.Fatalf("%s: %v", key, err)
			}
		}
		for key, body := range bodies {
			got, out, err := w.get(key, "")
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("%s: %d bytes, not the %d put (%v)", key, len(got), len(body), err)
				continue
			}
			if out.ContentEncoding != nil { // this upstream keeps the framing's name
				t.Errorf("%s: Content-Encoding %s", key, *out.ContentEncoding)
			}
		}
		w.noPlaintext()
	}
}

// TestSealedBytesDamagedOnTheWay: what does not arrive as it was sent is refused by
// the upstream already.
func TestSealedBytesDamagedOnTheWay(t *testing.T) {
	w := newWorld(t, worldOptions{checksums: true})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool {
		return r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/o")
	}, Times: 1, FlipAt: 1000})
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("o"), Body: bytes.NewReader(pattern(9*segment, 1))})
	if err == nil || !strings.Contains(err.Error(), "BadDigest") {
		t.Errorf("the put answers %v", err)
	}
	if w.up.Object("acme-documents", "o") != nil {
		t.Error("damaged bytes became an object")
	}
}

// TestBucketThatDemandsChecksumsUnexpectedly: the refusal names the setting.
func TestBucketThatDemandsChecksumsUnexpectedly(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.DemandChecksums()
	response, err := http.DefaultClient.Do(w.request("PUT", "/documents/o", strings.NewReader("x"), 1))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusBadRequest || !strings.Contains(string(text), "objects.buckets.*.upstream.checksums") {
		t.Errorf("the answer is %d %s (%v)", response.StatusCode, text, err)
	}
}
