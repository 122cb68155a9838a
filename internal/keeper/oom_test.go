package keeper

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/keeper/oomtest"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// keeperMain is a keeper in a process of its own, of the worker that childVariable
// names. It waits for a line before it begins.
func keeperMain() int {
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	code, err := Run(Options{Program: os.Getenv(childVariable), Args: []string{"worker"}, Env: os.Environ(),
		Files: [3]*os.File{nil, os.Stdout, os.Stderr}, Signals: signals, StatusWithin: patience, Log: zap.NewNop()})
	if err != nil {
		say("keeper: %v", err)
		return 1
	}
	return code
}

// TestOOMScore: the keeper is spared when memory runs out if it may be, and the worker
// is not.
func TestOOMScore(t *testing.T) {
	w := keep(t, "serves")
	before := ownScoreBefore(t)
	w.hears("score=" + before)
	want := "-1000"
	if w.logs.FilterMessageSnippet("oom_score_adj cannot be lowered").Len() > 0 {
		want = before
		if may(t, unix.CAP_SYS_RESOURCE) {
			t.Error("the keeper did not lower its score, and may")
		}
	}
	if got := ownOOMScore(); got != want {
		t.Errorf("the keeper's oom_score_adj is %s, want %s", got, want)
	}
	w.kill(syscall.SIGKILL)
	w.hears("score=" + before) // the second worker's, too
}

// may reports whether this process has a capability.
func may(t *testing.T, capability int) bool {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

// ownScoreBefore is the score that the test was started with: its parent's.
func ownScoreBefore(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", os.Getppid()))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// TestOutOfMemory: the kernel takes the worker, time and again, and not the keeper,
// although both are in one cgroup, and that is killed as a whole where the version
// knows of that. The next worker is told the cause.
func TestOutOfMemory(t *testing.T) {
	group := oomtest.New(t, 64<<20)
	program := install(t, t.TempDir(), "eats")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childVariable+"="+program)
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	defer func() {
		if !stopped {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	group.Add(t, cmd.Process.Pid)
	if _, err := input.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(3*patience, func() { _ = cmd.Process.Kill() })
	defer watchdog.Stop()
	lines := bufio.NewScanner(output)
	for n := range 4 {
		cause := ""
		if n > 0 {
			cause = "oom"
		}
		if want := fmt.Sprintf("cause=%s killed=0 fault=0 upgraded=0 oom=%d", cause, n); !lines.Scan() || !strings.Contains(lines.Text(), want) {
			t.Fatalf("worker %d says %q (%v), want %q", n+1, lines.Text(), lines.Err(), want)
		}
	}
	stopped = true
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the keeper ended with %v", err)
	}
}

// TestOOMKillsOfEitherVersion reads what the kernels write.
func TestOOMKillsOfEitherVersion(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a/memory.events.local":       "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
		"memory.events.local":         "low 0\noom_kill 4\n",
		"memory/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
		"memory/memory.oom_control":   "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		controllers, path string
		want              uint64
		found             bool
	}{
		{"", "/a", 2, true},
		{"", "/of/the/host", 4, true}, // a container without a cgroup namespace
		{"memory", "/b", 5, true},
		{"memory", "/of/the/host", 6, true},
		{"cpu", "/a", 0, false},
	} {
		if got, found := oomKillsIn(root, c.controllers, c.path); got != c.want || found != c.found {
			t.Errorf("%q %s: %d, %v; want %d, %v", c.controllers, c.path, got, found, c.want, c.found)
		}
	}
}
