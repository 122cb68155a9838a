//go:build linux

package powercut

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
)

// plainExt4 has no journal and goes on after errors: with one, the first metadata
// write that fails makes the filesystem read-only, and there were no more to see.
var plainExt4 = lowerKind{"ext4", 96 << 20, []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "2048", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0"}, "errors=continue"}

// uncertainFile is a file on a disk that fails: what was acknowledged is sure, and
// beside it each byte may be what any later write has left that has failed.
type uncertainFile struct {
	name string
	fd   int
	rand *rand.Rand
	sure []byte
	when []uint64 // by byte: the write, as its tag, that sure is of
	open []fileOp // writes that failed, or whose sync did
	tag  uint64

	acked, failed, retried int
}

const uncertainLength = 256 << 10

// step writes a piece and syncs. It fails as the disk does; no other way.
func (f *uncertainFile) step() error {
	off := f.rand.Int64N(uncertainLength - 1)
	o := fileOp{kind: opWrite, off: off, n: min(f.rand.Int64N(30_000)+1, uncertainLength-off)}
	f.tag++
	o.tag = f.tag
	return f.write(o)
}

func (f *uncertainFile) write(o fileOp) error {
	b := make([]byte, o.n)
	pattern(b, o.tag, o.off)
	n, err := unix.Pwrite(f.fd, b, o.off)
	if err == nil && n < len(b) {
		err = unix.EIO // a short write is a failure whose cause the next call would tell
	}
	if err == nil {
		err = unix.Fdatasync(f.fd)
	}
	if err != nil {
		f.open = append(f.open, o)
		f.failed++
		return err
	}
	f.acked++
	copy(f.sure[o.off:], b)
	for i := o.off; i < o.off+o.n; i++ {
		f.when[i] = o.tag
	}
	return nil
}

// retry repeats what has failed last, as an application would; the disk works.
func (f *uncertainFile) retry() error {
	if len(f.open) == 0 {
		return nil
	}
	// What failed unnoticed by a call of ours is told by this sync, once.
	told := unix.Fdatasync(f.fd)
	if again := unix.Fdatasync(f.fd); again != nil {
		return fmt.Errorf("sync says %v, and then again %v", told, again)
	}
	o := f.open[len(f.open)-1]
	f.tag++
	o.tag = f.tag
	f.retried++
	return f.write(o)
}

// verify reads the file: nothing may be an error, nothing else than written.
func (f *uncertainFile) verify(dir string) error {
	got, err := os.ReadFile(filepath.Join(dir, f.name))
	if err != nil {
		return err
	}
	if len(got) != uncertainLength {
		return fmt.Errorf("%s: %d bytes", f.name, len(got))
	}
	if bytes.Equal(got, f.sure) {
		return nil
	}
	fine := make([]bool, len(got))
	image := make([]byte, uncertainLength)
	for _, o := range f.open {
		pattern(image[:o.n], o.tag, o.off)
		for i := o.off; i < o.off+o.n; i++ {
			fine[i] = fine[i] || o.tag > f.when[i] && got[i] == image[i-o.off]
		}
	}
	for i := range got {
		if got[i] != f.sure[i] && !fine[i] {
			return fmt.Errorf("%s at %d: %#02x, neither acknowledged nor of %d writes that failed", f.name, i, got[i], len(f.open))
		}
	}
	return nil
}

// faultyVolume is a volume on a disk that can be made to fail.
type faultyVolume struct {
	t      *testing.T
	disk   *disk
	lower  string // where its filesystem is mounted
	faults *counters
	view   sealed
	files  []*uncertainFile
}

// fill makes files and sees to it that they are on the disk.
func (v *faultyVolume) fill(dir string, count int) {
	v.t.Helper()
	for i := range count {
		f := &uncertainFile{name: fmt.Sprint("file-", i), rand: rand.New(rand.NewPCG(uint64(i), 7)), sure: make([]byte, uncertainLength), when: make([]uint64, uncertainLength)}
		var err error
		if f.fd, err = unix.Open(filepath.Join(dir, f.name), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600); err != nil {
			v.t.Fatal(err)
		}
		f.tag++
		if err := f.write(fileOp{kind: opWrite, n: uncertainLength, tag: f.tag}); err != nil {
			v.t.Fatal(err)
		}
		v.files = append(v.files, f)
	}
	if err := syncPath(dir); err != nil {
		v.t.Fatal(err)
	}
}

// fail has the disk fail while all files are written side by side, and a reader
// reads: what it gets is right or an error of the disk's.
func (v *faultyVolume) fail(dir string, length time.Duration) {
	v.t.Helper()
	v.faults.failReads.Store(500) // the kernel reads a page once more by itself when reading ahead has failed
	v.faults.failWrites.Store(100)
	v.faults.slow.Store(50)
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	var working sync.WaitGroup
	for _, f := range v.files {
		working.Go(func() {
			for ctx.Err() == nil {
				if err := f.step(); err != nil && !errors.Is(err, unix.EIO) {
					v.t.Errorf("%s: %v, which is not what the disk says", f.name, err)
					return
				}
			}
		})
	}
	var refused atomic.Int64
	working.Go(func() {
		b := make([]byte, uncertainLength)
		for ctx.Err() == nil || refused.Load() == 0 && !v.t.Failed() {
			v.forgetLower()
			for _, f := range v.files {
				_ = unix.Fadvise(f.fd, 0, 0, unix.FADV_DONTNEED)
				switch _, err := unix.Pread(f.fd, b, 0); {
				case errors.Is(err, unix.EIO):
					refused.Add(1)
				case err != nil:
					v.t.Errorf("read of %s: %v", f.name, err)
				}
			}
		}
	})
	working.Wait()
	v.faults.failReads.Store(0)
	v.faults.failWrites.Store(0)
	v.faults.slow.Store(0)
	v.t.Logf("the disk has failed %d requests; %d reads of files failed", v.faults.failed.Load(), refused.Load())
}

// forgetLower has the kernel forget what it has cached of the lower files, or none
// of them would be read from the disk.
func (v *faultyVolume) forgetLower() {
	names, err := filepath.Glob(below(v.lower) + "/*")
	if err != nil {
		v.t.Error(err)
	}
	for _, name := range names {
		if f, err := os.Open(name); err == nil { // EIO: the disk fails
			_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
			f.Close()
		}
	}
}

// mend retries everything on the disk that works again, and verifies.
func (v *faultyVolume) mend(dir, when string) {
	v.t.Helper()
	var acked, failed, retried int
	for _, f := range v.files {
		if err := f.retry(); err != nil {
			v.t.Errorf("%s: the disk works again, and %s: %v", when, f.name, err)
		}
		if err := f.verify(dir); err != nil {
			v.t.Errorf("%s: %v", when, err)
		}
		acked, failed, retried = acked+f.acked, failed+f.failed, retried+f.retried
	}
	v.t.Logf("%s: %d writes acknowledged, %d failed, %d retried", when, acked, failed, retried)
	if acked < len(v.files)*10 || failed == 0 || retried == 0 {
		v.t.Errorf("%s: too little has failed, or too much", when)
	}
}

// TestFaultyDisk runs a volume on a disk that fails reads and writes at random and
// is late at others: no call fails but with the disk's error, what was acknowledged
// stays, what failed is old or new, and once the disk works everything does, for
// the byokd that has seen the faults and for the next.
func TestFaultyDisk(t *testing.T) {
	requireDisks(t)
	k := newTestKey(t)
	for _, cache := range []fs.CacheMode{fs.Writeback, fs.Writethrough} {
		t.Run(cache.String(), func(t *testing.T) {
			b, err := newBench(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			v := &faultyVolume{t: t, view: sealed{k, cache, t.TempDir()}}
			if err := b.faulty(v); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// faulty makes the volume, lets the disk fail under it, and mounts it anew.
func (b bench) faulty(v *faultyVolume) (err error) {
	if v.disk, err = startDisk(b.disk, append(v.view.mounts(), b.dir), plainExt4.size); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.disk.stop(), v.disk.close()) }()
	v.lower, v.faults = b.dir, countersOf(v.disk.head)
	backing, err := os.OpenFile(b.disk+"/"+diskName, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, backing.Close()) }()
	loop, err := attach(backing, unix.LO_FLAGS_DIRECT_IO|unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.detach()) }()
	if err := plainExt4.format(loop.path); err != nil {
		return err
	}
	made := false
	during := func(work func(dir string)) (err error) {
		if err := plainExt4.mount(loop.path, b.dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unmount(b.dir)) }()
		if !made {
			made = true
			if err := v.view.create(b.dir); err != nil {
				return err
			}
		}
		dir, closeView, err := v.view.open(b.dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, closeView()) }()
		work(dir)
		return nil
	}
	err = during(func(dir string) {
		v.fill(dir, 4)
		for round := range 2 {
			v.fail(dir, 3*time.Second)
			v.mend(dir, fmt.Sprint("round ", round))
		}
		for _, f := range v.files {
			unix.Close(f.fd)
		}
	})
	if err != nil {
		return err
	}
	return during(func(dir string) {
		for _, f := range v.files {
			if err := f.verify(dir); err != nil {
				v.t.Errorf("mounted anew: %v", err)
			}
		}
	})
}
