package fs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pageSize is what tests reckon in: a page of the kernel, where it is 4096 bytes.
const pageSize = 4096

// A victim is a process that uses the mount and hangs in it. It is a process
// of its own so that it can hang, be killed and be looked at.

const victimEnv = "BYOKD_TEST_VICTIM"

func TestMain(m *testing.M) {
	if op := os.Getenv(victimEnv); op != "" {
		runtime.LockOSThread()
		signal.Notify(make(chan os.Signal, 1), syscall.SIGUSR1, syscall.SIGALRM)
		if err := beVictim(op, os.Args[1], os.Args[2]); err != nil {
			fmt.Println("failed", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(unprivilegedVariable); dir != "" {
		os.Exit(serveUnprivileged(dir))
	}
	switch dir := os.Getenv(keptVariable); {
	case dir == "":
	case os.Getenv(keptVariable+"_KEEPER") != "":
		os.Exit(keepKept())
	default:
		os.Exit(serveKept(dir))
	}
	os.Exit(m.Run())
}

// victimOps are what victims do. prepare runs before the freeze and returns
// what is run while frozen; that returns a word which must be the same whether
// there was a freeze or not.
var victimOps = map[string]func(dir, file string) (func() (string, error), error){
	"read":     func(_, file string) (func() (string, error), error) { return cachedRead(file, 0) },
	"sendfile": prepareSendfile,
	"load-private": func(_, file string) (func() (string, error), error) {
		return mapped(file, unix.MAP_PRIVATE, false, false)
	},
	"load-shared": func(_, file string) (func() (string, error), error) {
		return mapped(file, unix.MAP_SHARED, false, false)
	},
	"load-mlocked": func(_, file string) (func() (string, error), error) {
		return mapped(file, unix.MAP_SHARED, false, true)
	},
	"store-private": func(_, file string) (func() (string, error), error) {
		return mapped(file, unix.MAP_PRIVATE, true, false)
	},
	"store-shared": func(_, file string) (func() (string, error), error) {
		return mapped(file, unix.MAP_SHARED, true, false)
	},
	"write":        func(_, file string) (func() (string, error), error) { return writes(file, 0) },
	"append":       func(_, file string) (func() (string, error), error) { return writes(file, unix.O_APPEND) },
	"write-direct": func(_, file string) (func() (string, error), error) { return writes(file, unix.O_DIRECT) },
	"read-direct":  func(_, file string) (func() (string, error), error) { return cachedRead(file, unix.O_DIRECT) },
	"fsync":        prepareFsync,
	"stat": func(_, file string) (func() (string, error), error) {
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			return nil, err
		}
		return func() (string, error) { return fmt.Sprint(st.Size), unix.Stat(file, &st) }, nil
	},
	"open": func(_, file string) (func() (string, error), error) {
		return func() (string, error) { return opened(file, unix.O_RDONLY) }, nil
	},
	"create": func(dir, _ string) (func() (string, error), error) {
		return func() (string, error) { return opened(dir+"/created", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY) }, nil
	},
	"rename": func(dir, _ string) (func() (string, error), error) {
		err := os.WriteFile(dir+"/old", []byte("x"), 0o644)
		return func() (string, error) { return "renamed", unix.Rename(dir+"/old", dir+"/new") }, err
	},
	"mkdir": func(dir, _ string) (func() (string, error), error) {
		return func() (string, error) { return "made", unix.Mkdir(dir+"/made", 0o755) }, nil
	},
	"readdir": func(dir, _ string) (func() (string, error), error) {
		return func() (string, error) {
			entries, err := os.ReadDir(dir)
			return fmt.Sprint(len(entries) > 0), err
		}, nil
	},
	"many-stats":     manyStats,
	"sync-many":      syncManyFiles,
	"read-many":      readManyFiles,
	"make-open":      makeOpen,
	"differential":   prepareDifferential,
	"dirty-mappings": dirtyMappings,
	"append-lines":   appendLines,
	"fill":           fill,
	"remains":        leaveRemains,
	"failing-sync":   failingSync,
	"make-sparse":    makeSparse,
	"fill-verify":    verifyFill,
	"semantics":      prepareSemantics,
	"try-locks":      prepareTryLocks,
	"read-forever":   readForever,
	"write-gigabyte": writeGigabyte,
	"truncate": func(dir, _ string) (func() (string, error), error) {
		err := os.WriteFile(dir+"/long", make([]byte, 10_000), 0o644)
		return func() (string, error) { return "cut", unix.Truncate(dir+"/long", 5000) }, err
	},
}

func opened(path string, flags int) (string, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return "", err
	}
	return "opened", unix.Close(fd)
}

// page returns a page-aligned buffer.
func page(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return b
}

func cachedRead(file string, flags int) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDONLY|flags, 0)
	if err != nil {
		return nil, err
	}
	b := page(pageSize)
	read := func() (string, error) {
		n, err := unix.Pread(fd, b, pageSize)
		return fmt.Sprintf("%d %x", n, b[:8]), err
	}
	_, err = read()
	return read, err
}

func prepareSendfile(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	if _, err := unix.Pread(fd, make([]byte, pageSize), 0); err != nil {
		return nil, err
	}
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return nil, err
	}
	return func() (string, error) {
		off := int64(0)
		n, err := unix.Sendfile(pipe[1], fd, &off, pageSize)
		return fmt.Sprint(n), err
	}, nil
}

func mapped(file string, flags int, store, lock bool) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	m, err := unix.Mmap(fd, 0, 8*pageSize, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, err
	}
	if lock {
		if err := unix.Mlock(m); err != nil {
			return nil, err
		}
	}
	touch := m[0] + m[3*pageSize] // both pages are mapped now
	return func() (string, error) {
		if store {
			m[3*pageSize] = 'S'
			return fmt.Sprintf("stored %c", m[3*pageSize]), nil
		}
		return fmt.Sprintf("%d", m[0]+m[3*pageSize]-touch), nil
	}, nil
}

func writes(file string, flags int) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDWR|flags, 0)
	if err != nil {
		return nil, err
	}
	b := page(pageSize)
	copy(b, "written while frozen")
	if _, err := unix.Pwrite(fd, b, 2*pageSize); err != nil {
		return nil, err
	}
	return func() (string, error) {
		n, err := unix.Pwrite(fd, b, 4*pageSize)
		return fmt.Sprint(n), err
	}, nil
}

func prepareFsync(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return func() (string, error) { return "synced", unix.Fsync(fd) }, nil
}

func beVictim(op, dir, file string) error {
	prepare := victimOps[op]
	if prepare == nil {
		prepare = prepareCall(op)
	}
	run, err := prepare(dir, file)
	if err != nil {
		return err
	}
	fmt.Println("ready", unix.Gettid())
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	fmt.Println("going")
	word, err := run()
	if err != nil {
		return err
	}
	fmt.Println("done", word)
	return nil
}

// victim is the test's side of it.
type victim struct {
	t     testing.TB
	op    string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
	tid   string
}

func newVictim(t testing.TB, op, dir, file string) *victim {
	t.Helper()
	p := &victim{t: t, op: op, cmd: exec.Command(os.Args[0], dir, file), lines: make(chan string, 4)}
	p.cmd.Env = append(os.Environ(), victimEnv+"="+op)
	p.cmd.Stderr = os.Stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	ready := p.line(20 * time.Second)
	if _, err := fmt.Sscanf(ready, "ready %s", &p.tid); err != nil {
		t.Fatalf("%s: %q", op, ready)
	}
	return p
}

// line waits for the next line; "" at the end of the output or of the time.
func (p *victim) line(limit time.Duration) string {
	select {
	case line := <-p.lines:
		return line
	case <-time.After(limit):
		return ""
	}
}

func (p *victim) start() {
	p.t.Helper()
	if _, err := p.stdin.Write([]byte("\n")); err != nil {
		p.t.Fatal(err)
	}
	if got := p.line(20 * time.Second); got != "going" {
		p.t.Fatalf("%s: %q", p.op, got)
	}
}

// waits are the places in the kernel where a frozen caller may stand: for a
// reply, for a page that another waits for, for leave to dirty one more page.
var waits = []string{"request_wait_answer", "folio_wait_bit_common", "folio_wait_bit", "fuse_wait", "balance_dirty", "wait_on_page", "rwsem", "mutex", "io_schedule"}

// hangs waits until the victim stands in the filesystem. A victim that gets
// through fails the test.
func (p *victim) hangs() {
	p.t.Helper()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	limit := time.After(10 * time.Second)
	for steady := 0; steady < 20; { // a tenth of a second in the same place
		select {
		case line := <-p.lines:
			p.t.Fatalf("%s was answered while frozen: %q", p.op, line)
		case <-limit:
			p.t.Fatalf("%s stands nowhere known in the kernel: %q", p.op, p.wchan())
		case <-look.C:
		}
		if slices.ContainsFunc(waits, func(w string) bool { return strings.Contains(p.wchan(), w) }) {
			steady++
		} else {
			steady = 0
		}
	}
}

func (p *victim) wchan() string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/wchan", p.cmd.Process.Pid, p.tid))
	return string(b)
}

// finishes waits for the victim's word.
func (p *victim) finishes(limit time.Duration) string {
	p.t.Helper()
	line := p.line(limit)
	word, ok := strings.CutPrefix(line, "done ")
	if !ok {
		p.t.Errorf("%s: %q after the thaw", p.op, line)
	}
	return word
}
