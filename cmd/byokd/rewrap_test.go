package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// moveSite is a site with volume, bucket, control socket and a second key to move to.
type moveSite struct {
	*site
	up            *s3test.Server
	first, second string
	socket, audit string
}

func newMoveSite(t *testing.T) *moveSite {
	t.Helper()
	needMounts(t)
	asTenant(t)
	s := &moveSite{site: newSite(t), up: s3test.New("sealed-documents")}
	t.Cleanup(s.up.Close)
	s.first = s.arn
	var err error
	if s.second, err = s.kms.CreateKey("", "", "", false); err != nil {
		t.Fatal(err)
	}
	s.use(t, s.first)
	return s
}

// asTenant gives commands that this process runs itself the credentials of byokd's role.
func asTenant(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY": kmstest.TenantSecret,
		"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_REGION": "eu-central-1"} {
		t.Setenv(name, value)
	}
}

// use puts a key into the configuration.
func (s *moveSite) use(t *testing.T, arn string) {
	t.Helper()
	s.arn = arn
	s.socket, s.audit = s.withSocket(t, map[string]string{"http://127.0.0.1:9": s.up.URL()})
}

// rewrap runs the command and expects its exit code.
func (s *moveSite) rewrap(t *testing.T, want int, args ...string) (rewrapReport, string) {
	t.Helper()
	code, out, errs := byokd(t, nil, append([]string{"key", "rewrap", "--config", s.config, "-o", "json"}, args...)...)
	if code != want {
		t.Fatalf("rewrap %v: exit code %d, want %d\n%s%s", args, code, want, out, errs)
	}
	var report rewrapReport
	if out != "" {
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
	}
	return report, errs
}

func (p *process) s3Client() *s3.Client {
	_, endpoint := p.addresses()
	return s3.New(s3.Options{BaseEndpoint: aws.String(endpoint), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("id", "secret", "")})
}

func (p *process) put(t *testing.T, key string) {
	t.Helper()
	if _, err := p.s3Client().PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: &key, Body: strings.NewReader("object " + key)}); err != nil {
		t.Fatal(err)
	}
}

// mustRead expects files and objects as they were written.
func (s *moveSite) mustRead(t *testing.T, p *process, names ...string) {
	t.Helper()
	for _, name := range names {
		if got, err := os.ReadFile(filepath.Join(s.mount, name)); err != nil || string(got) != "file "+name {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		out, err := p.s3Client().GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("documents"), Key: &name})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := io.ReadAll(out.Body); err != nil || string(got) != "object "+name {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		out.Body.Close()
	}
}

func (s *moveSite) write(t *testing.T, p *process, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.mount, name), []byte("file "+name), 0o600); err != nil {
		t.Fatal(err)
	}
	p.put(t, name)
}

func (p *process) stop(t *testing.T) {
	t.Helper()
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// TestRewrapOnline is the whole move: while byokd serves, over its restart with the new configuration, to the
// end of the old key.
func TestRewrapOnline(t *testing.T) {
	s := newMoveSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	s.write(t, p, "before")

	report, _ := s.rewrap(t, exitOK, "--to", s.second, "--dry-run")
	if len(report.Needs) != 3 || report.Finished || report.Buckets[0].Waiting != report.Buckets[0].Keys || report.Volume.Under(s.second) || report.Volume.Generation != 1 {
		t.Errorf("dry run: %+v", report)
	}
	report, progress := s.rewrap(t, exitOK, "--to", s.second)
	if report.Volume.Generation != 2 || !slices.Equal(report.Volume.KMS, []string{s.first, s.second}) || report.Buckets[0].Waiting != 0 || report.Finished {
		t.Errorf("%+v", report)
	}
	if len(report.Needs) != 1 || !strings.Contains(report.Needs[0], "the running byokd: set keys.primary.arn to "+s.second) {
		t.Errorf("needs %q", report.Needs)
	}
	for _, step := range []string{"volume: unwrap with the new KMS key and compare", "data keys"} {
		if !strings.Contains(progress, step) {
			t.Errorf("progress says nothing of %q:\n%s", step, progress)
		}
	}
	// It can be taken back, and done again.
	back, _ := s.rewrap(t, exitOK, "--to", s.first, "--finish")
	if !back.Finished || !slices.Equal(back.Volume.KMS, []string{s.first}) || !slices.Equal(back.Buckets[0].KMS, []string{s.first}) {
		t.Errorf("taken back: %+v", back)
	}
	s.rewrap(t, exitOK, "--to", s.second)
	s.mustRead(t, p, "before")
	s.write(t, p, "between")
	if _, errs := s.rewrap(t, exitStillNeeded, "--to", s.second, "--finish"); !strings.Contains(errs, "the running byokd") {
		t.Errorf("it says %s", errs)
	}
	p.stop(t)

	s.use(t, s.second)
	p = s.start(t)
	p.awaitState(t, exitOK)
	s.mustRead(t, p, "before", "between")
	s.write(t, p, "after")
	report, _ = s.rewrap(t, exitOK, "--to", s.second, "--finish")
	if !report.Finished || !slices.Equal(report.Volume.KMS, []string{s.second}) || !slices.Equal(report.Buckets[0].KMS, []string{s.second}) || len(report.Needs) != 0 {
		t.Errorf("%+v", report)
	}
	if again, _ := s.rewrap(t, exitOK, "--to", s.second, "--finish"); !again.Finished || again.Volume.Changed {
		t.Errorf("once more: %+v", again)
	}
	if err := s.kms.Disable(s.first); err != nil {
		t.Fatal(err)
	}
	s.mustRead(t, p, "before", "between", "after")
	p.stop(t)
	p = s.start(t)
	p.awaitState(t, exitOK)
	s.mustRead(t, p, "before", "between", "after")
	if events := auditEvents(t, s.audit); !contains(events, "rewrap  from "+s.first) {
		t.Errorf("the audit has no rewrap:\n%s", strings.Join(events, "\n"))
	}
	p.stop(t)

	// The old key in the configuration is refused, with the way out, which leads there.
	s.use(t, s.first)
	p = s.start(t)
	p.awaitEnd(t, exitLower)
	if text := p.text(); !strings.Contains(text, "byokd key rewrap --config FILE --to "+s.first) {
		t.Errorf("it says:\n%s", text)
	}
}

// TestRewrapOffline: no byokd runs; the configuration names the new key already, as the refusal advises.
func TestRewrapOffline(t *testing.T) {
	s := newMoveSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	s.write(t, p, "before")
	p.stop(t)
	s.use(t, s.second)
	p = s.start(t)
	p.awaitEnd(t, exitLower)

	if _, errs := s.rewrap(t, exitUsage, "--to", "arn:aws:kms:eu-central-1:111122223333:alias/x"); !strings.Contains(errs, "alias") {
		t.Errorf("an alias: %s", errs)
	}
	disabled, err := s.kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.kms.Disable(disabled); err != nil {
		t.Fatal(err)
	}
	if _, errs := s.rewrap(t, exitMisconfigured, "--to", disabled, "--key", "primary"); !strings.Contains(errs, "is Disabled") {
		t.Errorf("a disabled key: %s", errs)
	}
	for state, away := range map[string][2]func(string) error{
		"enable-key":     {s.kms.Disable, s.kms.Enable},
		"put-key-policy": {func(arn string) error { return s.kms.Deny(arn, "*", "") }, func(arn string) error { return s.kms.Allow(arn, "*", "") }},
	} {
		if err := away[0](s.first); err != nil {
			t.Fatal(err)
		}
		if _, errs := s.rewrap(t, exitFrozen, "--to", s.second); !strings.Contains(errs, "Next step: ") || !strings.Contains(errs, state+" --key-id "+s.first) {
			t.Errorf("the old key is away: %s", errs)
		}
		if err := away[1](s.first); err != nil {
			t.Fatal(err)
		}
	}
	report, _ := s.rewrap(t, exitOK, "--to", s.second, "--finish")
	if !report.Finished || report.From != s.first || report.Volume.Generation != 3 {
		t.Errorf("%+v", report)
	}
	if err := s.kms.Disable(s.first); err != nil {
		t.Fatal(err)
	}
	p = s.start(t)
	p.awaitState(t, exitOK)
	s.mustRead(t, p, "before")
	p.stop(t)

	// An older header put back by hand, with the configuration that goes with it.
	path := filepath.Join(s.lower, seal.VolumeHeaderName)
	header, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	third, err := s.kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	s.use(t, third)
	s.rewrap(t, exitOK, "--to", third, "--finish")
	if err := os.WriteFile(path, header, 0o600); err != nil {
		t.Fatal(err)
	}
	s.use(t, s.second)
	p = s.start(t)
	p.awaitEnd(t, exitLower)
	if text := p.text(); !strings.Contains(text, "an older volume header was put back") {
		t.Errorf("it says:\n%s", text)
	}
	if _, errs := s.rewrap(t, exitLower, "--to", third); !strings.Contains(errs, "an older volume header was put back") {
		t.Errorf("it says %s", errs)
	}
}

// TestRewrapKilled: the command is killed with SIGKILL while it waits for each of its KMS calls; the data opens
// under the old key, and the next run completes the move.
func TestRewrapKilled(t *testing.T) {
	s := newMoveSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	s.write(t, p, "before")
	p.stop(t)
	restore := s.remember(t)
	kills := 0
	for s.killAtCall(t, kills) {
		kills++
		if kills%4 == 0 { // opening each time would only take longer
			p = s.start(t)
			p.awaitState(t, exitOK)
			s.mustRead(t, p, "before")
			p.stop(t)
		}
		if report, _ := s.rewrap(t, exitOK, "--to", s.second); report.Buckets[0].Waiting != 0 || !report.Volume.Under(s.second) {
			t.Errorf("after a kill in call %d: %+v", kills, report)
		}
		restore()
	}
	if kills < 8 {
		t.Errorf("killed %d times only: the search for calls is broken", kills)
	}
	t.Logf("killed in each of %d calls", kills)
	s.use(t, s.second)
	p = s.start(t)
	p.awaitState(t, exitOK)
	s.mustRead(t, p, "before")
	p.stop(t)
}

// remember keeps header, record and keyring, to be put back together.
func (s *moveSite) remember(t *testing.T) (restore func()) {
	t.Helper()
	files := map[string][]byte{}
	for _, name := range []string{seal.VolumeHeaderName, seal.VolumeMarkName} {
		text, err := os.ReadFile(filepath.Join(s.lower, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = text
	}
	ring := s.up.Object("sealed-documents", objstore.KeyringObject)
	return func() {
		for name, text := range files {
			s.site.write(t, filepath.Join(s.lower, name), string(text), 0o600)
		}
		again := *ring
		s.up.Replace("sealed-documents", objstore.KeyringObject, &again)
	}
}

// killAtCall lets the command make some KMS calls, kills it in the next, and reports whether it came so far.
func (s *moveSite) killAtCall(t *testing.T, calls int) bool {
	t.Helper()
	if _, err := s.kms.Inject(kmstest.Fault{Kind: kmstest.FaultHang, Skip: calls}); err != nil {
		t.Fatal(err)
	}
	defer s.kms.Clear()
	cmd := exec.Command(os.Args[0], "key", "rewrap", "--config", s.config, "--to", s.second)
	cmd.Env = append(os.Environ(), asByokd+"=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	hangs := make(chan error, 1)
	go func() { hangs <- s.kms.AwaitHeld(ctx, 1) }()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Fatalf("%v: %s", err, &out)
		}
		return false
	case err := <-hangs:
		if err != nil {
			t.Error(err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-ended
		return true
	}
}

// TestRewrapOnlineKilled: byokd itself is killed in the middle of a rewrap that it does, in that of the bucket and
// in that of the volume. The command says that it does not know; nothing is lost, and the next one completes it.
func TestRewrapOnlineKilled(t *testing.T) {
	s := newMoveSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	s.write(t, p, "before")
	for _, done := range []int{0, 2} { // ReEncrypts before the one that hangs: two are the bucket's
		if _, err := s.kms.Inject(kmstest.Fault{Kind: kmstest.FaultHang, Operations: []string{"ReEncrypt"}, Skip: done}); err != nil {
			t.Fatal(err)
		}
		ended := make(chan string, 1)
		go func() {
			_, _, errs := byokd(t, nil, "key", "rewrap", "--config", s.config, "--to", s.second)
			ended <- errs
		}()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := s.kms.AwaitHeld(ctx, 1); err != nil {
			t.Fatal(err)
		}
		cancel()
		p.signal(t, unix.SIGKILL)
		<-p.ended
		if errs := <-ended; !strings.Contains(errs, "cut off") {
			t.Errorf("the command says %s", errs)
		}
		s.kms.Clear()
		p = s.start(t)
		p.awaitState(t, exitOK)
		s.mustRead(t, p, "before")
	}
	if report, _ := s.rewrap(t, exitOK, "--to", s.second); report.Buckets[0].Waiting != 0 || !report.Volume.Under(s.second) {
		t.Errorf("%+v", report)
	}
	s.mustRead(t, p, "before")
	p.stop(t)
}
