package objstore_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// chunked frames a body as STREAMING-AWS4-HMAC-SHA256-PAYLOAD, after the text of
// the S3 API reference and apart from the code under test.
func chunked(body []byte, r *http.Request, now time.Time) []byte {
	day := now.UTC().Format("20060102")
	key := []byte("AWS4byokd-secret")
	for _, part := range []string{day, "eu-central-1", "s3", "aws4_request"} {
		key = mac(key, part)
	}
	_, previous, _ := strings.Cut(r.Header.Get("Authorization"), "Signature=")
	var out bytes.Buffer
	for done := false; !done; {
		n := min(len(body), 64<<10)
		chunk := body[:n]
		body, done = body[n:], n == 0
		sum, empty := sha256.Sum256(chunk), sha256.Sum256(nil)
		text := strings.Join([]string{"AWS4-HMAC-SHA256-PAYLOAD", now.UTC().Format("20060102T150405Z"), day + "/eu-central-1/s3/aws4_request", previous, hex.EncodeToString(empty[:]), hex.EncodeToString(sum[:])}, "\n")
		previous = hex.EncodeToString(mac(key, text))
		fmt.Fprintf(&out, "%x;chunk-signature=%s\r\n%s\r\n", n, previous, chunk)
	}
	return out.Bytes()
}

func mac(key []byte, text string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return m.Sum(nil)
}
