//go:build linux

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
)

// The load on the proxy runs in the test's own process, with the genuine SDK. It
// does not retry by itself, so that every error is seen.

const (
	bucketName  = "documents"
	smallCount  = 6         // small objects that are read
	streamSize  = 24 << 20  // of the object that is read as a stream
	putSlots    = 16        // objects that are written over and over
	partSize    = 5 << 20   // of an uploaded part, S3's least
	lastPart    = 100 << 10 // of the last part
	readingSize = 64 << 10
)

// client is one loop of requests. Its board says what mounts' workers say.
type client struct {
	board
	name   string
	s3     *s3.Client
	canary string
	stop   context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed

	slow  atomic.Int64 // answers 503 SlowDown
	early atomic.Int64 // of these, those that did not wait for holdFor

	mu    sync.Mutex
	acked map[string]object // guarded by mu; what was acknowledged, by key
	begun map[string]object // guarded by mu; what was sent last, by key
}

func (s *stack) newClient(name string) *client {
	return &client{name: name, s3: s.s3Client(), canary: s.canary, done: make(chan struct{}), acked: map[string]object{}, begun: map[string]object{}}
}

// object says what an acknowledged object holds.
type object struct {
	stamp uint64
	size  int
}

func (s *stack) s3Client() *s3.Client {
	return s3.New(s3.Options{Region: "eu-central-1", BaseEndpoint: aws.String(s.s3), UsePathStyle: true, Retryer: aws.NopRetryer{},
		HTTPClient:  awshttp.NewBuildableClient(),
		Credentials: credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", "")})
}

// clients starts the load on the proxy and waits until every loop has succeeded once.
func (s *stack) clients() []*client {
	s.t.Helper()
	seed := s.newClient("seed")
	for i := range smallCount {
		if err := seed.put(s.t.Context(), smallKey(i), object{uint64(i) << 32, smallSize(i)}); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := seed.put(s.t.Context(), "stream", object{1 << 40, streamSize}); err != nil {
		s.t.Fatal(err)
	}
	loops := map[string]func(*client, context.Context) error{
		"get": (*client).getSmall, "stream": (*client).stream, "put": (*client).putSmall, "multipart": (*client).multipart}
	var all []*client
	for name, loop := range loops {
		ctx, cancel := context.WithCancel(context.Background())
		c := s.newClient(name)
		c.stop = cancel
		go func() {
			defer close(c.done)
			for c.Stop.Load() == 0 && c.err == nil {
				c.err = c.tolerant(func() error { return loop(c, ctx) })
			}
		}()
		s.t.Cleanup(func() { cancel(); <-c.done })
		all = append(all, c)
	}
	for _, c := range all {
		s.await("the client "+c.name, s.daemon, func() bool { return c.Ops.Load() > 0 || c.failed() != nil })
	}
	return all
}

func (c *client) failed() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// tolerant makes one request and accepts what a frozen proxy may answer: 503
// SlowDown with Retry-After, not before it has held the request.
func (c *client) tolerant(request func() error) error {
	began := time.Now()
	err := request()
	var api smithy.APIError
	var response *awshttp.ResponseError
	if !errors.As(err, &api) || api.ErrorCode() != "SlowDown" {
		return err
	}
	if !errors.As(err, &response) || response.HTTPStatusCode() != http.StatusServiceUnavailable || response.Response.Header.Get("Retry-After") == "" {
		return fmt.Errorf("SlowDown without status 503 and Retry-After: %w", err)
	}
	c.slow.Add(1)
	if time.Since(began) < holdFor-100*time.Millisecond {
		c.early.Add(1)
	}
	return nil
}

func smallKey(i int) string { return fmt.Sprint("small-", i) }
func smallSize(i int) int   { return []int{0, 1, 1000, 65536, 65537, 300000}[i] }

func (o object) content(canary string) []byte {
	b := make([]byte, (o.size+recordSize-1)/recordSize*recordSize)
	pattern(b, canary, o.stamp)
	return b[:o.size]
}

// put writes an object with secret metadata and notes that it was acknowledged.
func (c *client) put(ctx context.Context, key string, o object) error {
	body := o.content(c.canary)
	c.sent(key, o)
	c.begin()
	_, err := c.s3.PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String(bucketName), Key: aws.String(key), Body: bytes.NewReader(body),
		Metadata: map[string]string{"title": c.canary, "stamp": strconv.FormatUint(o.stamp, 10)}})
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	c.end()
	c.acknowledged(key, o)
	return nil
}

func (c *client) sent(key string, o object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun[key] = o
}

func (c *client) acknowledged(key string, o object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked[key] = o
}

func (c *client) putSmall(ctx context.Context) error {
	k := c.Begun.Load()
	if err := c.put(ctx, fmt.Sprint("put-", k%putSlots), object{k << 20, int(k*7919) % 200000}); err != nil {
		return err
	}
	c.Begun.Add(1)
	return nil
}

// get reads an object and compares it. Each piece that arrives is a call of its
// own on the board: the last plaintext byte is what is looked for.
func (c *client) get(ctx context.Context, key string, o object, from, to int) error {
	in := &s3.GetObjectInput{Bucket: aws.String(bucketName), Key: aws.String(key)}
	if from > 0 || to < o.size {
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", from, to-1))
	}
	c.begin()
	out, err := c.s3.GetObject(ctx, in)
	if err != nil {
		return fmt.Errorf("get %s: %w", key, err)
	}
	defer out.Body.Close()
	if out.Metadata["title"] != c.canary {
		return fmt.Errorf("get %s: metadata %v", key, out.Metadata)
	}
	c.end()
	want := o.content(c.canary)[from:to]
	buf := make([]byte, readingSize)
	for at := 0; ; {
		c.begin()
		n, err := out.Body.Read(buf)
		if n > 0 || err == io.EOF {
			c.end()
		}
		if at+n > len(want) || !bytes.Equal(buf[:n], want[at:at+n]) {
			return fmt.Errorf("get %s: wrong bytes from %d on", key, from+at)
		}
		at += n
		if err == io.EOF && at == len(want) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("get %s: after %d of %d bytes: %w", key, at, len(want), err)
		}
	}
}

func (c *client) getSmall(ctx context.Context) error {
	k := int(c.Begun.Add(1))
	i := k % smallCount
	from, to := 0, smallSize(i)
	if k%3 == 0 && to > 1000 {
		from, to = to/3, to-to/4
	}
	return c.get(ctx, smallKey(i), object{uint64(i) << 32, smallSize(i)}, from, to)
}

func (c *client) stream(ctx context.Context) error {
	return c.get(ctx, "stream", object{1 << 40, streamSize}, 0, streamSize)
}

// multipart uploads an object in parts.
func (c *client) multipart(ctx context.Context) error {
	k := c.Begun.Load()
	key := aws.String(fmt.Sprint("multipart-", k%2))
	o := object{1<<40 | k<<20, partSize + lastPart}
	body := o.content(c.canary)
	c.sent(*key, o)
	c.begin()
	up, err := c.s3.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: aws.String(bucketName), Key: key,
		Metadata: map[string]string{"title": c.canary}})
	if err != nil {
		return fmt.Errorf("create an upload: %w", err)
	}
	c.end()
	var parts []types.CompletedPart
	for i, piece := range [][]byte{body[:partSize], body[partSize:]} {
		number := aws.Int32(int32(i + 1))
		err := c.again(ctx, func() error {
			c.begin()
			part, err := c.s3.UploadPart(ctx, &s3.UploadPartInput{Bucket: aws.String(bucketName), Key: key, UploadId: up.UploadId, PartNumber: number, Body: bytes.NewReader(piece)})
			if err != nil {
				return fmt.Errorf("upload a part: %w", err)
			}
			c.end()
			parts = append(parts, types.CompletedPart{ETag: part.ETag, PartNumber: number})
			return nil
		})
		if err != nil {
			return err
		}
	}
	err = c.again(ctx, func() error {
		c.begin()
		_, err := c.s3.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: aws.String(bucketName), Key: key, UploadId: up.UploadId,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
		return err
	})
	if err != nil {
		return fmt.Errorf("complete an upload: %w", err)
	}
	c.end()
	c.acknowledged(*key, o)
	c.Begun.Add(1)
	return nil
}

// again repeats a request of an upload while it is answered SlowDown.
func (c *client) again(ctx context.Context, request func() error) error {
	for {
		before := c.slow.Load()
		if err := c.tolerant(request); err != nil || c.slow.Load() == before {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// retireClients ends the loops after the request in hand, and checks that none has failed.
func (s *stack) retireClients(all []*client) {
	s.t.Helper()
	for _, c := range all {
		c.Stop.Store(1)
	}
	for _, c := range all {
		select {
		case <-c.done:
		case <-time.After(patience):
			s.t.Errorf("the client %s did not end its last request within %v", c.name, patience)
			c.stop()
			<-c.done
		}
		if c.err != nil {
			s.t.Errorf("the client %s failed: %v", c.name, c.err)
		}
		if n := c.early.Load(); n > 0 {
			s.t.Errorf("the client %s: %d of %d requests were answered SlowDown before they were held for %v", c.name, n, c.slow.Load(), holdFor)
		}
	}
}

// verifyObjects reads back every object that was acknowledged; a later one under
// the same key may have taken its place if it was sent.
func (s *stack) verifyObjects(all []*client) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	reader := s.newClient("verify")
	found := 0
	for _, c := range all {
		c.mu.Lock()
		for key, o := range c.acked {
			err := reader.get(ctx, key, o, 0, o.size)
			if later := c.begun[key]; err != nil && later != o {
				err = reader.get(ctx, key, later, 0, later.size)
			}
			if err != nil {
				s.t.Errorf("an acknowledged object: %v", err)
			}
			found++
		}
		c.mu.Unlock()
	}
	if found < 3 {
		s.t.Errorf("%d objects were acknowledged: this verifies nothing", found)
	}
}

// Without a mark that something is wrong, the loops above would prove nothing.
func TestPatternTellsDifferences(t *testing.T) {
	canary := newCanary()
	good := object{7 << 20, 1000}.content(canary)
	if err := differs(good, canary, 7<<20); err != nil {
		t.Error(err)
	}
	for _, at := range []int{0, 45, 55, 64, 999} {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		if differs(bad, canary, 7<<20) == nil {
			t.Errorf("a changed byte at %d is not seen", at)
		}
	}
	if differs(good, canary, 8<<20) == nil {
		t.Error("another version of the same record is not seen")
	}
}
