package objstore

import "time"

// Observer learns about requests; package metrics turns it into series. Calls
// come from many goroutines at once and must not block.
type Observer interface {
	// Done is called once per request, after its last byte.
	Done(e Event)
	// Held is called with +1 when a request starts to wait for a frozen key and
	// with -1 when it no longer does, so that the sum is the number waiting.
	Held(bucket string, delta int)
	// Tampered is called when sealed bytes failed authentication, before the
	// client learns of it.
	Tampered(bucket string)
}

// Event describes one finished request. Every string in it is drawn from a
// bounded set, so it can be a label.
type Event struct {
	Op     Op
	Bucket string // name of a configured bucket, or empty
	Status int    // HTTP status; 499 when the client left before an answer, 0 when the answer was broken off
	Code   string // S3 error code, empty when the request succeeded
	In     int64  // plain bytes taken from the client
	Out    int64  // plain bytes given to the client
	Took   time.Duration
	Held   time.Duration // part of Took spent waiting for a frozen key

	// UpstreamFailed says that the request failed because the bucket below cannot be used: it is not there, refuses byokd's
	// credentials or role, or cannot be reached. Only the operator of byokd can mend that, none of its clients.
	UpstreamFailed bool
}

// noObserver is what a Proxy without Observer calls.
type noObserver struct{}

func (noObserver) Done(Event)       {}
func (noObserver) Held(string, int) {}
func (noObserver) Tampered(string)  {}
