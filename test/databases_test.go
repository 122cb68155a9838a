//go:build linux

package test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// Real databases on a real mount (databases_*_test.go). The mount is served by
// byokd as a process of its own, and so is each database.

// requireDatabase returns the path of a program, and skips where it is missing.
func requireDatabase(t *testing.T, name string, found func() (string, error)) string {
	t.Helper()
	path, err := found()
	if err == nil {
		return path
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "databases") {
		t.Fatalf("BYOKD_REQUIRE names databases, but there is no %s: %v", name, err)
	}
	t.Skipf("needs %s (test/prepare.sh installs it): %v", name, err)
	return ""
}

func requireProgram(t *testing.T, name string) string {
	t.Helper()
	return requireDatabase(t, name, func() (string, error) { return exec.LookPath(name) })
}

// database is a stack with programs on its mount.
type database struct {
	*stack
}

func newDatabase(t *testing.T, options ...option) *database {
	return &database{newStack(t, shipped, options...)}
}

// launch starts a program that ends with the test at the latest. It has to end
// before the mount goes.
func (d *database) launch(name string, input io.Reader, program string, args ...string) *process {
	d.t.Helper()
	p := &process{name: name, cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = input, p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := startForever(p.cmd); err != nil {
		d.t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	d.t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		p.wait(patience)
	})
	return p
}

// finish waits until a program ends by itself, well.
func (d *database) finish(p *process) string {
	d.t.Helper()
	if !p.wait(2 * patience) {
		d.t.Fatalf("%s has not ended after %v:\n%s", p.name, 2*patience, p.tail())
	}
	if p.code() != 0 {
		d.t.Fatalf("%s ended with %d:\n%s", p.name, p.code(), p.tail())
	}
	return p.output()
}

// do runs a program to its end.
func (d *database) do(program string, args ...string) string {
	d.t.Helper()
	return d.finish(d.launch(filepath.Base(program), nil, program, args...))
}

// frozenFor is how long a database is held frozen: longer than what a program
// might wait for a disk that is only slow, short for the test.
const frozenFor = 1500 * time.Millisecond

// freeze takes the key away, holds it back and gives it back. Nothing of what
// progress counts may go on between.
func (d *database) freeze(progress func() int) {
	d.t.Helper()
	d.key(kmstest.KeyCommand{Do: "disable"})
	d.awaitState(metrics.StateFrozen)
	// A database answers what it has answered below: one statement each that had
	// its last call on the mount behind it.
	settled := time.After(frozenFor / 3)
	<-settled
	before := progress()
	<-time.After(frozenFor)
	if after := progress(); after != before {
		d.t.Errorf("while frozen, %d transactions were acknowledged", after-before)
	}
	d.key(kmstest.KeyCommand{Do: "enable"})
	d.awaitState(metrics.StateReady)
}

// restart ends byokd and starts it again on the same volume.
func (d *database) restart() {
	d.t.Helper()
	d.stopDaemon()
	d.resume()
}

func (d *database) resume() {
	d.t.Helper()
	d.startDaemon()
	d.awaitState(metrics.StateReady)
}

// RocksDB's own benchmark, with every way to read, through a freeze, a kill -9
// of the database and a restart of byokd.
func TestDatabaseRocksDB(t *testing.T) {
	requireProgram(t, "db_bench")
	requireProgram(t, "ldb")
	d := newDatabase(t)
	const keys = 100_000
	fill := d.mount + "/fill"
	d.bench(fill, "fillseq", keys, "--use_existing_db=0")
	for _, way := range [][]string{nil, {"--mmap_read=1"}, {"--use_direct_reads=1", "--use_direct_io_for_flush_and_compaction=1"}} {
		text := d.bench(fill, "readrandom,readseq,verifychecksum", keys, way...)
		if !strings.Contains(text, fmt.Sprintf("(%d of %d found)", keys, keys)) {
			t.Errorf("db_bench %v did not find all keys:\n%s", way, text)
		}
	}
	want := d.content(fill)

	t.Run("freeze", func(t *testing.T) {
		d := &database{d.within(t)}
		p := d.startBench(d.mount+"/random", "fillrandom", 4_000_000, "--use_existing_db=0", "--duration=6", "--write_buffer_size=4194304")
		d.await("db_bench to write", p, func() bool { return operations(p) > 0 })
		d.freeze(func() int { return operations(p) })
		before := operations(p)
		d.await("db_bench to go on", nil, func() bool { return operations(p) > before || p.ended() })
		d.finish(p)
		d.bench(d.mount+"/random", "readseq,verifychecksum", 1000)
		d.do("ldb", "--db="+d.mount+"/random", "checkconsistency")
	})
	t.Run("kill", func(t *testing.T) {
		d := &database{d.within(t)}
		p := d.startBench(d.mount+"/synced", "fillseq", 4_000_000, "--use_existing_db=0", "--sync=1")
		d.await("db_bench to sync", p, func() bool { return operations(p) >= 1000 })
		acknowledged := operations(p)
		p.signal(syscall.SIGKILL)
		p.wait(patience)
		text := d.bench(d.mount+"/synced", "readrandom,verifychecksum", acknowledged)
		if !strings.Contains(text, fmt.Sprintf("(%d of %d found)", acknowledged, acknowledged)) {
			t.Errorf("not all of the %d synced keys are there after kill -9:\n%s", acknowledged, text)
		}
	})
	d.restart()
	if got := d.content(fill); got != want {
		t.Errorf("after a restart of byokd the database differs: %d bytes of content instead of %d", len(got), len(want))
	}
	d.bench(fill, "readrandom,verifychecksum", keys)
	d.bench(d.mount+"/random", "readseq,verifychecksum", 1000)
	d.bench(d.mount+"/synced", "readseq,verifychecksum", 1000)
	t.Logf("%d keys, %d bytes of content verified before and after", keys, len(want))
}

// within is the stack for a subtest, which must not end it.
func (s *stack) within(t *testing.T) *stack {
	inner := *s
	inner.t = t
	return &inner
}

// startBench starts db_bench; an option in args comes after ours and wins.
func (d *database) startBench(dir, benchmarks string, keys int, args ...string) *process {
	d.t.Helper()
	args = append([]string{"--db=" + dir, "--benchmarks=" + benchmarks, fmt.Sprint("--num=", keys), "--use_existing_db=1",
		"--compression_type=none", "--seed=1", "--stats_interval=1000", "--verify_checksum=1"}, args...)
	return d.launch("db_bench", nil, "db_bench", args...)
}

func (d *database) bench(dir, benchmarks string, keys int, args ...string) string {
	d.t.Helper()
	text := d.finish(d.startBench(dir, benchmarks, keys, args...))
	for _, bad := range []string{"orruption", "IO error", "mismatch"} {
		if strings.Contains(text, bad) {
			d.t.Errorf("db_bench %s %v says %s:\n%s", benchmarks, args, bad, text)
		}
	}
	return text
}

// operations reads from db_bench's statistics how many operations were done:
// "… thread 0: (1000,25000) ops and …", the second number.
func operations(p *process) int {
	text := p.output()
	at := strings.LastIndex(text, " ops and ")
	if at < 0 {
		return 0
	}
	line := text[strings.LastIndex(text[:at], "thread "):at]
	var thread, last, all int
	if _, err := fmt.Sscanf(line, "thread %d: (%d,%d)", &thread, &last, &all); err != nil {
		return 0
	}
	return all
}

// content is every key and value of a database.
func (d *database) content(dir string) string {
	d.t.Helper()
	text := d.do("ldb", "--db="+dir, "--hex", "scan")
	if bytes.Count([]byte(text), []byte("\n")) < 1000 {
		d.t.Fatalf("ldb scan: %s", text[:min(len(text), 2000)])
	}
	return text
}
