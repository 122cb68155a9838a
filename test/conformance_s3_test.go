//go:build linux

package test

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// The public S3 tests of versitygw, at the version of go.mod, against byokd in
// front of versitygw. What they say is in docs/CONFORMANCE.md, which this test
// reads: a test that is not an exception there has to pass, and an exception that
// passes has to be taken out.

const (
	// conformanceVariable asks for the run: all, or a regular expression of tests.
	conformanceVariable = "BYOKD_CONFORMANCE"
	// conformanceBuckets is how many buckets one test of versitygw uses at most; they
	// are called test-bucket-1 and so on.
	conformanceBuckets = 40
	// conformanceLimit bounds one test; the longest take some seconds.
	conformanceLimit = 90 * time.Second
)

// gateway builds versitygw as go.mod pins it, once for all runs.
func gateway(t *testing.T) string {
	t.Helper()
	version, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", "github.com/versity/versitygw").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs("../.cache/versitygw-" + strings.TrimSpace(string(version)))
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "versitygw")
	if _, err := os.Stat(program); err == nil {
		return program
	}
	cmd := exec.Command("go", "install", "github.com/versity/versitygw/cmd/versitygw@"+strings.TrimSpace(string(version)))
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=", "GOEXPERIMENT=")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build versitygw: %v\n%s", err, text)
	}
	return program
}

// conformance is a versitygw with a byokd in front of it.
type conformance struct {
	*stack
	gateway string // the program
	direct  string // endpoint of versitygw itself
	data    string // its buckets
	old     string // its old versions, "" without versioning
}

func newConformance(t *testing.T, versioned bool) *conformance {
	t.Helper()
	byokd, err := shipped()
	if err != nil {
		t.Fatal(err)
	}
	c := &conformance{stack: &stack{t: t, dir: t.TempDir(), byokd: byokd, canary: newCanary()}, gateway: gateway(t)}
	t.Cleanup(c.leaveNothing)
	c.cloud, c.s3, c.admin, c.direct = freeEndpoint(t), freeEndpoint(t), freeEndpoint(t), freeEndpoint(t)
	c.control = kmstest.Control{Endpoint: c.cloud}
	c.data = c.dir + "/buckets"
	args := []string{"--access", kmstest.TenantAccessKey, "--secret", kmstest.TenantSecret, "--port", strings.TrimPrefix(c.direct, "http://"), "--iam-dir", c.dir + "/iam", "posix"}
	if versioned {
		c.old = c.dir + "/versions"
		args = append(args, "--versioning-dir", c.old)
	}
	for _, d := range []string{c.data, c.dir + "/iam", c.dir + "/versions"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	c.startCloud()
	gw := c.start("versitygw", []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir}, c.gateway, append(args, c.data)...)
	t.Cleanup(func() { gw.signal(os.Kill); gw.wait(patience) })
	c.await("versitygw to answer", gw, func() bool {
		response, err := http.Get(c.direct)
		if err != nil {
			return false
		}
		response.Body.Close()
		return true
	})
	c.configureBuckets()
	c.startDaemon()
	c.awaitState(metrics.StateReady)
	return c
}

// configureBuckets writes a configuration of byokd with the buckets of the tests.
func (c *conformance) configureBuckets() {
	c.t.Helper()
	var buckets strings.Builder
	for i := range conformanceBuckets {
		fmt.Fprintf(&buckets, "    test-bucket-%d: {upstream: {bucket: test-bucket-%d, region: us-east-1, endpoint: %q}}\n", i+1, i+1, c.direct)
	}
	config := fmt.Sprintf(`
cluster: {id: acme-test, region: eu-central-1}
keys:
  primary: {arn: %q, endpoint: %q}
objects:
  listen: %s
  credentials: {file: %q}
  buckets:
%sadmin: {listen: %s}
audit: {file: %q}
stopTimeout: %v
`, c.arn, c.cloud, strings.TrimPrefix(c.s3, "http://"), c.dir+"/s3-credentials", buckets.String(), strings.TrimPrefix(c.admin, "http://"), c.dir+"/audit.jsonl", stopTimeout)
	for name, text := range map[string]string{"/byokd.yaml": config, "/s3-credentials": kmstest.TenantAccessKey + ":" + kmstest.TenantSecret + "\n"} {
		if err := os.WriteFile(c.dir+name, []byte(text), 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
}

// command runs the test command of versitygw and returns what it printed.
func (c *conformance) command(limit time.Duration, args ...string) string {
	ctx, cancel := context.WithTimeout(c.t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.gateway, append([]string{"test"}, args...)...)
	cmd.Dir = filepath.Dir(c.gateway) // some tests call ./versitygw themselves
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir}
	text, _ := cmd.CombinedOutput() // a test that failed is in the text
	return string(text)
}

var (
	verdictPattern = regexp.MustCompile(`(PASS|FAIL) \x1b\[0m([A-Za-z0-9_]+)(: .*)?`)
	commandPattern = regexp.MustCompile(`(?m)^   ([A-Z][A-Za-z0-9_]+) +Runs `)
)

// fresh removes what a failed test left upstream.
func (c *conformance) fresh() {
	for _, dir := range []string{c.data, c.old} {
		left, _ := filepath.Glob(dir + "/test-bucket-*")
		for _, d := range left {
			if err := os.RemoveAll(d); err != nil {
				c.t.Fatal(err)
			}
		}
	}
}

// exceptions reads the tests that docs/CONFORMANCE.md lists below "## S3".
func exceptions(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../docs/CONFORMANCE.md")
	if err != nil {
		t.Fatal(err)
	}
	_, half, found := strings.Cut(string(text), "\n## S3")
	if !found {
		t.Fatal("docs/CONFORMANCE.md has no part S3")
	}
	half, _, _ = strings.Cut(half, "\n## ")
	listed := map[string]bool{}
	for _, line := range strings.Split(half, "\n") {
		if !strings.HasPrefix(line, "    ") {
			continue
		}
		for name := range strings.FieldsSeq(line) {
			listed[name] = true
		}
	}
	return listed
}

// conformed is what the runs of the tests have found so far, by several at once.
type conformed struct {
	listed map[string]bool // exceptions; fixed

	mu     sync.Mutex
	seen   map[string]bool // guarded by mu: passes with versitygw alone
	passed int             // guarded by mu: passes with byokd, too
}

// TestConformanceS3 runs the tests in as many shares at once as there are processors, each
// with a versitygw and a byokd of its own, first without and then with versioning.
func TestConformanceS3(t *testing.T) {
	chosen := os.Getenv(conformanceVariable)
	if chosen == "" {
		t.Skip("runs with make conformance-s3")
	}
	all := &conformed{listed: exceptions(t), seen: map[string]bool{}}
	gateway(t)
	if _, err := shipped(); err != nil {
		t.Fatal(err)
	}
	shares := runtime.GOMAXPROCS(0)
	t.Run("share", func(t *testing.T) {
		for share := range shares {
			t.Run(fmt.Sprint(share+1), func(t *testing.T) {
				t.Parallel()
				for _, versioned := range []bool{false, true} {
					t.Run(map[bool]string{false: "unversioned", true: "versioned"}[versioned], func(t *testing.T) {
						c := newConformance(t, versioned)
						for i, name := range c.chosen(chosen) {
							if i%shares == share {
								c.judge(t, name, all)
							}
						}
					})
				}
			})
		}
	})
	t.Logf("of %d tests that versitygw passes, byokd passes %d", len(all.seen), all.passed)
	if chosen == "all" {
		for _, name := range slices.Sorted(maps.Keys(all.listed)) {
			if !all.seen[name] {
				t.Errorf("%s is listed in docs/CONFORMANCE.md and was not run", name)
			}
		}
	}
}

// judge runs one test and compares with what is documented.
func (c *conformance) judge(t *testing.T, name string, all *conformed) {
	all.mu.Lock()
	before := all.seen[name]
	all.mu.Unlock()
	if before {
		return // without versions already
	}
	if ok, _ := c.try(name, c.direct); !ok {
		return // is for another set-up of versitygw
	}
	listed := all.listed[name]
	ok, why := c.try(name, c.s3)
	if !ok && !listed {
		// Some tests want things that happen within a millisecond to be in order, with
		// versitygw alone as with byokd.
		first := why
		for range 5 {
			if steady, _ := c.try(name, c.direct); !steady {
				t.Logf("%s fails with versitygw alone, too, now and then: %s", name, first)
				return
			}
			if ok, why = c.try(name, c.s3); ok {
				t.Logf("%s passed at another attempt; at the first: %s", name, first)
				break
			}
		}
	}
	switch {
	case ok && listed:
		t.Errorf("%s passes: take it out of docs/CONFORMANCE.md", name)
	case !ok && !listed:
		t.Errorf("%s fails: %s", name, why)
	case !ok:
		t.Logf("%s is an exception: %s", name, why)
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	all.seen[name] = true
	if ok {
		all.passed++
	}
}

// chosen are the tests of versitygw but for those of services that are not S3.
func (c *conformance) chosen(pattern string) []string {
	c.t.Helper()
	if pattern == "all" {
		pattern = "."
	}
	want := regexp.MustCompile(pattern)
	text := c.command(patience, "--help")
	var names []string
	for _, m := range commandPattern.FindAllStringSubmatch(text, -1) {
		if want.MatchString(m[1]) && !notS3.MatchString(m[1]) {
			names = append(names, m[1])
		}
	}
	if len(names) == 0 {
		c.t.Fatalf("no test of versitygw matches %s:\n%s", pattern, text)
	}
	slices.Sort(names)
	return names
}

// notS3 are tests of versitygw's own IAM and STS services and of its web sites.
var notS3 = regexp.MustCompile(`^(IAM|S3IAM|WebsiteHosting)`)

// try runs one test and reports whether it passed, or why it did not.
func (c *conformance) try(name, endpoint string) (ok bool, why string) {
	args := []string{"-a", kmstest.TenantAccessKey, "-s", kmstest.TenantSecret, "-e", endpoint, name}
	if c.old != "" {
		args = append(args, "--versioning-enabled")
	}
	text := c.command(conformanceLimit, args...)
	c.fresh()
	passes, fails := 0, ""
	for _, m := range verdictPattern.FindAllStringSubmatch(text, -1) {
		if m[1] == "PASS" {
			passes++
		} else {
			fails += m[2] + m[3]
		}
	}
	if fails == "" && passes == 0 {
		fails = text[max(0, len(text)-400):]
	}
	return fails == "", strings.TrimSpace(fails)
}
