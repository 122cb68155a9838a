package fs

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// counter counts operations by name.
type counter struct {
	mu   sync.Mutex
	seen map[string]int // guarded by mu
}

func (c *counter) Done(op string, _ int, _ time.Duration, _ syscall.Errno) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil {
		c.seen = map[string]int{}
	}
	c.seen[op]++
}

func (c *counter) Damaged() {}

func (c *counter) of(op string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[op]
}

// TestSyncedWrites: a write to a file opened with O_DSYNC or O_SYNC is synced
// below before it returns, in both cache modes.
func TestSyncedWrites(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		ops := &counter{}
		o.Observer = ops
		v := newVolume(t, o)
		for name, flag := range map[string]int{"O_DSYNC": unix.O_DSYNC, "O_SYNC": unix.O_SYNC, "none": 0} {
			fd, err := unix.Open(v.path(name), unix.O_RDWR|unix.O_CREAT|flag, 0o644)
			if err != nil {
				t.Fatal(err)
			}
			before := ops.of("fsync")
			for range 3 {
				if _, err := unix.Write(fd, []byte("meta")); err != nil {
					t.Fatal(err)
				}
			}
			synced := func() bool { return ops.of("fsync") == before+3 }
			if flag == 0 {
				if got := ops.of("fsync") - before; got != 0 {
					t.Errorf("%s: %d syncs", name, got)
				}
			} else {
				await(t, func() string { return fmt.Sprintf("%s: %d syncs for 3 writes", name, ops.of("fsync")-before) }, synced)
			}
			unix.Close(fd)
		}
	})
}

// TestSeveralAppend: processes that append to one file lose nothing of each
// other's.
func TestSeveralAppend(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const processes = 4
		var appenders []*victim
		for range processes {
			appenders = append(appenders, newVictim(t, "append-lines", v.mount, v.path("log")))
		}
		for _, p := range appenders {
			p.start()
		}
		v.freeze()
		v.thaw()
		for _, p := range appenders {
			p.finishes(30 * time.Second)
		}
		v.remount()
		b, err := os.ReadFile(v.path("log"))
		if err != nil {
			t.Fatal(err)
		}
		lines := map[string]int{}
		for _, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
			id, _, _ := strings.Cut(line, " ")
			if len(line) != appendedLine-1 {
				t.Fatalf("a line of %d bytes: %.40q", len(line), line)
			}
			lines[id]++
		}
		for id, n := range lines {
			if n != appendedLines {
				t.Errorf("process %s: %d lines of %d", id, n, appendedLines)
			}
		}
		if len(lines) != processes {
			t.Errorf("lines of %d processes", len(lines))
		}
	})
}

const appendedLine, appendedLines = 101, 3000

func appendLines(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND, 0o644)
	line := fmt.Sprintf("%d ", os.Getpid())
	line += strings.Repeat("x", appendedLine-1-len(line)) + "\n"
	return func() (string, error) {
		for range appendedLines {
			if n, err := unix.Write(fd, []byte(line)); err != nil || n != len(line) {
				return "", fmt.Errorf("append: %d, %v", n, err)
			}
		}
		return "appended", unix.Fsync(fd)
	}, err
}
