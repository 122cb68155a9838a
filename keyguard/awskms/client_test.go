package awskms

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

const testARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

var binding = keyguard.Binding{Cluster: "acme", Resource: "volume-1"}

func configuration(t *testing.T, accessKey, secret string) aws.Config {
	t.Helper()
	cfg, err := config.LoadDefaultConfig(context.Background(),
		config.WithRegion("us-west-2"), // the key's ARN decides, not this
		config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(accessKey, secret, "")))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func newClient(t *testing.T, cfg aws.Config, keyARN, endpoint string) *Client {
	t.Helper()
	c, err := New(cfg, keyARN, Options{Endpoint: endpoint})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNewChecksTheARN(t *testing.T) {
	bad := []string{"", "alias/byokd", "1234abcd-12ab-34cd-56ef-1234567890ab",
		"arn:aws:kms:eu-central-1:111122223333:alias/byokd", "arn:aws:s3:::bucket",
		"arn:aws:kms::111122223333:key/x", "arn:aws:kms:eu-central-1:111122223333:key/"}
	for _, keyARN := range bad {
		if _, err := New(aws.Config{}, keyARN, Options{}); err == nil {
			t.Errorf("accepted %q", keyARN)
		}
	}
	for _, keyARN := range []string{testARN, "arn:aws-cn:kms:cn-north-1:111122223333:key/mrk-1234"} {
		if _, err := New(aws.Config{}, keyARN, Options{}); err != nil {
			t.Errorf("%q: %v", keyARN, err)
		}
	}
}

// ask makes every kind of call and returns their errors by name.
func ask(c *Client, probe, wrapped []byte) map[string]error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	never := func([]byte) error { return errors.New("the plaintext of a failed call") }
	errs := map[string]error{}
	_, errs["Probe"] = c.Probe(ctx, probe, binding)
	_, errs["Unwrap"] = c.Unwrap(ctx, wrapped, binding, never)
	_, _, errs["GenerateDataKey"] = c.GenerateDataKey(ctx, binding, never)
	_, _, errs["GenerateProbe"] = c.GenerateProbe(ctx, binding)
	return errs
}

// TestStandIn runs the shipped client through the states of a real-looking KMS.
func TestStandIn(t *testing.T) {
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	keyARN, err := server.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, configuration(t, kmstest.TenantAccessKey, kmstest.TenantSecret), keyARN, server.URL())
	ctx := context.Background()

	probe, receipt, err := c.GenerateProbe(ctx, binding)
	if err != nil || receipt.RequestID == "" || receipt.KeyARN != keyARN {
		t.Fatalf("GenerateProbe: %+v, %v", receipt, err)
	}
	if receipt, err := c.Probe(ctx, probe, binding); err != nil || receipt.RequestID == "" {
		t.Fatalf("Probe: %+v, %v", receipt, err)
	}
	var made []byte
	wrapped, receipt, err := c.GenerateDataKey(ctx, binding, func(plain []byte) error {
		made = bytes.Clone(plain)
		return nil
	})
	if err != nil || receipt.RequestID == "" || len(made) != dataKeySize {
		t.Fatalf("GenerateDataKey: %d bytes, %+v, %v", len(made), receipt, err)
	}
	var seen []byte
	if _, err := c.Unwrap(ctx, wrapped, binding, func(plain []byte) error {
		if !bytes.Equal(plain, made) {
			t.Error("unwrapped another key")
		}
		seen = plain
		return nil
	}); err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	if !bytes.Equal(seen, make([]byte, dataKeySize)) {
		t.Error("the plaintext was not cleared")
	}
	mine := errors.New("mine")
	if _, err := c.Unwrap(ctx, wrapped, binding, func([]byte) error { return mine }); err != mine {
		t.Errorf("the user's error became %v", err)
	}
	other := keyguard.Binding{Cluster: "acme", Resource: "volume-2"}
	if _, err := c.Unwrap(ctx, wrapped, other, func([]byte) error { return nil }); keyguard.StateOf(err) != keyguard.Misconfigured {
		t.Errorf("another binding: %v", err)
	}

	steps := []struct {
		name   string
		change func() error
		state  keyguard.KeyState
	}{
		{"disabled", func() error { return server.Disable(keyARN) }, keyguard.Disabled},
		{"enabled", func() error { return server.Enable(keyARN) }, keyguard.Enabled},
		{"scheduled", func() error { return server.ScheduleDeletion(keyARN, 7*24*time.Hour) }, keyguard.PendingDeletion},
		{"cancelled", func() error { return server.CancelDeletion(keyARN) }, keyguard.Disabled},
		{"enabled again", func() error { return server.Enable(keyARN) }, keyguard.Enabled},
		{"pending import", func() error { return server.SetState(keyARN, "PendingImport") }, keyguard.Unavailable},
		{"unavailable", func() error { return server.SetState(keyARN, "Unavailable") }, keyguard.Unavailable},
		{"back", func() error { return server.SetState(keyARN, "Enabled") }, keyguard.Enabled},
		{"denied", func() error { return server.Deny(keyARN, "*", kmstest.TenantRole) }, keyguard.AccessDenied},
		{"allowed", func() error { return server.Allow(keyARN, "*", kmstest.TenantRole) }, keyguard.Enabled},
		{"throttled", func() error { server.Throttle(); return nil }, keyguard.Unreachable},
		{"clear", func() error { server.Clear(); return nil }, keyguard.Enabled},
		{"faulty", func() error { server.ServerError(); return nil }, keyguard.Unreachable},
		{"clear again", func() error { server.Clear(); return nil }, keyguard.Enabled},
		{"cut", func() error { server.Cut(); return nil }, keyguard.Unreachable},
		{"clear for the third time", func() error { server.Clear(); return nil }, keyguard.Enabled},
		{"down", func() error { server.Down(); return nil }, keyguard.Unreachable},
		{"up", func() error { return server.Up() }, keyguard.Enabled},
		{"deleted", func() error { return server.Delete(keyARN) }, keyguard.Deleted},
	}
	for _, step := range steps {
		if err := step.change(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if _, err := c.Probe(ctx, probe, binding); keyguard.StateOf(err) != step.state {
			t.Errorf("%s: probe says %v (%v), want %v", step.name, keyguard.StateOf(err), err, step.state)
		}
		d, err := c.Describe(ctx)
		if described := d.State; err == nil && described != step.state {
			t.Errorf("%s: description says %v, want %v", step.name, described, step.state)
		} else if err != nil && keyguard.StateOf(err) != step.state {
			t.Errorf("%s: description fails with %v", step.name, err)
		}
		if step.state == keyguard.PendingDeletion && d.DeletionDate.IsZero() {
			t.Error("no date of deletion")
		}
		if step.state == keyguard.Enabled {
			continue
		}
		for op, err := range ask(c, probe, wrapped) {
			if keyguard.StateOf(err) != step.state {
				t.Errorf("%s: %s says %v (%v), want %v", step.name, op, keyguard.StateOf(err), err, step.state)
			}
			var k *keyguard.KMSError
			if errors.As(err, &k); k == nil || step.state == keyguard.AccessDenied && (k.Principal != kmstest.TenantRole || !strings.HasPrefix(k.Action, "kms:")) {
				t.Errorf("%s: %s fails with %#v", step.name, op, err)
			}
		}
	}
}

func TestOneAttemptPerCall(t *testing.T) {
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.WriteHeader(http.StatusInternalServerError)
	}))
	defer server.Close()
	c := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
	calls := ask(c, []byte("p"), []byte("w"))
	for op, err := range calls {
		if keyguard.ReasonOf(err) != keyguard.ReasonServiceFault {
			t.Errorf("%s: %v", op, err)
		}
	}
	if n := requests.Load(); n != int64(len(calls)) {
		t.Errorf("%d requests for %d calls", n, len(calls))
	}
}

// TestOverHTTP is the table once more, as bytes on the wire.
func TestOverHTTP(t *testing.T) {
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.Header().Set("X-Amzn-Requestid", "wire-1")
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	fault := func(status int, kind, message string) http.HandlerFunc {
		return answer(status, fmt.Sprintf(`{"__type":%q,"message":%q}`, kind, message))
	}
	granted := func(keyARN string) http.HandlerFunc {
		return answer(200, fmt.Sprintf(`{"KeyId":%q,"Plaintext":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","CiphertextBlob":"AQID"}`, keyARN))
	}
	tests := []struct {
		name   string
		serve  http.HandlerFunc
		state  keyguard.KeyState
		reason keyguard.Reason
	}{
		{"disabled", fault(400, "DisabledException", "is disabled."), keyguard.Disabled, keyguard.ReasonKeyDisabled},
		{"disabled, with a namespace", fault(400, "com.amazonaws.kms#DisabledException", ""), keyguard.Disabled, keyguard.ReasonKeyDisabled},
		{"pending deletion", fault(400, "KMSInvalidStateException", "arn is pending deletion."), keyguard.PendingDeletion, keyguard.ReasonPendingDeletion},
		{"not found", fault(400, "NotFoundException", ""), keyguard.Deleted, keyguard.ReasonKeyDeleted},
		{"denied", fault(400, "AccessDeniedException", "User: arn:aws:iam::1:role/r is not authorized to perform: kms:Decrypt on resource: k"), keyguard.AccessDenied, keyguard.ReasonAccessDenied},
		{"incorrect key", fault(400, "IncorrectKeyException", ""), keyguard.Misconfigured, keyguard.ReasonWrongKey},
		{"invalid ciphertext", fault(400, "InvalidCiphertextException", ""), keyguard.Misconfigured, keyguard.ReasonInvalidCiphertext},
		{"throttled", fault(400, "ThrottlingException", ""), keyguard.Unreachable, keyguard.ReasonThrottled},
		{"expired token", fault(400, "ExpiredTokenException", ""), keyguard.Unreachable, keyguard.ReasonCredentials},
		{"internal", fault(500, "KMSInternalException", ""), keyguard.Unreachable, keyguard.ReasonServiceFault},
		{"unknown", fault(400, "NewException", ""), keyguard.Unreachable, keyguard.ReasonUnknownFault},
		{"a proxy's error page", answer(502, "<html>Bad Gateway</html>"), keyguard.Unreachable, keyguard.ReasonServiceFault},
		{"a login page", answer(200, "<html>Please log in</html>"), keyguard.Unreachable, keyguard.ReasonUnknownFault},
		{"403 of a middlebox", answer(403, "<html>Forbidden</html>"), keyguard.Unreachable, keyguard.ReasonUnknownFault},
		{"an empty answer", answer(200, "{}"), keyguard.Unreachable, keyguard.ReasonUnknownFault},
		{"nothing", answer(200, ""), keyguard.Unreachable, keyguard.ReasonUnknownFault},
		{"another key", granted("arn:aws:kms:eu-central-1:111122223333:key/other"), keyguard.Misconfigured, keyguard.ReasonWrongKey},
		{"cut", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, keyguard.Unreachable, keyguard.ReasonConnection},
		{"cut in the answer", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "{")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, keyguard.Unreachable, keyguard.ReasonConnection},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			server := httptest.NewUnstartedServer(test.serve)
			server.Start()
			defer server.Close()
			c := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
			for op, err := range ask(c, []byte("p"), []byte("w")) {
				if keyguard.StateOf(err) != test.state || keyguard.ReasonOf(err) != test.reason {
					t.Errorf("%s: %v %v, want %v %v: %v", op, keyguard.StateOf(err), keyguard.ReasonOf(err), test.state, test.reason, err)
				}
			}
		})
	}
	t.Run("granted", func(t *testing.T) {
		server := httptest.NewServer(granted(testARN))
		defer server.Close()
		c := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
		if _, err := c.Probe(context.Background(), []byte("p"), binding); err != nil {
			t.Error(err)
		}
	})
}

func TestHangingCallsHonourTheContext(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))
	defer server.Close()
	defer close(release)
	c := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
	calls := map[string]func(ctx context.Context) error{
		"Probe":  func(ctx context.Context) error { _, err := c.Probe(ctx, []byte("p"), binding); return err },
		"Unwrap": func(ctx context.Context) error { _, err := c.Unwrap(ctx, []byte("w"), binding, nil); return err },
	}
	for op, call := range calls {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := call(ctx); keyguard.ReasonOf(err) != keyguard.ReasonTimeout {
			t.Errorf("%s with a deadline: %v", op, err)
		}
		cancel()
		ctx, cancel = context.WithCancel(context.Background())
		ended := make(chan error)
		go func() { ended <- call(ctx) }()
		cancel()
		if err := <-ended; keyguard.ReasonOf(err) != keyguard.ReasonStopped {
			t.Errorf("%s cancelled: %v", op, err)
		}
	}
}

func TestTLS(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 1 {
			t.Errorf("HTTP/%d", r.ProtoMajor)
		}
		fmt.Fprintf(w, `{"KeyId":%q,"Plaintext":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","CiphertextBlob":"AQID"}`, testARN)
	}))
	defer server.Close()
	use := func([]byte) error { return nil }
	ctx := context.Background()

	unknown := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
	_, probeErr := unknown.Probe(ctx, []byte("p"), binding)
	_, unwrapErr := unknown.Unwrap(ctx, []byte("w"), binding, use)
	for _, err := range []error{probeErr, unwrapErr} {
		if keyguard.ReasonOf(err) != keyguard.ReasonTLS {
			t.Errorf("a server nobody vouches for: %v", err)
		}
	}

	cfg := configuration(t, "id", "secret")
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	cfg.HTTPClient = awshttp.NewBuildableClient().WithTransportOptions(func(tr *http.Transport) {
		tr.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	})
	trusted := newClient(t, cfg, testARN, server.URL)
	if _, err := trusted.Probe(ctx, []byte("p"), binding); err != nil {
		t.Error(err)
	}
	if _, err := trusted.Unwrap(ctx, []byte("w"), binding, use); err != nil {
		t.Error(err)
	}
}

func TestNobodyThere(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + listener.Addr().String()
	listener.Close()
	for endpoint, reason := range map[string]keyguard.Reason{
		nobody:                       keyguard.ReasonConnection,
		"http://kms.invalid.:80/":    keyguard.ReasonDNS,
		"https://no such host:1234/": keyguard.ReasonUnknownFault,
	} {
		c := newClient(t, configuration(t, "id", "secret"), testARN, endpoint)
		for op, err := range ask(c, []byte("p"), []byte("w")) {
			if keyguard.StateOf(err) != keyguard.Unreachable || keyguard.ReasonOf(err) != reason {
				t.Errorf("%s to %s: %v (%v)", op, endpoint, keyguard.ReasonOf(err), err)
			}
		}
	}
}

func TestNoCredentials(t *testing.T) {
	cfg := configuration(t, "id", "secret")
	cfg.Credentials = nil
	failing := cfg.Copy()
	failing.Credentials = aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{}, errors.New("web identity token has expired")
	}))
	for _, cfg := range []aws.Config{cfg, failing} {
		c := newClient(t, cfg, testARN, "http://127.0.0.1:1")
		for op, err := range ask(c, []byte("p"), []byte("w")) {
			if keyguard.ReasonOf(err) != keyguard.ReasonCredentials {
				t.Errorf("%s: %v", op, err)
			}
		}
	}
}

func TestThroughAProxy(t *testing.T) {
	var proxied atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxied.Add(1)
		fmt.Fprintf(w, `{"KeyId":%q,"Plaintext":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","CiphertextBlob":"AQID"}`, testARN)
	}))
	defer proxy.Close()
	cfg := configuration(t, "id", "secret")
	cfg.HTTPClient = awshttp.NewBuildableClient().WithTransportOptions(func(tr *http.Transport) {
		tr.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse(proxy.URL) }
	})
	c := newClient(t, cfg, testARN, "http://kms.invalid")
	if _, err := c.Probe(context.Background(), []byte("p"), binding); err != nil {
		t.Error(err)
	}
	if _, err := c.Unwrap(context.Background(), []byte("w"), binding, func([]byte) error { return nil }); err != nil {
		t.Error(err)
	}
	if n := proxied.Load(); n != 2 {
		t.Errorf("%d of 2 calls went through the proxy", n)
	}
}
