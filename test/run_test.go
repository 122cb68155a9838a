//go:build linux

package test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"
)

// runPatience bounds each wait of this file; `make run` compiles both programs first.
const runPatience = 10 * time.Minute

// makeRun is one `make run` in a directory and on ports of its own.
type makeRun struct {
	dir              string
	admin, cloud, s3 string
	cmd              *exec.Cmd
	ended            chan struct{} // closed when make has ended and its output was read

	mu     sync.Mutex
	output strings.Builder // guarded by mu
}

// start runs `make run` again in the same place.
func (m *makeRun) start(t *testing.T) {
	t.Helper()
	m.cmd = exec.Command("make", "run")
	m.cmd.Dir = ".."
	m.cmd.Env = append(os.Environ(), "RUN_DIR="+m.dir, "RUN_ADMIN="+m.admin, "RUN_CLOUD="+m.cloud, "RUN_S3="+m.s3)
	m.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // as a shell does: Ctrl-C goes to the group
	m.ended = make(chan struct{})
	m.output.Reset()
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.cmd.Stderr = m.cmd.Stdout
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			m.mu.Lock()
			m.output.WriteString(lines.Text() + "\n")
			m.mu.Unlock()
		}
		m.cmd.Wait()
	}()
}

func (m *makeRun) said() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.output.String()
}

// await waits until the output since the start holds text count times.
func (m *makeRun) await(t *testing.T, text string, count int) {
	t.Helper()
	deadline := time.After(runPatience)
	for strings.Count(m.said(), text) < count {
		select {
		case <-m.ended:
			t.Fatalf("make run has ended before it said %q %d times:\n%s", text, count, m.said())
		case <-deadline:
			t.Fatalf("make run does not say %q %d times:\n%s", text, count, m.said())
		case <-time.After(20 * time.Millisecond): // the pace of looking
		}
	}
}

func (m *makeRun) awaitEnd(t *testing.T) {
	t.Helper()
	select {
	case <-m.ended:
	case <-time.After(runPatience):
		t.Fatalf("make run does not end:\n%s", m.said())
	}
}

// pid reads which process plays a part.
func (m *makeRun) pid(t *testing.T, name string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, name+".pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (m *makeRun) mounted(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), " "+m.dir+"/data ")
}

// tool runs bin/devcloud or bin/byokd and returns its exit code.
func (m *makeRun) tool(t *testing.T, name string, args ...string) int {
	t.Helper()
	cmd := exec.Command("../bin/"+name, args...)
	cmd.Env = append(os.Environ(), "DEVCLOUD_ENDPOINT=http://"+m.cloud)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return cmd.ProcessState.ExitCode()
}

func (m *makeRun) status(t *testing.T) int {
	t.Helper()
	return m.tool(t, "byokd", "status", "--admin", m.admin)
}

func (m *makeRun) client() *s3.Client {
	return s3.New(s3.Options{BaseEndpoint: aws.String("http://" + m.s3), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("byokd", "byokd-secret", "")})
}

func (m *makeRun) object(t *testing.T) string {
	t.Helper()
	got, err := m.client().GetObject(context.Background(), &s3.GetObjectInput{Bucket: aws.String("documents"), Key: aws.String("k")})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Body.Close()
	body, err := io.ReadAll(got.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// ready waits for a started run and checks that what was written before is there.
func (m *makeRun) ready(t *testing.T, file, object string) {
	t.Helper()
	m.start(t)
	m.await(t, "READY", 1)
	if code := m.status(t); code != 0 {
		t.Fatalf("status: exit code %d", code)
	}
	if got, err := os.ReadFile(m.dir + "/data/hello"); string(got) != file && file != "" {
		t.Errorf("the disk holds %q, %v", got, err)
	}
	if object != "" {
		if got := m.object(t); got != object {
			t.Errorf("the bucket holds %q", got)
		}
	}
}

// The README's second command, as a newcomer would use it: tour, Ctrl-C, again, killed, again.
func TestMakeRun(t *testing.T) {
	requireFUSE(t)
	if testing.Short() {
		t.Skip("builds both programs")
	}
	m := &makeRun{dir: t.TempDir(), admin: freeAddress(t), cloud: freeAddress(t), s3: freeAddress(t)}
	t.Cleanup(func() {
		if m.cmd != nil && m.cmd.Process != nil {
			unix.Kill(-m.cmd.Process.Pid, unix.SIGTERM)
			m.awaitEnd(t)
		}
		if t.Failed() {
			log, _ := os.ReadFile(m.dir + "/byokd.log")
			t.Logf("make run said:\n%s\nbyokd's log:\n%s", m.said(), log)
		}
	})

	m.ready(t, "", "")
	if err := os.WriteFile(m.dir+"/data/hello", []byte("Hello, Frank"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := m.client().PutObject(context.Background(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: aws.String("k"), Body: strings.NewReader("an object")}); err != nil {
		t.Fatal(err)
	}
	m.tour(t)

	unix.Kill(-m.cmd.Process.Pid, unix.SIGINT) // Ctrl-C
	m.awaitEnd(t)
	if m.mounted(t) || !strings.Contains(m.said(), "stopped; nothing is mounted") {
		t.Errorf("after Ctrl-C: mounted %v\n%s", m.mounted(t), m.said())
	}

	m.ready(t, "Hello, Frank", "an object")
	byokd, devcloud := m.pid(t, "byokd"), m.pid(t, "devcloud")
	killChildren(t, byokd) // the sentinel, which would end the mount
	unix.Kill(byokd, unix.SIGKILL)
	unix.Kill(-m.cmd.Process.Pid, unix.SIGKILL) // make and the script, which cannot tidy up
	m.awaitEnd(t)
	unix.Kill(devcloud, unix.SIGKILL)
	for name, pid := range map[string]int{"byokd": byokd, "devcloud": devcloud} {
		for deadline := time.Now().Add(runPatience); unix.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
			if state, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(state), ") Z ") {
				break // dead, and nobody asked for it yet
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s does not die", name)
			}
		}
	}
	if !m.mounted(t) {
		t.Fatal("a killed byokd left no mount: this test tests nothing")
	}

	m.ready(t, "Hello, Frank", "an object")
	if !strings.Contains(m.said(), "a mount of a killed run is cleared away") {
		t.Error("it did not say that it cleared a mount away")
	}
	// Signals that a script sends to make alone.
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		unix.Kill(m.cmd.Process.Pid, s)
		m.awaitEnd(t)
		if m.mounted(t) || !strings.Contains(m.said(), "stopped; nothing is mounted") {
			t.Errorf("after %v: mounted %v\n%s", s, m.mounted(t), m.said())
		}
		if s == unix.SIGTERM {
			m.ready(t, "Hello, Frank", "an object")
		}
	}
}

// killChildren kills what a process has started.
func killChildren(t *testing.T, pid int) {
	t.Helper()
	for _, child := range children(t, pid) {
		unix.Kill(child, unix.SIGKILL)
	}
}

// tour takes the key away and gives it back.
func (m *makeRun) tour(t *testing.T) {
	t.Helper()
	if code := m.tool(t, "devcloud", "key", "disable"); code != 0 {
		t.Fatalf("devcloud key disable: exit code %d", code)
	}
	m.await(t, "gate Frozen", 1)
	if code := m.status(t); code != 10 {
		t.Errorf("status while frozen: exit code %d", code)
	}
	read := make(chan string, 1)
	go func() {
		got, err := os.ReadFile(m.dir + "/data/hello")
		read <- fmt.Sprintf("%s %v", got, err)
	}()
	if code := m.tool(t, "devcloud", "key", "enable"); code != 0 {
		t.Fatalf("devcloud key enable: exit code %d", code)
	}
	m.await(t, "READY", 2)
	if got := <-read; got != "Hello, Frank <nil>" {
		t.Errorf("the read that hung gave %q", got)
	}
}
