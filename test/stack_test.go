//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// The timing of the stacks: the defaults of byokd, but for the lease, which is
// the shortest that the configuration takes (probe interval + 2 s), and for the
// hold, which a freeze of this test outlasts.
const (
	probeInterval = time.Second
	outageGrace   = 3 * time.Second
	holdFor       = 3 * time.Second
	stopTimeout   = 10 * time.Second

	// patience bounds waiting for what is not promised a time (starting on a
	// loaded machine, for example). It is no bound of the product.
	patience = 30 * time.Second
)

// requireFUSE skips on a machine without FUSE, and fails where the machine is
// said to have it.
func requireFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	if err == nil && os.Geteuid() == 0 {
		return
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
		t.Fatalf("BYOKD_REQUIRE names fuse, but this is not root with /dev/fuse: %v", err)
	}
	t.Skipf("needs root and /dev/fuse: %v", err)
}

// erasing says whether this platform has GOEXPERIMENT=runtimesecret.
const erasing = runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64"

// The programs under test, each built once: byokd as shipped, byokd without the
// experiment that erases keys, which is the control of the memory test, and
// devcloud.
var (
	shipped      = sync.OnceValues(func() (string, error) { return goBuild("byokd", erasing) })
	leaky        = sync.OnceValues(func() (string, error) { return goBuild("byokd", false) })
	cloudProgram = sync.OnceValues(func() (string, error) { return goBuild("devcloud", erasing) })
)

func goBuild(name string, erase bool) (file string, err error) {
	experiment := ""
	if erase {
		experiment = "runtimesecret"
	}
	file = filepath.Join(os.Getenv(binVariable), name+"-"+experiment)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-o", file, "../cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOEXPERIMENT="+experiment, "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", name, err, text)
	}
	return file, nil
}

// stack is one devcloud and one byokd on it, with directories and ports of their own.
type stack struct {
	t          *testing.T
	byokd      string // the binary
	dir        string
	lower      string
	mount      string
	cloud      string // endpoint of devcloud
	s3         string // endpoint of the proxy
	admin      string // endpoint of byokd's status
	arn        string
	canary     string          // in every plain byte string that the test writes
	cache      string          // of the volume
	grace      time.Duration   // outageGrace of the key
	launch     []string        // a program with arguments that byokd is started by, if any
	container  func() *process // starts byokd in a container, if set
	alone      bool            // byokd is one process, and the mount ends with it
	keeper     bool            // the mount outlives its worker: what is called the daemon is the keeper
	ownership  string          // volume.ownership; auto where empty
	volumeless bool            // byokd has buckets only, and its files belong to nobody
	socket     string          // of the node driver that mounts; byokd's files belong to nobody then
	holdFor    time.Duration   // of a request of a frozen bucket
	prepare    func()          // once devcloud runs, before byokd is configured
	control    kmstest.Control
	kms        *kms.Client // as the administrator
	daemon     *process    // byokd, while it runs
	clouds     *process

	writers []*writerState // workers whose acknowledgements are to be verified
}

// option changes a stack before anything of it is started.
type option func(*stack)

// withCache sets the volume's cache mode; "" leaves the default.
func withCache(mode string) option {
	return func(s *stack) {
		if mode != "" {
			s.cache = mode
		}
	}
}

// withGrace sets the length of the lease.
func withGrace(grace time.Duration) option { return func(s *stack) { s.grace = grace } }

// newStack starts a devcloud and a byokd, and waits until it is ready.
func newStack(t *testing.T, program func() (string, error), options ...option) *stack {
	t.Helper()
	requireFUSE(t)
	byokd, err := program()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &stack{t: t, byokd: byokd, dir: dir, lower: dir + "/sealed", mount: dir + "/data", canary: newCanary(), cache: "writeback", grace: outageGrace, holdFor: holdFor}
	for _, o := range options {
		o(s)
	}
	s.keeper = !s.alone && !s.volumeless && s.socket == ""
	t.Cleanup(s.leaveNothing)
	for _, d := range []string{s.lower, s.mount} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.cloud, s.s3, s.admin = freeEndpoint(t), freeEndpoint(t), freeEndpoint(t)
	s.control = kmstest.Control{Endpoint: s.cloud}
	s.kms = kms.New(kms.Options{Region: kmstest.DefaultRegion, BaseEndpoint: aws.String(s.cloud), HTTPClient: awshttp.NewBuildableClient(),
		Credentials: credentials.NewStaticCredentialsProvider(kmstest.AdminAccessKey, kmstest.AdminSecret, "")})
	s.startCloud()
	if s.prepare != nil {
		s.prepare()
	}
	s.configure()
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	return s
}

// newCanary is text that occurs nowhere by chance, of which every long enough
// piece of the test's plaintext holds a copy.
func newCanary() string { return "canary-" + seal.NewID().String() }

// freeEndpoint is freeAddress as a URL.
func freeEndpoint(t *testing.T) string {
	t.Helper()
	return "http://" + freeAddress(t)
}

const (
	firstPort = 20000
	ports     = 12000
)

// nextPort counts the ports that were looked at, from a random one on, so that tests
// that run side by side seldom look at the same.
var nextPort atomic.Int64

func init() { nextPort.Store(rand.Int64N(ports)) }

// freeAddress picks a loopback address with a port below the range from which the
// kernel takes ports for outgoing connections, so that it is still free when it is
// used, and again after a restart. It picks none twice.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 200 {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+nextPort.Add(1)%ports)
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address
		}
	}
	t.Fatal("no free port")
	return ""
}

func (s *stack) startCloud() {
	s.t.Helper()
	program, err := cloudProgram()
	if err != nil {
		s.t.Fatal(err)
	}
	s.clouds = s.start("devcloud", nil, program, "serve", "--dir", s.dir+"/cloud", "--listen", strings.TrimPrefix(s.cloud, "http://"), "--setup")
	s.await("devcloud to answer", s.clouds, func() bool {
		status, err := s.control.Status(s.t.Context())
		if err != nil || len(status.Keys) == 0 {
			return false
		}
		s.arn = status.Keys[0].ARN
		return strings.Contains(s.clouds.output(), "devcloud: ready")
	})
}

// configure writes the configuration of byokd.
func (s *stack) configure() {
	s.t.Helper()
	config := fmt.Sprintf(`
cluster: {id: acme-test, region: eu-central-1}
keys:
  primary: {arn: %q, endpoint: %q, probeInterval: %v, outageGrace: %v}
volume: {role: orchestration, lower: %q, mount: %q, cache: %s}
objects:
  listen: %s
  credentials: {file: %q}
  holdFor: %v
  buckets:
    documents: {upstream: {bucket: acme-documents, endpoint: %q}}
    backups: {upstream: {bucket: acme-backups, endpoint: %q}}
admin: {listen: %s}
audit: {file: %q}
stopTimeout: %v
`, s.arn, s.cloud, probeInterval, s.grace, s.lower, s.mount, s.cache, strings.TrimPrefix(s.s3, "http://"), s.dir+"/s3-credentials",
		s.holdFor, s.cloud, s.cloud, strings.TrimPrefix(s.admin, "http://"), s.dir+"/audit.jsonl", stopTimeout)
	switch {
	case s.keeper:
		config = strings.Replace(config, "volume: {", "volume: {keeper: on, ", 1)
	case s.alone:
		config = strings.Replace(config, "volume: {", "volume: {keeper: off, ", 1)
	}
	if s.ownership != "" {
		config = strings.Replace(config, "volume: {", fmt.Sprintf("volume: {ownership: %s, ", s.ownership), 1)
	}
	if s.socket != "" {
		config = strings.Replace(config, "volume: {", fmt.Sprintf("volume: {mountSocket: %q, ", s.socket), 1)
	}
	if s.volumeless {
		config = regexp.MustCompile(`(?m)^volume: .*\n`).ReplaceAllString(config, "")
	}
	for name, text := range map[string]string{"/byokd.yaml": config, "/s3-credentials": "byokd:byokd-secret\n"} {
		if err := os.WriteFile(s.dir+name, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	if s.volumeless || s.socket != "" {
		s.giveAway()
	}
}

// giveAway lets a byokd that runs as nobody reach its program and its files.
func (s *stack) giveAway() {
	s.t.Helper()
	const nobody = 65534
	for _, path := range []string{s.dir, s.lower, s.dir + "/byokd.yaml", s.dir + "/s3-credentials"} {
		if err := os.Chown(path, nobody, nobody); err != nil {
			s.t.Fatal(err)
		}
	}
	for _, path := range []string{filepath.Dir(s.dir), filepath.Dir(s.byokd), s.byokd} {
		if err := os.Chmod(path, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
}

// startDaemon starts byokd as the tenant, with nothing else from our environment.
func (s *stack) startDaemon() {
	s.t.Helper()
	if s.container != nil {
		s.daemon = s.container()
		return
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "AWS_REGION=eu-central-1", "AWS_EC2_METADATA_DISABLED=true",
		"AWS_ACCESS_KEY_ID=" + kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY=" + kmstest.TenantSecret}
	command := append(slices.Clone(s.launch), s.byokd, "run", "--config", s.dir+"/byokd.yaml")
	s.daemon = s.start("byokd", env, command[0], command[1:]...)
}

// report is byokd's status, false while it does not answer.
func (s *stack) report() (metrics.Report, bool) {
	var r metrics.Report
	code, body := s.get("/v1/status")
	return r, code == http.StatusOK && json.Unmarshal(body, &r) == nil && len(r.Keys) == 1
}

// get asks byokd's admin listener; code 0 means no answer.
func (s *stack) get(path string) (code int, body []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.admin+path, nil)
	if err != nil {
		s.t.Error(err)
		return 0, nil
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil
	}
	return resp.StatusCode, body
}

// awaitState waits until byokd reports a state, and returns the report.
func (s *stack) awaitState(want ...metrics.State) metrics.Report {
	s.t.Helper()
	var last metrics.Report
	s.await(fmt.Sprint("the state ", want), s.daemon, func() bool {
		r, ok := s.report()
		if ok {
			last = r
		}
		return ok && slices.Contains(want, r.State)
	})
	return last
}

// awaitGate waits until byokd's guard is in a state. Draining reports itself as
// frozen, but lets the kernel's flush pass.
func (s *stack) awaitGate(want keyguard.GateState) metrics.KeyReport {
	s.t.Helper()
	var last metrics.KeyReport
	s.await("the gate "+want.String(), s.daemon, func() bool {
		r, ok := s.report()
		if ok {
			last = r.Keys[0]
		}
		return ok && last.Gate == want
	})
	return last
}

// await waits until ok, and fails the test when patience or the process ends first.
func (s *stack) await(what string, p *process, ok func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if p != nil && p.ended() {
			s.t.Fatalf("waiting for %s: %s has ended: %v\n%s", what, p.name, p.err, p.tail())
		}
		if time.Now().After(deadline) {
			r, _ := s.report()
			s.t.Fatalf("waited %v for %s; byokd says %s: %s", patience, what, r.State, r.Cause)
		}
		time.Sleep(5 * time.Millisecond) // between two looks at a condition
	}
}

// command runs byokd with arguments to its end and returns its exit code.
func (s *stack) command(args ...string) (code int, output string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	text, err := exec.CommandContext(ctx, s.byokd, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return code, string(text)
}

// key changes the key behind AWS's back, and returns when the change is in force.
func (s *stack) key(c kmstest.KeyCommand) {
	s.t.Helper()
	c.Key = s.arn
	if _, err := s.control.Key(s.t.Context(), c); err != nil {
		s.t.Fatal(err)
	}
}

// stopDaemon asks byokd to stop, and checks that it leaves cleanly.
func (s *stack) stopDaemon() (took time.Duration) {
	s.t.Helper()
	began := time.Now()
	s.daemon.signal(syscall.SIGTERM)
	if !s.daemon.wait(patience) {
		s.t.Fatalf("byokd did not stop within %v of SIGTERM\n%s", patience, s.daemon.tail())
	}
	if code := s.daemon.code(); code != 0 {
		s.t.Errorf("byokd ended with %d after SIGTERM\n%s", code, s.daemon.tail())
	}
	if s.socket == "" && mounted(s.mount) {
		s.t.Error("byokd stopped and left its mount behind")
	}
	return time.Since(began)
}

// leaveNothing ends everything at the end of a test. It runs before the
// temporary directory is removed, which a mount in it would make dangerous.
func (s *stack) leaveNothing() {
	for _, w := range s.writers {
		w.kill()
	}
	if s.daemon != nil && !s.daemon.ended() {
		s.daemon.signal(syscall.SIGTERM)
		if !s.daemon.wait(2 * stopTimeout) {
			s.t.Errorf("byokd did not stop within %v of SIGTERM; killed\n%s", 2*stopTimeout, s.daemon.tail())
			s.daemon.signal(syscall.SIGKILL)
			s.daemon.wait(patience)
		}
	}
	if s.t.Failed() && s.daemon != nil {
		s.t.Logf("the end of byokd's log:\n%s", s.daemon.tail())
	}
	for mounted(s.mount) {
		s.t.Errorf("a mount was left at %s", s.mount)
		if err := unix.Unmount(s.mount, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			s.t.Error(err)
			break
		}
	}
	if s.clouds != nil {
		s.clouds.signal(syscall.SIGTERM)
		if !s.clouds.wait(patience) {
			s.t.Error("devcloud did not stop")
			s.clouds.signal(syscall.SIGKILL)
		}
	}
}

// mounted reports whether something of byokd is mounted at dir.
func mounted(dir string) bool {
	mounts, err := os.ReadFile("/proc/self/mounts")
	return err == nil && bytes.Contains(mounts, []byte(" "+dir+" fuse.byokd "))
}
