//go:build linux

package test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDatabasesOverWorkerKills kills the worker at random moments under PostgreSQL,
// SQLite with synchronous=FULL and RocksDB at once: no transaction fails, and what
// was acknowledged is there, now and after byokd was started anew.
func TestDatabasesOverWorkerKills(t *testing.T) {
	k := newKilled(t)
	seconds := keeperKills(t)/2 + 2
	k.lite.ledgers = []*ledger{k.lite.ledger(0), k.lite.ledger(1)}
	rocks := k.mount + "/rocks"
	bench := k.startBench(rocks, "fillseq", 4_000_000, "--use_existing_db=0", "--sync=1", "--stats_interval=10")
	client := k.pg.load(seconds)
	var took []time.Duration
	for !client.ended() || len(took) < keeperKills(t) {
		time.Sleep(rand.N(300 * time.Millisecond)) // the random moment
		took = append(took, k.killWorker(syscall.SIGKILL))
		for _, c := range []*process{bench, k.lite.ledgers[0].process, k.lite.ledgers[1].process} {
			if c.ended() {
				t.Fatalf("%s has ended: %s", c.name, c.tail())
			}
		}
	}
	if text := k.finish(client); !strings.Contains(text, "number of failed transactions: 0 (0.000%)") {
		t.Errorf("transactions failed:\n%s", text)
	}
	k.await("db_bench to sync", bench, func() bool { return operations(bench) >= 100 })
	bench.signal(syscall.SIGKILL)
	bench.wait(patience)
	k.lite.awaitProgress(k.lite.ledgers...)
	k.lite.end(k.lite.ledgers...)
	acknowledged := operations(bench)
	verify := func(when string) {
		k.lite.verify(when)
		k.pg.verify(when)
		text := k.bench(rocks, "readrandom,verifychecksum", acknowledged)
		if want := fmt.Sprintf("(%d of %d found)", acknowledged, acknowledged); !strings.Contains(text, want) {
			t.Errorf("%s: not all of the %d synced keys are there:\n%s", when, acknowledged, text)
		}
	}
	verify("after the kills")
	k.pg.stop()
	k.restart()
	k.pg.start()
	verify("after a restart")
	k.pg.stop()
	slices.Sort(took)
	t.Logf("%d kills: %d transactions of SQLite, %d of PostgreSQL, %d keys of RocksDB, none failed; from the kill to the first reply p50 %v, max %v", len(took),
		k.lite.acknowledged(), k.pg.booked(), acknowledged, took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}
