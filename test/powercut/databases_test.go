//go:build linux

package powercut

import (
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
)

// requirePrograms skips where one is missing, and fails where the machine is
// said to have databases.
func requirePrograms(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "databases") {
			t.Fatalf("BYOKD_REQUIRE names databases, but there is no %s", name)
		}
		t.Skipf("needs %s (test/prepare.sh installs it)", name)
	}
}

func TestSQLite(t *testing.T) {
	requireDisks(t)
	requirePrograms(t, "sqlite3", "stdbuf")
	k := newTestKey(t)
	loads := func() []workload {
		return []workload{&sqliteLoad{journal: "WAL"}, &sqliteLoad{journal: "DELETE"}}
	}
	for lower, points := range map[*lowerKind]int{&ext4: 40, &xfs: 20} {
		t.Run(lower.name, func(t *testing.T) {
			told(t, trial{lower: *lower, view: sealed{k, fs.Writeback, t.TempDir()}, loads: loads,
				length: 4 * time.Second, pause: time.Second, key: k, points: points, suffice: enough}.cutPower(t))
		})
	}
}

// acknowledger is a database's workload.
type acknowledger interface{ by(cut int) int }

// enough fails when a database has acknowledged so little that cuts find
// nothing to look for.
func enough(t *testing.T, r *recording) {
	t.Helper()
	for _, l := range r.loads {
		n := l.(acknowledger).by(len(r.events))
		t.Logf("%s: %d acknowledged", l.name(), n)
		if n < 20 {
			t.Errorf("%s has acknowledged %d transactions only", l.name(), n)
		}
	}
}

func TestRocksDB(t *testing.T) {
	requireDisks(t)
	requirePrograms(t, "db_bench", "ldb")
	k := newTestKey(t)
	loads := func() []workload { return []workload{&rocksLoad{}} }
	for lower, points := range map[*lowerKind]int{&ext4: 30, &xfs: 10} {
		t.Run(lower.name, func(t *testing.T) {
			told(t, trial{lower: *lower, view: sealed{k, fs.Writeback, t.TempDir()}, loads: loads,
				length: 3 * time.Second, pause: time.Second, key: k, points: points, suffice: enough}.cutPower(t))
		})
	}
}

func TestPostgreSQL(t *testing.T) {
	requireDisks(t)
	k := newTestKey(t)
	bin, mount, out := postgresPrograms(t), t.TempDir(), t.TempDir()
	uid, gid, err := postgresUser()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(out, int(uid), int(gid)); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Dir(filepath.Dir(mount)), filepath.Dir(mount), mount} { // postgres passes through
		if err := unix.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lower := ext4
	lower.size = 256 << 20 // a cluster is some 40 MiB when new
	loads := func() []workload { return []workload{&postgresLoad{bin: bin, out: out}} }
	told(t, trial{lower: lower, view: sealed{k, fs.Writeback, mount}, loads: loads,
		length: 10 * time.Second, pause: 4 * time.Second, key: k, points: 10, suffice: enough}.cutPower(t))
}

// postgresPrograms returns where Debian puts them.
func postgresPrograms(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err == nil && len(found) > 0 {
		if _, err := user.Lookup("postgres"); err == nil {
			return filepath.Dir(found[len(found)-1])
		}
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "databases") {
		t.Fatal("BYOKD_REQUIRE names databases, but there is no PostgreSQL with a user postgres")
	}
	t.Skip("needs PostgreSQL and a user postgres (test/prepare.sh installs them)")
	return ""
}
