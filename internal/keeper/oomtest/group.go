package oomtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Group is a memory cgroup with a limit.
type Group struct{ dir string }

var number atomic.Uint64 // tells the groups of one process apart

// New makes a group of the cgroup version that this machine has, for the test. It
// skips where none can be made, as in a container that sees them read-only, and fails
// where BYOKD_REQUIRE names cgroups.
func New(t testing.TB, limit int) Group {
	t.Helper()
	name := fmt.Sprintf("byokd-test-%d-%d", os.Getpid(), number.Add(1))
	var last error
	for _, v := range []struct {
		root, limit string
		magic       int64
	}{
		{"/sys/fs/cgroup", "memory.max", unix.CGROUP2_SUPER_MAGIC},
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", unix.CGROUP_SUPER_MAGIC},
	} {
		var fs unix.Statfs_t
		if last = unix.Statfs(v.root, &fs); last == nil && int64(fs.Type) != v.magic { // a tmpfs with those of version 1 below
			last = fmt.Errorf("%s is no cgroup of that version", v.root)
		}
		if last != nil {
			continue
		}
		g := Group{filepath.Join(v.root, name)}
		if last = os.Mkdir(g.dir, 0o755); last != nil {
			continue
		}
		t.Cleanup(func() { g.remove(t) })
		if last = os.WriteFile(filepath.Join(g.dir, v.limit), []byte(strconv.Itoa(limit)), 0); last != nil {
			continue
		}
		_ = os.WriteFile(filepath.Join(g.dir, "memory.oom.group"), []byte("1"), 0) // version 2: as kubelet does
		return g
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "cgroups") {
		t.Fatalf("BYOKD_REQUIRE names cgroups, but no memory cgroup can be made: %v", last)
	}
	t.Skipf("needs root and memory cgroups: %v", last)
	return Group{}
}

// Add moves a process into the group, and with it the children that it starts from
// now on.
func (g Group) Add(t testing.TB, pid int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

// remove waits for the group's last processes to be taken down.
func (g Group) remove(t testing.TB) {
	deadline := time.Now().Add(10 * time.Second)
	for err := os.Remove(g.dir); err != nil && !os.IsNotExist(err); err = os.Remove(g.dir) {
		if time.Now().After(deadline) {
			t.Error(err)
			return
		}
		time.Sleep(10 * time.Millisecond) // the pace of looking
	}
}
