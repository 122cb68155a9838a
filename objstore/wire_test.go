package objstore_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore/s3test"
)

// TestUnknownOperations: nothing that byokd does not know reaches the upstream.
func TestUnknownOperations(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	before := w.up.Calls("GET") + w.up.Calls("PUT") + w.up.Calls("POST") + w.up.Calls("DELETE") + w.up.Calls("HEAD")
	asked := 0
	try := func(method, path string, header ...string) {
		t.Helper()
		body := strings.NewReader(canary)
		r := w.request(method, path, body, int64(body.Len()))
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		r.Header.Del("Authorization")
		w.sign(r, "UNSIGNED-PAYLOAD")
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		if response.StatusCode != http.StatusNotImplemented || method != "HEAD" && !strings.Contains(string(text), "<Code>NotImplemented</Code>") {
			t.Errorf("%s %s %v: %d %s", method, path, header, response.StatusCode, text)
		}
		asked++
	}
	for _, sub := range []string{"select&select-type=2", "restore&select", "torrent", "annotation=x", "append&position=0", "renameObject", "brandnew", "x-amz-brandnew", "acl&tagging", "uploads&acl", "analytics", "inventory", "metadataTable", "session"} {
		for _, method := range []string{"GET", "HEAD", "PUT", "POST", "DELETE"} {
			try(method, "/documents/o?"+sub)
			try(method, "/documents?"+sub)
		}
	}
	for _, method := range []string{"GET", "HEAD", "PUT", "DELETE"} { // POST restores archived objects
		try(method, "/documents/o?restore")
		try(method, "/documents?restore")
	}
	try("POST", "/documents?restore")
	for _, method := range []string{"POST", "PATCH", "PROPFIND"} {
		try(method, "/documents/o")
		try(method, "/documents")
		try(method, "/")
	}
	try("GET", "/documents?list-type=3")
	for _, header := range [][]string{{"X-Amz-Write-Offset-Bytes", "1"}, {"X-Amz-Rename-Source", "/x"}, {"X-Amz-If-Match-Size", "1"}, {"X-Amz-Server-Side-Encryption-Context", "e30="},
		{"X-Amz-Server-Side-Encryption-Customer-Algorithm", "AES256"}, {"X-Amz-Copy-Source-Server-Side-Encryption-Customer-Algorithm", "AES256"}} {
		try("PUT", "/documents/o", header...)
	}
	after := w.up.Calls("GET") + w.up.Calls("PUT") + w.up.Calls("POST") + w.up.Calls("DELETE") + w.up.Calls("HEAD")
	if after != before || asked < 150 {
		t.Errorf("%d requests reached the upstream (of %d)", after-before, asked)
	}
	w.noPlaintext()
}

// TestKnownArgumentsDoNotMatter: queries that clients add are no operations.
func TestKnownArgumentsDoNotMatter(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	for _, path := range []string{"/documents/o?x-purpose=snapshot", "/documents/o?x-id=GetObject", "/documents?prefix=", "/documents?delimiter=&marker="} {
		response, err := http.DefaultClient.Do(w.request("GET", path, nil, 0))
		if err != nil || response.StatusCode != http.StatusOK {
			t.Errorf("%s: %v %v", path, response, err)
			continue
		}
		response.Body.Close()
	}
}

// TestUnsignedRequests: no signature, no service, whatever the operation.
func TestUnsignedRequests(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("x"))
	for _, path := range []string{"/", "/documents", "/documents/o", "/nope/o"} {
		response, err := http.Get(w.server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != http.StatusForbidden || !strings.Contains(string(text), "AccessDenied") {
			t.Errorf("%s: %d %s", path, response.StatusCode, text)
		}
	}
}

// TestVirtualHostStyle addresses the bucket by name, path-escaped keys included.
func TestVirtualHostStyle(t *testing.T) {
	w := newWorld(t, worldOptions{})
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", w.server.Listener.Addr().String())
	}
	client := w.newClient(func(o *s3.Options) {
		o.UsePathStyle, o.BaseEndpoint = false, aws.String("http://s3.test")
		o.HTTPClient = &http.Client{Transport: &http.Transport{DialContext: dial}}
	})
	key := "dir/ü +%&=?/'()*"
	if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: &key, Body: strings.NewReader("virtual")}); err != nil {
		t.Fatal(err)
	}
	if got := w.mustGet(key, ""); string(got) != "virtual" {
		t.Fatalf("read %q", got)
	}
	list, err := client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: documents, Prefix: aws.String("dir/ü ")})
	if err != nil || len(list.Contents) != 1 || *list.Contents[0].Key != key {
		t.Fatalf("%+v %v", list, err)
	}
}

// TestPresigned opens links as curl and browsers do.
func TestPresigned(t *testing.T) {
	now := time.Now()
	w := newWorld(t, worldOptions{now: func() time.Time { return now }})
	w.put("link", pattern(segment+1, 1))
	presign := s3.NewPresignClient(w.client)
	get, err := presign.PresignGetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String("link"), ResponseContentDisposition: aws.String("attachment; filename=a.pdf"), ResponseContentType: aws.String("application/pdf")}, s3.WithPresignExpires(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.Get(get.URL)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	if !bytes.Equal(body, pattern(segment+1, 1)) || response.Header.Get("Content-Disposition") != "attachment; filename=a.pdf" || response.Header.Get("Content-Type") != "application/pdf" {
		t.Fatalf("%d, %d bytes, %v", response.StatusCode, len(body), response.Header)
	}
	put, err := presign.PresignPutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("up")})
	if err != nil {
		t.Fatal(err)
	}
	r, _ := http.NewRequest("PUT", put.URL, strings.NewReader("by link"))
	for name, v := range put.SignedHeader {
		r.Header[name] = v
	}
	if response, err = http.DefaultClient.Do(r); err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response, err)
	}
	response.Body.Close()
	if got := w.mustGet("up", ""); string(got) != "by link" {
		t.Fatalf("read %q", got)
	}
	now = now.Add(2 * time.Minute)
	if response, err = http.Get(get.URL); err != nil || response.StatusCode != http.StatusForbidden {
		t.Fatalf("an expired link: %v %v", response, err)
	}
	response.Body.Close()
}

// TestExpiryIsJudgedAtArrival: a link that expires while its request waits for
// the key is honoured.
func TestExpiryIsJudgedAtArrival(t *testing.T) {
	var ahead atomic.Int64
	w := newWorld(t, worldOptions{now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }})
	w.put("link", []byte("x"))
	get, err := s3.NewPresignClient(w.client).PresignGetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String("link")}, s3.WithPresignExpires(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	w.freeze()
	answered := make(chan int, 1)
	go func() {
		response, err := http.Get(get.URL)
		if err != nil {
			t.Error(err)
			answered <- 0
			return
		}
		response.Body.Close()
		answered <- response.StatusCode
	}()
	await(t, "that the request waits", func() bool { return w.events.holding() == 1 })
	ahead.Store(int64(2 * time.Minute))
	w.thaw()
	if status := <-answered; status != http.StatusOK {
		t.Errorf("status %d", status)
	}
	if response, err := http.Get(get.URL); err != nil || response.StatusCode != http.StatusForbidden {
		t.Errorf("the link did not expire: %v %v", response, err)
	}
}

// TestTLS serves over TLS, where clients send unsigned chunks with a trailer, and
// where a client that leaves has to be noticed below the encryption.
func TestTLS(t *testing.T) {
	w := newWorld(t, worldOptions{})
	server := httptest.NewUnstartedServer(w.proxy)
	server.Config = w.proxy.Server()
	server.StartTLS()
	defer server.Close()
	client := w.newClient(func(o *s3.Options) {
		o.BaseEndpoint = &server.URL
		o.HTTPClient = server.Client()
	})
	body := pattern(3*segment+1, 1)
	for _, algorithm := range []types.ChecksumAlgorithm{types.ChecksumAlgorithmCrc32, types.ChecksumAlgorithmCrc64nvme, types.ChecksumAlgorithmSha256} {
		out, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("tls"), Body: io.NopCloser(bytes.NewReader(body)), ContentLength: aws.Int64(int64(len(body))), ChecksumAlgorithm: algorithm})
		if err != nil {
			t.Fatal(err)
		}
		if out.ChecksumCRC32 == nil && out.ChecksumCRC64NVME == nil && out.ChecksumSHA256 == nil {
			t.Errorf("%s was not returned", algorithm)
		}
	}
	if got := w.mustGet("tls", ""); !bytes.Equal(got, body) {
		t.Fatal("wrong bytes")
	}
	head, err := client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("tls")})
	if err != nil || head.ContentEncoding != nil {
		t.Fatalf("%+v %v", head, err)
	}

	w.freeze()
	conn, err := tls.Dial("tcp", server.Listener.Addr().String(), server.Client().Transport.(*http.Transport).TLSClientConfig)
	if err != nil {
		t.Fatal(err)
	}
	r := w.request("PUT", "/documents/left", bytes.NewReader(make([]byte, 8<<20)), 8<<20)
	go func() { _ = r.Write(conn) }() // fails when the connection closes
	await(t, "that the request waits", func() bool { return w.events.holding() == 1 })
	began := time.Now()
	conn.NetConn().Close()
	await(t, "that the proxy notices", func() bool { return w.events.holding() == 0 })
	if took := time.Since(began); took > time.Second {
		t.Errorf("noticed after %v", took)
	}
}

// TestExpectContinue: a refused upload never has its body asked for.
func TestExpectContinue(t *testing.T) {
	w := newWorld(t, worldOptions{})
	asked := false
	body := &noted{Reader: bytes.NewReader(make([]byte, 1<<20)), note: func() { asked = true }}
	r := w.request("PUT", "/documents/o", body, 1<<20)
	r.Header.Set("Expect", "100-continue")
	r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "Signature=", "Signature=0", 1))
	client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}
	response, err := client.Do(r)
	if err != nil || response.StatusCode != http.StatusForbidden || asked {
		t.Fatal(response, err, asked)
	}
	response.Body.Close()
}

// TestExpectContinueWhileFrozen: an upload that waits for the key keeps its body, until it
// may come; one that has waited too long is told so and never asked for it.
func TestExpectContinueWhileFrozen(t *testing.T) {
	for name, thaws := range map[string]bool{"thawed": true, "held too long": false} {
		t.Run(name, func(t *testing.T) {
			o := worldOptions{}
			if !thaws {
				o.hold = 100 * time.Millisecond
			}
			w := newWorld(t, o)
			w.put("warm", []byte("x"))
			w.freeze()
			var asked atomic.Bool
			data := pattern(1<<20, 1)
			body := &noted{Reader: bytes.NewReader(data), note: func() { asked.Store(true) }}
			r := w.request("PUT", "/documents/o", body, int64(len(data)))
			r.Header.Set("Expect", "100-continue")
			client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}
			type result struct {
				response *http.Response
				err      error
			}
			results := make(chan result, 1)
			go func() {
				response, err := client.Do(r)
				results <- result{response, err}
			}()
			if thaws {
				await(t, "that the request waits", func() bool { return w.events.holding() == 1 })
				if asked.Load() {
					t.Error("the body was asked for while frozen")
				}
				w.thaw()
			}
			got := <-results
			if got.err != nil {
				t.Fatal(got.err)
			}
			got.response.Body.Close()
			if want := map[bool]int{true: http.StatusOK, false: http.StatusServiceUnavailable}[thaws]; got.response.StatusCode != want {
				t.Errorf("status %d, want %d", got.response.StatusCode, want)
			}
			if thaws {
				if got := w.mustGet("o", ""); !bytes.Equal(got, data) {
					t.Error("the object is wrong")
				}
			} else if asked.Load() {
				t.Error("the body of a refused upload was asked for")
			}
		})
	}
}

type noted struct {
	io.Reader
	note func()
}

func (n *noted) Read(p []byte) (int, error) { n.note(); return n.Reader.Read(p) }

// TestEarlyRefusal: an upstream that refuses before it has the body is heard,
// also while the client is slow.
func TestEarlyRefusal(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "PUT" }, Status: 412, Code: "PreconditionFailed"})
	body := pattern(40*segment, 1)
	source := newGated(body, 20*segment)
	defer close(source.release)
	response, err := http.DefaultClient.Do(w.request("PUT", "/documents/o", source, int64(len(body))))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	// The upstream closes its connection after such an answer; when the transport
	// sees that first, all it can say is that the upstream is gone.
	if response.StatusCode != http.StatusPreconditionFailed && response.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("status %d", response.StatusCode)
	}
}

// TestWrongBodies: what does not hold what it promises never becomes an object.
func TestWrongBodies(t *testing.T) {
	w := newWorld(t, worldOptions{})
	for name, c := range map[string]struct {
		payload, code string
		change        func(r *http.Request)
	}{
		"hash":        {strings.Repeat("0", 64), "XAmzContentSHA256Mismatch", func(*http.Request) {}},
		"length":      {"UNSIGNED-PAYLOAD", "MissingContentLength", func(r *http.Request) { r.ContentLength = -1 }},
		"invalid md5": {"UNSIGNED-PAYLOAD", "InvalidDigest", func(r *http.Request) { r.Header.Set("Content-Md5", "x") }},
		"no framing":  {"STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", func(r *http.Request) { r.Header.Set("X-Amz-Decoded-Content-Length", "5") }},
		"no length":   {"STREAMING-UNSIGNED-PAYLOAD-TRAILER", "MissingContentLength", func(*http.Request) {}},
		"xxhash":      {"UNSIGNED-PAYLOAD", "InvalidRequest", func(r *http.Request) { r.Header.Set("X-Amz-Checksum-Xxhash64", "AAAA") }},
		"too large":   {"UNSIGNED-PAYLOAD", "EntityTooLarge", func(r *http.Request) { r.ContentLength = 5<<30 + 1 }},
	} {
		body := pattern(3*segment, 1)
		r := w.request("PUT", "/documents/"+url.PathEscape(name), bytes.NewReader(body), int64(len(body)))
		r.Header.Del("Authorization")
		c.change(r)
		w.sign(r, c.payload)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			if name == "too large" { // answered before the body was sent; the client may miss it
				continue
			}
			t.Fatalf("%s: %v", name, err)
		}
		text, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if !strings.Contains(string(text), "<Code>"+c.code+"</Code>") {
			t.Errorf("%s: %d %s", name, response.StatusCode, text)
		}
		if w.up.Object("acme-documents", name) != nil {
			t.Errorf("%s: became an object", name)
		}
	}
}

// TestSignedChunks uses the framing that Java clients use over plain http.
func TestSignedChunks(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(200_000, 1)
	send := func(spoil int) *http.Response {
		r, err := http.NewRequest("PUT", w.server.URL+"/documents/chunks", nil)
		if err != nil {
			t.Fatal(err)
		}
		creds, _ := credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", "").Retrieve(context.Background())
		now := time.Now()
		r.Header.Set("X-Amz-Decoded-Content-Length", fmt.Sprint(len(body)))
		r.Header.Set("X-Amz-Content-Sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
		r.Header.Set("Content-Encoding", "aws-chunked")
		if err := v4.NewSigner().SignHTTP(context.Background(), creds, r, "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "s3", "eu-central-1", now); err != nil {
			t.Fatal(err)
		}
		framed := chunked(body, r, now)
		if spoil > 0 {
			framed[spoil] ^= 1
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(framed)), int64(len(framed))
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response
	}
	if response := send(190_000); response.StatusCode != http.StatusForbidden || w.up.Object("acme-documents", "chunks") != nil {
		t.Fatalf("a changed chunk: %d", response.StatusCode)
	}
	if response := send(0); response.StatusCode != http.StatusOK {
		t.Fatalf("status %d", response.StatusCode)
	}
	if got := w.mustGet("chunks", ""); !bytes.Equal(got, body) {
		t.Fatal("wrong bytes")
	}
	if h := w.up.Object("acme-documents", "chunks").Header; h.Get("Content-Encoding") != "" {
		t.Errorf("the framing was kept as Content-Encoding %q", h.Get("Content-Encoding"))
	}
}
