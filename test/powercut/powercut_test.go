//go:build linux

package powercut

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/byokd/byokd/fs"
)

// TestMain lets this program be the processes that the harness starts.
func TestMain(m *testing.M) {
	serve := serveDisk
	switch {
	case os.Getenv(mapVariable) != "":
		serve = serveMapping
	case os.Getenv(diskVariable) == "":
		code, err := inOwnNamespace(m.Run)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(code)
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// requireDisks skips on a machine without FUSE and loop devices, and fails where
// the machine is said to have them.
func requireDisks(t testing.TB) {
	t.Helper()
	missing := ""
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			missing = err.Error()
			continue
		}
		f.Close()
	}
	if missing == "" && os.Geteuid() == 0 {
		return
	}
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
		t.Fatalf("BYOKD_REQUIRE names fuse, but this is not root with /dev/fuse and loop devices: %s", missing)
	}
	t.Skipf("needs root, /dev/fuse and loop devices: %s", missing)
}

// rounds is how often each test records anew.
func rounds(t testing.TB) int {
	t.Helper()
	text := os.Getenv("BYOKD_POWERCUT_ROUNDS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("BYOKD_POWERCUT_ROUNDS=%s: say a number from 1 on", text)
	}
	return n
}

func newTestKey(t testing.TB) *key {
	t.Helper()
	k, err := newKey(zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// trial is one kind of recording and how many points are made of each.
type trial struct {
	lower   lowerKind
	view    view
	loads   func() []workload
	length  time.Duration
	pause   time.Duration // between freezes; 0 for none
	key     *key          // to freeze with
	points  int
	suffice func(t *testing.T, r *recording) // may be nil
}

// cutPower records and verifies, and returns where something was lost.
func (c trial) cutPower(t *testing.T) []loss {
	t.Helper()
	if _, err := exec.LookPath(c.lower.mkfs[0]); err != nil {
		if os.Getenv("BYOKD_REQUIRE") != "" {
			t.Fatalf("BYOKD_REQUIRE is set, but there is no %s", c.lower.mkfs[0])
		}
		t.Skipf("needs %s (test/prepare.sh installs it)", c.lower.mkfs[0])
	}
	b, err := newBench(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var lost []loss
	for range rounds(t) {
		r := &recording{lower: c.lower, view: c.view, loads: c.loads(), seed: rand.Uint64()>>32 + 1}
		if err := b.record(r, c.length, c.between()); err != nil {
			t.Fatalf("seed %d: %v", r.seed, err)
		}
		began := time.Now()
		here, err := b.verify(r, c.points, os.Getenv("BYOKD_POWERCUT_KEEP"))
		if err != nil {
			t.Fatalf("seed %d: %v", r.seed, err)
		}
		t.Logf("%s, seed %d: %d events of the disk, %d points in %v, lost at %d", c.lower.name, r.seed, len(r.events)-r.start, c.points, time.Since(began).Round(time.Millisecond), len(here))
		if c.suffice != nil {
			c.suffice(t, r)
		}
		lost = append(lost, here...)
		r.forget()
	}
	return lost
}

// between freezes the volume, or does nothing.
func (c trial) between() func(context.Context) error {
	return func(ctx context.Context) error {
		if c.pause == 0 {
			<-ctx.Done()
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(c.pause): // the load runs meanwhile
			return c.key.freeze()
		}
	}
}

func told(t *testing.T, lost []loss) {
	t.Helper()
	for i, l := range lost {
		if i == 5 {
			t.Errorf("and at %d more points", len(lost)-i)
			return
		}
		t.Error(l)
	}
}

func manyFiles() []workload { return append(fileLoads(), &namesLoad{}) }

func TestFiles(t *testing.T) {
	requireDisks(t)
	k := newTestKey(t)
	for _, c := range []struct {
		lower  lowerKind
		cache  fs.CacheMode
		points int
	}{{ext4, fs.Writeback, 160}, {ext4, fs.Writethrough, 60}, {xfs, fs.Writeback, 60}, {xfs, fs.Writethrough, 30}} {
		t.Run(c.lower.name+"/"+c.cache.String(), func(t *testing.T) {
			told(t, trial{lower: c.lower, view: sealed{k, c.cache, t.TempDir()}, loads: manyFiles,
				length: 4 * time.Second, pause: time.Second, key: k, points: c.points}.cutPower(t))
		})
	}
}

// TestBare is the control: the harness finds nothing where nothing is lost.
func TestBare(t *testing.T) {
	requireDisks(t)
	for _, lower := range []lowerKind{ext4, xfs} {
		t.Run(lower.name, func(t *testing.T) {
			told(t, trial{lower: lower, view: bare{}, loads: manyFiles, length: 2 * time.Second, points: 40}.cutPower(t))
		})
	}
}

// TestNaive is the other control: a format that loses what was acknowledged is
// seen to.
func TestNaive(t *testing.T) {
	requireDisks(t)
	loads := func() []workload {
		naive, err := newNaiveJournal()
		if err != nil {
			t.Fatal(err)
		}
		return append(manyFiles(), naive)
	}
	lost := trial{lower: ext4, view: bare{}, loads: loads, length: 2 * time.Second, points: 40}.cutPower(t)
	if len(lost) == 0 {
		t.Error("a format that cannot be safe loses nothing: the harness does not see what it is for")
	}
	for _, l := range lost {
		if !strings.HasPrefix(l.err.Error(), "naive: ") {
			t.Errorf("beside the naive format: %v", l)
		}
	}
}
