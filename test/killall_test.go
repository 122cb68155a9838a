//go:build linux

package test

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// killCycles is how often everything is killed: BYOKD_KILL_CYCLES, or once while
// open, once while frozen.
func killCycles(t *testing.T) int {
	t.Helper()
	text := os.Getenv("BYOKD_KILL_CYCLES")
	if text == "" {
		return 2
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("BYOKD_KILL_CYCLES=%s: say a number from 1 on", text)
	}
	return n
}

// gateCycles are the states in which everything is killed, in turn: how one gets
// there, and back after byokd was started in it.
var gateCycles = []struct {
	name      string
	into, out []kmstest.KeyCommand
	outage    bool              // KMS cannot be reached; the lease runs
	waits     keyguard.KeyState // what the new byokd waits with; Unknown: it goes ready
}{
	{name: "open"},
	{name: "disabled", into: []kmstest.KeyCommand{{Do: "disable"}}, out: []kmstest.KeyCommand{{Do: "enable"}}, waits: keyguard.Disabled},
	{name: "degraded", outage: true, waits: keyguard.Unreachable},
	{name: "to be deleted", into: []kmstest.KeyCommand{{Do: "schedule-deletion", AfterSeconds: 3600}}, out: []kmstest.KeyCommand{{Do: "cancel-deletion"}, {Do: "enable"}}, waits: keyguard.PendingDeletion},
	{name: "denied", into: []kmstest.KeyCommand{{Do: "deny", Action: "kms:Decrypt", Principal: kmstest.TenantRole}},
		out: []kmstest.KeyCommand{{Do: "allow", Action: "kms:Decrypt", Principal: kmstest.TenantRole}}, waits: keyguard.AccessDenied},
	{name: "unavailable", into: []kmstest.KeyCommand{{Do: "set-state", State: "Unavailable"}}, out: []kmstest.KeyCommand{{Do: "set-state", State: "Enabled"}}, waits: keyguard.Unavailable},
}

// TestEverythingKilled kills byokd and three databases under load on its mount at
// one moment, again and again, in each state of the gate: what they had
// acknowledged is there when all is started anew.
func TestEverythingKilled(t *testing.T) {
	k := newKilled(t, withGrace(time.Minute)) // longer than it takes to kill them after an outage was noticed
	for cycle := range killCycles(t) {
		k.cycle(cycle)
	}
	k.pg.start()
	k.pg.stop()
	t.Logf("%d transactions of SQLite, %d of PostgreSQL and %d keys of RocksDB were acknowledged before a kill, all there", k.sums[0], k.sums[1], k.sums[2])
}

// killed is the three databases on one mount.
type killed struct {
	*database
	lite *sqlite
	pg   *postgres
	sums [3]int
}

// newKilled sets the databases up.
func newKilled(t *testing.T, options ...option) *killed {
	t.Helper()
	requireProgram(t, "db_bench")
	requireProgram(t, "ldb")
	requireProgram(t, "stdbuf")
	requireProgram(t, "setpriv")
	lite := requireProgram(t, "sqlite3")
	bin := filepath.Dir(requireDatabase(t, "PostgreSQL", findPostgres))
	if _, err := user.Lookup("postgres"); err != nil {
		t.Skip("there is no user postgres")
	}
	d := newDatabase(t, options...)
	k := &killed{database: d,
		lite: &sqlite{database: d, program: lite, file: d.mount + "/bank.db", journal: "WAL"},
		pg:   &postgres{database: d, bin: bin},
	}
	k.lite.setUp()
	k.pg.setUp()
	k.pg.start()
	k.pg.run("pgbench", "-i", "-q", "-s", fmt.Sprint(pgScale), "bank")
	k.pg.sql("CREATE TABLE acknowledged(client int, run int, n int, PRIMARY KEY(client, run, n))")
	return k
}

// cycle starts the load, kills all, starts all anew and verifies.
func (k *killed) cycle(number int) {
	k.t.Helper()
	state := gateCycles[number%len(gateCycles)]
	if number > 0 {
		k.pg.start()
	}
	writer := k.lite.ledger(number)
	k.lite.ledgers = []*ledger{writer}
	rocks := fmt.Sprintf("%s/rocks-%d", k.mount, number)
	bench := k.startBench(rocks, "fillseq", 4_000_000, "--use_existing_db=0", "--sync=1", "--stats_interval=10")
	client := k.pg.load(600)
	k.awaitProgress(bench, client)
	for _, c := range state.into {
		k.key(c)
	}
	switch {
	case state.outage:
		k.cutOff()
		k.awaitGate(keyguard.Degraded)
	case state.waits != keyguard.Unknown:
		k.awaitGate(keyguard.Frozen)
	}
	k.kill(writer.process, bench, client)
	acknowledged := operations(bench)

	k.startDaemon()
	if state.waits != keyguard.Unknown {
		k.awaitKey(state.waits)
		k.awaitState(metrics.StateWaiting)
		if mounted(k.mount) {
			k.t.Errorf("%s: mounted without a key", state.name)
		}
	}
	for _, c := range state.out {
		k.key(c)
	}
	if state.outage {
		k.reconnect()
	}
	k.awaitState(metrics.StateReady)
	when := fmt.Sprintf("cycle %d, killed while %s", number, state.name)
	k.verify(when, rocks, acknowledged)
	if number%50 == 0 {
		k.t.Logf("%s: %d transactions of SQLite, %d of PostgreSQL, %d keys of RocksDB", when, writer.acked(), k.pg.booked(), acknowledged)
	}
	k.sums[0] += writer.acked()
	k.sums[1] += k.pg.booked()
	k.sums[2] += acknowledged
	k.forget(rocks)
}

// awaitProgress waits until each database has acknowledged something.
func (k *killed) awaitProgress(bench, client *process) {
	k.t.Helper()
	k.lite.awaitProgress(k.lite.ledgers...)
	k.await("db_bench to sync", bench, func() bool { return operations(bench) >= 100 })
	k.await("pgbench to make transactions", client, func() bool {
		return k.pg.sql("SELECT count(*) > 20 FROM acknowledged WHERE run="+fmt.Sprint(k.pg.runs)) == "t"
	})
}

// kill kills byokd and all who use its mount at one moment: they are stopped
// first, so that none sees the end of another.
func (k *killed) kill(clients ...*process) {
	k.t.Helper()
	all := append(children(k.t, k.pg.server.pid()), k.pg.server.pid(), k.daemon.pid())
	for _, c := range clients {
		all = append(all, c.pid())
	}
	for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, pid := range all {
			if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
				k.t.Error(err)
			}
		}
	}
	k.await("everything to be dead", nil, func() bool {
		for _, pid := range all {
			if alive(pid) {
				return false
			}
		}
		return true
	})
	k.daemon.wait(patience)
	// EINVAL: the sentinel of the mount was first.
	if err := unix.Unmount(k.mount, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		k.t.Errorf("unmount what byokd left: %v", err)
	}
}

// verify lets each database recover and compares.
func (k *killed) verify(when, rocks string, acknowledged int) {
	k.t.Helper()
	k.lite.verify(when)
	text := k.bench(rocks, "readrandom,verifychecksum", acknowledged)
	if want := fmt.Sprintf("(%d of %d found)", acknowledged, acknowledged); !strings.Contains(text, want) {
		k.t.Errorf("%s: not all of the %d synced keys are there:\n%s", when, acknowledged, text)
	}
	stale, _ := filepath.Glob(k.pg.out + "/.s.PGSQL.*")
	for _, name := range append(stale, k.pg.data+"/postmaster.pid") {
		if err := os.Remove(name); err != nil {
			k.t.Error(err)
		}
	}
	k.pg.start()
	k.pg.verify(when)
	k.pg.stop()
}

// forget removes what has been verified, so that a thousand cycles fit the disk.
func (k *killed) forget(rocks string) {
	logs, _ := filepath.Glob(k.pg.out + "/run-*")
	for _, name := range logs {
		if err := os.Remove(name); err != nil {
			k.t.Error(err)
		}
	}
	if err := os.RemoveAll(rocks); err != nil {
		k.t.Error(err)
	}
}
