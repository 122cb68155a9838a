package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// onlyFrom empties the environment of all sources of credentials but these files, which are returned.
func onlyFrom(t *testing.T) (credentialsFile, configFile string) {
	t.Helper()
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_STS"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	dir := t.TempDir()
	credentialsFile, configFile = filepath.Join(dir, "credentials"), filepath.Join(dir, "config")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", credentialsFile)
	t.Setenv("AWS_CONFIG_FILE", configFile)
	return credentialsFile, configFile
}

// replace puts a file in the place of another, as an agent does that renews credentials.
func replace(t *testing.T, path, text string) {
	t.Helper()
	next := path + ".next"
	if err := errors.Join(os.WriteFile(next, []byte(text), 0o600), os.Rename(next, path)); err != nil {
		t.Fatal(err)
	}
}

func profile(id, secret string) string {
	return fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", id, secret)
}

// TestReplacedCredentialsFile: a guard whose credentials are refused goes on by itself once
// the shared file has others, at the start and after it has been open.
func TestReplacedCredentialsFile(t *testing.T) {
	file, _ := onlyFrom(t)
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	key, err := server.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, file, profile("AKIDGONE", "gone"))
	client, err := new(awsConfigs).newKMS(t.Context(), KeyConfig{ARN: key, Endpoint: server.URL()})
	if err != nil {
		t.Fatal(err)
	}
	guard, err := keyguard.New(client, keyguard.Options{Name: "g", ProbeInterval: 100 * time.Millisecond, OutageGrace: 2100 * time.Millisecond, Endpoint: server.URL()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- guard.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	await := func(what string, ok func(keyguard.Status) bool) {
		t.Helper()
		for limit := time.After(time.Minute); ; {
			changed := guard.Changed()
			if ok(guard.Status()) {
				return
			}
			select {
			case <-changed:
			case <-limit:
				t.Fatalf("%s: %+v", what, guard.Status())
			}
		}
	}
	refused := func(gate keyguard.GateState) func(keyguard.Status) bool {
		return func(s keyguard.Status) bool {
			return s.Gate == gate && s.Reason == keyguard.ReasonCredentials && strings.Contains(s.NextStep(), "get-caller-identity")
		}
	}
	await("refused at the start", refused(keyguard.Starting))
	replace(t, file, profile(kmstest.TenantAccessKey, kmstest.TenantSecret))
	await("granted", keyguard.Status.Ready)
	replace(t, file, profile("AKIDGONE", "gone"))
	await("frozen", refused(keyguard.Frozen))
	if err := os.WriteFile(file, []byte(profile(kmstest.TenantAccessKey, kmstest.TenantSecret)), 0o600); err != nil { // in place, as careless agents do
		t.Fatal(err)
	}
	await("granted again", keyguard.Status.Ready)
}

// credentialsEndpoint stands for what a node lends its pods credentials by.
type credentialsEndpoint struct {
	*httptest.Server
	asked  atomic.Int64
	mu     sync.Mutex
	broken int           // mu; status to fail with
	hang   chan struct{} // mu; answers wait for its closing
	ends   time.Time     // mu
}

func newCredentialsEndpoint(t *testing.T, ends time.Time) *credentialsEndpoint {
	e := &credentialsEndpoint{ends: ends}
	e.Server = httptest.NewServer(e)
	t.Cleanup(e.Close)
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", e.URL+"/role")
	return e
}

func (e *credentialsEndpoint) set(broken int, hang chan struct{}, ends time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.broken, e.hang, e.ends = broken, hang, ends
}

func (e *credentialsEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := e.asked.Add(1)
	e.mu.Lock()
	broken, hang, ends := e.broken, e.hang, e.ends
	e.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return
		}
	}
	if broken != 0 {
		w.WriteHeader(broken)
		return
	}
	fmt.Fprintf(w, `{"AccessKeyId":"AKID%d","SecretAccessKey":"s","Token":"t","Expiration":%q}`, n, ends.UTC().Format(time.RFC3339))
}

// TestCredentialsOutliveTheirEndpoint: while the endpoint fails or hangs, credentials are
// used up to their end; afterwards calls fail in their own time, and go on once it answers.
func TestCredentialsOutliveTheirEndpoint(t *testing.T) {
	for name, hangs := range map[string]bool{"fails": false, "hangs": true} {
		t.Run(name, func(t *testing.T) {
			onlyFrom(t)
			start := time.Now()
			endpoint := newCredentialsEndpoint(t, start.Add(time.Hour))
			var ahead atomic.Int64
			cfg, err := new(awsConfigs).in(t.Context(), "eu-central-1")
			if err != nil {
				t.Fatal(err)
			}
			live := cfg.Credentials.(*liveCredentials)
			live.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
			get := func() (string, error) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				c, err := live.Retrieve(ctx)
				return c.AccessKeyID, err
			}
			first, err := get()
			if err != nil {
				t.Fatal(err)
			}
			if again, err := get(); again != first || err != nil || endpoint.asked.Load() != 1 {
				t.Errorf("asked %d times, %q, %v", endpoint.asked.Load(), again, err)
			}
			release, once := make(chan struct{}), sync.Once{}
			free := func() { once.Do(func() { close(release) }) }
			defer free()
			if hangs {
				endpoint.set(0, release, start.Add(3*time.Hour))
			} else {
				endpoint.set(http.StatusInternalServerError, nil, time.Time{})
			}
			ahead.Store(int64(52 * time.Minute))                                  // the SDK takes five minutes off the life of an endpoint's credentials
			for begun := endpoint.asked.Load(); endpoint.asked.Load() == begun; { // a renewal has begun in the background
				if again, err := get(); again != first || err != nil {
					t.Fatalf("before their end: %q, %v", again, err)
				}
			}
			ahead.Store(int64(61 * time.Minute))
			if _, err := get(); err == nil {
				t.Error("credentials are used after their end")
			}
			endpoint.set(0, nil, start.Add(3*time.Hour))
			free()
			awaitCredentials(t, get, func(id string) bool { return id != first })
		})
	}
}

// TestHungRenewalIsNotWaitedFor: where there are no credentials, an attempt that hangs does not keep a later one from giving
// some; and however long the endpoint hangs, there are a few attempts at a time only.
func TestHungRenewalIsNotWaitedFor(t *testing.T) {
	var asked, ended atomic.Int64
	hanging := atomic.Bool{}
	hanging.Store(true)
	live := &liveCredentials{now: time.Now, timeout: time.Hour, read: func(ctx context.Context) (aws.CredentialsProvider, error) {
		asked.Add(1)
		if hanging.Load() {
			<-ctx.Done()
			ended.Add(1)
		}
		return credentials.NewStaticCredentialsProvider("AKID", "s", ""), ctx.Err()
	}}
	ctx, cancel := context.WithCancel(t.Context())
	type answer struct {
		c   aws.Credentials
		err error
	}
	answers := make(chan answer, 2)
	ask := func(ctx context.Context) {
		c, err := live.Retrieve(ctx)
		answers <- answer{c, err}
	}
	go ask(ctx)
	for limit := time.Now().Add(time.Minute); asked.Load() < 2; time.Sleep(10 * time.Millisecond) { // between two looks
		if time.Now().After(limit) {
			t.Fatal("there is no second attempt")
		}
	}
	cancel()
	if a := <-answers; !errors.Is(a.err, context.Canceled) {
		t.Errorf("who gives up is told %v", a.err)
	}
	hanging.Store(false)
	ask(t.Context())
	if a := <-answers; a.err != nil || a.c.AccessKeyID != "AKID" || ended.Load() != 0 {
		t.Errorf("%q, %v; %d attempts have ended that hung", a.c.AccessKeyID, a.err, ended.Load())
	}
	if n := asked.Load(); n > int64(maxRenewals) {
		t.Errorf("%d attempts", n)
	}
}

// TestHungRenewalsAreBounded: attempts of which none is answered become no more than a few, and who asks learns of the failure
// of the one that he has waited for although later ones are under way.
func TestHungRenewalsAreBounded(t *testing.T) {
	failure := errors.New("nobody answers")
	var asked atomic.Int64
	fail := make(chan struct{})
	live := &liveCredentials{now: time.Now, timeout: time.Hour, read: func(ctx context.Context) (aws.CredentialsProvider, error) {
		if asked.Add(1) == 1 {
			<-fail
			return nil, failure
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	// The clock is far ahead at each look, so that every look may begin an attempt.
	var looks atomic.Int64
	live.now = func() time.Time { return time.Now().Add(time.Duration(looks.Add(1)) * time.Hour) }
	waiting := make(chan error, 1)
	go func() { _, err := live.Retrieve(t.Context()); waiting <- err }()
	for limit := time.Now().Add(time.Minute); asked.Load() == 0; time.Sleep(time.Millisecond) { // between two looks
		if time.Now().After(limit) {
			t.Fatal("there is no attempt")
		}
	}
	given, cancel := context.WithCancel(t.Context())
	cancel()
	for range 10 * maxRenewals {
		if _, err := live.Retrieve(given); !errors.Is(err, context.Canceled) {
			t.Fatalf("a caller that has left is told %v", err)
		}
	}
	close(fail)
	if err := <-waiting; !errors.Is(err, failure) {
		t.Errorf("who has waited for the first attempt is told %v", err)
	}
	if n := asked.Load(); n > int64(maxRenewals)+1 { // one may have begun when the first had ended
		t.Errorf("%d attempts at a time, at most %d are wanted", n, maxRenewals)
	}
}

// TestDistrustedCredentials: what AWS refuses is asked for again, now and then, and used until there is other.
func TestDistrustedCredentials(t *testing.T) {
	onlyFrom(t)
	endpoint := newCredentialsEndpoint(t, time.Now().Add(time.Hour))
	cfg, err := new(awsConfigs).in(t.Context(), "eu-central-1")
	if err != nil {
		t.Fatal(err)
	}
	live := cfg.Credentials.(*liveCredentials)
	first, err := live.Retrieve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	awaitCredentials(t, func() (string, error) {
		live.Invalidate()
		c, err := live.Retrieve(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return c.AccessKeyID, nil
	}, func(id string) bool { return id != first.AccessKeyID })
	if n := endpoint.asked.Load(); n != 2 {
		t.Errorf("asked %d times", n)
	}
}

// TestReplacedTokenFile: each renewal takes the service account's token as it is then.
func TestReplacedTokenFile(t *testing.T) {
	onlyFrom(t)
	token := filepath.Join(t.TempDir(), "token")
	replace(t, token, "token-1")
	tokens := make(chan string, 100)
	start := time.Now()
	sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		given := r.Form.Get("WebIdentityToken")
		tokens <- given
		if given == "token-1" && len(tokens) > 1 {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Code>ExpiredTokenException</Code><Message>Token expired</Message></Error></ErrorResponse>`)
			return
		}
		fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>
			<AccessKeyId>AKID-%s</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`,
			given, start.Add(time.Duration(len(tokens))*time.Hour).UTC().Format(time.RFC3339))
	}))
	defer sts.Close()
	t.Setenv("AWS_ENDPOINT_URL_STS", sts.URL)
	t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/byokd")
	t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token)
	cfg, err := new(awsConfigs).in(t.Context(), "eu-central-1")
	if err != nil {
		t.Fatal(err)
	}
	live := cfg.Credentials.(*liveCredentials)
	var ahead atomic.Int64
	live.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	if c, err := live.Retrieve(t.Context()); err != nil || c.AccessKeyID != "AKID-token-1" {
		t.Fatalf("%+v, %v", c.AccessKeyID, err)
	}
	ahead.Store(int64(61 * time.Minute))
	if c, err := live.Retrieve(t.Context()); err == nil {
		t.Errorf("an expired token gives %s", c.AccessKeyID)
	}
	replace(t, token, "token-2")
	awaitCredentials(t, func() (string, error) {
		c, err := live.Retrieve(t.Context())
		return c.AccessKeyID, err
	}, func(id string) bool { return id == "AKID-token-2" })
}

// awaitCredentials asks for an access key id until it is one that is wanted.
func awaitCredentials(t *testing.T, get func() (string, error), wanted func(id string) bool) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); ; {
		id, err := get()
		if err == nil && wanted(id) {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("the last credentials: %q, %v", id, err)
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}
