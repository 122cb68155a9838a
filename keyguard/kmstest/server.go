package kmstest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"go.uber.org/zap"
)

const (
	targetPrefix = "TrentService."
	// bodyLimit bounds a KMS or STS request: the largest legal one is a 32 KiB
	// policy or a 6 KiB ciphertext, in JSON and base64.
	bodyLimit = 256 << 10
)

// Options configure a Server. The zero value is a server in memory with the
// default credentials and an empty state.
type Options struct {
	// Dir holds the state and the call log; it is made if missing and must be
	// used by one process at a time. Empty means in memory.
	Dir string
	// Account is the twelve-digit account of every key; default DefaultAccount.
	Account string
	// Credentials are the known access keys; default DefaultCredentials.
	Credentials []Credential
	// Clock drives key states, deletion dates and rotation; default time.Now.
	Clock func() time.Time
	// SignatureClock judges the age of signatures; default time.Now. It is
	// separate so that a test may let 30 days pass while the SDK signs in the present.
	SignatureClock func() time.Time
	// ReplicaDelay is how long a new replica of a multi-Region key stays in the state
	// Creating, as on AWS, where it takes seconds; default 0.
	ReplicaDelay time.Duration
	// CallLimit is how many calls the log keeps in memory; default 10000.
	CallLimit int
	// Logger reports what the server does by itself; default none.
	Logger *zap.Logger
}

// Server is the stand-in. It is safe for concurrent use.
type Server struct {
	dir            string // "" in memory
	account        string
	credentials    []Credential
	now            func() time.Time
	signatureClock func() time.Time
	replicaDelay   time.Duration
	logger         *zap.Logger
	signer         *v4.Signer
	operations     map[string]operation
	calls          *callLog
	faults         *faultSet
	lock           *os.File // holds the flock on dir; nil in memory

	mu        sync.Mutex            // serialises changes of the state
	published atomic.Pointer[state] // immutable snapshot; replaced under mu
	due       atomic.Int64          // unix nanoseconds of the next thing that happens by itself; 0 none
}

// New makes a server and reads its state. It fails if the directory cannot be
// used or another process holds it.
func New(o Options) (*Server, error) {
	if o.Account == "" {
		o.Account = DefaultAccount
	}
	if o.Credentials == nil {
		o.Credentials = DefaultCredentials()
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.SignatureClock == nil {
		o.SignatureClock = time.Now
	}
	if o.CallLimit <= 0 {
		o.CallLimit = 10000
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	s := &Server{
		account: o.Account, credentials: slices.Clone(o.Credentials),
		now: func() time.Time { return o.Clock().UTC() }, signatureClock: o.SignatureClock, replicaDelay: o.ReplicaDelay,
		logger: o.Logger, signer: v4.NewSigner(), operations: operations(), faults: newFaultSet(),
	}
	if err := s.open(o); err != nil {
		s.Close()
		return nil, fmt.Errorf("kmstest: %w", err)
	}
	return s, nil
}

func (s *Server) open(o Options) error {
	if o.Dir == "" {
		s.calls = newCallLog(o.CallLimit)
		s.publish(newState())
		return nil
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	s.dir = dir
	if s.lock, err = lockDir(dir); err != nil {
		return err
	}
	st, err := loadState(dir)
	if err != nil {
		return err
	}
	s.publish(st)
	s.calls, err = openCallLog(filepath.Join(dir, callsFile), o.CallLimit)
	return err
}

// Interrupt ends calls that hang in an injected fault or wait for the call log,
// for good: it is the first step of a graceful shutdown.
func (s *Server) Interrupt() { s.faults.close() }

// Close releases the directory and ends calls that hang in an injected fault.
// It does not wait for calls under way: shut the HTTP server down first.
func (s *Server) Close() error {
	s.faults.close()
	var errs []error
	if s.calls != nil {
		errs = append(errs, s.calls.close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

func (s *Server) publish(st *state) {
	s.published.Store(st)
	due := int64(0)
	if t := st.nextDue(); !t.IsZero() {
		due = t.UnixNano()
	}
	s.due.Store(due)
}

// snapshot returns the current state after carrying out what is due.
func (s *Server) snapshot() (*state, error) {
	due := s.due.Load()
	if due == 0 || s.now().UnixNano() < due {
		return s.published.Load(), nil
	}
	err := s.update(func(st *state) error { return nil })
	return s.published.Load(), err
}

// update runs f on a copy of the state, makes the copy durable and publishes
// it. If f fails or the copy cannot be written nothing has changed.
func (s *Server) update(f func(*state) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.published.Load().clone()
	st.advance(s.now())
	if err := f(st); err != nil {
		return err
	}
	st.advance(s.now())
	if s.dir != "" {
		if err := st.save(s.dir); err != nil {
			return fmt.Errorf("write state: %w", err)
		}
	}
	s.publish(st)
	return nil
}

// ServeHTTP answers KMS, STS and, below /_devcloud/, the control interface.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case IsControl(r):
		s.serveControl(w, r)
	case r.Header.Get("X-Amz-Target") == "" && IsSTS(r):
		s.serveSTS(w, r)
	default:
		s.serveKMS(w, r)
	}
}

// IsControl tells whether a request is one for the control interface.
func IsControl(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, ControlPath) }

// IsKMS tells whether a request is one for KMS rather than for S3.
func IsKMS(r *http.Request) bool {
	return r.Method == http.MethodPost && strings.HasPrefix(r.Header.Get("X-Amz-Target"), targetPrefix)
}

// IsSTS tells whether a request is one for STS: a form posted to the root.
func IsSTS(r *http.Request) bool {
	return r.Method == http.MethodPost && r.URL.Path == "/" && r.URL.RawQuery == "" &&
		strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded")
}

// serveKMS answers one KMS call.
func (s *Server) serveKMS(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(r, "kms", strings.TrimPrefix(r.Header.Get("X-Amz-Target"), targetPrefix))
	body, aerr := readBody(w, r)
	if aerr != nil {
		c.answer(w, nil, aerr)
		return
	}
	c.learn(body)
	if done := s.faults.apply(w, r, c); done {
		return
	}
	out, aerr := c.perform(r, body)
	c.answer(w, out, aerr)
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, *apiError) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyLimit))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return nil, &apiError{Code: "RequestEntityTooLargeException", Status: http.StatusRequestEntityTooLarge,
			Message: fmt.Sprintf("The request is larger than %d bytes.", bodyLimit)}
	}
	if err != nil {
		return nil, clientError("SerializationException", "The request body ended early.")
	}
	return body, nil
}

// call is one request on its way through the stations named in doc.go. It
// belongs to the goroutine that serves the request.
type call struct {
	s      *Server
	st     *state // one snapshot, or for changing operations the copy
	now    time.Time
	who    caller
	region string
	op     string
	begun  time.Time // wall clock, for the log

	event Call // filled on the way, logged before the answer
}

func (s *Server) newCall(r *http.Request, service, op string) *call {
	c := &call{s: s, now: s.now(), op: op, begun: time.Now()}
	c.event = Call{Time: c.now, Service: service, Operation: op, RequestID: newRequestID(), Source: r.RemoteAddr, Agent: limitString(r.UserAgent(), 200)}
	if sig, aerr := parseAuthorization(r.Header.Get("Authorization")); aerr == nil {
		c.event.AccessKey, c.event.Region = limitString(sig.accessKey, 128), limitString(sig.region, 64)
		if i := slices.IndexFunc(s.credentials, func(k Credential) bool { return k.AccessKey == sig.accessKey }); i >= 0 {
			c.event.Principal = s.credentials[i].caller().arn
		}
	}
	return c
}

// learn notes the key and the encryption context a request names, so that the
// log and the faults know them even if the call is refused early.
func (c *call) learn(body []byte) {
	var in struct {
		KeyId             any
		EncryptionContext map[string]string
	}
	if json.Unmarshal(body, &in) == nil {
		c.event.EncryptionContext = in.EncryptionContext
		if ref, ok := in.KeyId.(string); ok {
			c.event.Key = limitString(ref, 256)
			if st := c.s.published.Load(); c.event.Region != "" {
				if k, aerr := c.s.resolve(st, c.event.Region, ref, aliasAllowed); aerr == nil {
					c.event.Key = k.ARN
				}
			}
		}
	}
}

// perform authenticates and runs the operation.
func (c *call) perform(r *http.Request, body []byte) (any, *apiError) {
	if r.Method != http.MethodPost || r.URL.Path != "/" {
		return nil, &apiError{Code: "UnknownOperationException", Status: http.StatusNotFound}
	}
	who, region, aerr := c.s.authenticate(r, body, "kms")
	if aerr != nil {
		return nil, aerr
	}
	c.who, c.region = who, region
	op, ok := c.s.operations[c.op]
	if !ok {
		return nil, clientError("UnknownOperationException", "")
	}
	if !op.changes {
		st, err := c.s.snapshot()
		if err != nil {
			return nil, errInternal(err)
		}
		c.st = st
		return op.run(c, body)
	}
	var out any
	err := c.s.update(func(st *state) error {
		c.st = st
		var aerr *apiError
		if out, aerr = op.run(c, body); aerr != nil {
			return aerr
		}
		return nil
	})
	if errors.As(err, &aerr) {
		return nil, aerr
	}
	if err != nil {
		return nil, errInternal(err)
	}
	return out, nil
}

// answer logs the call and writes the response.
func (c *call) answer(w http.ResponseWriter, out any, aerr *apiError) {
	status, body := http.StatusOK, []byte(nil)
	var err error
	if aerr == nil && out != nil {
		if body, err = json.Marshal(out); err != nil {
			aerr = errInternal(err)
		}
	}
	if aerr != nil {
		status = aerr.Status
		body, _ = json.Marshal(errorBody{Type: aerr.Code, Message: aerr.Message}) // two strings
		c.event.Error, c.event.Message = aerr.Code, aerr.Message
	}
	c.log(status)
	h := w.Header()
	h.Set("Content-Type", "application/x-amz-json-1.1")
	h.Set("x-amzn-RequestId", c.event.RequestID)
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate, private")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

func (c *call) log(status int) {
	c.event.Status = status
	c.event.TookMicros = time.Since(c.begun).Microseconds()
	c.s.calls.add(c.event)
}

type errorBody struct {
	Type    string `json:"__type"`
	Message string `json:"message,omitempty"`
}

func limitString(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
