package fs

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// mappedUnlinked is what Zeebe does with a segment: mapped, renamed, unlinked, and
// still read, written and synced.
func mappedUnlinked(say func(string, ...any)) error {
	const size = 64 * pageSize
	fd, err := unix.Open("segment", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	say("allocate", unix.Fallocate(fd, 0, 0, size), shown("segment"))
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	page := func(i int) []byte { return m[i*pageSize:][:pageSize] }
	seen := func(i int) string {
		b := make([]byte, pageSize)
		n, err := unix.Pread(fd, b, int64(i)*pageSize)
		return digest(page(i)) + " " + digest(b[:max(n, 0)]) + said(err)
	}
	copy(page(3)[4000:], "stored before the rename")
	_, err = unix.Pwrite(fd, []byte("written beside"), 3*pageSize)
	say("coherent", err, seen(3))
	dir, err := unix.Open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	say("rename", err, unix.Rename("segment", "segment-deleted"), unix.Fsync(dir))
	copy(page(5), "stored after the rename")
	say("msync", unix.Msync(m, unix.MS_SYNC), seen(5))
	say("unlink", unix.Unlink("segment-deleted"), unix.Fsync(dir))
	say("forget the pages", unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED), unix.Madvise(m, unix.MADV_DONTNEED))
	say("faults", seen(3), seen(5), seen(9))
	copy(page(9)[1:], "stored after the unlink")
	copy(page(60), "and far behind")
	say("msync of what has no name", unix.Msync(m, unix.MS_SYNC), unix.Msync(page(60), unix.MS_SYNC|unix.MS_INVALIDATE))
	say("grow what has no name", unix.Ftruncate(fd, 2*size), unix.Fdatasync(fd))
	say("forget again", unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED), unix.Madvise(m, unix.MADV_DONTNEED), seen(9), seen(60))
	say("close under the mapping", unix.Close(fd))
	copy(page(11), "stored after the close")
	say("the last of it", unix.Msync(m, unix.MS_SYNC), digest(m), unix.Munmap(m))
	return unix.Close(dir)
}

// mappedTruncated: a mapping of a file that is cut and grown again shows zeros
// where it was cut, not what was there.
func mappedTruncated(say func(string, ...any)) error {
	fd, err := unix.Open("f", unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, bytes.Repeat([]byte("x"), 5*pageSize), 0)
	m, merr := unix.Mmap(fd, 0, 5*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err = errors.Join(err, merr); err != nil {
		return err
	}
	for _, size := range []int64{3*pageSize + 17, pageSize, 1, 0, 4064, 4032} {
		m[0] = 'm'
		say("cut and grow", unix.Ftruncate(fd, size), unix.Ftruncate(fd, 5*pageSize), digest(m), shown("f"))
		_, err = unix.Pwrite(fd, []byte("again"), size+3)
		say("write", err, digest(m))
	}
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE} {
		copy(m[pageSize-9:], bytes.Repeat([]byte("y"), 3*pageSize))
		say("zero under a mapping", unix.Fallocate(fd, mode, pageSize-5, 2*pageSize+3), digest(m))
	}
	return errors.Join(unix.Munmap(m), unix.Close(fd))
}

// copiedRanges: copy_file_range between files and within one, of dirty pages,
// beyond the end, and where it would overlap.
func copiedRanges(say func(string, ...any)) error {
	a, err := unix.Open("a", unix.O_RDWR|unix.O_CREAT, 0o644)
	b, berr := unix.Open("b", unix.O_RDWR|unix.O_CREAT, 0o644)
	if err = errors.Join(err, berr); err != nil {
		return err
	}
	data := make([]byte, 50_000)
	for i := range data {
		data[i] = byte(i % 251)
	}
	_, err = unix.Pwrite(a, data, 100)
	say("source", err)
	copied := func(from int, off int64, to int, at int64, length int) string {
		n, err := unix.CopyFileRange(from, &off, to, &at, length, 0)
		content, rerr := wholeFile("b")
		return fmt.Sprint(n, off, at, said(err), said(rerr), digest(content))
	}
	say("between", copied(a, 50, b, 0, 30_000), shown("b"))
	say("at the end", copied(a, 50_000, b, 4064, 30_000), copied(a, 60_000, b, 0, 10))
	say("with a gap", copied(a, 0, b, 100_000, 4096), shown("b"))
	say("within", copied(b, 0, b, 200_000, 5000), copied(b, 0, b, 100, 5000))
	m, err := unix.Mmap(a, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m[10:], "stored through a mapping")
	say("of a mapping", copied(a, 0, b, 7, 4096))
	ro, err := unix.Open("b", unix.O_RDONLY, 0)
	say("to a read-only one", err, copied(a, 0, ro, 0, 10))
	return errors.Join(unix.Munmap(m), unix.Close(a), unix.Close(b), unix.Close(ro))
}

// cutToSameSize: to cut a file to the size that it has sets its times, and gives back
// what was allocated beyond the end, as RocksDB does with each log that it closes.
func cutToSameSize(say func(string, ...any)) error {
	fd, err := unix.Open("f", unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return err
	}
	old := []unix.Timespec{{Sec: 1_000_000_000}, {Sec: 1_000_000_000}}
	look := func() (st unix.Stat_t) {
		err = errors.Join(err, unix.Fstat(fd, &st))
		return st
	}
	for _, size := range []int{0, 100_000} {
		_, werr := unix.Pwrite(fd, make([]byte, size), 0)
		err = errors.Join(err, werr, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, int64(size), 4<<20), unix.Fsync(fd), unix.UtimesNanoAt(unix.AT_FDCWD, "f", old, 0))
		before := look()
		say("cut", unix.Ftruncate(fd, int64(size)))
		after := look()
		say("its times and space", err, before.Mtim.Sec, after.Mtim.Sec == before.Mtim.Sec, before.Blocks > 8000, after.Blocks > 8000)
	}
	say("cut to nothing", unix.Ftruncate(fd, 0), unix.UtimesNanoAt(unix.AT_FDCWD, "f", old, 0))
	again, err := unix.Open("f", unix.O_WRONLY|unix.O_TRUNC, 0)
	say("opened to be cut", err, look().Mtim.Sec == old[1].Sec)
	return errors.Join(unix.Close(again), unix.Close(fd))
}
