//go:build linux

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/metrics"
)

// stallingTransport sends half of each body and then waits.
type stallingTransport struct {
	half    chan struct{} // closed once half of a body was sent
	release chan struct{} // closed by the test to let it go on
}

// Do implements aws.HTTPClient.
func (s *stallingTransport) Do(r *http.Request) (*http.Response, error) {
	if r.Body != nil && r.ContentLength > 0 {
		r.Body = &stallingBody{ReadCloser: r.Body, left: r.ContentLength / 2, transport: s}
	}
	return awshttp.NewBuildableClient().Do(r)
}

type stallingBody struct {
	io.ReadCloser
	left      int64
	transport *stallingTransport
}

// Read implements io.Reader.
func (b *stallingBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		b.left = -1
		close(b.transport.half)
		<-b.transport.release
	}
	if b.left > 0 {
		p = p[:min(int64(len(p)), b.left)]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left > 0 {
		b.left -= int64(n)
	}
	return n, err
}

// TestKilledDuringMultipart kills byokd while a part is on its way. The client goes
// on with the same upload at the byokd that is started then: what was acknowledged
// need not be sent again, and the object is equal.
func TestKilledDuringMultipart(t *testing.T) {
	s := newStack(t, shipped)
	client := s.s3Client()
	o := object{7 << 40, 3*partSize + lastPart}
	body := o.content(s.canary)
	piece := func(number int) []byte { return body[(number-1)*partSize : min(number*partSize, len(body))] }
	bucket, key := aws.String(bucketName), aws.String("interrupted")
	up, err := client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: bucket, Key: key, Metadata: map[string]string{"title": s.canary}})
	if err != nil {
		t.Fatal(err)
	}
	send := func(client *s3.Client, number int) (types.CompletedPart, error) {
		part, err := client.UploadPart(t.Context(), &s3.UploadPartInput{Bucket: bucket, Key: key, UploadId: up.UploadId, PartNumber: aws.Int32(int32(number)), Body: bytes.NewReader(piece(number))})
		if err != nil {
			return types.CompletedPart{}, err
		}
		return types.CompletedPart{ETag: part.ETag, PartNumber: aws.Int32(int32(number))}, nil
	}
	parts := make([]types.CompletedPart, 4)
	for _, number := range []int{1, 4} { // the last one before those in the middle, as parallel uploads do
		if parts[number-1], err = send(client, number); err != nil {
			t.Fatal(err)
		}
	}
	stalling := &stallingTransport{half: make(chan struct{}), release: make(chan struct{})}
	failed := make(chan error, 1)
	go func() {
		options := client.Options()
		options.HTTPClient = stalling
		_, err := send(s3.New(options), 2)
		failed <- err
	}()
	<-stalling.half
	s.killDaemon()
	close(stalling.release)
	if err := <-failed; err == nil {
		t.Error("the part that was interrupted was acknowledged")
	}

	s.startDaemon()
	s.awaitState(metrics.StateReady)
	for _, number := range []int{2, 3} {
		if parts[number-1], err = send(client, number); err != nil {
			t.Fatal(err)
		}
	}
	// Killed again, between all parts and the end.
	s.killDaemon()
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	_, err = client.CompleteMultipartUpload(t.Context(), &s3.CompleteMultipartUploadInput{Bucket: bucket, Key: key, UploadId: up.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: bucket, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Body.Close()
	text, err := io.ReadAll(got.Body)
	if err != nil || !bytes.Equal(text, body) || got.Metadata["title"] != s.canary {
		t.Errorf("%d bytes of %d, equal %v, metadata %v, %v", len(text), len(body), bytes.Equal(text, body), got.Metadata, err)
	}
	s.stopDaemon()
}

func (s *stack) killDaemon() {
	s.t.Helper()
	s.daemon.signal(syscall.SIGKILL)
	if !s.daemon.wait(patience) {
		s.t.Fatal("byokd survived SIGKILL")
	}
}

// putUnique writes object after object, each under a key of its own, until ctx ends.
// What is not acknowledged must be refused as a fault of the store: 5xx.
func (c *client) putUnique(ctx context.Context, refused *atomic.Int64) error {
	for n := uint64(0); ctx.Err() == nil; n++ {
		err := c.put(ctx, fmt.Sprintf("%s-%d", c.name, n), object{n << 20, int(n*7919) % 200000})
		var response *awshttp.ResponseError
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.As(err, &response) && response.HTTPStatusCode() >= 500:
			refused.Add(1)
		default:
			return err
		}
	}
	return nil
}

// TestCloudKilled kills KMS and S3 at one moment under load. The mount goes on
// within the lease; the proxy refuses what it cannot store; and when they are back,
// nothing was frozen and everything acknowledged is there.
func TestCloudKilled(t *testing.T) {
	s := newStack(t, shipped)
	workers := s.workers("store", "journal", "overwrite", "cached")
	ctx, stop := context.WithCancel(t.Context())
	var refused atomic.Int64
	var all []*client
	for i := range 4 {
		c := s.newClient(fmt.Sprint("unique", i))
		all = append(all, c)
		go func() { defer close(c.done); c.err = c.putUnique(ctx, &refused) }()
	}
	t.Cleanup(func() {
		stop()
		for _, c := range all {
			<-c.done
		}
	})
	goOn := func(boards load) { t.Helper(); s.awaitProgress(boards) }
	goOn(load{workers: workers, clients: all})
	before := s.awaitState(metrics.StateReady).Keys[0]

	for range 3 {
		s.clouds.signal(syscall.SIGKILL)
		if !s.clouds.wait(patience) {
			t.Fatal("devcloud survived SIGKILL")
		}
		killed := time.Now()
		goOn(load{workers: workers})
		s.startCloud()
		away := time.Since(killed)
		// A bucket is called impaired for a minute after the last request that failed.
		s.awaitState(metrics.StateReady, metrics.StateImpaired)
		goOn(load{workers: workers, clients: all})
		if after := s.awaitState(metrics.StateReady, metrics.StateImpaired).Keys[0]; after.Epoch != before.Epoch {
			if away < outageGrace-probeInterval {
				t.Errorf("KMS was away for %v, and byokd froze within its lease", away)
			}
			t.Logf("KMS was away for %v, longer than the lease: a freeze", away)
			before = after
		}
		t.Logf("KMS and S3 were away for %d ms; %d requests were refused so far", away.Milliseconds(), refused.Load())
	}
	stop()
	for _, c := range all {
		<-c.done
		if c.err != nil {
			t.Errorf("the client %s failed: %v", c.name, c.err)
		}
	}
	s.retire(workers)
	s.once(task{Role: "verify", Claims: claims(workers)})
	s.verifyObjects(all)
	s.stopDaemon()
	s.assertSealed()
}
