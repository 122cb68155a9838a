package fs

import (
	"sync"

	"golang.org/x/sys/unix"
)

// dirtyBlocks tells which blocks of a lower file may be dirty in the lower page
// cache, or under writeback from there.
//
// A page under writeback must not change, or the device reads a mixture of two
// sealings (lower.go). Nobody but this process dirties the pages of a lower
// file, and it does so only by writing a block through the page cache. So a block
// that was not written since a sync that has succeeded is clean; a clean page
// does not go under writeback, and may be written through the page cache. Any
// other block is rewritten with O_DIRECT, which waits for its page.
//
// Blocks are looked up, written and noted under the block range lock of who
// writes them, or with node.content held alone.
//
// Of its three states it is in one:
//
//   - ignorant (neither known nor learning), as the zero value is and whatever was
//     lost: every block is taken for dirty, and none is noted;
//   - learning: the same, but blocks are noted, for a sync is under way whose
//     success will make it know;
//   - knowing: what is in neither set is clean.
//
// It comes to know by a sync (begin, end), by asking the kernel (ask), or because
// the file is new (fresh); a sync that fails and sets that grow too large (lose)
// take it back to ignorance.
type dirtyBlocks struct {
	untracked bool // always ignorant, where tracksBlocks says no; fixed before the first use

	mu       sync.Mutex
	known    bool // blocks in neither set are clean
	asked    bool // the kernel was asked what is dirty since the file was opened
	learning bool // a sync is under way that will tell: what was written since it began is all in written

	// Sets of blocks, 64 to a key. flushing is what was written before the sync
	// that is under way began.
	written, flushing map[int64]uint64
}

// dirtyKeys bounds the sets: about 0.7 MB, and 64 MiB of the most scattered
// writes.
const dirtyKeys = 1 << 14

// run returns how many blocks, from first to last at most, are like the first:
// all clean or all perhaps dirty. Blocks from end on do not exist and are clean:
// cutting a file waits for the writeback of its pages.
func (d *dirtyBlocks) run(first, last, end int64) (length int64, dirty bool) {
	if first >= end {
		return last - first + 1, false
	}
	last = min(last, end-1)
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.known {
		return last - first + 1, true
	}
	dirty = d.has(first)
	for i := first + 1; i <= last; i++ {
		if i%64 == 0 && i+63 <= last && d.bits(i/64) == 0 {
			if dirty {
				return i - first, true
			}
			i += 63
			continue
		}
		if d.has(i) != dirty {
			return i - first, dirty
		}
	}
	return last - first + 1, dirty
}

func (d *dirtyBlocks) bits(key int64) uint64 { return d.written[key] | d.flushing[key] }

func (d *dirtyBlocks) has(index int64) bool { return d.bits(index/64)&(1<<(index%64)) != 0 }

// note says that blocks were written through the page cache. It reports whether
// the sets had to be given up: a sync makes them known again.
func (d *dirtyBlocks) note(first, last int64) (lost bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.known && !d.learning {
		return false
	}
	if d.written == nil {
		d.written = map[int64]uint64{}
	}
	for i := first; i <= last; {
		to := min(last, i|63)
		d.written[i/64] |= ^uint64(0) >> (63 - (to - i)) << (i % 64)
		i = to + 1
	}
	if len(d.written)+len(d.flushing) <= dirtyKeys {
		return false
	}
	d.lose()
	return true
}

// lose gives up what is known; mu is held.
func (d *dirtyBlocks) lose() {
	d.known, d.learning, d.written, d.flushing = false, false, nil, nil
}

// begin is called before a sync of the lower file, and end after it. They come one
// at a time (node.settling).
func (d *dirtyBlocks) begin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.learning = !d.untracked
	d.written, d.flushing = nil, d.written
}

func (d *dirtyBlocks) end(succeeded bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !succeeded:
		d.lose()
	case d.learning:
		d.known, d.learning, d.flushing = true, false, nil
	}
}

// fresh says that the lower file was just made: all of it is clean.
func (d *dirtyBlocks) fresh() {
	d.mu.Lock()
	d.lose()
	d.known = !d.untracked
	d.mu.Unlock()
}

// forget is called when the lower file is closed, so that the sets' memory is
// that of open files only.
func (d *dirtyBlocks) forget() {
	d.mu.Lock()
	d.lose()
	d.asked = false
	d.mu.Unlock()
}

// ask asks the kernel, once after the file was opened, whether anything of it is
// dirty. Those who write meanwhile take every block for dirty, and so dirty none.
func (d *dirtyBlocks) ask(fd int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known || d.asked || d.untracked {
		return
	}
	d.asked = true
	var all unix.CachestatRange // length 0: to the end
	var pages unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &all, &pages, 0); err == nil && pages.Dirty == 0 && pages.Writeback == 0 {
		d.known = true
	}
}
