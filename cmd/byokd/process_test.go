package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// patience bounds every wait for something that must happen: generous, since machines of CI are slow.
// Nothing is asserted about how long things take, except by the tests in package test.
const patience = 60 * time.Second

// asByokd in the environment turns the test binary into byokd itself, so that the tests below start real
// processes, send real signals and see real exit codes.
const asByokd = "TEST_AS_BYOKD"

func TestMain(m *testing.M) {
	if os.Getenv(asByokd) != "" {
		main()
	}
	os.Exit(m.Run())
}

// needMounts skips where nothing can be mounted, and fails where that must not happen.
func needMounts(t *testing.T) {
	t.Helper()
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		dev.Close()
		if os.Geteuid() == 0 {
			return
		}
		err = errors.New("not root")
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
		t.Fatalf("BYOKD_REQUIRE names fuse, and nothing can be mounted: %v", err)
	}
	t.Skipf("nothing can be mounted here: %v", err)
}

// site is a KMS with a key, and directories for a byokd.
type site struct {
	kms                 *kmstest.Server
	endpoint, arn       string
	lower, mount        string
	credentials, config string
}

func newSite(t *testing.T) *site {
	t.Helper()
	kms, err := kmstest.New(kmstest.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(kms)
	t.Cleanup(func() {
		kms.Interrupt()
		server.Close()
		if err := kms.Close(); err != nil {
			t.Error(err)
		}
	})
	arn, err := kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &site{kms: kms, endpoint: server.URL, arn: arn, lower: filepath.Join(dir, "sealed"), mount: filepath.Join(dir, "data"),
		credentials: filepath.Join(dir, "s3-credentials"), config: filepath.Join(dir, "byokd.yaml")}
	for _, d := range []string{s.lower, s.mount} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.write(t, s.credentials, "# for the test\nid:secret\n", 0o600)
	s.configure(t, nil)
	return s
}

func (s *site) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// configure writes the configuration, with replacements in it.
func (s *site) configure(t *testing.T, replace map[string]string) {
	t.Helper()
	text := fmt.Sprintf(`cluster: {id: test-cluster}
keys: {primary: {arn: %q, endpoint: %q, probeInterval: 100ms}}
volume: {lower: %q, mount: %q}
objects:
  listen: 127.0.0.1:0
  credentials: {file: %q}
  holdFor: 5m
  buckets: {documents: {upstream: {bucket: sealed-documents, endpoint: "http://127.0.0.1:9"}}}
admin: {listen: "localhost:0"}
stopTimeout: 30s
`, s.arn, s.endpoint, s.lower, s.mount, s.credentials)
	for old, new := range replace {
		if !strings.Contains(text, old) {
			t.Fatalf("nothing to replace: %q", old)
		}
		text = strings.ReplaceAll(text, old, new)
	}
	s.write(t, s.config, text, 0o644)
}

// withoutVolume configures the proxy alone, which needs no FUSE.
func (s *site) withoutVolume(t *testing.T, replace map[string]string) {
	t.Helper()
	all := map[string]string{fmt.Sprintf("volume: {lower: %q, mount: %q}\n", s.lower, s.mount): ""}
	maps.Copy(all, replace)
	s.configure(t, all)
}

// process is a running byokd.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
	code  int           // valid after ended

	mu    sync.Mutex
	log   strings.Builder // guarded by mu
	admin string          // guarded by mu
	s3    string          // guarded by mu
}

func (s *site) start(t *testing.T) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0], "run", "--config", s.config), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), asByokd+"=1", "AWS_ACCESS_KEY_ID="+kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY="+kmstest.TenantSecret,
		"AWS_EC2_METADATA_DISABLED=true", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null")
	p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.follow(stderr)
	t.Cleanup(func() {
		select {
		case <-p.ended:
		default:
			p.cmd.Process.Kill()
			<-p.ended
		}
		for unix.Unmount(s.mount, unix.MNT_DETACH) == nil { // what a killed process leaves
		}
		if t.Failed() {
			t.Logf("byokd said:\n%s", p.text())
		}
	})
	return p
}

// follow collects the log and the addresses in it until the process has ended.
func (p *process) follow(stderr io.Reader) {
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		var entry struct{ Msg, Admin, Address string }
		p.mu.Lock()
		p.log.WriteString(lines.Text() + "\n")
		if json.Unmarshal(lines.Bytes(), &entry) == nil {
			switch entry.Msg {
			case "started":
				p.admin = entry.Admin
			case "the S3 proxy listens":
				p.s3 = "http://" + entry.Address
			}
		}
		p.mu.Unlock()
	}
	p.cmd.Wait()
	p.code = p.cmd.ProcessState.ExitCode()
	close(p.ended)
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func (p *process) addresses() (admin, s3 string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.admin, p.s3
}

// await waits until what it asks for is so.
func (p *process) await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		if holds() {
			return
		}
		select {
		case <-p.ended:
			t.Fatalf("byokd ended with %d while waiting for: %s\n%s", p.code, what, p.text())
		case <-deadline:
			t.Fatalf("not within %v: %s\n%s", patience, what, p.text())
		case <-time.After(10 * time.Millisecond): // the pace of asking, not an expectation
		}
	}
}

// awaitState waits until `byokd status` ends with code.
func (p *process) awaitState(t *testing.T, code int) string {
	t.Helper()
	var out strings.Builder
	p.await(t, fmt.Sprintf("status %d", code), func() bool {
		out.Reset()
		admin, _ := p.addresses()
		return admin != "" && run(context.Background(), []string{"status", "--admin", admin}, nil, &out, io.Discard) == code
	})
	return out.String()
}

func (p *process) awaitEnd(t *testing.T, code int) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("it does not end\n%s", p.text())
	}
	if p.code != code {
		t.Errorf("exit code %d, want %d", p.code, code)
	}
}

func (p *process) signal(t *testing.T, s unix.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// probe asks a health endpoint.
func (p *process) probe(t *testing.T, path string) (int, string) {
	t.Helper()
	admin, _ := p.addresses()
	resp, err := http.Get(admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func mountedOn(t *testing.T, dir string) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return mountedAt(string(text), dir) != ""
}
