package objstore_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/crc32"
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

// TestLongTrailersCostNothing: a long object whose checksum follows it is one request
// upstream; one in parts, whose checksum is kept in a tag, has five more than its own.
func TestLongTrailersCostNothing(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("key", nil) // the bucket's data key, and where it is kept
	requests := func() int {
		return w.up.Calls("GET") + w.up.Calls("HEAD") + w.up.Calls("PUT") + w.up.Calls("POST")
	}
	before := requests()
	body := pattern(9*segment, 1)
	framed := fmt.Sprintf("%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:%s\r\n\r\n", len(body), body, crc32Text(body))
	r := w.request("PUT", "/documents/o", strings.NewReader(framed), int64(len(framed)))
	r.Header.Set("X-Amz-Trailer", "x-amz-checksum-crc32")
	r.Header.Set("X-Amz-Decoded-Content-Length", fmt.Sprint(len(body)))
	w.sign(r, "STREAMING-UNSIGNED-PAYLOAD-TRAILER")
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK || requests()-before != 1 {
		t.Errorf("the answer is %d after %d requests upstream", response.StatusCode, requests()-before)
	}
	before = requests()
	w.uploadSummed("parts", types.ChecksumAlgorithmCrc32, 2*segment, 99)
	if n := requests() - before; n != 5+5 { // created, two parts, listed, completed
		t.Errorf("an upload of two parts is %d requests", n)
	}
}

// crc32Text is a CRC32 as S3 writes it.
func crc32Text(body []byte) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(body)))
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
