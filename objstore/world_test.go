package objstore_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// memoryKMS is one KMS key in memory. Wrapped keys are names of keys it holds.
type memoryKMS struct {
	mu      sync.Mutex
	state   keyguard.KeyState // guarded by mu
	keys    map[string][]byte // guarded by mu; by wrapped form
	bound   map[string]keyguard.Binding
	arn     string // fixed
	created int    // guarded by mu
	unwraps int    // guarded by mu
}

func newMemoryKMS() *memoryKMS {
	return newMemoryKMSCalled("arn:aws:kms:eu-central-1:111122223333:key/11111111-2222-4333-8444-555555555555")
}

func newMemoryKMSCalled(arn string) *memoryKMS {
	return &memoryKMS{state: keyguard.Enabled, keys: map[string][]byte{}, bound: map[string]keyguard.Binding{}, arn: arn}
}

func (k *memoryKMS) ARN() string { return k.arn }

// reEncrypt wraps under another key what k has wrapped.
func (k *memoryKMS) reEncrypt(to *memoryKMS) func(context.Context, []byte, keyguard.Binding) ([]byte, error) {
	return func(_ context.Context, wrapped []byte, b keyguard.Binding) ([]byte, error) {
		if err := errors.Join(k.refused("ReEncryptFrom"), to.refused("ReEncryptTo")); err != nil {
			return nil, err
		}
		k.mu.Lock()
		secret, bound := k.keys[string(wrapped)], k.bound[string(wrapped)]
		k.mu.Unlock()
		if len(secret) == 0 || bound != b {
			return nil, &keyguard.KMSError{Op: "ReEncrypt", State: keyguard.Misconfigured, Reason: keyguard.ReasonInvalidCiphertext, Err: errors.New("InvalidCiphertextException")}
		}
		again := make([]byte, 184)
		rand.Read(again)
		to.mu.Lock()
		defer to.mu.Unlock()
		to.keys[string(again)], to.bound[string(again)] = secret, b
		return again, nil
	}
}

func (k *memoryKMS) set(s keyguard.KeyState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state = s
}

func (k *memoryKMS) refused(op string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.state == keyguard.Enabled {
		return nil
	}
	return &keyguard.KMSError{Op: op, State: k.state, Reason: keyguard.ReasonKeyDisabled, RequestID: "req-1", Err: errors.New("DisabledException")}
}

func (k *memoryKMS) GenerateProbe(context.Context, keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	return []byte("probe"), keyguard.Receipt{}, k.refused("GenerateDataKeyWithoutPlaintext")
}

func (k *memoryKMS) Probe(context.Context, []byte, keyguard.Binding) (keyguard.Receipt, error) {
	return keyguard.Receipt{KeyARN: k.ARN()}, k.refused("Decrypt")
}

func (k *memoryKMS) GenerateDataKey(_ context.Context, b keyguard.Binding, use func([]byte) error) ([]byte, keyguard.Receipt, error) {
	if err := k.refused("GenerateDataKey"); err != nil {
		return nil, keyguard.Receipt{}, err
	}
	secret, wrapped := make([]byte, seal.RootSize), make([]byte, 184)
	rand.Read(secret)
	rand.Read(wrapped)
	k.mu.Lock()
	k.keys[string(wrapped)], k.bound[string(wrapped)] = bytes.Clone(secret), b
	k.created++
	k.mu.Unlock()
	var err error
	seal.Do(func() { err = use(secret) })
	return wrapped, keyguard.Receipt{}, err
}

func (k *memoryKMS) Unwrap(_ context.Context, wrapped []byte, b keyguard.Binding, use func([]byte) error) (keyguard.Receipt, error) {
	if err := k.refused("Decrypt"); err != nil {
		return keyguard.Receipt{}, err
	}
	k.mu.Lock()
	secret, bound := bytes.Clone(k.keys[string(wrapped)]), k.bound[string(wrapped)]
	k.unwraps++
	k.mu.Unlock()
	if len(secret) == 0 || bound != b {
		return keyguard.Receipt{}, &keyguard.KMSError{Op: "Decrypt", State: keyguard.Misconfigured, Reason: keyguard.ReasonInvalidCiphertext, Err: errors.New("InvalidCiphertextException")}
	}
	var err error
	seal.Do(func() { err = use(secret) })
	return keyguard.Receipt{}, err
}

func (k *memoryKMS) Describe(context.Context) (keyguard.Description, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return keyguard.Description{State: k.state}, nil
}

// world is a proxy with everything around it: client → proxy → s3test, and a
// guard over a KMS key in memory. Bucket documents is sealed in acme-documents,
// backups in acme-backups under another key.
type world struct {
	t      testing.TB
	kms    *memoryKMS
	guard  *keyguard.Guard
	other  *keyguard.Guard // of bucket backups
	up     *s3test.Server
	proxy  *objstore.Proxy
	server *httptest.Server
	client *s3.Client
	log    *observer.ObservedLogs
	events *eventLog
}

type worldOptions struct {
	hold       time.Duration
	stall      time.Duration
	keyObjects int64
	clear      bool
	compress   bool
	checksums  bool // demanded by the upstream, over TLS
	now        func() time.Time
}

func newWorld(t testing.TB, o worldOptions) *world {
	t.Helper()
	w := &world{t: t, kms: newMemoryKMS(), up: s3test.New("acme-documents", "acme-backups"), events: &eventLog{}}
	w.guard, w.other = startGuard(t, w.kms), startGuard(t, newMemoryKMS())
	core, logs := observer.New(zap.InfoLevel)
	w.log = logs
	upstream := w.up.Client(objstore.TuneClient)
	if o.checksums {
		w.up.Close()
		w.up = s3test.NewTLS("acme-documents", "acme-backups")
		w.up.DemandChecksums()
		upstream = w.up.Client(objstore.TuneClient, objstore.SendChecksums)
	}
	var err error
	w.proxy, err = objstore.New(objstore.Options{
		Buckets: map[string]objstore.Bucket{
			"documents": {Upstream: objstore.NewUpstream(upstream, "acme-documents"), Guard: w.guard, ClearMetadata: o.clear, Compress: o.compress,
				Binding: keyguard.Binding{Cluster: "acme", Resource: "bucket/acme-documents"}, Region: "eu-central-1"},
			"backups": {Upstream: objstore.NewUpstream(upstream, "acme-backups"), Guard: w.other,
				Binding: keyguard.Binding{Cluster: "acme", Resource: "bucket/acme-backups"}},
		},
		Credentials: objstore.StaticCredentials{"byokd": "byokd-secret"},
		BaseDomains: []string{"s3.test"},
		HoldFor:     o.hold, StallTimeout: o.stall, KeyObjects: o.keyObjects, Now: o.now,
		Logger: zap.New(core), Observer: w.events,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.server = httptest.NewUnstartedServer(w.proxy)
	w.server.Config = w.proxy.Server()
	w.server.Start()
	t.Cleanup(func() {
		w.server.CloseClientConnections()
		w.server.Close()
		w.up.Close()
	})
	w.client = w.newClient()
	return w
}

// documentsBinding is the encryption context of bucket documents.
var documentsBinding = keyguard.Binding{Cluster: "acme", Resource: "bucket/acme-documents"}

// upstream is the bucket below documents.
func (w *world) upstream() objstore.Upstream {
	return objstore.NewUpstream(w.up.Client(objstore.TuneClient), "acme-documents")
}

// another starts a second proxy for bucket documents, as another pod would, and
// returns a client of it.
func (w *world) another(guard *keyguard.Guard, tune ...func(*objstore.Options)) *s3.Client {
	w.t.Helper()
	o := objstore.Options{
		Buckets:     map[string]objstore.Bucket{"documents": {Upstream: w.upstream(), Guard: guard, Binding: documentsBinding}},
		Credentials: objstore.StaticCredentials{"byokd": "byokd-secret"},
	}
	for _, f := range tune {
		f(&o)
	}
	proxy, err := objstore.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(proxy)
	server.Config = proxy.Server()
	server.Start()
	w.t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return w.newClient(func(o *s3.Options) { o.BaseEndpoint = aws.String(server.URL) })
}

// newClient makes a client as applications do, with the SDK's defaults.
func (w *world) newClient(tune ...func(*s3.Options)) *s3.Client {
	o := s3.Options{
		BaseEndpoint: aws.String(w.server.URL), UsePathStyle: true, Region: "eu-central-1",
		Credentials:      credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", ""),
		RetryMaxAttempts: 1,
	}
	return s3.New(o, tune...)
}

// startGuard runs a guard until the test ends, and waits until it is open.
func startGuard(t testing.TB, kms keyguard.KMS) *keyguard.Guard {
	t.Helper()
	g, err := keyguard.New(kms, keyguard.Options{Name: t.Name(), ProbeInterval: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	awaitGate(t, g, func(s keyguard.Status) bool { return s.Ready() })
	return g
}

// awaitGate waits until the guard's status is as wanted.
func awaitGate(t testing.TB, g *keyguard.Guard, want func(keyguard.Status) bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		changed := g.Changed()
		if want(g.Status()) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("the guard stays %v", g.Status().Gate)
		}
	}
}

// freeze disables the key and waits until nothing passes any more.
func (w *world) freeze() {
	w.t.Helper()
	w.kms.set(keyguard.Disabled)
	awaitGate(w.t, w.guard, func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen })
}

func (w *world) thaw() {
	w.t.Helper()
	w.kms.set(keyguard.Enabled)
	awaitGate(w.t, w.guard, keyguard.Status.Ready)
}

// put stores an object through the proxy.
func (w *world) put(key string, body []byte) *s3.PutObjectOutput {
	w.t.Helper()
	out, err := w.client.PutObject(w.t.Context(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: &key, Body: bytes.NewReader(body)})
	if err != nil {
		w.t.Fatalf("put %s: %v", key, err)
	}
	return out
}

// get reads an object through the proxy; rng may be "".
func (w *world) get(key, rng string) ([]byte, *s3.GetObjectOutput, error) {
	in := &s3.GetObjectInput{Bucket: aws.String("documents"), Key: &key}
	if rng != "" {
		in.Range = &rng
	}
	out, err := w.client.GetObject(w.t.Context(), in)
	if err != nil {
		return nil, nil, err
	}
	defer out.Body.Close()
	body, err := io.ReadAll(out.Body)
	return body, out, err
}

func (w *world) mustGet(key, rng string) []byte {
	w.t.Helper()
	body, _, err := w.get(key, rng)
	if err != nil {
		w.t.Fatalf("get %s %s: %v", key, rng, err)
	}
	return body
}

// upload stores an object in parts of the given sizes and returns its bytes.
func (w *world) upload(key string, sizes ...int) []byte {
	w.t.Helper()
	body, err := w.tryUpload(key, sizes...)
	if err != nil {
		w.t.Fatalf("upload %s: %v", key, err)
	}
	return body
}

func (w *world) tryUpload(key string, sizes ...int) ([]byte, error) {
	ctx, bucket := w.t.Context(), aws.String("documents")
	created, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: bucket, Key: &key, Metadata: map[string]string{"kind": "multipart"}})
	if err != nil {
		return nil, err
	}
	var whole []byte
	parts := make([]completed, len(sizes))
	bodies := make([][]byte, len(sizes))
	for i, n := range sizes {
		bodies[i] = pattern(n, i+1)
		whole = append(whole, bodies[i]...)
	}
	for i := len(sizes) - 1; i >= 0; i-- { // in any order
		out, err := w.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: bucket, Key: &key, UploadId: created.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(bodies[i])})
		if err != nil {
			return nil, err
		}
		parts[i] = completed{int32(i + 1), *out.ETag}
	}
	_, err = w.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: bucket, Key: &key, UploadId: created.UploadId, MultipartUpload: completedParts(parts)})
	return whole, err
}

// pattern returns n bytes that differ from place to place and hold the canary.
func pattern(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8*13 + i>>16*29 + seed*101)
	}
	copy(b, canary)
	return b
}

// canary is searched for in everything upstream.
const canary = "PLAINTEXT-CANARY-7f3a"

func (w *world) noPlaintext() {
	w.t.Helper()
	if where := w.up.Holds([]byte(canary)); where != "" {
		w.t.Fatalf("plain bytes found upstream in %s", where)
	}
}

// eventLog is an Observer that keeps what it was told.
type eventLog struct {
	mu       sync.Mutex
	events   []objstore.Event
	held     int
	heldEver int
	tampered int
}

func (l *eventLog) Done(e objstore.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
}

func (l *eventLog) Held(_ string, delta int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held += delta
	l.heldEver = max(l.heldEver, l.held)
}

func (l *eventLog) Tampered(string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tampered++
}

func (l *eventLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = nil
}

func (l *eventLog) holding() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

func (l *eventLog) find(op objstore.Op) (objstore.Event, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.Op == op {
			return e, true
		}
	}
	return objstore.Event{}, false
}

// await polls a condition that no channel announces.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	limit := time.After(20 * time.Second)
	for !condition() {
		select {
		case <-ticker.C:
		case <-limit:
			t.Fatalf("%s does not happen", what)
		}
	}
}
