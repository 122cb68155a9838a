//go:build linux

package test

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const (
	pgClients = 4
	pgScale   = 2 // 200,000 accounts, 32 MB: more than shared_buffers
)

// PostgreSQL under pgbench: through a freeze, kill -9 of all its processes under
// load, and a restart of byokd.
func TestDatabasePostgreSQL(t *testing.T) {
	bin := filepath.Dir(requireDatabase(t, "PostgreSQL", findPostgres))
	requireProgram(t, "setpriv")
	if _, err := user.Lookup("postgres"); err != nil {
		t.Skip("there is no user postgres")
	}
	d := &postgres{database: newDatabase(t), bin: bin}
	d.setUp()
	d.start()
	d.run("pgbench", "-i", "-q", "-s", fmt.Sprint(pgScale), "bank")
	d.sql("CREATE TABLE acknowledged(client int, run int, n int, PRIMARY KEY(client, run, n))")

	load := d.load(12)
	d.await("pgbench to make transactions", load, func() bool { return d.booked() > 50 })
	d.freeze(d.booked)
	frozen := d.booked()
	text := d.finish(load)
	if !strings.Contains(text, "number of failed transactions: 0 (0.000%)") {
		t.Errorf("transactions failed over a freeze:\n%s", text)
	}
	if got := d.booked(); got <= frozen {
		t.Errorf("no transaction after the thaw: %d before, %d after", frozen, got)
	}
	d.verify("after a freeze")

	load = d.load(60)
	start := d.booked()
	d.await("pgbench to make transactions", load, func() bool { return d.booked() > start+200 })
	d.kill()
	load.wait(patience) // it has lost its server
	d.start()
	d.verify("after kill -9 of PostgreSQL")

	d.stop()
	d.restart()
	d.start()
	d.verify("after a restart of byokd")
	d.stop()
	t.Logf("%d transactions acknowledged, all there", d.booked())
}

// findPostgres looks where Debian puts it.
func findPostgres() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err == nil && len(found) == 0 {
		return exec.LookPath("postgres")
	}
	return found[len(found)-1], err
}

type postgres struct {
	*database
	bin    string
	data   string // the cluster, on the mount
	out    string // socket and logs, not on the mount
	server *process
	runs   int // pgbench loads so far
}

// as starts a program as the user postgres.
func (d *postgres) as(name string, args ...string) *process {
	d.t.Helper()
	full := append([]string{"--reuid=postgres", "--regid=postgres", "--clear-groups", "env", "-C", d.out, "PGHOST=" + d.out, "PGDATABASE=postgres",
		filepath.Join(d.bin, name)}, args...)
	return d.launch(name, nil, "setpriv", full...)
}

func (d *postgres) run(name string, args ...string) string {
	d.t.Helper()
	return d.finish(d.as(name, args...))
}

func (d *postgres) setUp() {
	d.t.Helper()
	d.data, d.out = d.mount+"/pg", d.dir+"/pg-out"
	u, err := user.Lookup("postgres")
	if err != nil {
		d.t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	for _, dir := range []string{d.data, d.out} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			d.t.Fatal(err)
		}
		if err := os.Chown(dir, uid, gid); err != nil {
			d.t.Fatal(err)
		}
	}
	for _, dir := range []string{filepath.Dir(d.dir), d.dir, d.mount} { // postgres passes through
		if err := os.Chmod(dir, 0o755); err != nil {
			d.t.Fatal(err)
		}
	}
	d.run("initdb", "-D", d.data, "--auth=trust", "--locale=C", "--encoding=UTF8", "--data-checksums")
	config := fmt.Sprintf("listen_addresses = ''\nunix_socket_directories = '%s'\nshared_buffers = 16MB\nmax_wal_size = 64MB\nmin_wal_size = 32MB\n"+
		"checkpoint_timeout = 30s\nmax_connections = 20\nfsync = on\nsynchronous_commit = on\n", d.out)
	f, err := os.OpenFile(d.data+"/postgresql.conf", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(config); err != nil {
		d.t.Fatal(err)
	}
}

// start starts the server and waits until it has recovered and answers.
func (d *postgres) start() {
	d.t.Helper()
	d.server = d.as("postgres", "-D", d.data)
	d.await("PostgreSQL to answer", d.server, func() bool { return d.as("pg_isready", "-q").ok() })
	if d.runs == 0 {
		d.run("createdb", "bank")
	}
}

// ok waits for the end and reports whether it was a good one.
func (p *process) ok() bool { return p.wait(patience) && p.code() == 0 }

// stop ends the server in order.
func (d *postgres) stop() {
	d.t.Helper()
	d.server.signal(syscall.SIGINT) // fast shutdown
	d.finish(d.server)
}

// kill kills every process of the server at one moment: the first is stopped so
// that it starts no other, and removes nothing.
func (d *postgres) kill() {
	d.t.Helper()
	d.server.signal(syscall.SIGSTOP)
	all := append(children(d.t, d.server.pid()), d.server.pid())
	for _, pid := range all {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			d.t.Error(err)
		}
	}
	if len(all) < pgClients {
		d.t.Errorf("only %d processes of PostgreSQL: %v", len(all), all)
	}
	d.await("PostgreSQL to be dead", nil, func() bool {
		return d.server.ended() && !slices.ContainsFunc(all, func(pid int) bool { return alive(pid) })
	})
	stale := []string{d.data + "/postmaster.pid"}
	sockets, _ := filepath.Glob(d.out + "/.s.PGSQL.*")
	for _, name := range append(stale, sockets...) {
		if err := os.Remove(name); err != nil {
			d.t.Error(err)
		}
	}
}

// alive reports whether a process runs; one that only waits to be collected does not.
func alive(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func (d *postgres) sql(query string) string {
	d.t.Helper()
	return strings.TrimSpace(d.run("psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", "bank", "-c", query))
}

// transaction is pgbench's own, and books itself: n counts the client's
// transactions of this run, as pgbench's log does.
const transaction = `\set aid random(1, 100000 * :scale)
\set bid random(1, 1 * :scale)
\set tid random(1, 10 * :scale)
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
INSERT INTO acknowledged VALUES (:client_id, :run, :n);
END;
\set n :n + 1
`

// load starts pgbench for some seconds, with a log of each transaction that was
// acknowledged to it.
func (d *postgres) load(seconds int) *process {
	d.t.Helper()
	d.runs++
	script := d.out + "/transaction.sql"
	if err := os.WriteFile(script, []byte(transaction), 0o644); err != nil {
		d.t.Fatal(err)
	}
	return d.as("pgbench", "-n", "-c", fmt.Sprint(pgClients), "-j", "1", "-T", fmt.Sprint(seconds), "-f", script, "-D", fmt.Sprint("scale=", pgScale),
		"-D", "n=0", "-D", fmt.Sprint("run=", d.runs), "--log", fmt.Sprintf("--log-prefix=%s/run-%d", d.out, d.runs), "bank")
}

// logged reads from pgbench's logs how many transactions of each client
// and run were acknowledged. pgbench buffers its log, so while it runs this is
// less than the truth.
func (d *postgres) logged() map[[2]int]int {
	d.t.Helper()
	all := map[[2]int]int{}
	for run := 1; run <= d.runs; run++ {
		files, _ := filepath.Glob(fmt.Sprintf("%s/run-%d.*", d.out, run))
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				d.t.Fatal(err)
			}
			for _, line := range strings.Split(string(text), "\n") {
				client, _, ok := strings.Cut(line, " ")
				if n, err := strconv.Atoi(client); ok && err == nil {
					all[[2]int{n, run}]++
				}
			}
		}
	}
	return all
}

// booked is the number of transactions in pgbench's logs.
func (d *postgres) booked() int {
	sum := 0
	for _, n := range d.logged() {
		sum += n
	}
	return sum
}

// verify checks that the four sums agree, that every acknowledged transaction is
// there, and every checksum and index.
func (d *postgres) verify(when string) {
	d.t.Helper()
	sums := d.sql(`SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
(SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
(SELECT count(*) FROM pgbench_history) = (SELECT count(*) FROM acknowledged)`)
	fields := strings.Split(sums, "|")
	if len(fields) != 5 || fields[0] != fields[1] || fields[1] != fields[2] || fields[2] != fields[3] || fields[4] != "t" {
		d.t.Errorf("%s: the sums of accounts, tellers, branches and history differ: %s", when, sums)
	}
	for key, n := range d.logged() {
		got := d.sql(fmt.Sprintf("SELECT count(*) FROM acknowledged WHERE client=%d AND run=%d AND n<%d", key[0], key[1], n))
		if got != fmt.Sprint(n) {
			d.t.Errorf("%s: of %d acknowledged transactions of client %d in run %d only %s are there", when, n, key[0], key[1], got)
		}
	}
	d.sql("CREATE EXTENSION IF NOT EXISTS amcheck")
	d.sql("SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_index i ON i.indexrelid=c.oid JOIN pg_namespace n ON n.oid=c.relnamespace WHERE n.nspname='public' AND c.relkind='i'")
	d.run("pg_dumpall", "--no-sync", "-f", "/dev/null") // reads every page of every table, with its checksum
}
