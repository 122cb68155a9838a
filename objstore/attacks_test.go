package objstore_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// What somebody tries who sits between a client and byokd, holds a link, or is a client
// that wants more than its bucket: each attempt gets a clear refusal, and nothing of it
// reaches the upstream.

// signedAs is a request that is signed for one path and sent with another spelling of it.
func (w *world) signedAs(method, path, wire string, body string, header ...string) *http.Request {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.server.URL+"/", strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	r.URL.Path, r.URL.RawQuery, _ = strings.Cut(path, "?")
	w.sign(r, "UNSIGNED-PAYLOAD")
	wirePath, wireQuery, _ := strings.Cut(wire, "?")
	r.URL.Opaque, r.URL.RawQuery = "//"+r.URL.Host+wirePath, wireQuery
	return r
}

// answerTo sends a request and returns status and text.
func (w *world) answerTo(r *http.Request) (int, string, http.Header) {
	w.t.Helper()
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		w.t.Fatalf("%s %s: %v", r.Method, r.URL, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return response.StatusCode, string(text), response.Header
}

// onTheWire writes bytes to the proxy and reads the answers that come.
func (w *world) onTheWire(text string) (statuses []int, bodies string) {
	w.t.Helper()
	conn, err := net.Dial("tcp", w.server.Listener.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, text); err != nil && len(text) < 1000 {
		w.t.Fatal(err)
	}
	answers := bufio.NewReader(conn)
	for {
		// The first answer always comes; after the last there is nothing to wait for.
		limit := 20 * time.Second
		if len(statuses) > 0 {
			limit = 300 * time.Millisecond
		}
		if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
			w.t.Fatal(err)
		}
		response, err := http.ReadResponse(answers, nil)
		if err != nil {
			return statuses, bodies
		}
		body, err := io.ReadAll(response.Body)
		statuses, bodies = append(statuses, response.StatusCode), bodies+string(body)
		if err != nil || response.Close {
			return statuses, bodies
		}
	}
}

// TestSmuggledRequests: requests whose length two readers could understand in two ways are
// refused, and what stands behind them is no request of the one who signed.
func TestSmuggledRequests(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("secret", []byte(canary))
	smuggled := "GET /documents/secret HTTP/1.1\r\nHost: x\r\n\r\n"
	for name, framing := range map[string]string{
		"both lengths":             "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"both, the other way":      "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
		"two lengths":              "Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
		"a list of lengths":        "Content-Length: 0, 44\r\n\r\n",
		"a signed length":          "Content-Length: +0\r\n\r\n",
		"a hexadecimal length":     "Content-Length: 0x2c\r\n\r\n",
		"a negative length":        "Content-Length: -1\r\n\r\n",
		"an endless length":        "Content-Length: 99999999999999999999\r\n\r\n",
		"a coding that is none":    "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"two codings":              "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"codings twice":            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
		"a space before the colon": "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
		"a folded coding":          "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
		"a control in the coding":  "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
		"a NUL in a header":        "X-Y: a\x00b\r\nContent-Length: 0\r\n\r\n",
		"a bare CR in a header":    "X-Y: a\rContent-Length: 44\r\nContent-Length: 0\r\n\r\n",
		"a chunk size too long":    "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
		"a signed chunk size":      "Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
		"chunked alone":            "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			r := w.request(http.MethodPut, "/documents/smuggled", nil, 0)
			var head strings.Builder
			fmt.Fprintf(&head, "PUT /documents/smuggled HTTP/1.1\r\nHost: %s\r\n", r.Host)
			if err := r.Header.Write(&head); err != nil {
				t.Fatal(err)
			}
			statuses, bodies := w.onTheWire(head.String() + framing + smuggled)
			if len(statuses) == 0 || len(statuses) > 2 {
				t.Errorf("%d answers", len(statuses))
			}
			for _, status := range statuses {
				if status < 400 || status == http.StatusInternalServerError {
					t.Errorf("answered with %v: %s", statuses, bodies)
				}
			}
			if strings.Contains(bodies, canary) {
				t.Error("the request behind it was answered")
			}
			if w.up.Object("acme-documents", "smuggled") != nil {
				t.Error("it became an object")
			}
		})
	}
}

// TestInjectedHeaders: line ends in metadata, keys and parameters end no line, neither in what
// clients are answered nor in what the upstream is asked.
func TestInjectedHeaders(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	const evil = "%0d%0aX-Evil:%201"
	for _, query := range []string{"x-amz-meta-a=b" + evil, "x-amz-meta-a" + evil + "=b", "x-amz-storage-class=STANDARD" + evil, "x-amz-tagging=a=b" + evil, "x-amz-acl=private" + evil,
		"x-amz-website-redirect-location=/a" + evil, "x-amz-server-side-encryption=AES256" + evil, "x-amz-grant-read=id=%22a%22" + evil, "x-amz-object-lock-mode=GOVERNANCE" + evil, "x-amz-copy-source=documents/o" + evil,
		"x-amz-expected-bucket-owner=1" + evil, "x-amz-checksum-crc32=AAAAAA==" + evil, "x-amz-%00=1", "x-amz-meta-%00=1", "x-amz-meta-=1", "x-amz-meta-a%3Ab=1"} {
		status, text, header := w.answerTo(w.request(http.MethodPut, "/documents/injected?"+query, strings.NewReader("body"), 4))
		if status >= 500 || header.Get("X-Evil") != "" {
			t.Errorf("%s: %d %s", query, status, text)
		}
		if o := w.up.Object("acme-documents", "injected"); o != nil {
			for name, values := range o.Header {
				if strings.Contains(name+strings.Join(values, ""), "Evil") {
					t.Errorf("%s: stored with %s: %q", query, name, values)
				}
			}
			if status != http.StatusOK {
				t.Errorf("%s: refused with %d and stored", query, status)
			}
			w.up.Remove("acme-documents", "injected")
		}
	}
	for _, name := range []string{"content-disposition", "content-type", "content-encoding", "content-language", "cache-control", "expires"} {
		status, _, header := w.answerTo(w.request(http.MethodGet, "/documents/o?response-"+name+"=a"+evil, nil, 0))
		if status != http.StatusOK || header.Get("X-Evil") != "" {
			t.Errorf("response-%s: %d %v", name, status, header)
		}
	}
	for _, key := range []string{"a\r\nX-Evil: 1", "a\nb", "<x>&\"'", "a\tb", "\u202e"} {
		if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: &key, Body: strings.NewReader("x"), Metadata: map[string]string{"k": "v"}}); err != nil {
			t.Errorf("%q: %v", key, err)
			continue
		}
		list, err := w.client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: documents, Prefix: &key, EncodingType: "url"})
		if err != nil || len(list.Contents) != 1 {
			t.Errorf("%q: listed %+v, %v", key, list, err)
			continue
		}
		if got, err := url.QueryUnescape(*list.Contents[0].Key); err != nil || got != key {
			t.Errorf("%q is listed as %q", key, got)
		}
	}
}

// TestPathsThatLeadElsewhere: no spelling of a path or of a copy's source leads out of a bucket, to
// byokd's own objects, or to what is not configured.
func TestPathsThatLeadElsewhere(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte(canary))
	for path, wire := range map[string]string{
		"/documents/../backups/o":         "/documents/%2e%2e/backups/o",
		"/documents/a/../../backups/o":    "/documents/a%2f..%2f..%2fbackups%2fo",
		"/../documents/o":                 "/%2e%2e/documents/o",
		"/./documents/o":                  "/./documents/o",
		"/../o":                           "/../o",
		"/./":                             "/%2e/",
		"/..":                             "/%2e%2e",
		"/documents/.byokd/keyring":       "/documents/%2ebyokd%2fkeyring",
		"/documents/./.byokd/keyring":     "/documents/./.byokd/keyring",
		"/documents//.byokd/keyring":      "/documents//%2Ebyokd/keyring",
		"/documents/a/../.byokd/keyring":  "/documents/a/%2e%2e/.byokd/keyring",
		"/acme-documents/o":               "/acme-documents/o",
		"//documents/o":                   "//documents/o",
		"/documents\x00/o":                "/documents%00/o",
		"/documents/o\x00":                "/documents/o%00",
		"/DOCUMENTS/o":                    "/DOCUMENTS/o",
		"/documents/o?prefix=a;acl":       "/documents/o?prefix=a;acl",
		"/documents/o?prefix=%zz":         "/documents/o?prefix=%zz",
		"/documents/o?versionId=1&acl":    "/documents/o?versionId=1",
		"/documents/o?x-amz-copy-source=": "/documents/o?x-amz-copy-source=backups/x",
	} {
		for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete} {
			status, text, _ := w.answerTo(w.signedAs(method, path, wire, ""))
			if status < 400 || status == http.StatusInternalServerError || strings.Contains(text, canary) {
				t.Errorf("%s %s: %d %s", method, wire, status, text)
			}
		}
	}
	for _, source := range []string{"documents/.byokd/keyring", "documents%2F.byokd%2Fkeyring", "documents/%2ebyokd/keyring", "documents/a/../.byokd/keyring", "documents/../backups/x", "documents/..%2facme-backups%2fx",
		"../acme-documents/o", "..%2Facme-documents%2Fo", "./documents/o", "acme-documents/o", "//documents/o", "documents", "documents/", "/", "documents/%zz", "documents/o?versionId=%zz", "documents/o%00",
		"arn:aws:s3:eu-central-1:1:accesspoint/a/object/o", "http://elsewhere/documents/o"} {
		status, text, _ := w.answerTo(w.signedAs(http.MethodPut, "/documents/copied", "/documents/copied", "", "X-Amz-Copy-Source", source, "X-Amz-Metadata-Directive", "COPY"))
		if status < 400 || status == http.StatusInternalServerError {
			t.Errorf("copy of %q: %d %s", source, status, text)
		}
		if o := w.up.Object("acme-documents", "copied"); o != nil {
			t.Errorf("copy of %q became an object", source)
			w.up.Remove("acme-documents", "copied")
		}
	}
}

// TestLinksThatAreChanged: a presigned link allows what it was made for and nothing else.
func TestLinksThatAreChanged(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("link", []byte("for all"))
	w.put("secret", []byte(canary))
	presign := s3.NewPresignClient(w.client)
	get, err := presign.PresignGetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String("link")})
	if err != nil {
		t.Fatal(err)
	}
	put, err := presign.PresignPutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("up")})
	if err != nil {
		t.Fatal(err)
	}
	type change func(r *http.Request)
	header := func(name, value string) change { return func(r *http.Request) { r.Header.Set(name, value) } }
	query := func(more string) change { return func(r *http.Request) { r.URL.RawQuery += more } }
	replace := func(old, next string) change {
		return func(r *http.Request) { r.URL.RawQuery = strings.Replace(r.URL.RawQuery, old, next, 1) }
	}
	for name, c := range map[string]struct {
		url    string
		change change
	}{
		"another method":           {get.URL, func(r *http.Request) { r.Method = http.MethodDelete }},
		"the headers alone":        {get.URL, func(r *http.Request) { r.Method = http.MethodHead }},
		"another key":              {get.URL, func(r *http.Request) { r.URL.Path = "/documents/secret" }},
		"another bucket":           {get.URL, func(r *http.Request) { r.URL.Path = "/backups/link" }},
		"a list":                   {get.URL, func(r *http.Request) { r.URL.Path = "/documents" }},
		"another host":             {get.URL, func(r *http.Request) { r.Host = "secret.s3.test" }},
		"a bucket as host":         {get.URL, func(r *http.Request) { r.Host = "documents.s3.test"; r.URL.Path = "/secret" }},
		"a subresource":            {get.URL, query("&acl")},
		"a version":                {get.URL, query("&versionId=1")},
		"another content type":     {get.URL, query("&response-content-type=text/html")},
		"a longer life":            {get.URL, replace("X-Amz-Expires=900", "X-Amz-Expires=9000")},
		"another life first":       {get.URL, replace("X-Amz-Expires=900", "X-Amz-Expires=9000&X-Amz-Expires=900")},
		"another life last":        {get.URL, query("&X-Amz-Expires=9000")},
		"fewer signed headers":     {get.URL, replace("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders=")},
		"no signature":             {get.URL, replace("X-Amz-Signature=", "X-Amz-Sig=")},
		"half a signature":         {get.URL, func(r *http.Request) { r.URL.RawQuery = r.URL.RawQuery[:len(r.URL.RawQuery)-1] }},
		"a signature as well":      {get.URL, header("Authorization", "AWS4-HMAC-SHA256 Credential=byokd/20260101/eu-central-1/s3/aws4_request, SignedHeaders=host, Signature=00")},
		"a payload of its own":     {put.URL, header("X-Amz-Content-Sha256", strings.Repeat("0", 64))},
		"a chunked payload":        {put.URL, header("X-Amz-Content-Sha256", "STREAMING-UNSIGNED-PAYLOAD-TRAILER")},
		"a source to copy":         {put.URL, header("X-Amz-Copy-Source", "documents/secret")},
		"a source to copy, quoted": {put.URL, query("&x-amz-copy-source=documents/secret")},
		"an ACL":                   {put.URL, header("X-Amz-Acl", "public-read")},
		"metadata":                 {put.URL, header("X-Amz-Meta-A", "b")},
		"a lock":                   {put.URL, header("X-Amz-Object-Lock-Legal-Hold", "ON")},
	} {
		r, err := http.NewRequest(http.MethodGet, c.url, nil)
		if c.url == put.URL {
			r, err = http.NewRequest(http.MethodPut, c.url, strings.NewReader("by link"))
		}
		if err != nil {
			t.Fatal(err)
		}
		c.change(r)
		status, text, _ := w.answerTo(r)
		if status < 400 || status >= 500 || strings.Contains(text, canary) {
			t.Errorf("%s: %d %s", name, status, text)
		}
		if w.up.Object("acme-documents", "up") != nil || w.up.Object("acme-documents", "link") == nil {
			t.Fatalf("%s: was carried out", name)
		}
	}
}

// TestRangesAtTheEdgesOfNumbers: whatever a Range says, the answer is the whole, the right part, or 416.
func TestRangesAtTheEdgesOfNumbers(t *testing.T) {
	w := newWorld(t, worldOptions{})
	objects := map[string][]byte{"empty": {}, "small": []byte(canary), "large": pattern(3*segment+7, 1), "parts": w.upload("parts", 2*segment, 2*segment, 9)}
	for key, body := range objects {
		if key != "parts" {
			w.put(key, body)
		}
		size := int64(len(body))
		for spec, part := range map[string]func() ([]byte, bool){
			"bytes=-0":                                        nil,
			"bytes=-1":                                        func() ([]byte, bool) { return body[max(0, size-1):], true },
			"bytes=-9223372036854775807":                      func() ([]byte, bool) { return body, true },
			"bytes=-9223372036854775808":                      func() ([]byte, bool) { return body, true },
			"bytes=-99999999999999999999999":                  func() ([]byte, bool) { return body, true },
			"bytes=9223372036854775807-":                      nil,
			"bytes=9223372036854775806-9223372036854775807":   nil,
			"bytes=18446744073709551616-":                     nil,
			"bytes=18446744073709551616-18446744073709551617": nil,
			"bytes=0-18446744073709551615":                    func() ([]byte, bool) { return body, size > 0 },
			"bytes=" + fmt.Sprint(size) + "-":                 nil,
			"bytes=0-0,1-1":                                   whole(body),
			"bytes=0-0,":                                      whole(body),
			"bytes=" + strings.Repeat("0-0,", 2000) + "0-0":   whole(body),
			"bytes=--1":                                       whole(body),
			"bytes=-":                                         whole(body),
			"bytes=":                                          whole(body),
			"bytes=0x0-1":                                     whole(body),
			"bytes=+0-1":                                      whole(body),
			"bytes= 0-1":                                      whole(body),
			"bytes=1-0":                                       whole(body),
			"bytes=٠-١":                                       whole(body),
			"BYTES=0-0":                                       whole(body),
			"lines=0-0":                                       whole(body),
			"bytes=18446744073709551617-18446744073709551616x": whole(body),
		} {
			for range 2 { // before and after the layout is known
				r := w.request(http.MethodGet, "/documents/"+key, nil, 0)
				r.Header.Set("Range", spec)
				status, text, header := w.answerTo(r)
				want, satisfiable := []byte(nil), false
				if part != nil {
					want, satisfiable = part()
				}
				switch {
				case !satisfiable && status == http.StatusRequestedRangeNotSatisfiable:
				case satisfiable && (status == http.StatusOK || status == http.StatusPartialContent) && text == string(want) && header.Get("Content-Length") == fmt.Sprint(len(want)):
				default:
					t.Errorf("%s, %.60s: %d, %d bytes of %d", key, spec, status, len(text), len(want))
				}
			}
		}
	}
	created, err := w.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("target")})
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range []string{"bytes=0-9223372036854775806", "bytes=0-9223372036854775807", "bytes=9223372036854775807-9223372036854775807", "bytes=-1", "bytes=1-", "bytes=1-0", "bytes=0-0,1-1", "0-1", "bytes=18446744073709551616-18446744073709551616"} {
		_, err := w.client.UploadPartCopy(t.Context(), &s3.UploadPartCopyInput{Bucket: documents, Key: aws.String("target"), UploadId: created.UploadId, PartNumber: aws.Int32(1), CopySource: aws.String("documents/small"), CopySourceRange: &spec})
		wantCode(t, err, http.StatusBadRequest, "InvalidArgument")
	}
}

func whole(body []byte) func() ([]byte, bool) {
	return func() ([]byte, bool) { return body, true }
}

// TestConditionsOnSealedObjects: a condition holds for the ETag that clients were given, and never by accident.
func TestConditionsOnSealedObjects(t *testing.T) {
	w := newWorld(t, worldOptions{})
	etag := aws.ToString(w.put("o", []byte(canary)).ETag)
	w.put("other", []byte("x"))
	other, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("other")})
	if err != nil {
		t.Fatal(err)
	}
	do := func(method, name, value string) int {
		r := w.request(method, "/documents/o", bytes.NewReader([]byte("new")), 3)
		if method != http.MethodPut {
			r = w.request(method, "/documents/o", nil, 0)
		}
		r.Header.Set(name, value)
		status, _, _ := w.answerTo(r)
		return status
	}
	bare := strings.Trim(etag, `"`)
	for value, want := range map[string]int{
		etag: http.StatusOK, "*": http.StatusOK,
		*other.ETag: http.StatusPreconditionFailed, `"` + strings.ToUpper(bare) + `x"`: http.StatusPreconditionFailed, `""`: http.StatusPreconditionFailed,
		`"` + bare[:len(bare)-1] + `"`: http.StatusPreconditionFailed, `"*"`: http.StatusPreconditionFailed,
	} {
		if got := do(http.MethodGet, "If-Match", value); got != want {
			t.Errorf("GET If-Match %s: %d, want %d", value, got, want)
		}
		if want == http.StatusOK {
			continue
		}
		if got := do(http.MethodPut, "If-Match", value); got < 400 || got >= 500 {
			t.Errorf("PUT If-Match %s: %d", value, got)
		}
	}
	if got := do(http.MethodGet, "If-None-Match", etag); got != http.StatusNotModified {
		t.Errorf("GET If-None-Match: %d", got)
	}
	if got := do(http.MethodPut, "If-None-Match", "*"); got != http.StatusPreconditionFailed {
		t.Errorf("PUT If-None-Match *: %d", got)
	}
	if got := w.mustGet("o", ""); string(got) != canary {
		t.Error("a write whose condition did not hold was carried out")
	}
}

// TestHostTricks: a bucket is named by one host name only, whatever its spelling.
func TestHostTricks(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte(canary))
	for host, want := range map[string]int{
		"documents.s3.test": http.StatusOK, "DOCUMENTS.S3.TEST": http.StatusOK, "documents.s3.test:80": http.StatusOK,
		"acme-documents.s3.test": http.StatusNotFound, "a.documents.s3.test": http.StatusNotFound, "documents.s3.test.evil.example": http.StatusNotImplemented,
		"..s3.test": http.StatusBadRequest, "documents..s3.test": http.StatusBadRequest,
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.server.URL+"/o", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		for _, name := range []string{"X-Forwarded-Host", "Forwarded", "X-Original-Url", "X-Rewrite-Url", "X-Http-Method-Override"} {
			r.Header.Set(name, "documents.s3.test")
		}
		w.sign(r, "UNSIGNED-PAYLOAD")
		status, text, _ := w.answerTo(r)
		if want == http.StatusNotImplemented { // no host of ours: the path names the bucket, and o is none
			want = http.StatusBadRequest
		}
		if status != want || (status == http.StatusOK) != strings.Contains(text, canary) {
			t.Errorf("%s: %d %s, want %d", host, status, text, want)
		}
	}
}
