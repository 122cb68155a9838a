package kmstest

import (
	"context"
	"encoding/xml"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// FaultKind says what an injected fault does to a call.
type FaultKind string

const (
	FaultThrottle FaultKind = "throttle" // ThrottlingException, HTTP 400
	FaultLatency  FaultKind = "latency"  // the call goes on after a delay
	FaultError    FaultKind = "error"    // a server error, by default KMSInternalException, HTTP 500
	FaultHang     FaultKind = "hang"     // no answer until the fault is cleared; then the call goes on
	FaultCut      FaultKind = "cut"      // the connection is reset
)

// Fault is an injected fault. Faults live in memory: they end with the process.
type Fault struct {
	ID   int       `json:"id"` // given by Inject
	Kind FaultKind `json:"kind"`
	// Service is "kms" (the default), "sts", "s3" or "*".
	Service string `json:"service,omitempty"`
	// Operations are the operations concerned, with wildcards as in policies; empty means all.
	Operations []string `json:"operations,omitempty"`
	// AccessKey, Region and Key narrow the fault to one caller, one signed
	// region, one key ARN; empty means any.
	AccessKey string `json:"access_key,omitempty"`
	Region    string `json:"region,omitempty"`
	Key       string `json:"key,omitempty"`
	// Skip lets so many calls pass before the fault begins.
	Skip int `json:"skip,omitempty"`
	// Count ends the fault after so many calls; 0 means until it is cleared.
	Count int `json:"count,omitempty"`
	// DelayMillis is the delay of FaultLatency.
	DelayMillis int64 `json:"delay_ms,omitempty"`
	// Status, Code and Message replace the answer of FaultThrottle and FaultError.
	Status  int    `json:"status,omitempty"`
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
}

// maxDelay bounds FaultLatency; what lasts longer is a hang.
const maxDelay = 10 * time.Minute

func (f *Fault) complete() error {
	switch f.Kind {
	case FaultThrottle:
		f.answer(http.StatusBadRequest, "ThrottlingException", "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.")
	case FaultError:
		f.answer(http.StatusInternalServerError, "KMSInternalException", "The service encountered an internal error (injected).")
	case FaultLatency:
		if f.DelayMillis <= 0 || f.DelayMillis > maxDelay.Milliseconds() {
			return fmt.Errorf("latency needs a delay of 1 ms to %v", maxDelay)
		}
	case FaultHang, FaultCut:
	default:
		return fmt.Errorf("unknown fault %q: want throttle, latency, error, hang or cut", f.Kind)
	}
	if f.Service == "" {
		f.Service = "kms"
	}
	if !slices.Contains([]string{"kms", "sts", "s3", "*"}, f.Service) {
		return fmt.Errorf("unknown service %q: want kms, sts, s3 or *", f.Service)
	}
	if f.Status != 0 && (f.Status < 400 || f.Status > 599) {
		return fmt.Errorf("status %d is not an error: want 400 to 599", f.Status)
	}
	if f.Count < 0 || f.Skip < 0 {
		return fmt.Errorf("count %d or skip %d is negative", f.Count, f.Skip)
	}
	return nil
}

func (f *Fault) answer(status int, code, message string) {
	if f.Status == 0 {
		f.Status = status
	}
	if f.Code == "" {
		f.Code = code
	}
	if f.Message == "" {
		f.Message = message
	}
}

func (f *Fault) concerns(c *call) bool {
	return (f.Service == "*" || f.Service == c.event.Service) &&
		(f.AccessKey == "" || f.AccessKey == c.event.AccessKey) &&
		(f.Region == "" || f.Region == c.event.Region) &&
		(f.Key == "" || f.Key == c.event.Key) &&
		(len(f.Operations) == 0 || slices.ContainsFunc(f.Operations, func(op string) bool {
			return wildcard(strings.ToLower(op), strings.ToLower(c.op))
		}))
}

// activeFault is a fault and the channel that its end closes.
type activeFault struct {
	Fault
	ended chan struct{}
}

type faultSet struct {
	mu     sync.Mutex
	active []*activeFault // guarded by mu, in order of injection
	nextID int            // guarded by mu
	held   int            // guarded by mu; calls that wait in a fault right now
	moved  chan struct{}  // guarded by mu; closed and replaced when held changes
	closed chan struct{}  // closed by close, once
	once   sync.Once
}

func newFaultSet() *faultSet {
	return &faultSet{nextID: 1, moved: make(chan struct{}), closed: make(chan struct{})}
}

func (fs *faultSet) add(f Fault) (Fault, error) {
	if err := f.complete(); err != nil {
		return Fault{}, err
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.ID = fs.nextID
	fs.nextID++
	fs.active = append(fs.active, &activeFault{Fault: f, ended: make(chan struct{})})
	return f, nil
}

// remove ends one fault, or all with id 0, and returns how many.
func (fs *faultSet) remove(id int) int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := 0
	fs.active = slices.DeleteFunc(fs.active, func(f *activeFault) bool {
		if id != 0 && f.ID != id {
			return false
		}
		close(f.ended)
		n++
		return true
	})
	return n
}

func (fs *faultSet) list() []Fault {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	out := make([]Fault, 0, len(fs.active))
	for _, f := range fs.active {
		out = append(out, f.Fault)
	}
	return out
}

// take returns the faults for a call and counts them.
func (fs *faultSet) take(c *call) []*activeFault {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var out []*activeFault
	fs.active = slices.DeleteFunc(fs.active, func(f *activeFault) bool {
		if !f.concerns(c) {
			return false
		}
		if f.Skip > 0 {
			f.Skip--
			return false
		}
		out = append(out, &activeFault{Fault: f.Fault, ended: f.ended})
		if f.Count == 0 {
			return false
		}
		f.Count--
		// A hang whose count is used up still holds its call until it is cleared.
		return f.Count == 0 && f.Kind != FaultHang
	})
	return out
}

func (fs *faultSet) idle() bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.active) == 0
}

func (fs *faultSet) close() { fs.once.Do(func() { close(fs.closed) }) }

// apply lets the faults have their way with a call; true when the call is over.
func (fs *faultSet) apply(w http.ResponseWriter, r *http.Request, c *call) (done bool) {
	for _, f := range fs.take(c) {
		c.event.Fault = string(f.Kind)
		switch f.Kind {
		case FaultLatency:
			timer := time.NewTimer(time.Duration(f.DelayMillis) * time.Millisecond)
			done = fs.wait(r, timer.C, f.ended)
			timer.Stop()
		case FaultHang:
			done = fs.wait(r, nil, f.ended)
		case FaultCut:
			done = true
		default:
			c.refuse(w, &apiError{Code: f.Code, Message: f.Message, Status: f.Status})
			return true
		}
		if done {
			c.event.Error = "ConnectionCut"
			c.log(0)
			cut(w)
			return true
		}
	}
	return false
}

// wait waits for the timer, the end of the fault, the end of the caller or of
// the server; true when the connection is to be cut.
func (fs *faultSet) wait(r *http.Request, timer <-chan time.Time, ended <-chan struct{}) bool {
	fs.hold(1)
	defer fs.hold(-1)
	select {
	case <-timer:
		return false
	case <-ended:
		return false
	case <-r.Context().Done():
		return true
	case <-fs.closed:
		return true
	}
}

func (fs *faultSet) hold(n int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.held += n
	close(fs.moved)
	fs.moved = make(chan struct{})
}

// holding returns how many calls wait in a fault, and a channel that is closed
// at the next change of it.
func (fs *faultSet) holding() (int, <-chan struct{}) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.held, fs.moved
}

// refuse answers with an error in the service's own protocol.
func (c *call) refuse(w http.ResponseWriter, aerr *apiError) {
	switch c.event.Service {
	case "sts":
		c.answerSTS(w, nil, aerr)
	case "s3":
		c.refuseS3(w, aerr)
	default:
		c.answer(w, nil, aerr)
	}
}

// s3Error is an error as S3 puts it on the wire.
type s3Error struct {
	XMLName   xml.Name `xml:"Error"`
	Code      string
	Message   string
	RequestID string `xml:"RequestId"`
}

// refuseS3 gives the injected errors the names they have in S3.
func (c *call) refuseS3(w http.ResponseWriter, aerr *apiError) {
	out := *aerr
	switch out.Code {
	case "ThrottlingException":
		out = apiError{Code: "SlowDown", Message: "Please reduce your request rate.", Status: http.StatusServiceUnavailable}
	case "KMSInternalException":
		out = apiError{Code: "InternalError", Message: "We encountered an internal error. Please try again.", Status: http.StatusInternalServerError}
	}
	c.event.Error, c.event.Message = out.Code, out.Message
	c.log(out.Status)
	body, _ := xml.Marshal(s3Error{Code: out.Code, Message: out.Message, RequestID: c.event.RequestID}) // strings only
	w.Header().Set("Content-Type", "application/xml")
	w.Header().Set("x-amz-request-id", c.event.RequestID)
	w.WriteHeader(out.Status)
	w.Write(body)
}

// AwaitHeld waits until at least n calls wait in a hang or a delay.
func (s *Server) AwaitHeld(ctx context.Context, n int) error {
	for {
		held, changed := s.faults.holding()
		if held >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d calls wait in faults, want %d: %w", held, n, ctx.Err())
		}
	}
}

// FaultyS3 puts the faults injected for service "s3" in front of an S3 server.
// Their operations are HTTP methods. Only calls that a fault answers are logged.
func (s *Server) FaultyS3(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.faults.idle() || !s.faults.apply(w, r, s.newCall(r, "s3", r.Method)) {
			next.ServeHTTP(w, r)
		}
	})
}

// cut resets the connection under a response: the client sees neither status nor FIN.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // HTTP/2 and tests' recorders: the server ends the stream
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}
