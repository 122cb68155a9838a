package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// TestMain lets the test binary be devcloud: S3 changes the working directory and
// cannot run twice in one process, and kill -9 needs a process of its own.
func TestMain(m *testing.M) {
	if os.Getenv("DEVCLOUD_TEST_RUN") == "1" {
		main()
	}
	os.Exit(m.Run())
}

// cloud is a devcloud in a process of its own.
type cloud struct {
	t        *testing.T
	dir      string
	endpoint string
	cmd      *exec.Cmd
	output   *lockedBuffer
	ended    chan error
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// serveCloud starts `devcloud serve` on a free port and waits until it is ready.
func serveCloud(t *testing.T, dir string, args ...string) *cloud {
	t.Helper()
	c := &cloud{t: t, dir: dir, output: &lockedBuffer{}, ended: make(chan error, 1)}
	c.cmd = exec.Command(os.Args[0], append([]string{"serve", "--dir", dir, "--listen", "127.0.0.1:0"}, args...)...)
	c.cmd.Env = append(os.Environ(), "DEVCLOUD_TEST_RUN=1")
	c.cmd.Stderr = c.output
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	go func() {
		lines := bufio.NewScanner(io.TeeReader(out, c.output))
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(lines.Text()), "endpoint"); ok {
				c.endpoint = strings.Fields(rest)[0]
			}
			if lines.Text() == "devcloud: ready" {
				close(ready)
			}
		}
		c.ended <- c.cmd.Wait()
	}()
	t.Cleanup(func() { c.kill() })
	select {
	case <-ready:
	case err := <-c.ended:
		t.Fatalf("devcloud ended: %v\n%s", err, c.output)
	case <-time.After(60 * time.Second):
		t.Fatalf("devcloud is not ready:\n%s", c.output)
	}
	return c
}

// kill ends the process as an out-of-memory kill would.
func (c *cloud) kill() {
	c.cmd.Process.Kill()
	select {
	case <-c.ended:
	case <-time.After(10 * time.Second):
		c.t.Error("devcloud survived SIGKILL")
	}
	c.ended <- nil // for the cleanup
}

// stop ends the process with SIGTERM and returns its exit code.
func (c *cloud) stop() int {
	c.t.Helper()
	c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.ended:
	case <-time.After(30 * time.Second):
		c.t.Fatalf("devcloud ignores SIGTERM:\n%s", c.output)
	}
	c.ended <- nil
	return c.cmd.ProcessState.ExitCode()
}

func (c *cloud) control() kmstest.Control { return kmstest.Control{Endpoint: c.endpoint} }

// command runs a devcloud command in this process against an endpoint.
func command(t *testing.T, endpoint string, args ...string) (out string, exit int) {
	t.Helper()
	var buf bytes.Buffer
	getenv := func(name string) string {
		if name == "DEVCLOUD_ENDPOINT" {
			return endpoint
		}
		return ""
	}
	exit = run(t.Context(), args, getenv, strings.NewReader(""), &buf, &buf)
	return buf.String(), exit
}

func TestCommandLine(t *testing.T) {
	l, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	arn, err := l.CreateKey("", "alias/byokd", "", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.CreateKey("eu-west-1", "alias/backup", "", false); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		args string
		exit int
		want string
	}{
		{"key list", 0, "alias/byokd   Enabled  eu-central-1  " + arn},
		{"key list -o json", 0, `"arn": "` + arn + `"`},
		{"key list -o xml", 2, "want table or json"},
		{"key disable", 0, "Disabled"},
		{"key list", 0, "alias/byokd   Disabled"},
		{"key enable", 0, "Enabled"},
		{"key schedule-deletion", 0, "PendingDeletion (deletion at"},
		{"key enable", 1, "is pending deletion"},
		{"key cancel-deletion", 0, "The key is Disabled now"},
		{"key enable", 0, "Enabled"},
		{"key schedule-deletion --after 0s", 2, "positive duration"},
		{"key schedule-deletion --after soon", 2, "duration"},
		{"key deny Decrypt", 0, "denied: kms:Decrypt for arn:aws:iam::111122223333:role/byokd-tenant"},
		{"key deny", 0, "kms:* for"},
		{"key allow", 0, "alias/byokd  Enabled\n"},
		{"key deny Decrypt alias/byokd", 0, "denied: kms:Decrypt"},
		{"key allow alias/byokd", 0, "alias/byokd  Enabled\n"},
		{"key rotate", 0, "Enabled"},
		{"key set-state Unavailable", 0, "Unavailable"},
		{"key set-state Broken", 1, "Broken"},
		{"key set-state", 2, "usage: devcloud key set-state STATE [KEY]"},
		{"key enable", 0, "Enabled"},
		{"key policy", 0, "Allow Camunda tenant IAM Role basic key access"},
		{"key policy --documented", 0, "Enabled"},
		{"key policy --put /does/not/exist", 1, "no such file"},
		{"key policy --put - ", 1, "MalformedPolicyDocumentException"},
		{"key disable alias/backup", 0, "eu-west-1"},
		{"key disable alias/none", 1, "no key alias/none"},
		{"key disable a b", 2, "usage: devcloud key disable [KEY]"},
		{"key explode", 2, `unknown argument "explode"`},
		{"fault list", 0, "no faults"},
		{"fault throttle --operation Decrypt --count 3", 0, "fault 1: throttle with ThrottlingException for kms on Decrypt for 3 more calls"},
		{"fault latency 300ms", 0, "fault 2: latency 300ms"},
		{"fault latency soon", 2, "300ms"},
		{"fault error --code DependencyTimeoutException --status 503", 0, "DependencyTimeoutException"},
		{"fault hang --service moon", 1, "unknown service"},
		{"fault list", 0, "2  latency 300ms for kms"},
		{"fault list -o json", 0, `"delay_ms": 300`},
		{"fault clear 1", 0, "cleared 1"},
		{"fault clear 1", 1, "no fault"},
		{"fault clear x", 2, "number"},
		{"fault clear", 0, "cleared 2"},
		{"calls -n 1", 0, "devcloud  Clear  ok"},
		{"calls -n 1 -o json", 0, `"operation":"Clear"`},
		{"key delete", 0, "gone\nDeleted for good"},
		{"key list", 0, "alias/backup  Disabled"},
		{"nonsense", 2, "nonsense"},
		{"--nonsense", 2, "nonsense"},
		{"", 0, "devcloud serve --dir ./cloud --setup"},
		{"serve", 2, "--dir"},
	} {
		if out, exit := command(t, l.URL(), strings.Fields(row.args)...); exit != row.exit || !strings.Contains(out, row.want) {
			t.Errorf("devcloud %s: exit %d, want %d; want %q in\n%s", row.args, exit, row.exit, row.want, out)
		}
	}
}

func TestNobodyThereIsSaid(t *testing.T) {
	for _, args := range []string{"key list", "key disable", "key policy", "fault list", "fault cut", "fault clear", "calls"} {
		out, exit := command(t, "http://127.0.0.1:1", strings.Fields(args)...)
		if exit != 1 || !strings.Contains(out, "no devcloud answers at http://127.0.0.1:1 (start it with: devcloud serve --dir DIR)") {
			t.Errorf("%s: exit %d\n%s", args, exit, out)
		}
	}
}

func TestOnlyLoopbackIsServed(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.168.1.1:0", "example.org:0", "127.0.0.1"} {
		out, exit := command(t, "", "serve", "--dir", t.TempDir(), "--listen", address)
		if exit != exitUsage || !strings.Contains(out, "--listen") {
			t.Errorf("%s: exit %d\n%s", address, exit, out)
		}
	}
}

func TestCallsFollow(t *testing.T) {
	l, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	reader, writer := io.Pipe()
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{"calls", "--follow", "--endpoint", l.URL()}, func(string) string { return "" }, nil, writer, io.Discard)
	}()
	lines := bufio.NewScanner(reader)
	for _, alias := range []string{"alias/one", "alias/two"} {
		if _, err := l.CreateKey("", alias, "", false); err != nil {
			t.Fatal(err)
		}
		if err := l.Disable(alias); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() || !strings.Contains(lines.Text(), "devcloud  Disable  on arn:aws:kms:eu-central-1:") {
			t.Errorf("%q", lines.Text())
		}
	}
	cancel()
	reader.Close()
	if code := <-done; code != 0 {
		t.Errorf("exit %d", code)
	}
}
