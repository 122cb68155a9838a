package fs

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDirtyBlocks compares with a model: random writes, syncs that overlap them,
// failures and closings. What the model takes for dirty must be; where all is
// known, nothing else is.
func TestDirtyBlocks(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	const blocks = 400
	var d dirtyBlocks
	d.fresh()
	dirty, covered := map[int64]bool{}, map[int64]bool{} // covered by the sync under way
	known, syncing := true, false
	for step := range 20_000 {
		switch k := r.IntN(100); {
		case k < 60:
			first := r.Int64N(blocks)
			last := min(blocks-1, first+r.Int64N(1+r.Int64N(200)))
			d.note(first, last)
			for i := first; i <= last; i++ {
				dirty[i] = true
				delete(covered, i)
			}
		case k < 90 && !syncing:
			d.begin()
			syncing = true
			for i := range dirty {
				covered[i] = true
			}
		case k < 90:
			d.end(true)
			syncing, known = false, true
			for i := range covered {
				delete(dirty, i)
			}
			clear(covered)
		case k < 93 && syncing:
			d.end(false)
			syncing, known = false, false
			clear(covered)
		}
		if syncing && !known {
			continue // what it will know is seen at its end
		}
		end := r.Int64N(blocks + 1)
		for at := int64(0); at < blocks; {
			length, got := d.run(at, blocks-1, end)
			if length < 1 {
				t.Fatalf("step %d: a run of %d", step, length)
			}
			for i := at; i < at+length; i++ {
				want := i < end && (!known || dirty[i])
				if got != want {
					t.Fatalf("step %d: block %d: dirty %t, want %t", step, i, got, want)
				}
			}
			at += length
		}
	}
}

// TestDirtyBlocksGivesUp: the sets are bounded; a sync makes them known again.
func TestDirtyBlocksGivesUp(t *testing.T) {
	var d dirtyBlocks
	d.fresh()
	lost := 0
	for i := range int64(3 * dirtyKeys) {
		if d.note(i*64, i*64) {
			lost++
		}
	}
	if lost != 1 || d.count() != -1 {
		t.Fatalf("gave up %d times, %d blocks known as dirty", lost, d.count())
	}
	d.begin()
	d.note(7, 9)
	d.end(true)
	if n := d.count(); n != 3 {
		t.Fatalf("after a sync %d blocks are dirty, want those written meanwhile: 3", n)
	}
}

// TestDirtyBlocksAsksTheKernel: a file that was opened is known to be clean when
// the kernel says so, and is not while something of it is dirty.
func TestDirtyBlocksAsksTheKernel(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !tracksBlocks(int(f.Fd())) {
		t.Skip("not a filesystem that tracks dirty blocks")
	}
	if _, err := f.Write(make([]byte, 16*block)); err != nil {
		t.Fatal(err)
	}
	var all unix.CachestatRange
	var pages unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &all, &pages, 0); err != nil {
		t.Skipf("cachestat: %v", err)
	}
	var d dirtyBlocks
	if pages.Dirty+pages.Writeback > 0 { // the kernel's flusher may have been quicker
		d.ask(int(f.Fd()))
		if d.count() != -1 {
			t.Fatal("a file with dirty pages is taken for clean")
		}
	}
	d.forget()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	d.ask(int(f.Fd()))
	if d.count() != 0 {
		t.Fatal("a file that was synced is not taken for clean")
	}
}

// count is how many blocks are taken for dirty, -1 for all.
func (d *dirtyBlocks) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.known {
		return -1
	}
	n := 0
	for _, b := range d.written {
		n += bits.OnesCount64(b)
	}
	for key, b := range d.flushing {
		n += bits.OnesCount64(b &^ d.written[key])
	}
	return n
}

// TestRewritesWhereBlocksAreNotTracked: where the lower filesystem may write back a clean
// block with its neighbours, every rewrite is O_DIRECT, also of a file that was just
// made, or synced.
func TestRewritesWhereBlocksAreNotTracked(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	v.fs.nodes.mu.Lock() // nodes are made under it
	v.fs.nodes.untracked = true
	v.fs.nodes.mu.Unlock()
	for _, synced := range []bool{false, true} {
		name := v.path(fmt.Sprint("synced ", synced))
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(make([]byte, 10*block)); err != nil {
			t.Fatal(err)
		}
		if synced {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.WriteAt([]byte("again"), 5*block); err != nil {
			t.Fatal(err)
		}
		for _, n := range v.fs.nodes.all() {
			if n.opens.Load() > 0 && n.file.direct.Load() == 0 && !v.fs.stable {
				t.Errorf("synced %t: a block was rewritten through the page cache", synced)
			}
		}
		f.Close()
	}
}
