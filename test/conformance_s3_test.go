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
	"slices"
	"strings"
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
	for name, text := range map[string]string{"/byokd.yaml": config, "/s3-credentials": "byokd:byokd-secret\n"} {
		if err := os.WriteFile(c.dir+name, []byte(text), 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
}

// run runs tests of versitygw and returns what it printed.
func (c *conformance) run(limit time.Duration, access, secret, endpoint string, args ...string) string {
	ctx, cancel := context.WithTimeout(c.t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.gateway, append([]string{"test", "-a", access, "-s", secret, "-e", endpoint}, args...)...)
	cmd.Dir = filepath.Dir(c.gateway) // some tests call ./versitygw themselves
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir}
	text, _ := cmd.CombinedOutput() // a test that failed is in the text
	return string(text)
}

var (
	verdictPattern = regexp.MustCompile(`(PASS|FAIL) \x1b\[0m([A-Za-z0-9_]+)(: .*)?`)
	commandPattern = regexp.MustCompile(`(?m)^   ([A-Z][A-Za-z0-9_]+) +Runs `)
)

// verdicts are the tests that passed, and what the others said.
func verdicts(text string) (passed []string, failed map[string]string) {
	failed = map[string]string{}
	for _, m := range verdictPattern.FindAllStringSubmatch(text, -1) {
		if m[1] == "PASS" {
			passed = append(passed, m[2])
		} else {
			failed[m[2]] = strings.TrimPrefix(m[3], ": ")
		}
	}
	return passed, failed
}

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

func TestConformanceS3(t *testing.T) {
	chosen := os.Getenv(conformanceVariable)
	if chosen == "" {
		t.Skip("runs with make conformance-s3")
	}
	listed := exceptions(t)
	seen := map[string]bool{}
	for _, versioned := range []bool{false, true} {
		t.Run(map[bool]string{false: "unversioned", true: "versioned"}[versioned], func(t *testing.T) {
			c := newConformance(t, versioned)
			names := c.names(versioned, chosen)
			passed := 0
			for _, name := range names {
				args := []string{name}
				if versioned {
					args = append(args, "--versioning-enabled")
				}
				text := c.run(conformanceLimit, "byokd", "byokd-secret", c.s3, args...)
				good, bad := verdicts(text)
				ok := len(bad) == 0 && slices.Contains(good, name)
				seen[name] = true
				switch {
				case ok && listed[name]:
					t.Errorf("%s passes: take it out of docs/CONFORMANCE.md", name)
				case !ok && !listed[name]:
					t.Errorf("%s fails: %s", name, reason(text, bad[name]))
				case !ok:
					t.Logf("%s is an exception: %s", name, reason(text, bad[name]))
				}
				if ok {
					passed++
				}
				c.fresh()
			}
			t.Logf("%d of %d tests passed", passed, len(names))
		})
	}
	if chosen == "all" {
		for _, name := range slices.Sorted(maps.Keys(listed)) {
			if !seen[name] {
				t.Errorf("%s is listed in docs/CONFORMANCE.md and was not run", name)
			}
		}
	}
}

// reason is why a test failed, or the end of what it printed when it says nothing.
func reason(text, said string) string {
	if said == "" {
		said = text[max(0, len(text)-400):]
	}
	return strings.TrimSpace(said)
}

// names are the tests to run: those of versioned buckets for the one run, and for
// the other those that versitygw itself passes; or those that were chosen.
func (c *conformance) names(versioned bool, chosen string) []string {
	c.t.Helper()
	if versioned || chosen != "all" {
		pattern := regexp.MustCompile(chosen)
		var names []string
		for _, m := range commandPattern.FindAllStringSubmatch(c.run(patience, "x", "x", c.direct, "--help"), -1) {
			if strings.HasPrefix(m[1], "Versioning_") == versioned && (chosen == "all" || pattern.MatchString(m[1])) {
				names = append(names, m[1])
			}
		}
		slices.Sort(names)
		return names
	}
	passed, failed := verdicts(c.run(5*time.Minute, kmstest.TenantAccessKey, kmstest.TenantSecret, c.direct, "full-flow", "--parallel"))
	if len(passed) < 500 || len(failed) > 0 {
		c.t.Fatalf("versitygw alone passed %d tests and failed %v", len(passed), failed)
	}
	c.fresh()
	slices.Sort(passed)
	return passed
}
