package main

import (
	"fmt"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/metrics"
	"github.com/byokd/byokd/objstore"
)

// upstreamFailureLasts is how long a bucket is called impaired after the last request that its upstream failed. A request
// that succeeds says nothing of those of another kind, so that only time ends it.
const upstreamFailureLasts = time.Minute

// causeLasts is how long one cause is shown before another takes its place, so that watchers of the status are not told of
// each request.
const causeLasts = 5 * time.Second

// bucketState tells how a bucket is: by itself it serves once its key is there, whatever its upstream does. Safe for
// concurrent use.
type bucketState struct {
	resource *metrics.Resource
	upstream UpstreamConfig
	log      *zap.Logger

	mu      sync.Mutex
	serves  bool        // guarded by mu
	failing string      // what the status says of the upstream; empty while it is well; guarded by mu
	told    time.Time   // when it began to say that; guarded by mu
	last    time.Time   // when the upstream last failed a request; guarded by mu
	ends    *time.Timer // makes it well again; nil before the first failure; guarded by mu
}

// serving is called when the bucket's key is there.
func (b *bucketState) serving() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serves = true
	b.resource.Serving()
}

// upstreamFailed has the status tell of a request that failed because of the upstream.
func (b *bucketState) upstreamFailed(e objstore.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.serves {
		return
	}
	b.last = time.Now()
	if b.ends == nil {
		b.ends = time.AfterFunc(upstreamFailureLasts, b.wellAgain)
	} else {
		b.ends.Reset(upstreamFailureLasts)
	}
	if cause := upstreamCause(b.upstream.Bucket, e); b.failing == "" || cause != b.failing && time.Since(b.told) >= causeLasts {
		b.failing, b.told = cause, time.Now()
		b.resource.Impaired(cause, upstreamNextStep(b.upstream))
	}
}

// wellAgain is called when no request has failed for a while.
func (b *bucketState) wellAgain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.last) < upstreamFailureLasts {
		return // a request has failed while this was about to run, and has set the timer anew
	}
	b.failing = ""
	b.resource.Serving()
	b.log.Info("no request has failed because of the upstream bucket for a while", zap.String("upstream", b.upstream.Bucket), zap.Duration("for", upstreamFailureLasts))
}

// upstreamCause says why a request failed: nothing of the request is named but its kind, and nothing of the answer but its
// code, as both would name the object.
func upstreamCause(bucket string, e objstore.Event) string {
	switch {
	case e.Code == "NoSuchBucket":
		return fmt.Sprintf("There is no bucket %s: requests fail with %s.", bucket, e.Code)
	case e.Status == http.StatusForbidden:
		return fmt.Sprintf("S3 refuses %s in the bucket %s to byokd: requests have failed in the last minute with %s.", e.Op, bucket, e.Code)
	case e.Status >= http.StatusInternalServerError || e.Status == 0:
		return fmt.Sprintf("The S3 below byokd, with the bucket %s, cannot be reached or fails: requests have failed in the last minute with %s.", bucket, e.Code)
	}
	return fmt.Sprintf("S3 refuses byokd in the bucket %s: requests have failed in the last minute with %s.", bucket, e.Code)
}

// bucketObserver counts requests, and has the status tell of upstreams that cannot be used.
type bucketObserver struct {
	*metrics.Objects
	buckets map[string]*bucketState
}

// Done implements objstore.Observer.
func (o bucketObserver) Done(e objstore.Event) {
	o.Objects.Done(e)
	if e.UpstreamFailed {
		o.buckets[e.Bucket].upstreamFailed(e)
	}
}
