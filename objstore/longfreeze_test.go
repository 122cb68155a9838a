package objstore_test

import (
	"bytes"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// frozenForEnv is for how long TestUploadThroughALongFreeze stays frozen: a Go
// duration, such as 3m. Requests then wait as long as they do in production.
const frozenForEnv = "BYOKD_FROZEN_FOR"

// pausedSource is a part's bytes, held back from one offset on until release is
// closed. It can be sent again, as a file can.
type pausedSource struct {
	*bytes.Reader
	at      int64
	reached chan struct{} // closed when all before at was taken
	release chan struct{}
}

func newPausedSource(body []byte, at int) *pausedSource {
	return &pausedSource{Reader: bytes.NewReader(body), at: int64(at), reached: make(chan struct{}), release: make(chan struct{})}
}

// Read implements io.Reader.
func (p *pausedSource) Read(b []byte) (int, error) {
	select {
	case <-p.release:
		return p.Reader.Read(b)
	default:
	}
	if before := p.at - (p.Size() - int64(p.Len())); before > 0 {
		return p.Reader.Read(b[:min(before, int64(len(b)))])
	}
	close(p.reached)
	<-p.release
	return p.Reader.Read(b)
}

// persistent makes a client try again for as long as a freeze lasts.
func persistent(o *s3.Options) {
	o.RetryMaxAttempts = 0 // as the retryer says
	o.Retryer = retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts, o.MaxBackoff, o.RateLimiter = 10_000, 2*time.Second, ratelimit.None
	})
}

// unbuffered makes a client send a body without having read it before.
func unbuffered(o *s3.Options) {
	o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
	o.APIOptions = append(o.APIOptions, v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware)
}

// TestUploadThroughALongFreeze freezes an upload while two of its parts are under
// way, one in its first half and one in its second; another part is begun while
// frozen, and further ones follow afterwards. All of them arrive, also where the
// upstream gave up on requests that stood still, as S3 does after some 20 s.
func TestUploadThroughALongFreeze(t *testing.T) {
	for name, patience := range map[string]time.Duration{"patient upstream": 0, "upstream that gives up": time.Second} {
		t.Run(name, func(t *testing.T) {
			frozenFor, o := 3*time.Second, worldOptions{hold: 500 * time.Millisecond}
			if long, err := time.ParseDuration(os.Getenv(frozenForEnv)); err == nil {
				frozenFor, o.hold, patience = long, 0, 20*patience
			}
			w := newWorld(t, o)
			w.up.GiveUpAfter(patience)
			w.uploadThroughAFreeze(frozenFor)
		})
	}
}

func (w *world) uploadThroughAFreeze(frozenFor time.Duration) {
	const count, size = 7, 40 * segment
	t, ctx, key := w.t, w.t.Context(), aws.String("backup")
	client := w.newClient(persistent)
	created, err := client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	parts, done := make([]completed, count), make(chan error, count)
	bodies := make([][]byte, count)
	for i := range bodies {
		bodies[i] = pattern(size, i)
	}
	send := func(i int, body *pausedSource, options ...func(*s3.Options)) {
		in := &s3.UploadPartInput{Bucket: documents, Key: key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: body}
		out, err := client.UploadPart(ctx, in, options...)
		if err == nil {
			parts[i] = completed{int32(i + 1), *out.ETag}
		}
		done <- err
	}
	wanted := func(n int) {
		t.Helper()
		for range n {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
	}
	whole := func(i int) *pausedSource {
		body := newPausedSource(bodies[i], 0)
		close(body.release)
		return body
	}
	send(0, whole(0))
	wanted(1)

	early, late := newPausedSource(bodies[1], 12*segment), newPausedSource(bodies[2], 36*segment)
	go send(1, early, unbuffered)
	go send(2, late, unbuffered)
	<-early.reached
	<-late.reached
	w.freeze()
	close(early.release)
	close(late.release)
	await(t, "that both parts wait for the key", func() bool { return w.guard.Status().Waiting >= 2 })
	go send(3, whole(3))
	await(t, "that a part begun while frozen waits", func() bool { return w.events.holding() > 0 })
	select {
	case err := <-done:
		t.Fatalf("a part arrived while frozen (%v)", err)
	case <-time.After(frozenFor): // that nothing arrives for so long is the test
	}
	began := time.Now()
	w.thaw()
	wanted(3)
	t.Logf("frozen for %v; the parts under way arrived %v after the thaw", frozenFor, time.Since(began).Round(time.Millisecond))
	for i := 4; i < count; i++ {
		send(i, whole(i))
		wanted(1)
	}
	if _, err := client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: documents, Key: key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)}); err != nil {
		t.Fatal(err)
	}
	if got := w.mustGet("backup", ""); !bytes.Equal(got, slices.Concat(bodies...)) {
		t.Fatal("the upload holds other bytes than were sent")
	}
	w.noPlaintext()
}
