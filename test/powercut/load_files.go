//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// fileLoad works on one file, an operation after the other, and makes it durable
// now and then.
type fileLoad struct {
	model
	title string
	flags int // of open(2), beside O_RDWR
	step  func(f *openFile) error
	limit int64 // the file does not grow beyond
}

// openFile is the file at work.
type openFile struct {
	*fileLoad
	fd   int
	size int64
	rand *rand.Rand
	now  func() int
	tag  uint64
}

func (l *fileLoad) name() string { return l.title }

func (l *fileLoad) run(ctx context.Context, w *world) error {
	fd, err := l.create(w)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	f := &openFile{fileLoad: l, fd: fd, rand: w.rand, now: w.now}
	for ctx.Err() == nil {
		if err := l.step(f); err != nil {
			return err
		}
	}
	return nil
}

// create makes the file and its name durable.
func (l *fileLoad) create(w *world) (int, error) {
	fd, err := unix.Open(w.dir+"/file", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|l.flags, 0o600)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(unix.Fsync(fd), syncPath(w.dir)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	l.acknowledge(w.now(), 0)
	return fd, nil
}

func (l *fileLoad) check(dir string, cut int) error {
	acked, later, ok := l.at(cut)
	got, err := os.ReadFile(dir + "/file")
	if err != nil && (ok || !errors.Is(err, os.ErrNotExist)) {
		return err
	}
	if !ok {
		return nil
	}
	return compare(got, acked, later)
}

func (f *openFile) write(off, n int64) error {
	f.tag++
	b := make([]byte, n)
	pattern(b, f.tag, off)
	f.begin(fileOp{kind: opWrite, begin: f.now(), off: off, n: n, tag: f.tag})
	for done := 0; done < len(b); {
		got, err := unix.Pwrite(f.fd, b[done:], off+int64(done))
		if err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
		}
		done += got
	}
	f.end()
	f.size = max(f.size, off+n)
	return nil
}

func (f *openFile) truncate(size int64) error {
	f.begin(fileOp{kind: opResize, begin: f.now(), n: size})
	if err := unix.Ftruncate(f.fd, size); err != nil {
		return fmt.Errorf("truncate to %d: %w", size, err)
	}
	f.end()
	f.size = size
	return nil
}

func (f *openFile) fallocate(mode uint32, off, n int64) error {
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		f.begin(fileOp{kind: opZero, begin: f.now(), off: off, n: n})
	}
	grows := mode&unix.FALLOC_FL_KEEP_SIZE == 0 && off+n > f.size
	if grows {
		f.begin(fileOp{kind: opResize, begin: f.now(), n: off + n})
	}
	if err := unix.Fallocate(f.fd, mode, off, n); err != nil {
		return fmt.Errorf("fallocate mode %d of %d at %d: %w", mode, n, off, err)
	}
	f.end()
	if grows {
		f.size = off + n
	}
	return nil
}

func (f *openFile) sync() error {
	covers := f.returned()
	call := unix.Fdatasync
	if f.rand.IntN(4) == 0 {
		call = unix.Fsync
	}
	if err := call(f.fd); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	f.acknowledge(f.now(), covers)
	return nil
}

// perhapsSync leaves some operations unacknowledged for a while.
func (f *openFile) perhapsSync(oneIn int) error {
	if f.rand.IntN(oneIn) > 0 {
		return nil
	}
	return f.sync()
}

func (f *openFile) upTo(n int64) int64 { return f.rand.Int64N(n) + 1 }

// start over when the file has reached its limit.
func (f *openFile) restart() error {
	if f.size < f.limit {
		return nil
	}
	return errors.Join(f.truncate(0), f.sync())
}

// fileLoads are the workloads on single files.
func fileLoads() []workload {
	return []workload{
		&fileLoad{title: "journal", limit: 512 << 10, step: func(f *openFile) error {
			return errors.Join(f.restart(), f.write(f.size, f.upTo(3000)), f.sync())
		}},
		&fileLoad{title: "journal-dsync", flags: unix.O_DSYNC, limit: 256 << 10, step: func(f *openFile) error {
			if err := errors.Join(f.restart(), f.write(f.size, f.upTo(700))); err != nil {
				return err
			}
			f.acknowledge(f.now(), f.returned())
			return nil
		}},
		&fileLoad{title: "append", limit: 1 << 20, step: func(f *openFile) error {
			return errors.Join(f.restart(), f.write(f.size, f.upTo(20000)), f.perhapsSync(5))
		}},
		&fileLoad{title: "overwrite", step: func(f *openFile) error {
			if f.size == 0 {
				return errors.Join(f.write(0, 300_000), f.sync())
			}
			return errors.Join(f.write(f.rand.Int64N(290_000), f.upTo(10_000)), f.perhapsSync(4))
		}},
		&fileLoad{title: "truncate", limit: 400_000, step: func(f *openFile) error {
			if f.rand.IntN(2) == 0 {
				return errors.Join(f.restart(), f.write(f.size, f.upTo(12_000)), f.perhapsSync(2))
			}
			return errors.Join(f.truncate(f.rand.Int64N(f.size+8000)), f.perhapsSync(3))
		}},
		&fileLoad{title: "holes", step: holes},
		&mappedLoad{},
		&groupCommit{},
	}
}

// holes makes a sparse file: with all modes of fallocate that byokd takes.
func holes(f *openFile) error {
	const span = 300_000
	off, n := f.rand.Int64N(span), f.upTo(30_000)
	var err error
	switch f.rand.IntN(7) {
	case 0, 1:
		err = f.write(off, n)
	case 2:
		err = f.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	case 3:
		err = f.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	case 4:
		err = f.fallocate(unix.FALLOC_FL_KEEP_SIZE, off, n)
	case 5:
		err = f.fallocate(0, off, n)
	default:
		err = f.truncate(off)
	}
	return errors.Join(err, f.perhapsSync(3))
}

// groupCommit appends in one thread and syncs in two others, so that a block is
// sealed anew while it is on its way to the disk.
type groupCommit struct {
	fileLoad
	// one is what the kernel does on a FUSE mount (inode_lock in fuse_fsync and
	// fuse_do_setattr): one fsync or truncate of a file at a time. So the control on
	// the bare filesystem has what byokd asks of it, and no more: syncs of a
	// growing file side by side lose on XFS, without byokd (docs/RELIABILITY.md).
	one sync.Mutex
}

func (*groupCommit) name() string { return "group-commit" }

func (l *groupCommit) run(ctx context.Context, w *world) error {
	fd, err := l.create(w)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var syncing sync.WaitGroup
	failed := make([]error, 3)
	for i := range 2 {
		syncing.Go(func() {
			for ctx.Err() == nil && failed[i] == nil {
				l.one.Lock()
				covers := l.returned()
				if failed[i] = unix.Fdatasync(fd); failed[i] == nil {
					l.acknowledge(w.now(), covers)
				}
				l.one.Unlock()
			}
		})
	}
	f := &openFile{fileLoad: &l.fileLoad, fd: fd, rand: w.rand, now: w.now}
	const longest = 256 << 10
	for ctx.Err() == nil && failed[2] == nil {
		if f.size > longest {
			l.one.Lock()
			failed[2] = f.truncate(0)
			l.one.Unlock()
		} else {
			failed[2] = f.write(f.size, f.upTo(400))
		}
	}
	cancel()
	syncing.Wait()
	return errors.Join(failed...)
}
