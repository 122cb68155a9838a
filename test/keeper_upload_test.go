//go:build linux

package test

import (
	"bytes"
	"io"
	"net/http"
	"sync"
	"syscall"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// dead kills the worker and returns when it can do nothing any more.
func (s *stack) dead() {
	s.t.Helper()
	pid := s.workerPid()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	s.await("the end of a worker", s.daemon, func() bool { return !alive(pid) })
}

// TestUploadOverWorkerKills kills the worker amid the parts of an upload and between
// them. Connections break, the SDK tries again by itself, and the upload goes on. Who
// connects while nobody is there waits in the listener's queue and is not refused.
func TestUploadOverWorkerKills(t *testing.T) {
	s := newStack(t, shipped)
	impatient := s.s3Client() // without retries
	options := impatient.Options()
	options.Retryer = retry.NewStandard() // the SDK's default
	patient := s3.New(options)

	const count = 5
	o := object{9 << 40, (count-1)*partSize + lastPart}
	body := o.content(s.canary)
	bucket, key := aws.String(bucketName), aws.String("over-kills")
	up, err := patient.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: bucket, Key: key, Metadata: map[string]string{"title": s.canary}})
	if err != nil {
		t.Fatal(err)
	}
	var parts []types.CompletedPart
	for number := int32(1); number <= count; number++ {
		stalling := &stallingTransport{half: make(chan struct{}), release: make(chan struct{})}
		client, piece := patient, body[int(number-1)*partSize:min(int(number)*partSize, len(body))]
		killed := make(chan struct{})
		if number%2 == 1 { // killed when it has read half of the part
			options := patient.Options()
			options.HTTPClient = &firstStalls{stalling: stalling, then: options.HTTPClient}
			client = s3.New(options)
			go func() {
				defer close(killed)
				<-stalling.half
				s.dead()
				close(stalling.release)
			}()
		} else { // killed before the part is sent
			s.dead()
			close(killed)
		}
		part, err := client.UploadPart(t.Context(), &s3.UploadPartInput{Bucket: bucket, Key: key, UploadId: up.UploadId, PartNumber: &number, Body: bytes.NewReader(piece)})
		if err != nil {
			t.Fatalf("part %d: %v", number, err)
		}
		<-killed
		parts = append(parts, types.CompletedPart{ETag: part.ETag, PartNumber: aws.Int32(number)})
	}
	s.dead()
	if _, err := patient.CompleteMultipartUpload(t.Context(), &s3.CompleteMultipartUploadInput{Bucket: bucket, Key: key, UploadId: up.UploadId,
		MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}}); err != nil {
		t.Fatal(err)
	}
	for range 5 { // each on a connection of its own, made while there is no worker
		s.dead()
		got, err := s.s3Client().GetObject(t.Context(), &s3.GetObjectInput{Bucket: bucket, Key: key})
		if err != nil {
			t.Fatalf("a client without retries, which came when nobody was there: %v", err)
		}
		text, err := io.ReadAll(got.Body)
		got.Body.Close()
		if err != nil || !bytes.Equal(text, body) || got.Metadata["title"] != s.canary {
			t.Fatalf("%d bytes of %d, equal %v, metadata %v, %v", len(text), len(body), bytes.Equal(text, body), got.Metadata, err)
		}
	}
	s.stopDaemon()
}

// firstStalls sends the first request to one client and those that follow to another.
type firstStalls struct {
	stalling *stallingTransport
	then     s3.HTTPClient
	once     sync.Once
}

// Do implements aws.HTTPClient.
func (f *firstStalls) Do(r *http.Request) (resp *http.Response, err error) {
	client := f.then
	f.once.Do(func() { client = f.stalling })
	return client.Do(r)
}
