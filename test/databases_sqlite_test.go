//go:build linux

package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	accounts  = 200
	opening   = 1000 // what is in each account at first; the sum never changes
	writing   = 3    // processes that write
	someCalls = 15   // transactions that show that a writer is at work

	// think is the pause between two transactions of a process. Without it one
	// process keeps the lock, for SQLite's waiters sleep up to 100 ms between two
	// tries and there is no queue.
	think = 8 * time.Millisecond
)

// SQLite with synchronous=FULL, several processes on one database, in both kinds
// of journal: through a freeze, kill -9 of a writer, kill -9 of byokd.
func TestDatabaseSQLite(t *testing.T) {
	program := requireProgram(t, "sqlite3")
	requireProgram(t, "stdbuf")
	for _, journal := range []string{"DELETE", "WAL"} {
		t.Run(journal, func(t *testing.T) {
			d := &sqlite{database: newDatabase(t), program: program, journal: journal}
			d.file = d.mount + "/bank.db"
			d.setUp()
			for range writing {
				d.ledgers = append(d.ledgers, d.ledger(len(d.ledgers)))
			}
			audit := d.auditor()
			d.awaitProgress(d.ledgers...)
			d.freeze(d.acknowledged)
			d.awaitProgress(d.ledgers...)

			d.ledgers[0].signal(syscall.SIGKILL) // in mid-transaction: the others roll it back
			d.ledgers[0].wait(patience)
			d.awaitProgress(d.ledgers[1:]...)
			d.end(d.ledgers[1:]...)
			d.end(audit)
			d.verify("after kill -9 of a writer")

			d.restart()
			d.verify("after a restart of byokd")

			d.ledgers = append(d.ledgers, d.ledger(len(d.ledgers)), d.ledger(len(d.ledgers)+1))
			last := d.ledgers[len(d.ledgers)-2:]
			d.awaitProgress(last...)
			d.killDaemon(last...)
			d.resume()
			d.verify("after kill -9 of byokd")
			t.Logf("%d transactions acknowledged by %d processes, all there", d.acknowledged(), len(d.ledgers))
		})
	}
}

type sqlite struct {
	*database
	program string
	file    string
	journal string
	ledgers []*ledger
}

// ledger is a sqlite3 process that makes transactions until told to stop. It
// says ACK and a number after each COMMIT.
type ledger struct {
	*process
	number int
	stop   atomic.Bool
}

func (d *sqlite) setUp() {
	d.t.Helper()
	d.query(fmt.Sprintf(`PRAGMA journal_mode=%s;
CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
CREATE TABLE entry(writer INTEGER, n INTEGER, payload BLOB, PRIMARY KEY(writer, n)) WITHOUT ROWID;
WITH RECURSIVE i(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM i WHERE x < %d) INSERT INTO account SELECT x, %d FROM i;`,
		d.journal, accounts, opening))
}

const preamble = ".timeout 120000\nPRAGMA synchronous=FULL;\nPRAGMA mmap_size=1048576;\n"

// query runs SQL to its end and returns the last line.
func (d *sqlite) query(sql string) string {
	d.t.Helper()
	text := d.finish(d.launch("sqlite3", strings.NewReader(preamble+sql+"\n"), d.program, "-batch", "-bail", d.file))
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// feed starts sqlite3 and gives it one text after the other until it is
// to stop.
func (d *sqlite) feed(number int, text func(n int) string) *ledger {
	d.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		d.t.Fatal(err)
	}
	// A short pipe, so that it stops soon.
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pageSize); err != nil {
		d.t.Fatal(err)
	}
	c := &ledger{number: number}
	c.process = d.launch(fmt.Sprint("sqlite3 number ", number), r, "stdbuf", "-oL", d.program, "-batch", "-bail", d.file)
	r.Close()
	go func() {
		defer w.Close()
		if _, err := w.WriteString(preamble); err != nil {
			return
		}
		for n := 1; !c.stop.Load(); n++ {
			if _, err := w.WriteString(text(n)); err != nil {
				return // it was killed
			}
			for c.acked() < n && !c.stop.Load() && !c.ended() { // a text that waits in the pipe would leave no pause
				time.Sleep(time.Millisecond)
			}
			time.Sleep(think)
		}
	}()
	return c
}

// ledger moves money to and fro, and books each transaction.
func (d *sqlite) ledger(number int) *ledger {
	return d.feed(number, func(n int) string {
		from, to := (n*7+number)%accounts+1, (n*13+number*5)%accounts+1
		return fmt.Sprintf(`BEGIN IMMEDIATE; UPDATE account SET balance=balance-%[3]d WHERE id=%[1]d; UPDATE account SET balance=balance+%[3]d WHERE id=%[2]d;
INSERT INTO entry VALUES(%[4]d, %[5]d, randomblob(%[6]d)); COMMIT; SELECT 'ACK %[5]d';
`, from, to, n%90+1, number, n, n%3000)
	})
}

// auditor reads while the others write: no reader may ever see half a
// transaction.
func (d *sqlite) auditor() *ledger {
	return d.feed(-1, func(n int) string {
		return fmt.Sprintf("SELECT CASE sum(balance) WHEN %d THEN 'ACK %d' ELSE 'WRONG SUM ' || sum(balance) END FROM account;\n", accounts*opening, n)
	})
}

// acked is the number of the ledger's last acknowledged transaction.
func (c *ledger) acked() int { return bytes.Count([]byte(c.output()), []byte("ACK ")) }

func (d *sqlite) acknowledged() int {
	sum := 0
	for _, w := range d.ledgers {
		sum += w.acked()
	}
	return sum
}

func (d *sqlite) awaitProgress(them ...*ledger) {
	d.t.Helper()
	for _, c := range them {
		goal := c.acked() + someCalls
		d.await(fmt.Sprintf("%s to make transactions", c.name), c.process, func() bool { return c.acked() >= goal })
	}
}

// end stops them after what they have in hand; none may have failed.
func (d *sqlite) end(them ...*ledger) {
	d.t.Helper()
	for _, c := range them {
		c.stop.Store(true)
	}
	for _, c := range them {
		if text := d.finish(c.process); strings.Contains(text, "WRONG") {
			d.t.Errorf("%s saw half a transaction: %s", c.name, c.tail())
		}
	}
}

// killDaemon kills byokd under its them, which lose the mount.
func (d *sqlite) killDaemon(them ...*ledger) {
	d.t.Helper()
	d.daemon.signal(syscall.SIGKILL)
	d.daemon.wait(patience)
	for _, c := range them {
		c.signal(syscall.SIGKILL)
		c.wait(patience)
	}
	// EINVAL: the sentinel of the mount was first.
	if err := unix.Unmount(d.mount, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		d.t.Errorf("unmount what byokd left: %v", err)
	}
}

// verify checks the database, and that each acknowledged transaction is there.
func (d *sqlite) verify(when string) {
	d.t.Helper()
	if got := d.query("PRAGMA integrity_check;"); got != "ok" {
		d.t.Fatalf("%s: integrity_check: %s", when, got)
	}
	if got, want := d.query("SELECT sum(balance) FROM account;"), fmt.Sprint(accounts*opening); got != want {
		d.t.Errorf("%s: the sum of the accounts is %s instead of %s", when, got, want)
	}
	for _, w := range d.ledgers {
		acked := w.acked()
		got := d.query(fmt.Sprintf("SELECT count(*) FROM entry WHERE writer=%d AND n<=%d;", w.number, acked))
		if got != fmt.Sprint(acked) {
			d.t.Errorf("%s: of the %d acknowledged transactions of %s only %s are there", when, acked, w.name, got)
		}
	}
}
