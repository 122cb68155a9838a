//go:build linux

package test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a child of the test. It dies with the test, whatever that dies of.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; set before done is closed

	mu   sync.Mutex
	text bytes.Buffer // guarded by mu; standard output and error
}

// start starts a program. env nil means ours.
func (s *stack) start(name string, env []string, program string, args ...string) *process {
	s.t.Helper()
	p := &process{name: name, cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, p, p
	// TERM and not KILL, so that byokd unmounts; a group of its own, so that Ctrl-C reaches the test first.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := startForever(p.cmd); err != nil {
		s.t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// starter starts children on one thread that never ends: Pdeathsig follows the
// thread that started the child, not its process.
var starter = sync.OnceValue(func() chan<- func() {
	jobs := make(chan func())
	go func() {
		lockThread()
		for job := range jobs {
			job()
		}
	}()
	return jobs
})

func startForever(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

// Write implements io.Writer for the child's output.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// tail is the end of the output, for a failed test.
func (p *process) tail() string {
	lines := strings.Split(strings.TrimSpace(p.output()), "\n")
	return strings.Join(lines[max(0, len(lines)-25):], "\n")
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// wait reports whether the process ended in time.
func (p *process) wait(limit time.Duration) bool {
	select {
	case <-p.done:
		return true
	case <-time.After(limit):
		return false
	}
}

// code is the exit code of an ended process, -1 for a signal.
func (p *process) code() int { return p.cmd.ProcessState.ExitCode() }

// signal sends a signal unless the process has ended.
func (p *process) signal(s os.Signal) {
	if !p.ended() {
		_ = p.cmd.Process.Signal(s) // it may end this moment
	}
}
