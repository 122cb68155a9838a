package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// TestChecksumsInTrailers: over TLS the SDKs send checksums after the bytes. Those of
// short objects are kept like those from a header, those of long ones verified only.
func TestChecksumsInTrailers(t *testing.T) {
	for _, compress := range []bool{false, true} {
		w := newWorld(t, worldOptions{compress: compress})
		server := httptest.NewUnstartedServer(w.proxy)
		server.Config = w.proxy.Server()
		server.StartTLS()
		defer server.Close()
		client := w.newClient(func(o *s3.Options) { o.BaseEndpoint, o.HTTPClient = &server.URL, server.Client() })
		put := func(body []byte, algorithm types.ChecksumAlgorithm) {
			t.Helper()
			in := &s3.PutObjectInput{Bucket: documents, Key: aws.String("sum"), Body: io.NopCloser(bytes.NewReader(body)), ContentLength: aws.Int64(int64(len(body))), ChecksumAlgorithm: algorithm, Metadata: map[string]string{"a": "b"}}
			if _, err := client.PutObject(t.Context(), in); err != nil {
				t.Fatalf("%d bytes with %s: %v", len(body), algorithm, err)
			}
		}
		for _, size := range []int{10, segment, 8 * segment} {
			for _, algorithm := range []types.ChecksumAlgorithm{types.ChecksumAlgorithmCrc32, types.ChecksumAlgorithmCrc64nvme, types.ChecksumAlgorithmSha256} {
				body := pattern(size, size)
				put(body, algorithm)
				w.checksumsKept(t, "sum", body, algorithm)
			}
		}
		long := pattern(8*segment+1, 1)
		put(long, types.ChecksumAlgorithmCrc32)
		head, err := client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("sum"), ChecksumMode: types.ChecksumModeEnabled})
		if err != nil || head.ChecksumType != "" || head.Metadata["a"] != "b" {
			t.Errorf("%+v %v", head, err)
		}
		if got := w.mustGet("sum", ""); !bytes.Equal(got, long) {
			t.Error("wrong bytes")
		}
		w.noPlaintext()
	}
}

// TestWrongTrailers: no object comes of a body whose checksum is another one,
// whether it was held or not, or whose end does not come.
func TestWrongTrailers(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for _, size := range []int{10, 8 * segment, 9 * segment} {
		for name, end := range map[string]string{"another": "x-amz-checksum-crc32:AAAAAA==\r\n\r\n", "none": "\r\n", "cut": ""} {
			framed := fmt.Sprintf("%x\r\n%s\r\n0\r\n%s", size, pattern(size, 1), end)
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, w.server.URL+"/documents/o", strings.NewReader(framed))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("X-Amz-Trailer", "x-amz-checksum-crc32")
			r.Header.Set("X-Amz-Decoded-Content-Length", fmt.Sprint(size))
			w.sign(r, "STREAMING-UNSIGNED-PAYLOAD-TRAILER")
			response, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != http.StatusBadRequest || w.up.Object("acme-documents", "o") != nil {
				t.Errorf("%d bytes, %s trailer: answer %d, object %v", size, name, response.StatusCode, w.up.Object("acme-documents", "o") != nil)
			}
		}
	}
}
