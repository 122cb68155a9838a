package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/internal/volumeread"
)

// churn changes a volume in every way that a check could take for damage, until stop is called.
func churn(t *testing.T, mount string) (rounds *atomic.Int64, stop func()) {
	t.Helper()
	rounds = new(atomic.Int64)
	var over atomic.Bool
	var working sync.WaitGroup
	for i, work := range []func(dir string, r *rand.Rand) error{rewrite, resize, replaceNames} {
		dir := filepath.Join(mount, fmt.Sprintf("churn-%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		working.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for !over.Load() {
				if err := work(dir, r); err != nil {
					t.Error(err)
					return
				}
				rounds.Add(1)
			}
		})
	}
	return rounds, func() { over.Store(true); working.Wait() }
}

// rewrite seals the same few blocks anew, buffered and past the cache.
func rewrite(dir string, r *rand.Rand) error {
	f, err := os.OpenFile(dir+"/hot", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for range 20 {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(r.Uint32())}, 30_000), r.Int64N(100_000)); err != nil {
			return err
		}
	}
	if r.IntN(2) == 0 {
		return f.Sync()
	}
	return nil
}

// resize lets a file grow and shrink.
func resize(dir string, r *rand.Rand) error {
	f, err := os.OpenFile(dir+"/size", os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte{1}, 1+r.IntN(50_000))); err != nil {
		return err
	}
	return f.Truncate(r.Int64N(150_000))
}

// replaceNames lets names come and go, and be of another kind the next time.
func replaceNames(dir string, r *rand.Rand) error {
	name := fmt.Sprintf("%s/name-%d", dir, r.IntN(4))
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	switch r.IntN(4) {
	case 0:
		return os.Mkdir(name, 0o755)
	case 1:
		return os.Symlink("to/somewhere", name)
	case 2:
		if err := os.WriteFile(name+".new", bytes.Repeat([]byte{2}, r.IntN(20_000)), 0o600); err != nil {
			return err
		}
		if err := unix.Setxattr(name+".new", "user.note", []byte("remember"), 0); err != nil {
			return err
		}
		return os.Rename(name+".new", name)
	default:
		return os.WriteFile(name, []byte("short"), 0o600)
	}
}

// checkServed has a running byokd check its volume.
func checkServed(t *testing.T, socket string) (code int, r checkReport, errs string) {
	t.Helper()
	code, out, errs := byokd(t, nil, "check", "--socket", socket, "-o", "json")
	if out != "" {
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
	}
	return code, r, errs
}

// TestCheckServed checks a volume while it is written to, frozen and thawed: nothing sound is called damaged, what
// is damaged is told, and everything goes on.
func TestCheckServed(t *testing.T) {
	needMounts(t)
	setTenant(t)
	s := newSite(t)
	socket, _ := s.withSocket(t, nil)
	p := s.start(t)
	p.awaitState(t, exitOK)
	quiet := bytes.Repeat([]byte("quiet"), 2000)
	if err := os.WriteFile(s.mount+"/quiet", quiet, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := byokd(t, nil, "freeze", "--quiesce", "--socket", socket); code != exitOK { // so that it is on the disk
		t.Fatal(errs)
	}
	if code, _, errs := checkServed(t, socket); code != exitFrozen || !strings.Contains(errs, "byokd thaw --socket "+socket) {
		t.Errorf("while frozen: %d %s", code, errs)
	}
	if code, _, errs := byokd(t, nil, "thaw", "--socket", socket); code != exitOK {
		t.Fatal(errs)
	}
	target := lowerOfSize(t, s.lower, int64(len(quiet))) // while no other file can have its size
	rounds, stop := churn(t, s.mount)
	checks, files := 0, int64(0)
	sound := func() {
		t.Helper()
		code, r, errs := checkServed(t, socket)
		if code != exitOK || !r.Sound || !r.Served || !r.Complete || r.Files < 1 || r.Bytes < int64(len(quiet)) {
			t.Errorf("%d %+v %s", code, r, errs)
		}
		checks, files = checks+1, files+r.Files
	}
	for before := rounds.Load(); rounds.Load() < before+2000 && !t.Failed(); {
		sound()
	}
	// The configuration finds the socket, and a person is told, too.
	if code, out, errs := byokd(t, nil, "check", s.lower, "--config", s.config); code != exitOK || !strings.Contains(out, "is sound") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	// Freezes amid checks: one that has begun waits and ends after the thaw, one that begins later is refused.
	var freezing sync.WaitGroup
	var frozen atomic.Bool
	freezing.Go(func() {
		for range 3 {
			if err := s.kms.Disable(s.arn); err != nil {
				t.Error(err)
			}
			p.awaitState(t, exitFrozen)
			if err := s.kms.Enable(s.arn); err != nil {
				t.Error(err)
			}
			p.awaitState(t, exitOK)
		}
		frozen.Store(true)
	})
	for !frozen.Load() && !t.Failed() {
		if code, r, errs := checkServed(t, socket); code != exitFrozen && (code != exitOK || !r.Sound) {
			t.Errorf("amid freezes: %d %+v %s", code, r, errs)
		}
	}
	freezing.Wait()
	sound()

	flip(t, target, seal.BlockSize+100)
	code, r, errs := checkServed(t, socket)
	want := volumeread.Fault{Path: "quiet", Offset: seal.BlockStart(1), Length: seal.BlockPayload, Reason: volumeread.Damaged}
	if len(r.Faults) != 1 || code != exitDamaged || r.Sound || !r.Complete {
		t.Fatalf("%d %+v %s", code, r, errs)
	}
	got := r.Faults[0]
	want.Lower, want.Detail = got.Lower, got.Detail
	if got.Fault != want || got.Lower == "" || got.Detail == "" || got.Next == "" {
		t.Errorf("%+v instead of %+v", got, want)
	}
	stop()
	t.Logf("%d checks of %d files beside %d rounds of changes; in the last %d names had gone", checks, files, rounds.Load(), r.Changed)

	if code, _, errs := byokd(t, nil, "check", "--socket", socket, "--config", s.config); code != exitUsage || !strings.Contains(errs, "leave") {
		t.Errorf("%d %s", code, errs)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if code, _, errs := checkServed(t, socket); code != exitNoAnswer {
		t.Errorf("nobody there: %d %s", code, errs)
	}
}

// mending is a server of a volume in which one block is half written until its writer is waited for.
type mending struct {
	t    *testing.T
	path string
	at   int64
	held int // how often writers were held off
}

// Still implements volumeread.Server.
func (m *mending) Still(_ int, first, last int64, read func()) error {
	if m.held++; m.at/seal.BlockSize >= first && m.at/seal.BlockSize <= last {
		flip(m.t, m.path, m.at)
		m.at = -seal.BlockSize
	}
	read()
	return nil
}

// TestCheckLooksAgain: a block of a volume in use that does not open is looked at again while its writers are held
// off. What opens then was never damaged; what does not is.
func TestCheckLooksAgain(t *testing.T) {
	s := newVolumeSite(t, ownershipAuto)
	target := s.lowerOf(t, 40_000)
	m := &mending{t: t, path: target, at: 3*seal.BlockSize + 100}
	flip(t, target, m.at)
	flip(t, target, 5*seal.BlockSize+100)
	from := keySource{file: s.config}
	if err := from.load(nil, io.Discard); err != nil {
		t.Fatal(err)
	}
	v, err := volumeread.OpenServed(s.lower, m)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := unlockOffline(t.Context(), v, &from); err != nil {
		t.Fatal(err)
	}
	check := newVolumeCheck(s.lower, v, func(int64) {})
	if err := check.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := check.report
	if m.held == 0 || len(r.Faults) != 1 || r.FaultCount != 1 || r.Faults[0].Offset != seal.BlockStart(5) || r.Faults[0].Length != seal.BlockPayload || r.FaultyBytes != seal.BlockPayload {
		t.Errorf("writers were held off %d times; %+v", m.held, r)
	}
}
