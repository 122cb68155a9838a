package awskms

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
)

// The guard bounds each call by its context (3 to 5 s); these bounds name the
// part that hangs, and are shorter so that they win.
const (
	dialTimeout = 2500 * time.Millisecond // two retransmissions of a lost SYN (1 s, then 3 s in all)
	tlsTimeout  = 2500 * time.Millisecond
	idleTimeout = 30 * time.Second // probes come every second and keep one connection warm
	keepAlive   = 15 * time.Second
	maxIdle     = 4 // a probe, its repetition, a description

	// maxAnswer bounds the body of an answer, and maxHead what stands before it: KMS's are
	// below 10 KiB. What answers without end in its place must not cost memory, eight times at once.
	maxAnswer = 64 << 10
	maxHead   = 64 << 10
	// maxInterim bounds the answers 1xx before the real one, as net/http does.
	maxInterim = 5
)

var errTooLong = fmt.Errorf("an answer of more than %d bytes", maxAnswer)

// transports makes the two HTTP clients out of the configured one, whose trusted
// CAs, client certificates and proxy they keep. A client of a foreign kind is
// taken for both, and its answers are bounded only.
func transports(configured aws.HTTPClient) (pooled boundedClient, direct aws.HTTPClient) {
	buildable, ok := configured.(*awshttp.BuildableClient)
	if !ok {
		if configured != nil {
			bounded := boundedClient{configured}
			return bounded, bounded
		}
		buildable = awshttp.NewBuildableClient()
	}
	buildable = buildable.
		WithDialerOptions(func(d *net.Dialer) {
			d.Timeout = dialTimeout
			d.KeepAlive = keepAlive
		}).
		WithTransportOptions(func(t *http.Transport) {
			// One connection per call under way: on a shared HTTP/2 connection one
			// dead path would hold up every later probe, and with it the thaw.
			t.ForceAttemptHTTP2 = false
			t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
			// The transport that this one is copied from has offered h2 already, which a server would take up.
			if t.TLSClientConfig == nil {
				t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
			}
			t.TLSClientConfig.NextProtos = []string{"http/1.1"}
			t.TLSHandshakeTimeout = tlsTimeout
			t.IdleConnTimeout = idleTimeout
			t.MaxIdleConns = maxIdle
			t.MaxIdleConnsPerHost = maxIdle
			t.MaxResponseHeaderBytes = maxHead
			t.DisableCompression = true // a few bytes that unpack to gigabytes are no answer of KMS
		})
	oneShot := buildable.WithTransportOptions(func(t *http.Transport) { t.DisableKeepAlives = true })
	return unredirected(buildable), &directClient{transport: buildable.GetTransport(), proxied: unredirected(oneShot)}
}

// unredirected makes a client that follows no redirection. KMS redirects nobody, and the
// SDK's own client would carry a ciphertext, and the question whether the key may be
// used, to wherever a 307 points.
func unredirected(b *awshttp.BuildableClient) boundedClient {
	return boundedClient{&http.Client{
		Transport:     b.GetTransport(),
		Timeout:       b.GetTimeout(),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// boundedClient reads each answer to its end, which is at most maxAnswer bytes away.
type boundedClient struct{ client aws.HTTPClient }

// Do sends one request and reads its whole answer.
func (b boundedClient) Do(req *http.Request) (*http.Response, error) {
	resp, err := b.client.Do(req)
	if err != nil {
		return nil, err
	}
	return whole(resp)
}

// CloseIdleConnections makes later requests on new connections.
func (b boundedClient) CloseIdleConnections() {
	if pool, keeps := b.client.(interface{ CloseIdleConnections() }); keeps {
		pool.CloseIdleConnections()
	}
}

// whole reads an answer into memory.
func whole(resp *http.Response) (*http.Response, error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxAnswer {
		return nil, errTooLong
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// directClient makes each request on a connection of its own, in the caller's
// goroutine. net/http's pool reads answers in goroutines of its own and keeps
// its buffers: inside seal.Do that would leave the plaintext key in memory that
// is not wiped. It costs one TLS handshake per unwrap, at start, thaw and for
// each new data key.
type directClient struct {
	transport *http.Transport // read for its settings, never used to send
	proxied   aws.HTTPClient  // through an HTTP proxy, which directClient does not speak
}

// Do sends one request and reads its whole answer.
func (d *directClient) Do(req *http.Request) (*http.Response, error) {
	if d.transport.Proxy != nil {
		proxy, err := d.transport.Proxy(req)
		if err != nil {
			return nil, err
		}
		if proxy != nil {
			return d.proxied.Do(req)
		}
	}
	ctx := req.Context()
	conn, err := d.dial(ctx, req)
	if err != nil {
		return nil, because(ctx, err)
	}
	defer conn.Close()
	// A cancelled call must end at once: an expired deadline wakes reads and writes.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	resp, err := exchange(conn, req)
	if err != nil {
		return nil, because(ctx, err)
	}
	return resp, nil
}

func (d *directClient) dial(ctx context.Context, req *http.Request) (net.Conn, error) {
	port := req.URL.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[req.URL.Scheme]
	}
	conn, err := d.transport.DialContext(ctx, "tcp", net.JoinHostPort(req.URL.Hostname(), port))
	if err != nil || req.URL.Scheme != "https" {
		return conn, err
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if d.transport.TLSClientConfig != nil {
		settings = d.transport.TLSClientConfig.Clone()
	}
	if settings.ServerName == "" {
		settings.ServerName = req.URL.Hostname()
	}
	settings.NextProtos = []string{"http/1.1"}
	shake, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	secured := tls.Client(conn, settings)
	if err := secured.HandshakeContext(shake); err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}

// exchange writes the request and reads the answer into memory.
func exchange(conn net.Conn, req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Close = true
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	// http.ReadResponse reads headers as long as there are any; a chunked body is longer on the wire than it is.
	wire := &io.LimitedReader{R: conn, N: maxHead + 2*maxAnswer}
	resp, err := final(bufio.NewReader(wire), req)
	if err == nil {
		resp, err = whole(resp)
	}
	switch {
	case err != nil && wire.N == 0:
		return nil, errTooLong
	case errors.Is(err, io.EOF):
		return nil, io.ErrUnexpectedEOF
	}
	return resp, err
}

// final reads the head of an answer, and skips the interim ones that a proxy may send before it.
func final(r *bufio.Reader, req *http.Request) (*http.Response, error) {
	for range maxInterim + 1 {
		resp, err := http.ReadResponse(r, req)
		if err != nil || resp.StatusCode >= http.StatusOK || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, err
		}
	}
	return nil, fmt.Errorf("more than %d interim answers", maxInterim)
}

// because prefers the context's word to that of the connection it broke.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
