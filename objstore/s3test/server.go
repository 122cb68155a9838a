package s3test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// Server is an S3 service in memory. Its methods may be called at any time from
// any goroutine.
type Server struct {
	http *httptest.Server

	mu      sync.Mutex
	buckets map[string]map[string]*Stored // guarded by mu
	uploads map[string]*upload            // guarded by mu
	faults  []*Fault                      // guarded by mu
	calls   map[string]int                // guarded by mu
	serial  int                           // guarded by mu
	// discard forgets the bytes of objects, for tests of large ones.
	discard bool // guarded by mu
	// careless ignores the preconditions of writes.
	careless bool // guarded by mu
	// patience is for how long a body may stand still; 0 is for ever.
	patience time.Duration // guarded by mu
	// checksums are demanded of uploads.
	checksums bool // guarded by mu
	// locked are the buckets with versions and Object Lock, versions their objects by
	// bucket/key, the oldest first.
	locked   map[string]bool      // guarded by mu
	versions map[string][]*Stored // guarded by mu
}

// Stored is one object.
type Stored struct {
	Data     []byte
	Size     int64   // length, also when Data was discarded
	Parts    []int64 // lengths, of an object that was uploaded in parts
	ETag     string
	Header   http.Header // content headers and x-amz-meta-*
	Tags     string
	Grants   http.Header // x-amz-acl and x-amz-grant-* that it was created with
	Version  string      // in locked buckets
	Tier     string      // that its restore was asked for with
	Modified time.Time
	checksum string // CRC32 that a part was uploaded with
}

type upload struct {
	bucket, key string
	header      http.Header
	tags        string
	grants      http.Header
	algorithm   string // of the checksums of its parts; may be empty
	parts       map[int]*Stored
}

// Fault is a misbehaviour for the requests that Match says yes to, Times times
// (0: for ever).
type Fault struct {
	Match func(r *http.Request) bool
	Times int
	// Status and Code answer instead of the service, before the body is read.
	Status int
	Code   string
	// Persist carries the request out all the same, and fails afterwards.
	Persist bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// CutAt breaks the connection after so many bytes of the answer, StallAt stops
	// there until Release is closed. 0 is off; use 1 for "at once".
	CutAt, StallAt int64
	Release        chan struct{}
	// FlipAt changes one bit of the byte at this offset of a request's body; 0 is off.
	FlipAt int64
	// Change rewrites the bytes of an answer.
	Change func(body []byte) []byte
}

// New starts a server with the given buckets; Close ends it.
func New(buckets ...string) *Server {
	s := newServer(buckets)
	s.http = httptest.NewServer(s)
	return s
}

// NewTLS is New for a server that is spoken to over TLS.
func NewTLS(buckets ...string) *Server {
	s := newServer(buckets)
	s.http = httptest.NewTLSServer(s)
	return s
}

func newServer(buckets []string) *Server {
	s := &Server{buckets: map[string]map[string]*Stored{}, uploads: map[string]*upload{}, calls: map[string]int{}, locked: map[string]bool{}, versions: map[string][]*Stored{}}
	for _, b := range buckets {
		s.buckets[b] = map[string]*Stored{}
	}
	return s
}

// Close stops the server.
func (s *Server) Close() {
	s.http.CloseClientConnections()
	s.http.Close()
}

// URL is the endpoint, for path-style clients.
func (s *Server) URL() string { return s.http.URL }

// Client makes an AWS client for the server.
func (s *Server) Client(tune ...func(*s3.Options)) *s3.Client {
	o := s3.Options{
		BaseEndpoint: aws.String(s.URL()), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("upstream", "upstream-secret", ""),
		// As many attempts as by default, without the seconds between them.
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) { o.MaxBackoff = 20 * time.Millisecond }),
	}
	if s.http.TLS != nil {
		o.HTTPClient = awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.TLSClientConfig = s.http.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
		})
	}
	return s3.New(o, tune...)
}

// Inject adds a fault.
func (s *Server) Inject(f *Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, f)
}

// Heal removes all faults.
func (s *Server) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// Discard makes the server forget the bytes of what is stored from now on, and
// not hash them, for tests of memory and speed.
func (s *Server) Discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.discard = true
}

// Object returns a copy of a stored object, or nil.
func (s *Server) Object(bucket, key string) *Stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.buckets[bucket][key]
	if o == nil {
		return nil
	}
	c := *o
	c.Data, c.Header = bytes.Clone(o.Data), o.Header.Clone()
	return &c
}

// Replace stores an object as it is given, ETag included.
func (s *Server) Replace(bucket, key string, o *Stored) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.Size = int64(len(o.Data))
	s.buckets[bucket][key] = o
}

// ReplaceLocked is Replace for a Fault's Match, which runs under the server's lock.
func (s *Server) ReplaceLocked(bucket, key string, o *Stored) {
	o.Size = int64(len(o.Data))
	s.buckets[bucket][key] = o
}

// IgnoreConditions makes the server one that does not know the preconditions of
// writes, as some stores do.
func (s *Server) IgnoreConditions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.careless = true
}

// GiveUpAfter makes the server answer RequestTimeout, and close the connection, when
// nothing of a body came for so long, as S3 does; 0 is never.
func (s *Server) GiveUpAfter(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.patience = d
}

// DemandChecksums makes the server refuse objects and parts without a checksum, as S3
// does in buckets with a default retention.
func (s *Server) DemandChecksums() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.checksums = true
}

// Remove forgets an object.
func (s *Server) Remove(bucket, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.buckets[bucket], key)
}

// Calls returns how many requests "METHOD" or "METHOD subresource" had.
func (s *Server) Calls(what string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[what]
}

// Uploads returns the number of uploads in progress.
func (s *Server) Uploads() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.uploads)
}

// Holds reports where a plain text is found in anything the server holds, or "".
func (s *Server) Holds(plain []byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := func(o *Stored) bool {
		if bytes.Contains(o.Data, plain) {
			return true
		}
		for name, values := range o.Header {
			if strings.Contains(name+": "+strings.Join(values, ","), string(plain)) {
				return true
			}
		}
		return false
	}
	for bucket, objects := range s.buckets {
		for key, o := range objects {
			if found(o) {
				return bucket + "/" + key
			}
		}
	}
	for id, u := range s.uploads {
		for n, part := range u.parts {
			if found(part) {
				return fmt.Sprintf("upload %s part %d", id, n)
			}
		}
	}
	return ""
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault := s.faultFor(r)
	if fault != nil && fault.Persist {
		s.serve(discardAnswer{http.Header{}}, r)
	}
	if fault != nil && fault.Reset {
		panic(http.ErrAbortHandler)
	}
	if fault != nil && fault.Status != 0 {
		refuse(w, fault.Status, fault.Code)
		return
	}
	if fault != nil && fault.FlipAt > 0 {
		r.Body = &flipped{ReadCloser: r.Body, left: fault.FlipAt}
	}
	if fault != nil {
		w = &faulty{ResponseWriter: w, fault: fault}
	}
	s.serve(w, r)
}

func (s *Server) faultFor(r *http.Request) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[r.Method]++
	for name, v := range r.URL.Query() {
		if v[0] == "" || name == "uploadId" {
			s.calls[r.Method+" "+name]++
		}
	}
	for i, f := range s.faults {
		if f.Match != nil && !f.Match(r) {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
				copied := *f
				copied.Times = 1
				return &copied
			}
		}
		return f
	}
	return nil
}

// faulty is an answer that goes wrong.
type faulty struct {
	http.ResponseWriter
	fault *Fault
	sent  int64
}

func (f *faulty) Write(b []byte) (int, error) {
	if f.fault.Change != nil {
		return f.ResponseWriter.Write(f.fault.Change(bytes.Clone(b)))
	}
	total := len(b)
	for b != nil {
		limit, act := f.fault.StallAt, f.stall
		if limit == 0 || f.fault.CutAt > 0 && f.fault.CutAt < limit {
			limit, act = f.fault.CutAt, func() { panic(http.ErrAbortHandler) }
		}
		if limit == 0 || f.sent+int64(len(b)) < limit {
			break
		}
		n := max(limit-f.sent, 0)
		if _, err := f.ResponseWriter.Write(b[:n]); err != nil {
			return 0, err
		}
		f.sent += n
		b = b[n:]
		act()
	}
	n, err := f.ResponseWriter.Write(b)
	f.sent += int64(n)
	return total, err
}

// stall waits, once, in the midst of an answer.
func (f *faulty) stall() {
	_ = http.NewResponseController(f.ResponseWriter).Flush() // the client may have left
	<-f.fault.Release
	rest := *f.fault
	rest.StallAt = 0
	f.fault = &rest
}

// flipped is a request's body with one bit changed, left bytes from here.
type flipped struct {
	io.ReadCloser
	left int64
}

// Read implements io.Reader.
func (f *flipped) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if f.left >= 0 && f.left < int64(n) {
		p[f.left] ^= 1
	}
	f.left -= int64(n)
	return n, err
}

// discardAnswer swallows an answer.
type discardAnswer struct{ h http.Header }

func (d discardAnswer) Header() http.Header         { return d.h }
func (d discardAnswer) Write(b []byte) (int, error) { return len(b), nil }
func (d discardAnswer) WriteHeader(int)             {}

func refuse(w http.ResponseWriter, status int, code string) { refuseWith(w, status, code, code) }

func refuseWith(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.Header().Set("X-Amz-Request-Id", "S3TEST")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, message)
}

func answer(w http.ResponseWriter, doc any) {
	body, err := xml.Marshal(doc)
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/xml")
	w.Write(append([]byte(xml.Header), body...))
}

// sorted returns the keys of a bucket with a prefix, in order.
func sorted(objects map[string]*Stored, prefix string) []string {
	var keys []string
	for k := range objects {
		if strings.HasPrefix(k, prefix) {
			keys = append(keys, k)
		}
	}
	sort.Strings(keys)
	return keys
}

// take reads a body to its announced end; a short one is no object. It answers a
// request whose body stood still for too long.
func (s *Server) take(w http.ResponseWriter, r *http.Request) (*Stored, error) {
	s.mu.Lock()
	discard, patience, demanded := s.discard, s.patience, s.checksums
	s.mu.Unlock()
	body := io.Reader(r.Body)
	if patience > 0 {
		control := http.NewResponseController(w)
		defer func() { _ = control.SetReadDeadline(time.Time{}) }() // the connection may be closed
		body = &impatient{body: r.Body, control: control, patience: patience}
	}
	sum, err := newChecksum(r.Header)
	if err == nil && sum == nil && demanded {
		err = &refusal{http.StatusBadRequest, "InvalidRequest", "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters"}
	}
	var o *Stored
	if err == nil {
		o, err = readStored(sum.over(r, body), decodedLength(r), discard)
	}
	if err == nil {
		o.checksum, err = sum.check(r)
	}
	var no *refusal
	switch {
	case errors.As(err, &no):
		refuseWith(w, no.status, no.code, no.message)
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header().Set("Connection", "close")
		refuse(w, http.StatusBadRequest, "RequestTimeout")
	}
	return o, err
}

// impatient is a body that fails when it stands still.
type impatient struct {
	body     io.Reader
	control  *http.ResponseController
	patience time.Duration
}

// Read implements io.Reader.
func (i *impatient) Read(p []byte) (int, error) {
	if err := i.control.SetReadDeadline(time.Now().Add(i.patience)); err != nil {
		return 0, err
	}
	return i.body.Read(p)
}

func readStored(body io.Reader, want int64, discard bool) (*Stored, error) {
	sum := newSum()
	o := &Stored{Modified: time.Now().UTC().Truncate(time.Second), Header: http.Header{}}
	var err error
	if discard {
		o.Size, err = io.Copy(io.Discard, body)
	} else {
		o.Data, err = io.ReadAll(io.TeeReader(body, sum))
		o.Size = int64(len(o.Data))
	}
	if err == nil && want >= 0 && o.Size != want {
		err = io.ErrUnexpectedEOF
	}
	o.ETag = sum.etag()
	return o, err
}
