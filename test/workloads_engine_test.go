//go:build linux

package test

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

const engineClients = 8

// engine is the engine of test/workloads/src/engine and its clients.
type engine struct {
	*database
	data    string
	process *process
	port    string
	loads   int // so far, which name the instances
	writes  acknowledgements
	none    acknowledgements // it has no reads under load

	mu       sync.Mutex
	created  map[string]int64 // guarded by mu; payload: acknowledged id
	complete map[int64]bool   // guarded by mu; whether the completion was acknowledged, or only asked for
}

func newEngine(t *testing.T) *engine {
	requireWorkloads(t)
	d := newDatabase(t, withHold(20*time.Second))
	// As Camunda's charts do: the data directory is the mount point, whose free space byokd tells from memory.
	return &engine{database: d, data: d.mount, created: map[string]int64{}, complete: map[int64]bool{}}
}

func (e *engine) start(restore ...string) {
	e.t.Helper()
	e.process = e.jvm("engine", "engine.Engine", append([]string{e.data, e.s3, "backups"}, restore...)...)
	e.port = e.awaitLine(e.process, "READY")
}

func (e *engine) kill() {
	e.t.Helper()
	e.process.signal(syscall.SIGKILL)
	if !e.process.wait(patience) {
		e.t.Fatal("the engine is not killed by SIGKILL")
	}
}

// line is a connection to the engine.
type line struct {
	net.Conn
	in *bufio.Reader
}

func (e *engine) dial() (*line, error) {
	c, err := net.Dial("tcp", "127.0.0.1:"+e.port)
	if err != nil {
		return nil, err
	}
	return &line{c, bufio.NewReader(c)}, nil
}

// ask sends a command and returns the engine's answer to it; it waits as long as the engine does.
func (l *line) ask(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(l, format+"\n", args...); err != nil {
		return "", err
	}
	text, err := l.in.ReadString('\n')
	return strings.TrimSpace(text), err
}

// load is clients that create instances and complete two of three.
func (e *engine) load() *crew {
	e.loads++
	load := e.loads
	return e.newCrew(engineClients, func(ctx context.Context, client int) {
		l, err := e.dial()
		if err != nil {
			e.writes.add(time.Now(), err)
			return
		}
		defer l.Close()
		for n := 0; ctx.Err() == nil; n++ {
			if err := e.instance(l, fmt.Sprintf("%d-%d-%d %s %s", load, client, n, e.canary, strings.Repeat("x", 100+n%400)), n%3 > 0); err != nil {
				e.writes.add(time.Now(), err)
				return
			}
		}
	})
}

// instance creates one and perhaps completes it.
func (e *engine) instance(l *line, payload string, complete bool) error {
	began := time.Now()
	answer, err := l.ask("CREATE %s", payload)
	if err != nil {
		return err
	}
	id, err := strconv.ParseInt(strings.TrimPrefix(answer, "OK "), 10, 64)
	if err != nil {
		return fmt.Errorf("CREATE was answered %q", answer)
	}
	e.writes.add(began, nil)
	e.mu.Lock()
	e.created[payload] = id
	if complete {
		e.complete[id] = false
	}
	e.mu.Unlock()
	if !complete {
		return nil
	}
	began = time.Now()
	if answer, err = l.ask("COMPLETE %d", id); err != nil {
		return err
	}
	if !strings.HasPrefix(answer, "OK ") {
		return fmt.Errorf("COMPLETE %d was answered %q", id, answer)
	}
	e.writes.add(began, nil)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.complete[id] = true
	return nil
}

// acknowledged is what the clients know at this moment.
func (e *engine) acknowledged() (created map[string]int64, complete map[int64]bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.created), maps.Clone(e.complete)
}

// verify compares all instances of the engine with what must be there: each once, with its payload, and completed if that
// was acknowledged. Beyond them it may hold what was acknowledged since, and as many as nobody got an answer for.
func (e *engine) verify(when string, created map[string]int64, complete map[int64]bool, unanswered int) {
	e.t.Helper()
	known, asked := e.acknowledged()
	l, err := e.dial()
	if err != nil {
		e.t.Fatal(err)
	}
	defer l.Close()
	if _, err := fmt.Fprintln(l, "DUMP"); err != nil {
		e.t.Fatal(err)
	}
	seen := map[string]bool{}
	completed, extra := 0, 0
	for {
		text, err := l.in.ReadString('\n')
		if err != nil {
			e.t.Fatal(err)
		}
		if text == "END\n" {
			break
		}
		fields := strings.SplitN(strings.TrimSuffix(text, "\n"), " ", 3)
		id, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil || len(fields) != 3 {
			e.t.Fatalf("%s: the engine lists %q", when, text)
		}
		payload := fields[2]
		if seen[payload] {
			e.t.Errorf("%s: instance %.40q is there twice", when, payload)
		}
		seen[payload] = true
		want, told := known[payload]
		_, mayBeDone := asked[id]
		switch {
		case !told:
			extra++
		case want != id, complete[id] && fields[1] != "C", !mayBeDone && fields[1] != "A":
			e.t.Errorf("%s: instance %.40q is %d in state %s, acknowledged as %d, completed %v", when, payload, id, fields[1], want, complete[id])
		}
		if fields[1] == "C" {
			completed++
		}
	}
	for payload, id := range created {
		if !seen[payload] {
			e.t.Fatalf("%s: instance %d %.40q is lost", when, id, payload)
		}
	}
	if extra > unanswered {
		e.t.Errorf("%s: %d instances are there that nobody was told of", when, extra)
	}
	e.t.Logf("%s: %d instances verified, %d completed, %d created without an answer", when, len(created), completed, extra)
}

// backup takes one and takes another where it met a freeze too long for its client, as an operator would.
func (e *engine) backup(name string) (attempts int) {
	e.t.Helper()
	l, err := e.dial()
	if err != nil {
		e.t.Fatal(err)
	}
	defer l.Close()
	for attempts = 1; ; attempts++ {
		answer, err := l.ask("BACKUP %s-%d", name, attempts)
		if err != nil {
			e.t.Fatal(err)
		}
		if answer == "OK" {
			return attempts
		}
		e.t.Logf("backup %s-%d: %.300s", name, attempts, answer)
		if attempts == 3 {
			e.t.Fatal("three backups have failed")
		}
	}
}

// quietLog checks that the engine has said nothing about its disk. A backup that failed over a long freeze may be told.
func (e *engine) quietLog(when string) {
	e.t.Helper()
	if bad := complaints(e.process.output(), `\[Engine\] backup .* has failed`); len(bad) > 0 {
		e.t.Errorf("%s, the engine's log says:\n%.3000s", when, strings.Join(bad, "\n"))
	}
}

// An engine with Zeebe's way of keeping data, on a mount: no instance lost or doubled through freezes in full flight, a
// backup through the proxy with a freeze in it, kill -9 while frozen, a restart of byokd, a restore.
func TestWorkloadEngine(t *testing.T) {
	e := newEngine(t)
	e.start()
	load := e.load()
	e.awaitLong("instances", e.process, func() bool { return e.writes.count() > 2000 })
	for _, length := range outages(t) {
		e.freezeInFlight(length, &e.writes, &e.none)
	}
	e.quietLog("over the freezes")
	if segments, _ := os.ReadDir(e.data + "/journal"); len(segments) == 0 {
		t.Error("there is no journal on the mount")
	}

	// What is known before the backup is asked for must be in it.
	created, complete := e.acknowledged()
	taken := make(chan int, 1)
	go func() { taken <- e.backup("first") }()
	e.hold(50*time.Millisecond, func() {}) // into the uploads
	e.freezeInFlight(5*time.Second, &e.writes, &e.none)
	attempts := <-taken
	t.Logf("backup over a freeze of 5s: %d attempts", attempts)
	load.end()
	e.verifyAll("after freezes under load", 0)

	load = e.load()
	before := e.writes.count()
	e.awaitLong("instances", e.process, func() bool { return e.writes.count() > before+500 })
	e.key(kmstest.KeyCommand{Do: "disable"})
	e.awaitState(metrics.StateFrozen)
	e.kill()
	load.end() // each client has lost the engine
	e.key(kmstest.KeyCommand{Do: "enable"})
	e.awaitState(metrics.StateReady)
	e.start()
	e.verifyAll("after kill -9 while frozen", engineClients)

	e.kill()
	e.restart()
	e.start()
	e.verifyAll("after a restart of byokd", engineClients)
	e.quietLog("after the restarts")
	e.kill()

	e.data = e.mount + "/restored"
	e.start(fmt.Sprintf("first-%d", attempts))
	e.verify("restored through the proxy", created, complete, engineClients)
	e.kill()
	e.assertSealed()
}

func (e *engine) verifyAll(when string, unanswered int) {
	e.t.Helper()
	created, complete := e.acknowledged()
	e.verify(when, created, complete, unanswered)
}

// What the engine does in a second on byokd and on the directory below, beside each other.
func TestWorkloadEngineFigures(t *testing.T) {
	e := newEngine(t)
	raw := e.dir + "/raw"
	if err := os.Mkdir(raw, 0o755); err != nil {
		t.Fatal(err)
	}
	const span = 20 * time.Second
	for round := range 2 {
		for _, place := range []string{raw, e.mount} {
			m := &engine{database: &database{e.within(t)}, data: fmt.Sprintf("%s/engine-%d", place, round), created: map[string]int64{}, complete: map[int64]bool{}}
			m.start()
			load := m.load()
			m.awaitLong("the engine to be warm", m.process, func() bool { return m.writes.count() > 5000 })
			m.writes.reset()
			<-time.After(span)
			count := m.writes.count()
			load.end()
			name := map[bool]string{true: "ext4", false: "byokd"}[place == raw]
			t.Logf("%-6s %6.0f commands/s, p50 %v p99 %v", name, float64(count)/span.Seconds(),
				m.writes.percentile(0.5).Round(10*time.Microsecond), m.writes.percentile(0.99).Round(10*time.Microsecond))
			if failed := m.writes.errors(); len(failed) > 0 {
				t.Errorf("%s: %v", name, slices.Compact(failed))
			}
			m.kill()
		}
	}
}

// free is what a disk monitor asks once a second.
func (e *engine) free() (free uint64, took time.Duration) {
	e.t.Helper()
	began := time.Now()
	var all unix.Statfs_t
	if err := unix.Statfs(e.mount, &all); err != nil {
		e.t.Error(err)
	}
	return all.Bavail * uint64(all.Bsize), time.Since(began)
}
