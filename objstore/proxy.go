package objstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/connlimit"
	"github.com/byokd/byokd/keyguard"
)

// Defaults and limits. Each is a bound that a client cannot exceed.
const (
	// defaultHoldFor is how long a new request waits for a frozen key. Clients give
	// up after 30 s (AWS SDK for Java) to 60 s (boto3); 20 s leaves room for a slow
	// upstream and for the answer, so that they see 503 and try again.
	defaultHoldFor = 20 * time.Second
	// retryAfterSeconds is what a client is asked to wait after a 503: a thaw takes
	// at most a probe interval (1 s) and the second it has itself.
	retryAfterSeconds = 2
	// maxHeaderBytes bounds the request headers: S3 allows 8 KiB of metadata and
	// headers; a presigned URL may add some more.
	maxHeaderBytes = 32 << 10
	// readHeaderTimeout ends connections that never send a request.
	readHeaderTimeout = 10 * time.Second
	// idleTimeout closes kept connections; above the 60 s that SDK pools keep
	// theirs, so that the client is the one who closes.
	idleTimeout = 120 * time.Second
	// sendBuffer bounds the plain bytes that the kernel may still hold for a slow
	// client when a freeze begins; the kernel doubles it for its own books.
	sendBuffer = 256 << 10
	// maxKeyBytes is S3's own limit of an object key.
	maxKeyBytes = 1024
)

// Credentials finds the secret of an access key. It is asked on each request, so
// an implementation may reload; it must be safe for concurrent use and fast.
type Credentials interface {
	Secret(accessKey string) (secret string, known bool)
}

// StaticCredentials maps access keys to their secrets; it must not change while
// a Proxy uses it.
type StaticCredentials map[string]string

// Secret implements Credentials.
func (s StaticCredentials) Secret(accessKey string) (string, bool) {
	secret, known := s[accessKey]
	return secret, known && secret != ""
}

// Bucket is one bucket as clients see it.
type Bucket struct {
	// Upstream holds the sealed objects.
	Upstream Upstream
	// Guard says whether the bucket's key may be used, and holds its data keys.
	Guard *keyguard.Guard
	// Binding is the encryption context of the bucket's data keys. Changing it
	// makes the objects already written unreadable.
	Binding keyguard.Binding
	// Region is what GetBucketLocation answers; empty means us-east-1.
	Region string
	// ClearMetadata leaves x-amz-meta-* readable upstream instead of sealing it in
	// one entry.
	ClearMetadata bool
	// Compress packs objects that are put in one request before they are sealed.
	// Listings then ask for the length of each object (see measure).
	Compress bool
}

// Options configure a Proxy. Buckets and Credentials are required.
type Options struct {
	// Buckets by the name clients use.
	Buckets     map[string]Bucket
	Credentials Credentials
	// BaseDomains are host names below which virtual-host style is understood:
	// with "s3.local", "documents.s3.local" is bucket documents.
	BaseDomains []string
	// HoldFor is how long a new request waits for a frozen key before it is
	// answered 503; default 20 s, negative: not at all.
	HoldFor time.Duration
	// StallTimeout is how long a request waits for its client while fewer than 64 KiB
	// move, before it is ended: an upload with RequestTimeout, a download by closing the
	// connection. Time in which the key is frozen does not count; default 2 min.
	StallTimeout time.Duration
	// KeyPeriod and KeyObjects bound the use of one data key for new objects;
	// default 1 h and 2^20 objects.
	KeyPeriod  time.Duration
	KeyObjects int64
	Observer   Observer
	Logger     *zap.Logger
	// Now is the clock for signatures and key periods; default time.Now.
	Now func() time.Time
}

// Proxy is the encrypting S3 proxy: an http.Handler, safe for concurrent use. Use
// Server, or give ConnContext to the http.Server that serves it: without it a
// client that leaves during an upload is noticed late.
type Proxy struct {
	buckets map[string]*bucket // fixed after New
	opts    Options            // fixed after New
	log     *zap.Logger
	limits  limits // fixed after New
	pool    bufferPool
	packer  *packer
	lanes   atomic.Uint32 // spreads requests over the gate's lanes

	stopping context.Context // ends when Server is shut down: no new request waits for a frozen key any more
	stop     context.CancelFunc
}

// bucket is a Bucket with the state that belongs to it.
type bucket struct {
	Bucket
	name      string
	keyARN    string // of the guard's KMS key, for headers
	ring      *keyring
	writing   *writingKey
	layouts   *layoutCache
	writes    atomic.Int64 // requests under way that may seal something
	packed    packedLengths
	opened    openBatches
	sums      recent[partName, partSum]
	uploads   recent[UploadID, begunUpload]
	untold    atomic.Bool  // that checksums of uploads in parts cannot be kept
	aclUntold atomic.Bool  // that ACLs cannot be read
	refused   atomic.Int64 // when it was last told that the upstream refuses byokd, in ns; 0 before
}

// tellAgainAfter is how often it is logged that an upstream refuses byokd.
const tellAgainAfter = time.Minute

// limits are sizes and times that tests make smaller.
type limits struct {
	upstreamPut  int64         // most sealed bytes that the upstream takes in one request
	upstreamPart int64         // plain bytes in each part of an object that exceeds it
	keepAlive    time.Duration // between signs of life in a long answer
	step         time.Duration // what a step before the answer may take with the key at hand
}

// New makes a Proxy. It talks to nobody; the first write of each bucket and
// period makes a data key.
func New(opts Options) (*Proxy, error) {
	if len(opts.Buckets) == 0 {
		return nil, errors.New("objstore: no bucket is configured; name at least one under objects.buckets")
	}
	if opts.Credentials == nil {
		return nil, errors.New("objstore: no credentials are configured; clients could not sign their requests")
	}
	opts.setDefaults()
	p := &Proxy{buckets: make(map[string]*bucket, len(opts.Buckets)), opts: opts, log: opts.Logger}
	p.stopping, p.stop = context.WithCancel(context.Background())
	var err error
	if p.packer, err = newPacker(); err != nil {
		return nil, err
	}
	p.limits = limits{upstreamPut: maxPut, upstreamPart: upstreamPart, keepAlive: keepAliveEvery, step: defaultHoldFor}
	for name, b := range opts.Buckets {
		if name == "" || strings.ContainsRune(name, '/') {
			return nil, fmt.Errorf("objstore: %q cannot be the name of a bucket", name)
		}
		if b.Upstream == nil || b.Guard == nil {
			return nil, fmt.Errorf("objstore: bucket %s needs an upstream and a guard", name)
		}
		kept := &bucket{Bucket: b, name: name, keyARN: b.Guard.Status().KeyARN, layouts: newLayoutCache()}
		kept.ring = newKeyring(b.Upstream, b.Binding, guardedKeys{bucket: kept, now: opts.Now})
		kept.writing = newWritingKey(kept, opts.KeyPeriod, opts.KeyObjects, opts.Now)
		b.Guard.Subscribe(&kept.opened)
		p.buckets[name] = kept
	}
	return p, nil
}

func (o *Options) setDefaults() {
	if o.HoldFor == 0 {
		o.HoldFor = defaultHoldFor
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = defaultStallTimeout
	}
	if o.KeyPeriod <= 0 {
		o.KeyPeriod = time.Hour
	}
	if o.KeyObjects <= 0 {
		o.KeyObjects = 1 << 20
	}
	if o.Observer == nil {
		o.Observer = noObserver{}
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
}

// Server returns an http.Server that serves p with the limits it relies on; the
// caller sets TLSConfig, serves and shuts it down; then what has not been answered and
// waits for a frozen key is told to come again. There is no ReadTimeout or
// WriteTimeout, since a transfer may pause as long as its key is frozen: see
// Options.StallTimeout.
func (p *Proxy) Server() *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true) // as S3; a stream of HTTP/2 has no connection to watch
	server := &http.Server{
		Protocols:         &protocols,
		Handler:           p,
		ConnContext:       p.ConnContext,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          zap.NewStdLog(p.log),
	}
	server.RegisterOnShutdown(p.stop)
	return server
}

// ConnContext keeps the connection of each request, for http.Server.ConnContext.
func (p *Proxy) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if tcp, ok := rawConn(c).(*net.TCPConn); ok {
		// Best effort: a failure leaves the kernel's own, larger bound.
		_ = tcp.SetWriteBuffer(sendBuffer)
	}
	return context.WithValue(ctx, connKey{}, c)
}

// call is one request on its way through the proxy. It belongs to the goroutine
// that serves the request.
type call struct {
	op      Op
	bucket  *bucket
	key     string
	query   map[string][]string
	r       *http.Request
	w       *response
	body    *ingress // nil for operations without a body
	id      string   // x-amz-request-id
	lane    uint32   // of the gate
	held    time.Duration
	failed  error // an error that stands in a document with status 200
	waits   clientWaits
	stalled atomic.Bool // the client was waited for too long, and is not any more
}

// arg returns a query parameter, or "".
func (c *call) arg(name string) string {
	if v := c.query[name]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// ref names the object or version that the request is about.
func (c *call) ref() Ref { return Ref{Key: c.key, VersionID: c.arg("versionId")} }

// mayWrite reports whether the request may seal something into its bucket.
func (c *call) mayWrite() bool {
	return c.r.Method == http.MethodPut || c.r.Method == http.MethodPost
}

// interrupted reports whether byokd itself broke off reading the body.
func (c *call) interrupted() bool {
	return c.stalled.Load() || c.body != nil && c.body.interrupted.Load()
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	c := &call{r: r, w: &response{w: w}, id: newRequestID(), lane: p.lanes.Add(1)}
	c.waits.limit, c.w.wait = p.opts.StallTimeout, &c.waits.giving
	defer watchClient(r.Context(), func() { cancel(errClientLeft) }, c.lookAtWaits)()
	w.Header().Set("X-Amz-Request-Id", c.id)
	w.Header().Set("Server", "byokd")
	err := c.stallOf(p.serve(ctx, c))
	broken := false
	switch {
	case err == nil:
	case c.w.started || ctx.Err() != nil && !c.interrupted():
		broken = true
	default:
		if errorOf(err).Status == http.StatusServiceUnavailable && !c.interrupted() {
			linger(w, r)
		}
		p.writeError(c, err)
	}
	p.finish(ctx, c, errors.Join(err, c.failed), broken, time.Since(start))
	if broken {
		// A body that was begun cannot be taken back: breaking the connection is the
		// only answer that no client takes for success.
		panic(http.ErrAbortHandler)
	}
}

// serve runs the ordering rules of doc.go.
func (p *Proxy) serve(ctx context.Context, c *call) error {
	unknown := p.route(c) // names the operation also for a request that is refused
	grant, err := &grant{kind: payloadUnsigned}, error(nil)
	if !unsigned(c.r) {
		grant, err = p.authenticate(c.r)
	}
	if err == nil {
		err = unknown
	}
	if err != nil {
		return err
	}
	if !unsigned(c.r) { // the connection of somebody known, which others do not displace
		if conn, ok := c.r.Context().Value(connKey{}).(net.Conn); ok {
			defer connlimit.Busy(conn)()
		}
	}
	if err := adoptArgs(c); err != nil {
		return err
	}
	if err := refuseHeaders(c); err != nil {
		return err
	}
	if err := p.resolveBucket(c); err != nil {
		return err
	}
	if c.bucket != nil {
		c.waits.concerns(c.bucket.Guard)
		if err := p.admit(ctx, c); err != nil {
			return err
		}
	}
	if c.body, err = newIngress(c, grant); err != nil {
		return err
	}
	defer c.body.releaseUnlessLent()
	ctx, c.w.passing = withPassing(ctx, c.op, c.r.Header)
	if c.bucket != nil && c.mayWrite() {
		c.bucket.writes.Add(1) // before it takes a data key, so that deleteWithOwn sees it or it finds none
		defer c.bucket.writes.Add(-1)
	}
	return handlers[c.op](p, ctx, c)
}

// finish reports a request to the observer, and to the log where somebody has to
// look after it.
func (p *Proxy) finish(ctx context.Context, c *call, err error, broken bool, took time.Duration) {
	e := Event{Op: c.op, Status: c.w.status, Out: c.w.sent, Took: took, Held: c.held}
	if c.bucket != nil {
		e.Bucket = c.bucket.name
	}
	if c.body != nil {
		e.In = c.body.taken.Load()
	}
	if err != nil {
		e.Code = errorOf(err).Code
		e.UpstreamFailed = c.bucket != nil && ctx.Err() == nil && !c.interrupted() && upstreamUnusable(c.op, err)
	}
	if broken {
		e.Status = 0
		if !c.stalled.Load() && (errors.Is(context.Cause(ctx), errClientLeft) || ctx.Err() != nil) {
			e.Status, e.Code = 499, "ClientLeft"
		}
	}
	p.opts.Observer.Done(e)
	ordinary := e.Status == http.StatusNotImplemented || errors.Is(err, errHeld)
	if err != nil && c.stalled.Load() {
		ordinary = true
		p.log.Warn("a client stalled and was given up", zap.String("op", string(c.op)), zap.String("bucket", e.Bucket), zap.String("key", c.key),
			zap.String("request", c.id), zap.Int64("read", e.In), zap.Int64("written", e.Out), zap.Duration("stallTimeout", c.waits.limit), zap.Error(err))
	}
	if err != nil && (e.Status == 0 || e.Status >= 500) && !ordinary {
		p.log.Warn("request failed", zap.String("op", string(c.op)), zap.String("bucket", e.Bucket), zap.String("key", c.key),
			zap.String("request", c.id), zap.Int("status", e.Status), zap.Error(err))
	}
	if c.bucket != nil && e.Status < 500 && refusesByokd(err) {
		p.tellRefused(c, err)
	}
	if errorIsTampering(err) {
		p.opts.Observer.Tampered(e.Bucket)
		p.log.Error("sealed bytes failed authentication", zap.String("op", string(c.op)), zap.String("bucket", e.Bucket),
			zap.String("key", c.key), zap.String("request", c.id), zap.Error(err))
	}
}

// tellRefused tells those who operate byokd what only they can mend: its clients get an ordinary 403 or 404.
func (p *Proxy) tellRefused(c *call, err error) {
	now, told := time.Now().UnixNano(), c.bucket.refused.Load()
	if now-told < int64(tellAgainAfter) || !c.bucket.refused.CompareAndSwap(told, now) {
		return
	}
	p.log.Warn("the upstream bucket refuses byokd: check objects.buckets.*.upstream and the permissions of byokd's role (byokd preflight)",
		zap.String("op", string(c.op)), zap.String("bucket", c.bucket.name), zap.String("request", c.id), zap.Error(err))
}

// response counts what a client was given.
type response struct {
	w       http.ResponseWriter
	status  int
	started bool
	sent    int64
	wait    *clientWait
	passing *passedThrough // headers of the upstream's answer; nil before it is asked
}

// begin sends the status line and headers.
func (w *response) begin(status int) {
	w.status, w.started = status, true
	if w.passing != nil {
		w.passing.answer(w.header())
	}
	w.w.WriteHeader(status)
}

// Write hands bytes to the client.
func (w *response) Write(b []byte) (int, error) {
	if !w.started {
		w.begin(http.StatusOK)
	}
	w.wait.begin()
	n, err := w.w.Write(b)
	w.wait.end(n)
	w.sent += int64(n)
	return n, err
}

func (w *response) header() http.Header { return w.w.Header() }

// newRequestID returns 16 hex digits, as AWS does.
func newRequestID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return strings.ToUpper(hex.EncodeToString(b[:]))
}
