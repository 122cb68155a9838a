package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// gated is a body that yields its first half, then waits for release.
type gated struct {
	first, rest []byte
	reached     chan struct{} // closed when the first half was taken
	release     chan struct{}
	once        sync.Once
}

func newGated(body []byte, at int) *gated {
	return &gated{first: body[:at], rest: body[at:], reached: make(chan struct{}), release: make(chan struct{})}
}

func (g *gated) Read(p []byte) (int, error) {
	if len(g.first) == 0 {
		g.once.Do(func() { close(g.reached) })
		<-g.release
		if len(g.rest) == 0 {
			return 0, io.EOF
		}
		n := copy(p, g.rest)
		g.rest = g.rest[n:]
		return n, nil
	}
	n := copy(p, g.first)
	g.first = g.first[n:]
	return n, nil
}

// request builds a signed request with an unsigned payload.
func (w *world) request(method, path string, body io.Reader, size int64) *http.Request {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.server.URL+path, body)
	if err != nil {
		w.t.Fatal(err)
	}
	if body != nil {
		r.ContentLength = size
	}
	w.sign(r, "UNSIGNED-PAYLOAD")
	return r
}

func (w *world) sign(r *http.Request, payload string) {
	w.t.Helper()
	r.Header.Set("X-Amz-Content-Sha256", payload)
	creds, _ := credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", "").Retrieve(context.Background())
	if err := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true }).SignHTTP(context.Background(), creds, r, payload, "s3", "eu-central-1", time.Now()); err != nil {
		w.t.Fatal(err)
	}
}

// TestFrozenRequestsWaitAndGoOn freezes, sends one request of each kind, and
// thaws: all of them succeed.
func TestFrozenRequestsWaitAndGoOn(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(5*segment, 1)
	w.put("o", body)
	w.freeze()
	ctx := t.Context()
	calls := map[string]func() error{
		"get":   func() error { _, _, err := w.get("o", ""); return err },
		"range": func() error { _, _, err := w.get("o", "bytes=70000-80000"); return err },
		"head": func() error {
			_, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: aws.String("o")})
			return err
		},
		"put": func() error {
			_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: aws.String("n"), Body: bytes.NewReader(body)})
			return err
		},
		"list": func() error {
			_, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents})
			return err
		},
		"delete": func() error {
			_, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: aws.String("d")})
			return err
		},
	}
	results := make(chan error, len(calls))
	for _, call := range calls {
		go func() { results <- call() }()
	}
	await(t, "that all requests wait", func() bool { return w.events.holding() == len(calls) })
	if w.up.Object("acme-documents", "n") != nil {
		t.Fatal("a put went through a frozen gate")
	}
	if _, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String("backups"), Key: aws.String("x"), Body: bytes.NewReader(body)}); err != nil {
		t.Fatalf("the other bucket has another key, yet: %v", err)
	}
	began := time.Now()
	w.thaw()
	for range calls {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the thaw took %v", took)
	}
	if got := w.mustGet("n", ""); !bytes.Equal(got, body) {
		t.Error("what was put during the freeze is wrong")
	}
}

// TestFrozenTooLong wants 503 SlowDown with Retry-After after HoldFor, with cause
// and next step.
func TestFrozenTooLong(t *testing.T) {
	w := newWorld(t, worldOptions{hold: 200 * time.Millisecond})
	w.put("o", []byte("x"))
	w.freeze()
	began := time.Now()
	response, err := http.DefaultClient.Do(w.request("GET", "/documents/o", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("Retry-After") == "" {
		t.Fatalf("answer %d %s", response.StatusCode, text)
	}
	for _, want := range []string{"<Code>SlowDown</Code>", "External encryption key is not ready", "disabled", "aws kms enable-key"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the answer lacks %q: %s", want, text)
		}
	}
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("answered after %v already", took)
	}
	// The SDK's own retries succeed once the key is back.
	w.thaw()
	retrying := w.newClient(func(o *s3.Options) { o.RetryMaxAttempts = 5 })
	w.freeze()
	timer := time.AfterFunc(400*time.Millisecond, func() { w.kms.set(keyguard.Enabled) })
	defer timer.Stop()
	if _, err := retrying.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("o")}); err != nil {
		t.Errorf("with retries: %v", err)
	}
}

// TestGetPausesAndResumes freezes in the midst of a download: no plain byte
// leaves while frozen, and afterwards the download is complete and right, even
// when the upstream has dropped its connection meanwhile.
func TestGetPausesAndResumes(t *testing.T) {
	for _, cut := range []bool{false, true} {
		w := newWorld(t, worldOptions{})
		body := pattern(64*segment, 2)
		w.put("big", body)
		stall := &s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "GET" && strings.HasSuffix(r.URL.Path, "/big") }, Times: 1, StallAt: 20 * segment, Release: make(chan struct{})}
		if cut {
			stall.CutAt = 40 * segment
		}
		w.up.Inject(stall)
		response, err := http.DefaultClient.Do(w.request("GET", "/documents/big", nil, 0))
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		// The upstream stalls after 20 segments, so 16 come at most.
		got := make([]byte, 8*segment)
		if _, err := io.ReadFull(response.Body, got); err != nil {
			t.Fatal(err)
		}
		w.freeze()
		close(stall.Release) // sealed bytes flow again, but may not be opened
		more := make(chan int, 1)
		go func() {
			rest, err := io.ReadAll(response.Body)
			if err != nil {
				t.Error(err)
			}
			got = append(got, rest...)
			more <- len(rest)
		}()
		await(t, "that the download waits for the key", func() bool { return w.guard.Status().Waiting > 0 })
		select {
		case n := <-more:
			t.Fatalf("the download ended while frozen, %d bytes", n)
		default:
		}
		began := time.Now()
		w.thaw()
		<-more
		if !bytes.Equal(got, body) || response.ContentLength != int64(len(body)) {
			t.Fatalf("cut %v: got %d bytes of %d, equal %v", cut, len(got), len(body), bytes.Equal(got, body))
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("resumed after %v", took)
		}
	}
}

// TestPutPausesAndResumes freezes in the midst of an upload.
func TestPutPausesAndResumes(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(40*segment, 3)
	source := newGated(body, 20*segment)
	answered := make(chan *http.Response, 1)
	go func() {
		response, err := http.DefaultClient.Do(w.request("PUT", "/documents/up", source, int64(len(body))))
		if err != nil {
			t.Error(err)
		}
		answered <- response
	}()
	<-source.reached
	w.freeze()
	close(source.release)
	await(t, "that the upload waits for the key", func() bool { return w.guard.Status().Waiting > 0 })
	if w.up.Object("acme-documents", "up") != nil {
		t.Fatal("the object is there although the key is frozen")
	}
	w.thaw()
	response := <-answered
	if response == nil || response.StatusCode != http.StatusOK {
		t.Fatalf("answer %v", response)
	}
	response.Body.Close()
	if got := w.mustGet("up", ""); !bytes.Equal(got, body) {
		t.Fatal("wrong bytes")
	}
	w.noPlaintext()
}

// TestMultipartSurvivesFreeze uploads a part before and one after a freeze.
func TestMultipartSurvivesFreeze(t *testing.T) {
	w := newWorld(t, worldOptions{})
	ctx, key := t.Context(), aws.String("m")
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	var parts []completed
	for i := range 2 {
		out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: documents, Key: key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(pattern(segment, i))})
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, completed{int32(i + 1), *out.ETag})
		w.freeze()
		w.thaw()
	}
	if _, err := w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)}); err != nil {
		t.Fatal(err)
	}
	if got := w.mustGet("m", ""); !bytes.Equal(got, append(pattern(segment, 0), pattern(segment, 1)...)) {
		t.Fatal("wrong bytes")
	}
}

// TestClientLeaving has a client go away while its request waits for the key,
// with a body that nobody has read.
func TestClientLeaving(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.freeze()
	conn, err := net.Dial("tcp", w.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r := w.request("PUT", "/documents/left", bytes.NewReader(pattern(1<<20, 1)), 1<<20)
	go func() { _ = r.Write(conn) }() // fails when the connection closes
	await(t, "that the request waits", func() bool { return w.events.holding() == 1 })
	began := time.Now()
	conn.Close()
	await(t, "that the proxy notices", func() bool { _, done := w.events.find(objstore.OpPutObject); return done })
	if took := time.Since(began); took > time.Second {
		t.Errorf("noticed after %v", took)
	}
	if e, _ := w.events.find(objstore.OpPutObject); e.Status != 499 {
		t.Errorf("event %+v", e)
	}
	w.thaw()
	if w.up.Object("acme-documents", "left") != nil {
		t.Error("the request of a client that left was carried out")
	}
}

// TestClientLeavesMidway has a client go away in the midst of an upload.
func TestClientLeavesMidway(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := pattern(40*segment, 1)
	source := newGated(body[:21*segment], 20*segment)
	rest := iotest.ErrReader(errors.New("left")) // or the rest might still be sent before the client has gone
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := http.DefaultClient.Do(w.request("PUT", "/documents/half", io.MultiReader(source, rest), int64(len(body))).WithContext(ctx))
		failed <- err
	}()
	<-source.reached
	cancel()
	close(source.release)
	if err := <-failed; err == nil {
		t.Fatal("the request succeeded")
	}
	await(t, "that the proxy notices", func() bool { _, done := w.events.find(objstore.OpPutObject); return done })
	if w.up.Object("acme-documents", "half") != nil {
		t.Error("half an upload became an object")
	}
}
