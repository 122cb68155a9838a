package objstore

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// The vectors are those of the Amazon S3 API reference, "Authenticating Requests
// (AWS Signature Version 4)".
const (
	vectorKey    = "AKIAIOSFODNN7EXAMPLE"
	vectorSecret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
	vectorScope  = "Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
)

var vectorTime = time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC)

func verifier(now time.Time) *Proxy {
	return &Proxy{opts: Options{Credentials: StaticCredentials{vectorKey: vectorSecret}, Now: func() time.Time { return now }}}
}

// parse reads a request from its wire form.
func parse(t testing.TB, lines ...string) *http.Request {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(strings.Join(lines, "\r\n") + "\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func vectors(t testing.TB) map[string]*http.Request {
	const date = "x-amz-date: 20130524T000000Z"
	const empty = "x-amz-content-sha256: " + emptyHash
	auth := func(signed, signature string) string {
		return "Authorization: AWS4-HMAC-SHA256 " + vectorScope + "SignedHeaders=" + signed + ",Signature=" + signature
	}
	host := "Host: examplebucket.s3.amazonaws.com"
	return map[string]*http.Request{
		"GET object": parse(t, "GET /test.txt HTTP/1.1", host, "Range: bytes=0-9", empty, date,
			auth("host;range;x-amz-content-sha256;x-amz-date", "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")),
		"PUT object": parse(t, "PUT /test$file.text HTTP/1.1", host, "Date: Fri, 24 May 2013 00:00:00 GMT", date, "x-amz-storage-class: REDUCED_REDUNDANCY",
			"x-amz-content-sha256: 44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
			auth("date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd")),
		"GET lifecycle": parse(t, "GET /?lifecycle HTTP/1.1", host, date, empty,
			auth("host;x-amz-content-sha256;x-amz-date", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543")),
		"GET list": parse(t, "GET /?max-keys=2&prefix=J HTTP/1.1", host, date, empty,
			auth("host;x-amz-content-sha256;x-amz-date", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")),
		"presigned": parse(t, "GET /test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404 HTTP/1.1", host),
		"chunked": parse(t, "PUT /examplebucket/chunkObject.txt HTTP/1.1", "Host: s3.amazonaws.com", date, "x-amz-storage-class: REDUCED_REDUNDANCY",
			"x-amz-content-sha256: STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "Content-Encoding: aws-chunked", "x-amz-decoded-content-length: 66560", "Content-Length: 66824",
			auth("content-encoding;content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;x-amz-storage-class", "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9")),
		"chunked with trailer": parse(t, "PUT /examplebucket/chunkObject.txt HTTP/1.1", "Host: s3.amazonaws.com", date, "x-amz-storage-class: REDUCED_REDUNDANCY",
			"x-amz-content-sha256: STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER", "Content-Encoding: aws-chunked", "x-amz-decoded-content-length: 66560", "x-amz-trailer: x-amz-checksum-crc32c",
			auth("content-encoding;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;x-amz-storage-class;x-amz-trailer", "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e")),
	}
}

func TestPublishedSignatures(t *testing.T) {
	for name, r := range vectors(t) {
		if _, err := verifier(vectorTime).authenticate(r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range vectors(t) {
		r.URL.Path += "x"
		wantError(t, name+" with another path", authenticateOnly(r, vectorTime), "SignatureDoesNotMatch")
	}
	for name, r := range vectors(t) {
		r.Host = "elsewhere"
		wantError(t, name+" with another host", authenticateOnly(r, vectorTime), "SignatureDoesNotMatch")
	}
}

func authenticateOnly(r *http.Request, now time.Time) error {
	_, err := verifier(now).authenticate(r)
	return err
}

func wantError(t *testing.T, name string, err error, code string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: %v, want %s", name, err, code)
	}
}

func TestAuthenticationRefusals(t *testing.T) {
	get := func() *http.Request { return vectors(t)["GET object"] }
	for _, c := range []struct {
		name, code string
		now        time.Time
		change     func(r *http.Request)
	}{
		{"14 minutes late", "", vectorTime.Add(14 * time.Minute), func(*http.Request) {}},
		{"16 minutes late", "RequestTimeTooSkewed", vectorTime.Add(16 * time.Minute), func(*http.Request) {}},
		{"16 minutes early", "RequestTimeTooSkewed", vectorTime.Add(-16 * time.Minute), func(*http.Request) {}},
		{"no signature", "AccessDenied", vectorTime, func(r *http.Request) { r.Header.Del("Authorization") }},
		{"version 2", "InvalidRequest", vectorTime, func(r *http.Request) { r.Header.Set("Authorization", "AWS a:b") }},
		{"version 4A", "InvalidArgument", vectorTime, func(r *http.Request) { r.Header.Set("Authorization", "AWS4-ECDSA-P256-SHA256 x") }},
		{"bearer", "InvalidArgument", vectorTime, func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }},
		{"garbage", "AuthorizationHeaderMalformed", vectorTime, func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 x") }},
		{"other service", "AuthorizationHeaderMalformed", vectorTime, func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "/s3/", "/kms/", 1))
		}},
		{"unknown key", "InvalidAccessKeyId", vectorTime, func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "AKIA", "AKIB", 1))
		}},
		{"header not signed", "AccessDenied", vectorTime, func(r *http.Request) { r.Header.Set("X-Amz-Copy-Source", "b/k") }},
		{"host not signed", "AccessDenied", vectorTime, func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "host;", "", 1))
		}},
		{"changed header", "SignatureDoesNotMatch", vectorTime, func(r *http.Request) { r.Header.Set("Range", "bytes=0-10") }},
		{"date of another day", "AuthorizationHeaderMalformed", vectorTime, func(r *http.Request) { r.Header.Set("X-Amz-Date", "20130525T000000Z") }},
		{"wrong payload form", "InvalidArgument", vectorTime, func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", "STREAMING-NEW") }},
	} {
		r := get()
		c.change(r)
		err := authenticateOnly(r, c.now)
		if c.code == "" && err != nil || c.code != "" {
			if c.code == "" {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			wantError(t, c.name, err, c.code)
		}
	}
	presigned := vectors(t)["presigned"]
	if err := authenticateOnly(presigned, vectorTime.Add(86399*time.Second)); err != nil {
		t.Errorf("presigned in its last second: %v", err)
	}
	wantError(t, "expired", authenticateOnly(presigned, vectorTime.Add(86401*time.Second)), "AccessDenied")
	wantError(t, "not yet valid", authenticateOnly(presigned, vectorTime.Add(-16*time.Minute)), "AccessDenied")
	presigned.URL.RawQuery = strings.Replace(presigned.URL.RawQuery, "86400", "604801", 1)
	wantError(t, "presigned for too long", authenticateOnly(presigned, vectorTime), "AuthorizationQueryParametersError")
}

// chunkedVector is the body of the published example.
func chunkedVector(trailer bool) []byte {
	signatures := []string{"ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648", "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497", "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"}
	if trailer {
		signatures = []string{"b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2", "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7", "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992"}
	}
	var b bytes.Buffer
	b.WriteString("10000;chunk-signature=" + signatures[0] + "\r\n" + strings.Repeat("a", 65536) + "\r\n")
	b.WriteString("400;chunk-signature=" + signatures[1] + "\r\n" + strings.Repeat("a", 1024) + "\r\n")
	b.WriteString("0;chunk-signature=" + signatures[2] + "\r\n")
	if trailer {
		b.WriteString("x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435\r\n")
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// takeBody authenticates r, reads body through its ingress and finishes it.
func takeBody(t *testing.T, r *http.Request, body []byte) ([]byte, error) {
	t.Helper()
	g, err := verifier(vectorTime).authenticate(r)
	if err != nil {
		t.Fatal(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	in, err := newIngress(&call{r: r, op: OpPutObject}, g)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(in)
	if err == nil {
		err = in.finish()
	}
	return got, err
}

func TestPublishedChunks(t *testing.T) {
	for name, trailer := range map[string]bool{"chunked": false, "chunked with trailer": true} {
		body := chunkedVector(trailer)
		got, err := takeBody(t, vectors(t)[name], body)
		if err != nil || len(got) != 66560 || strings.Trim(string(got), "a") != "" {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		for i := range body { // every bit matters, in the text as in the framing
			if i > 200 && i < 65500 || i > 65800 && i < 66500 {
				continue // one place of a run of equal bytes stands for all
			}
			bad := bytes.Clone(body)
			bad[i] ^= 0x11
			if _, err := takeBody(t, vectors(t)[name], bad); err == nil {
				t.Errorf("%s: a change of byte %d (%q) was not noticed", name, i, body[i])
			}
		}
		for _, cut := range []int{0, 50, 100, 65000, len(body) - 90, len(body) - 3} {
			if _, err := takeBody(t, vectors(t)[name], body[:cut]); err == nil {
				t.Errorf("%s: cut at %d was not noticed", name, cut)
			}
		}
		if _, err := takeBody(t, vectors(t)[name], append(bytes.Clone(body), "more"...)); err == nil {
			t.Errorf("%s: bytes after the end were not noticed", name)
		}
	}
}

func TestUnsignedTrailer(t *testing.T) {
	r := parse(t, "PUT /b/k HTTP/1.1", "Host: h", "x-amz-decoded-content-length: 5", "x-amz-trailer: x-amz-checksum-crc32")
	for _, c := range []struct{ body, code string }{
		{"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", ""},
		{"3\r\nhel\r\n2\r\nlo\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", ""},
		{"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhw==\r\n\r\n", "BadDigest"},
		{"5\r\nhello\r\n0\r\n\r\n", "MalformedTrailerError"},
		{"5\r\nhello\r\n", "IncompleteBody"},
		{"6\r\nhello!\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", "IncompleteBody"},
		{"4\r\nhell\r\n0\r\n\r\n", "IncompleteBody"},
		{"5\r\nhelloX\r\n0\r\n\r\n", "IncompleteBody"},
		{"zz\r\nhello\r\n", "IncompleteBody"},
		{"-5\r\nhello\r\n", "IncompleteBody"},
		{"5;chunk-signature=00\r\nhello\r\n", "IncompleteBody"},
		{strings.Repeat("0", 500) + "5\r\nhello\r\n", "IncompleteBody"},
		{"5\r\nhello\r\n0\r\n" + strings.Repeat("a:b\r\n", 2000), "IncompleteBody"},
	} {
		r.Body = io.NopCloser(strings.NewReader(c.body))
		in, err := newIngress(&call{r: r, op: OpPutObject}, &grant{kind: payloadUnsignedTrailer})
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadAll(in)
		if err == nil {
			err = in.finish()
		}
		if c.code == "" && err != nil {
			t.Errorf("%.60q: %v", c.body, err)
		} else if c.code != "" {
			wantError(t, c.body[:min(60, len(c.body))], err, c.code)
		}
	}
}

func FuzzChunkReader(f *testing.F) {
	// Small ones: the fuzzer spends its time on shrinking large ones.
	f.Add([]byte("5;chunk-signature=00\r\nhello\r\n0;chunk-signature=00\r\nx-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:00\r\n\r\n"), true)
	f.Add([]byte("0;chunk-signature=\r\n\r\n"), true)
	f.Add([]byte("5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, body []byte, signed bool) {
		g := &grant{kind: payloadUnsignedTrailer}
		if signed {
			g.kind = payloadChunksTrailer
		}
		c := newChunkReader(bytes.NewReader(body), g)
		got, err := io.ReadAll(c)
		if len(got) > len(body) {
			t.Fatalf("%d bytes out of %d", len(got), len(body))
		}
		if err == nil && signed {
			t.Fatal("a body without key was accepted")
		}
	})
}

func FuzzAuthorization(f *testing.F) {
	for _, r := range vectors(f) {
		f.Add(r.Header.Get("Authorization"), r.URL.RawQuery, r.Header.Get("X-Amz-Date"))
	}
	f.Fuzz(func(t *testing.T, auth, query, date string) {
		r := parse(t, "GET /k HTTP/1.1", "Host: h")
		r.URL.RawQuery = query
		r.Header["Authorization"], r.Header["X-Amz-Date"] = []string{auth}, []string{date}
		if err := authenticateOnly(r, vectorTime); err == nil {
			t.Fatal("a request that nobody signed was accepted")
		}
	})
}

func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"bytes=0-1", "bytes=-5", "bytes=5-", "bytes=0-9223372036854775806", "bytes=1-0"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		want := parseRange(header)
		if want == nil || size < 0 {
			return
		}
		got, err := want.resolve(&layout{plain: size, count: 1})
		if err == nil && size > 0 && (got.off < 0 || got.n < 1 || got.off+got.n > size) {
			t.Fatalf("%q of %d bytes gives %+v", header, size, got)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	f.Add(packMetadata(map[string]string{"a": "b", "empty": ""}))
	f.Fuzz(func(t *testing.T, packed []byte) {
		m, err := unpackMetadata(packed)
		if err != nil {
			return
		}
		again, err := unpackMetadata(packMetadata(m))
		if err != nil || len(again) != len(m) {
			t.Fatalf("%v became %v, %v", m, again, err)
		}
	})
}
