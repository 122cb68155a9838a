package fs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
)

// lowerWrites counts writes of lower files, fails one, and holds the first.
type lowerWrites struct {
	fails   int32 // which, from 1; 0 for none
	n       atomic.Int32
	arrived chan struct{} // closed when the first is held
	release chan struct{}

	mu      sync.Mutex
	lengths []int // as asked for
}

func (w *lowerWrites) fault(op string, length int) (int, error) {
	if op != "write" {
		return length, nil
	}
	w.mu.Lock()
	w.lengths = append(w.lengths, length)
	w.mu.Unlock()
	n := w.n.Add(1)
	if n == 1 {
		close(w.arrived)
		<-w.release
	}
	if n == w.fails {
		return 0, unix.EIO
	}
	return length, nil
}

// flushTwo writes 2 MiB, which the kernel flushes in two WRITEs: the second comes while
// the first is being stored. It returns what was written and the error of the fsync.
func flushTwo(t *testing.T, v *volume, f *os.File, w *lowerWrites) ([]byte, error) {
	t.Helper()
	const half = 1 << 20
	content := make([]byte, 2*half)
	rand.NewChaCha8([32]byte{1}).Read(content)
	flush := func(off int64) {
		if _, err := f.WriteAt(content[off:off+half], off); err != nil {
			t.Fatal(err)
		}
		if err := unix.SyncFileRange(int(f.Fd()), off, half, unix.SYNC_FILE_RANGE_WRITE); err != nil {
			t.Fatal(err)
		}
	}
	flush(0)
	<-w.arrived
	flush(half)
	s := v.fs.seams
	await(t, func() string { return "the second WRITE did not come" }, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for place, met := range s.at {
			if place.off == half && met.first && met.second {
				return true
			}
		}
		return false
	})
	close(w.release)
	return content, f.Sync()
}

// noSeams: what no write is at is forgotten.
func (v *volume) noSeams() {
	v.t.Helper()
	v.fs.seams.mu.Lock()
	defer v.fs.seams.mu.Unlock()
	if left := len(v.fs.seams.at); left != 0 {
		v.t.Errorf("%d seams are left", left)
	}
}

// TestSharedBlockIsStoredOnce: of two pieces of a flush that share a block the second
// stores it, for both; where it cannot, the first does; where the first cannot, the
// second has its own.
func TestSharedBlockIsStoredOnce(t *testing.T) {
	const half = 1 << 20
	shared, _ := seal.BlockAt(half)
	end, _ := seal.BlockAt(2*half - 1)
	first, second := int(shared)*block, int(end-shared)*block // and a last block apart, which nobody shares
	for _, c := range []struct {
		name    string
		fails   int32
		lengths []int
		from    int // what has to be there of the content
		to      int
	}{
		{"stored", 0, []int{first, second, block}, 0, 2 * half},
		{"the first fails", 1, []int{first, block, second, block}, half, 2 * half}, // a file has a first block
		{"the second fails", 2, []int{first, second, block}, 0, half},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVolume(t, Options{Cache: Writeback})
			w := &lowerWrites{fails: c.fails, arrived: make(chan struct{}), release: make(chan struct{})}
			v.setFault(w.fault)
			f := v.create("f")
			content, err := flushTwo(t, v, f, w)
			if failed := c.fails != 0; failed != errors.Is(err, unix.EIO) || err != nil && !failed {
				t.Errorf("fsync: %v", err)
			}
			w.mu.Lock()
			lengths := fmt.Sprint(w.lengths)
			w.mu.Unlock()
			if lengths != fmt.Sprint(c.lengths) {
				t.Errorf("lower writes of %s bytes, want %v", lengths, c.lengths)
			}
			v.noSeams()
			v.dropPages(f)
			got := make([]byte, c.to-c.from)
			if _, err := f.ReadAt(got, int64(c.from)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content[c.from:c.to]) {
				t.Error("what was written is not there")
			}
		})
	}
}

// TestFlushesOfGrowingFiles: files that grow by pieces of any size, synced now and then and
// overwritten in part, hold what was written.
func TestFlushesOfGrowingFiles(t *testing.T) {
	const files, size = 4, 24 << 20
	v := newVolume(t, Options{Cache: Writeback})
	var all sync.WaitGroup
	contents := make([][]byte, files)
	for i := range contents {
		f := v.create(fmt.Sprint(i))
		all.Go(func() {
			var err error
			if contents[i], err = growAtRandom(f, size, uint64(i)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	v.noSeams()
	v.remount()
	for i, want := range contents {
		got, err := os.ReadFile(v.path(fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("file %d is not what was written to it", i)
		}
	}
}

// growAtRandom writes to a file until it has size bytes, and returns what it holds.
func growAtRandom(f *os.File, size int, seed uint64) ([]byte, error) {
	r := rand.New(rand.NewPCG(seed, 0))
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(content)
	for at := 0; at < size; {
		to := min(size, at+1+r.IntN(3<<20))
		if _, err := f.WriteAt(content[at:to], int64(at)); err != nil {
			return nil, err
		}
		at = to
		var err error
		switch r.IntN(8) {
		case 0:
			err = f.Sync()
		case 1, 2:
			err = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
		case 3: // what may be on its way
			from := r.IntN(at)
			part := content[from:min(at, from+1+r.IntN(8<<10))]
			for i := range part {
				part[i]++
			}
			_, err = f.WriteAt(part, int64(from))
		}
		if err != nil {
			return nil, err
		}
	}
	return content, f.Sync()
}
