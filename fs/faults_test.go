package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
)

// trap makes one operation below fail: the k-th since it was armed.
type trap struct {
	left   atomic.Int64 // operations to let pass; below 0 it is not armed
	sprung atomic.Bool
	synced atomic.Bool // what failed was a sync
	what   string      // kind of fault
	err    error
}

func (p *trap) arm(k int) { p.synced.Store(false); p.sprung.Store(false); p.left.Store(int64(k)) }
func (p *trap) disarm()   { p.left.Store(-1) }

func (p *trap) fault(op string, length int) (int, error) {
	if p.what == "slow" {
		time.Sleep(time.Millisecond) // every operation
		return length, nil
	}
	if p.left.Load() < 0 || p.left.Add(-1) != -1 {
		return length, nil
	}
	p.sprung.Store(true)
	p.synced.Store(op == "sync")
	if p.err != nil {
		return 0, fmt.Errorf("%s: %w", op, p.err)
	}
	return max(length/3&^511, min(length, 512)), nil // short, and not at the edge of a block; O_DIRECT counts in sectors
}

func faults() []*trap {
	return []*trap{{what: "EIO", err: unix.EIO}, {what: "ENOSPC", err: unix.ENOSPC}, {what: "EDQUOT", err: unix.EDQUOT}, {what: "short"}, {what: "slow"}}
}

// change is one step of a file's life: what it does and what comes of it.
type change struct {
	name string
	do   func(f *os.File) error
	to   func(old []byte) []byte
}

func writeChange(off, n int, fill byte) change {
	data := bytes.Repeat([]byte{fill}, n)
	return change{fmt.Sprintf("write %d at %d", n, off), func(f *os.File) error {
		_, err := f.WriteAt(data, int64(off))
		return err
	}, func(old []byte) []byte {
		out := append(bytes.Clone(old), make([]byte, max(0, off+n-len(old)))...)
		copy(out[off:], data)
		return out
	}}
}

func truncateChange(size int) change {
	return change{fmt.Sprintf("truncate to %d", size), func(f *os.File) error { return f.Truncate(int64(size)) }, func(old []byte) []byte {
		return append(bytes.Clone(old[:min(size, len(old))]), make([]byte, max(0, size-len(old)))...)
	}}
}

func punchChange(off, n int) change {
	return change{fmt.Sprintf("punch %d at %d", n, off), func(f *os.File) error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	}, func(old []byte) []byte {
		out := bytes.Clone(old)
		clear(out[off:min(off+n, len(out))])
		return out
	}}
}

func lifeOfAFile() []change {
	const b = seal.BlockPayload
	return []change{
		writeChange(0, 100, 'a'), writeChange(100, 3*b, 'b'), writeChange(50, 10, 'c'), writeChange(b+7, 2*b, 'd'),
		writeChange(9*b, 500, 'e'), punchChange(b, 5*b), writeChange(3*b, 20, 'f'), truncateChange(4*b + 9), truncateChange(8 * b),
		writeChange(8*b-5, 40*b, 'g'), truncateChange(0), writeChange(2*b, 5, 'h'),
	}
}

// TestFaultsBelow fails every operation below in turn, in each step of a file's
// life: the step says so, or is not touched by it; the file is then old or new,
// byte for byte, and can be read; and the step succeeds when it is repeated.
func TestFaultsBelow(t *testing.T) {
	for _, p := range faults() {
		t.Run(p.what, func(t *testing.T) {
			v := newVolume(t, Options{Cache: Writethrough})
			p.disarm()
			v.setFault(p.fault)
			reported := 0
			for i := range lifeOfAFile() {
				for k := 0; ; k++ {
					told, sprung := failStep(t, v, p, fmt.Sprintf("%d-%d", i, k), i, k)
					if told {
						reported++
					}
					if !sprung {
						break
					}
				}
			}
			if p.err != nil && reported == 0 {
				t.Error("no fault was reported: the trap is not in the way")
			}
		})
	}
}

// failStep lives a file's life and springs the trap at the k-th operation below
// of step number.
func failStep(t *testing.T, v *volume, p *trap, name string, number, k int) (told, sprung bool) {
	t.Helper()
	f, err := os.OpenFile(v.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var content []byte
	for i, c := range lifeOfAFile() {
		next := c.to(content)
		if i == number {
			p.arm(k)
			err := c.do(f)
			p.disarm()
			sprung = p.sprung.Load()
			told = err != nil
			if told && (p.err == nil || !errors.Is(err, p.err)) {
				t.Errorf("%s, fault %d: %v, want %v", c.name, k, err, p.err)
			}
			if !told {
				content = next
			}
			oldOrNew(t, fmt.Sprintf("%s after fault %d", c.name, k), f, content, next)
		}
		if err := c.do(f); err != nil {
			t.Fatalf("%s, step %d with fault %d in step %d: %v", c.name, i, k, number, err)
		}
		content = next
		if i >= number {
			oldOrNew(t, c.name, f, content, content)
		}
	}
	if told && p.synced.Load() { // by a truncate, which is not who wrote
		if err := f.Sync(); !errors.Is(err, p.err) {
			t.Errorf("step %d: a sync of ours that failed is told by fsync as %v, want %v", number, err, p.err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Errorf("sync after all: %v", err)
	}
	return told, sprung
}

// oldOrNew reads the file, and fails when it is an error or a byte is neither.
func oldOrNew(t *testing.T, when string, f *os.File, old, next []byte) {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil { // not from the kernel's memory
		t.Fatal(err)
	}
	got := make([]byte, info.Size())
	if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("%s: %v", when, err)
		return
	}
	least, most := min(len(old), len(next)), max(len(old), len(next))
	if len(got) < least || len(got) > most+seal.BlockPayload {
		t.Errorf("%s: %d bytes, neither %d nor %d", when, len(got), len(old), len(next))
	}
	at := func(b []byte, i int) byte {
		if i < len(b) {
			return b[i]
		}
		return 0
	}
	for i, b := range got {
		if b != at(old, i) && b != at(next, i) {
			t.Errorf("%s: at %d of %d: %q, neither old %q nor new %q", when, i, len(got), b, at(old, i), at(next, i))
			return
		}
	}
}

// TestFaultsBelowWriteback: with the writeback cache a fault is told by fsync,
// once; what is written and synced again is there after a remount, and nothing
// is an error.
func TestFaultsBelowWriteback(t *testing.T) {
	for _, p := range faults() {
		t.Run(p.what, func(t *testing.T) {
			v := newVolume(t, Options{})
			p.disarm()
			v.setFault(p.fault)
			want := map[string][]byte{}
			for k := 0; ; k++ {
				name := fmt.Sprint(k)
				content, sprung := faultBeforeSync(t, v, p, name, k)
				want[name] = content
				if !sprung {
					break
				}
			}
			v.remount()
			for name, content := range want {
				got, err := os.ReadFile(v.path(name))
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("file %s after a remount: equal %v, %v", name, bytes.Equal(got, content), err)
				}
			}
			t.Logf("%d faults", len(want)-1)
		})
	}
}

func faultBeforeSync(t *testing.T, v *volume, p *trap, name string, k int) (content []byte, sprung bool) {
	t.Helper()
	f, err := os.OpenFile(v.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	second, err := os.OpenFile(v.path(name), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	steps := []change{writeChange(0, 50_000, 'a'), writeChange(20_000, 100, 'b'), writeChange(50_000, 10_000, 'c')}
	p.arm(k)
	failed := false
	for _, c := range steps {
		content = c.to(content)
		failed = c.do(f) != nil || failed
	}
	failed = f.Sync() != nil || failed
	p.disarm()
	if sprung = p.sprung.Load(); sprung && p.err == unix.EIO && !failed {
		t.Errorf("fault %d was not told", k)
	}
	if !failed {
		return content, sprung // mended (a full disk, by the reserve): it must be there all the same
	}
	_ = second.Sync() // it is told once, too, or was not touched
	for _, g := range []*os.File{f, second} {
		if err := g.Sync(); err != nil {
			t.Errorf("fault %d is told again: %v", k, err)
		}
	}
	content = nil
	for _, c := range steps {
		content = c.to(content)
		if err := c.do(f); err != nil {
			t.Errorf("%s again after fault %d: %v", c.name, k, err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Errorf("sync after fault %d: %v", k, err)
	}
	return content, sprung
}
