package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/s3api"
	"github.com/versity/versitygw/s3api/middlewares"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// objectStore is S3 on a directory. One backend serves every region: versitygw's
// front refuses signatures for another region than its own, so there is one
// front per region, made when the first request for it comes.
//
// versitygw's posix backend changes the working directory of the process and
// keeps package-level state: there must be only one objectStore in a process.
type objectStore struct {
	backend backend.Backend

	mu      sync.Mutex
	regions map[string]*regionFront // guarded by mu
	closed  bool                    // guarded by mu
}

// maxRegions bounds the fronts that signed requests can make us start; AWS has fewer regions.
const maxRegions = 64

// copyLimit is S3's limit for one copy, 5 GiB.
const copyLimit = 5 << 30

// openS3 opens the store below dir: objects in data, versions beside them.
func openS3(dir string) (*objectStore, error) {
	data, versions, sidecar := filepath.Join(dir, "data"), filepath.Join(dir, "versions"), filepath.Join(dir, "metadata")
	for _, d := range []string{data, versions} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	options := posix.PosixOpts{VersioningDir: versions, ValidateBucketNames: true, CopyObjectThreshold: copyLimit}
	var store meta.MetadataStorer = meta.XattrMeta{}
	if (meta.XattrMeta{}).Test(data) != nil { // no xattrs here: keep metadata in files of their own
		if err := os.MkdirAll(sidecar, 0o700); err != nil {
			return nil, err
		}
		side, err := meta.NewSideCar(sidecar)
		if err != nil {
			return nil, err
		}
		store, options.SideCarDir = side, sidecar
	}
	be, err := quietly(func() (backend.Backend, error) { return posix.New(data, store, options) })
	if err != nil {
		return nil, fmt.Errorf("S3 on %s: %w", data, err)
	}
	return &objectStore{backend: wholeBodies{be}, regions: map[string]*regionFront{}}, nil
}

// quietly runs f, which prints to the standard output, without its prints. It
// is called before anything else runs that prints.
func quietly[T any](f func() (T, error)) (T, error) {
	stdout := os.Stdout
	defer func() { os.Stdout = stdout }()
	if null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0); err == nil {
		defer null.Close()
		os.Stdout = null
	}
	return f()
}

// scopePattern finds the region in a SigV4 credential scope, in the
// Authorization header or, after unescaping, in a presigned query.
var scopePattern = regexp.MustCompile(`/\d{8}/([a-z0-9-]{1,32})/s3/aws4_request`)

// requestRegion is the region a request was signed for.
func requestRegion(r *http.Request) string {
	for _, text := range []string{r.Header.Get("Authorization"), r.URL.Query().Get("X-Amz-Credential")} {
		if m := scopePattern.FindStringSubmatch(text); m != nil {
			return m[1]
		}
	}
	return kmstest.DefaultRegion
}

func (o *objectStore) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	front, err := o.front(requestRegion(r))
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	front.proxy.ServeHTTP(w, r)
}

func (o *objectStore) front(region string) (*regionFront, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return nil, errors.New("S3 is shutting down")
	}
	if f, ok := o.regions[region]; ok {
		return f, nil
	}
	if len(o.regions) >= maxRegions {
		return nil, fmt.Errorf("more than %d regions are in use", maxRegions)
	}
	f, err := startFront(o.backend, region)
	if err != nil {
		return nil, err
	}
	o.regions[region] = f
	return f, nil
}

// Close ends the fronts, waiting a few seconds for requests under way.
func (o *objectStore) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	var errs []error
	for _, f := range o.regions {
		f.transport.CloseIdleConnections() // else its shutdown waits for them
		errs = append(errs, f.server.ShutDown())
	}
	o.backend.Shutdown()
	return errors.Join(errs...)
}

// regionFront is versitygw for one region behind an abstract unix socket, and
// the proxy that leads to it.
type regionFront struct {
	server    *s3api.S3ApiServer
	transport *http.Transport
	proxy     *httputil.ReverseProxy
}

func startFront(be backend.Backend, region string) (*regionFront, error) {
	root := middlewares.RootUserConfig{Access: kmstest.AdminAccessKey, Secret: kmstest.AdminSecret}
	listening := make(chan struct{})
	server, err := s3api.New(be, root, region, accounts{}, nil, nil, nil, nil,
		s3api.WithQuiet(), s3api.WithKeepAlive(), s3api.WithMpMaxParts(10000),
		s3api.WithConcurrencyLimiter(4096, 4096), s3api.WithOnListen(func() { close(listening) }))
	if err != nil {
		return nil, fmt.Errorf("S3 in %s: %w", region, err)
	}
	var id [16]byte
	rand.Read(id[:])
	socket := "@devcloud-s3-" + hex.EncodeToString(id[:])
	failed := make(chan error, 1)
	go func() { failed <- server.ServeMultiPort([]string{socket}) }()
	select {
	case <-listening:
	case err := <-failed:
		return nil, fmt.Errorf("S3 in %s: %w", region, err)
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableCompression:    true,            // Accept-Encoding may be signed, and bodies pass as they are
		ExpectContinueTimeout: 5 * time.Second, // the front answers Expect: 100-continue itself
		MaxIdleConnsPerHost:   64,
		IdleConnTimeout:       30 * time.Second,
	}
	return &regionFront{server: server, transport: transport, proxy: newS3Proxy(transport)}, nil
}

// newS3Proxy passes a request on exactly as the client signed it: same Host, same
// escaped path and query, no headers added.
func newS3Proxy(transport *http.Transport) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport:     transport,
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // clients that leave are no news
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL = &url.URL{Scheme: "http", Host: p.In.Host, Path: p.In.URL.Path, RawPath: p.In.URL.RawPath, RawQuery: p.In.URL.RawQuery}
			p.Out.Host = p.In.Host
			if _, ok := p.In.Header["User-Agent"]; !ok {
				p.Out.Header["User-Agent"] = nil
			}
		},
	}
}

// wholeBodies refuses a body that ends before its length: fasthttp reports a
// client that left as a plain end of file, and the posix backend would store the
// half and answer 200 (seen with versitygw v1.8.0 and an unsigned payload).
type wholeBodies struct{ backend.Backend }

func (b wholeBodies) PutObject(ctx context.Context, in s3response.PutObjectInput) (s3response.PutObjectOutput, error) {
	in.Body = whole(in.Body, in.ContentLength)
	return b.Backend.PutObject(ctx, in)
}

func (b wholeBodies) UploadPart(ctx context.Context, in *s3.UploadPartInput) (*s3.UploadPartOutput, error) {
	in.Body = whole(in.Body, in.ContentLength)
	return b.Backend.UploadPart(ctx, in)
}

// whole wraps a body of a known length. The backend asks a body with a trailing
// checksum for it, so the wrapper has to answer that too.
func whole(body io.Reader, length *int64) io.Reader {
	if body == nil || length == nil {
		return body
	}
	r := &wholeReader{body: body, left: *length}
	if sum, ok := body.(middlewares.ChecksumReader); ok {
		return wholeChecksumReader{r, sum}
	}
	return r
}

type wholeReader struct {
	body io.Reader
	left int64
}

func (r *wholeReader) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	r.left -= int64(n)
	if r.left > 0 && (err == io.EOF || err == io.ErrUnexpectedEOF) {
		err = s3err.GetAPIError(s3err.ErrIncompleteBody) // the backend takes a plain unexpected EOF for an end
	}
	return n, err
}

type wholeChecksumReader struct {
	*wholeReader
	sum middlewares.ChecksumReader
}

func (r wholeChecksumReader) Algorithm() string { return r.sum.Algorithm() }
func (r wholeChecksumReader) Checksum() string  { return r.sum.Checksum() }

// accounts are devcloud's fixed identities as versitygw wants them. The
// administrator is its root; the tenant may use every bucket.
type accounts struct{}

var _ auth.IAMService = accounts{}

func (accounts) GetUserAccount(access string) (auth.Account, error) {
	for _, c := range kmstest.DefaultCredentials() {
		if c.AccessKey == access {
			return auth.Account{Access: c.AccessKey, Secret: c.Secret, Role: auth.RoleAdmin}, nil
		}
	}
	return auth.Account{}, auth.ErrNoSuchUser
}

func (a accounts) ResolveAccounts(access []string) ([]string, error) {
	var missing []string
	for _, id := range access {
		if _, err := a.GetUserAccount(id); err != nil {
			missing = append(missing, id)
		}
	}
	return missing, nil
}

func (accounts) CreateAccount(auth.Account) error {
	return s3err.GetAPIError(s3err.ErrAdminMethodNotSupported)
}

func (accounts) UpdateUserAccount(string, auth.MutableProps) error {
	return s3err.GetAPIError(s3err.ErrAdminMethodNotSupported)
}

func (accounts) DeleteUserAccount(string) error {
	return s3err.GetAPIError(s3err.ErrAdminMethodNotSupported)
}

func (accounts) ListUserAccounts() ([]auth.Account, error) {
	return nil, s3err.GetAPIError(s3err.ErrAdminMethodNotSupported)
}

func (accounts) Shutdown() error { return nil }
