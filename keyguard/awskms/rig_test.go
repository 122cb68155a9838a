package awskms

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// patience bounds waiting for what must happen; it is no bound of the product.
const patience = 60 * time.Second

// rigInterval is the shortest probe interval, and the lease the shortest that goes with it.
const rigInterval, rigGrace = 100 * time.Millisecond, 2100 * time.Millisecond

// rig is a guard on the shipped client, over TLS, with a key of its own in a
// stand-in that it shares with others.
type rig struct {
	t        *testing.T
	kms      *kmstest.Server
	arn      string
	options  keyguard.Options
	guard    *keyguard.Guard
	front    *httptest.Server // TLS before kms
	registry *metrics.Registry
	logs     *observer.ObservedLogs
	pinned   seal.KeyID
	run      chan error // gets the result of Run

	noDNS, badTLS atomic.Bool
	halves        atomic.Bool // answers stop in their midst, and the connection stays

	endpoint string           // what the client calls, if not the front itself
	date     func() time.Time // of the answers' Date, if not the present; before start only

	mu      sync.Mutex
	audit   []keyguard.AuditRecord // mu
	arrived chan struct{}          // mu; of unwraps that are held; nil: none is
	release chan struct{}          // mu
	fault   int                    // mu; injected by take
}

func newRig(t *testing.T, kms *kmstest.Server) *rig {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	w := &rig{t: t, kms: kms, logs: logs, run: make(chan error, 1)}
	var err error
	if w.arn, err = kms.CreateKey("", "", "", false); err != nil {
		t.Fatal(err)
	}
	w.serve()
	w.options = keyguard.Options{Name: "g", ProbeBinding: keyguard.Binding{Cluster: "acme", Resource: "probe"},
		ProbeInterval: rigInterval, OutageGrace: rigGrace, Audit: w.record, Logger: zap.New(core)}
	w.watch(w.arn)
	return w
}

// startKMS starts a stand-in for KMS that ends after the test.
func startKMS(t *testing.T) *kmstest.Local {
	t.Helper()
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return server
}

// watch makes the guard one of the key arn. Before start only.
func (w *rig) watch(arn string) {
	w.t.Helper()
	w.arn = arn
	w.registry = metrics.NewRegistry("test", "best_effort")
	w.options.Observer = w.registry.NewGuards().Observer("g")
	var err error
	if w.guard, err = keyguard.New(newClient(w.t, w.configuration(), arn, cmp.Or(w.endpoint, w.front.URL)), w.options); err != nil {
		w.t.Fatal(err)
	}
	w.registry.AddGuard(w.guard)
}

// serve puts TLS and the holding of unwraps before the stand-in.
func (w *rig) serve() {
	other := &tls.Config{Certificates: []tls.Certificate{selfSigned(w.t)}, MinVersion: tls.VersionTLS12}
	w.front = httptest.NewUnstartedServer(http.HandlerFunc(w.handle))
	w.front.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		if w.badTLS.Load() {
			return other, nil
		}
		return nil, nil
	}}
	w.front.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are what some rows are about
	w.front.StartTLS()
	w.t.Cleanup(func() {
		w.front.CloseClientConnections()
		w.front.Close()
	})
}

// handle holds unwraps of the pinned root when asked to, and passes all on.
func (w *rig) handle(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the caller has gone
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".Decrypt") && bytes.Contains(body, []byte(binding.Resource)) {
		w.mu.Lock()
		arrived, release := w.arrived, w.release
		w.mu.Unlock()
		if arrived != nil {
			select {
			case arrived <- struct{}{}:
			default:
			}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
	}
	if w.date != nil {
		rw.Header().Set("Date", w.date().UTC().Format(http.TimeFormat))
	}
	if w.halves.Load() {
		w.halfAnswer(rw, r)
		return
	}
	w.kms.ServeHTTP(rw, r)
}

// halfAnswer sends half of an answer, and then nothing until the caller leaves.
func (w *rig) halfAnswer(rw http.ResponseWriter, r *http.Request) {
	whole := httptest.NewRecorder()
	w.kms.ServeHTTP(whole, r)
	maps.Copy(rw.Header(), whole.Header())
	rw.Header().Set("Content-Length", strconv.Itoa(whole.Body.Len()))
	rw.WriteHeader(whole.Code)
	_, _ = rw.Write(whole.Body.Bytes()[:whole.Body.Len()/2]) // the caller may leave at any time
	_ = http.NewResponseController(rw).Flush()
	<-r.Context().Done()
}

// configuration trusts the front and fails where the network is told to.
func (w *rig) configuration() (cfg aws.Config) {
	cfg = configuration(w.t, kmstest.TenantAccessKey, kmstest.TenantSecret)
	pool := x509.NewCertPool()
	pool.AddCert(w.front.Certificate())
	cfg.HTTPClient = awshttp.NewBuildableClient().
		WithTransportOptions(func(t *http.Transport) { t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12} }).
		WithDialerOptions(func(d *net.Dialer) {
			d.Control = func(string, string, syscall.RawConn) error {
				if w.noDNS.Load() { // where the resolver's error arrives
					return &net.DNSError{Err: "no such host", Name: "kms.eu-central-1.amazonaws.com", IsNotFound: true}
				}
				return nil
			}
		})
	return cfg
}

// network switches a failure of the way to KMS on or off; open connections break.
func (w *rig) network(failing *atomic.Bool, on bool) {
	failing.Store(on)
	w.front.CloseClientConnections()
}

func (w *rig) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *rig) record(r keyguard.AuditRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.audit = append(w.audit, r)
}

// start runs the guard until the test ends.
func (w *rig) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		w.run <- w.guard.Run(ctx)
		close(done)
	}()
	w.t.Cleanup(func() {
		w.releaseUnwraps()
		cancel()
		<-done
	})
}

// open starts the guard, waits until it is open, and pins a root.
func (w *rig) open() {
	w.t.Helper()
	w.start()
	w.awaitGate(keyguard.Open)
	id, wrapped, err := w.guard.Create(w.t.Context(), binding)
	w.must(err)
	w.pinned = id
	w.guard.Pin(id, wrapped, binding)
}

// ended waits for the end of Run.
func (w *rig) ended() error {
	w.t.Helper()
	select {
	case err := <-w.run:
		return err
	case <-time.After(patience):
		w.t.Fatalf("Run goes on: %+v", w.guard.Status())
		return nil
	}
}

// take makes KMS answer as b says.
func (w *rig) take(b behaviour) {
	w.t.Helper()
	if b.take != nil {
		b.take(w)
		return
	}
	f := b.fault
	f.Key, f.Operations = w.arn, []string{"Decrypt", "GenerateDataKey*"}
	f, err := w.kms.Inject(f)
	w.must(err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f.ID
}

// give undoes take.
func (w *rig) give(b behaviour) {
	w.t.Helper()
	if b.take != nil {
		b.give(w)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kms.ClearFault(w.fault)
}

// holdUnwraps keeps every unwrap of the pinned root without an answer from now on.
func (w *rig) holdUnwraps() (arrived <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.arrived, w.release = make(chan struct{}, 1), make(chan struct{})
	return w.arrived
}

func (w *rig) releaseUnwraps() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.arrived != nil {
		close(w.release)
		w.arrived = nil
	}
}

func (w *rig) await(what string, ok func(keyguard.Status) bool) keyguard.Status {
	w.t.Helper()
	deadline := time.After(patience)
	for {
		changed := w.guard.Changed()
		s := w.guard.Status()
		if ok(s) {
			return s
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("%s: not within %v; status %+v", what, patience, s)
		}
	}
}

func (w *rig) awaitGate(want ...keyguard.GateState) keyguard.Status {
	w.t.Helper()
	return w.await("the gate", func(s keyguard.Status) bool {
		for _, g := range want {
			if s.Gate == g {
				return true
			}
		}
		return false
	})
}

func (w *rig) awaitErased() {
	w.t.Helper()
	w.await("the erasure", func(s keyguard.Status) bool { return s.Erased })
}

// written waits until the journal has written what ok looks for.
func (w *rig) written(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) { // between two looks
		if time.Now().After(deadline) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Fatalf("%s: not written in %v\naudit: %+v", what, patience, w.audit)
		}
	}
}

// awaitAudit waits for a record of an event, with b's reason and request id if b is given.
func (w *rig) awaitAudit(event keyguard.AuditEvent, b behaviour) {
	w.t.Helper()
	w.written("the audit record "+string(event)+" of "+b.name, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, r := range w.audit {
			if r.Event != event || r.Guard != "g" || r.KeyARN != w.arn || r.Time.IsZero() {
				continue
			}
			if b.name == "" || r.Reason == b.frozeAs() && (r.RequestID == "") == b.silent {
				return true
			}
		}
		return false
	})
}

// awaitLog waits for a line of the log that names the key's state.
func (w *rig) awaitLog(text string, key keyguard.KeyState) {
	w.t.Helper()
	w.written("the log line "+text, func() bool { return w.logged(text, key.String()) })
}

func (w *rig) logged(text, key string) bool {
	for _, entry := range w.logs.All() {
		if entry.Message == text && (key == "" || entry.ContextMap()["key"] == key) {
			return true
		}
	}
	return false
}

// thaws counts the openings of the gate in the metrics.
func (w *rig) thaws() (n int) {
	for line := range strings.Lines(w.series()) {
		if value, ok := strings.CutPrefix(line, `byokd_thaws_total{guard="g"} `); ok {
			for _, digit := range strings.TrimSpace(value) {
				n = 10*n + int(digit-'0')
			}
		}
	}
	return n
}

// series is the text of all metrics.
func (w *rig) series() string {
	w.t.Helper()
	panel := metrics.NewPanel("test", "acme", "best_effort")
	answer := httptest.NewRecorder()
	request := httptest.NewRequest(http.MethodGet, "http://localhost/metrics", nil)
	metrics.NewServer(panel, w.registry, nil, zap.NewNop()).Handler().ServeHTTP(answer, request)
	if answer.Code != http.StatusOK {
		w.t.Fatalf("metrics: %d %s", answer.Code, answer.Body)
	}
	return answer.Body.String()
}

// load is callers that use the key without end.
type load struct {
	w      *rig
	cancel context.CancelFunc
	all    sync.WaitGroup
	closed atomic.Bool // the gate was seen closed
	late   atomic.Int64
	uses   atomic.Int64
	made   atomic.Int64
}

// loadPause lets a hundred rigs share a machine.
const loadPause = 2 * time.Millisecond

func (w *rig) startLoad() *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{w: w, cancel: cancel}
	for lane := range uint32(3) {
		l.all.Go(func() { l.use(ctx, lane) })
	}
	l.all.Go(func() { l.make(ctx) })
	w.t.Cleanup(l.abandon)
	w.written("the load to run", func() bool { return l.uses.Load() > 10 && l.made.Load() > 0 })
	return l
}

// use takes passes and looks whether one is good after the gate was closed.
func (l *load) use(ctx context.Context, lane uint32) {
	for ctx.Err() == nil {
		p, err := l.w.guard.Enter(ctx, keyguard.Work, lane)
		if err != nil {
			return
		}
		closed := l.closed.Load() // before Err: a pass that is good now was taken before the gate closed
		if p.Keys().Root(l.w.pinned) == nil {
			l.w.t.Error("an open gate has no pinned root")
		}
		if p.Err() == nil && closed {
			l.late.Add(1)
		}
		p.Exit()
		l.uses.Add(1)
		time.Sleep(loadPause)
	}
}

// make asks KMS for data keys.
func (l *load) make(ctx context.Context) {
	for ctx.Err() == nil {
		_, _, err := l.w.guard.Create(ctx, keyguard.Binding{Cluster: "acme", Resource: "bucket"})
		if err != nil && ctx.Err() == nil && !errors.Is(err, keyguard.ErrMisconfigured) {
			l.w.t.Errorf("Create: %v", err)
			return
		}
		l.made.Add(1)
		time.Sleep(10 * loadPause)
	}
}

// leaked says how many passes were good although the gate is closed.
func (l *load) leaked() int64 {
	l.closed.Store(true)
	before := l.uses.Load()
	time.Sleep(20 * loadPause) // nothing can be waited for: nothing must happen
	if n := l.uses.Load() - before; n > 3 {
		l.w.t.Errorf("%d uses of a closed gate", n)
	}
	l.closed.Store(false)
	return l.late.Load()
}

// finish wants everybody to go on, and ends the load.
func (l *load) finish() {
	uses, made := l.uses.Load(), l.made.Load()
	l.w.written("the load to go on", func() bool { return l.uses.Load() > uses+10 && l.made.Load() > made })
	l.abandon()
}

func (l *load) abandon() {
	l.cancel()
	l.all.Wait()
}

// selfSigned makes a certificate that nobody trusts.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
