package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// What writes in the torture, but for names.

// appends adds records to a file and reads all of it now and then.
func appends(dir string, r *rand.Rand, going func() bool) error {
	f, err := os.OpenFile(dir+"/log", os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var want []byte
	for i := 0; going(); i++ {
		record := fmt.Appendf(nil, "record %d %s\n", i, bytes.Repeat([]byte{'x'}, r.IntN(400)))
		if _, err := f.Write(record); err != nil {
			return err
		}
		want = append(want, record...)
		if i%8 == 0 {
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				return fmt.Errorf("fdatasync: %w", err)
			}
		}
		if i%200 == 0 {
			if err := holds(f, want); err != nil {
				return err
			}
		}
		if len(want) > 4<<20 {
			if err := f.Truncate(0); err != nil {
				return err
			}
			want = want[:0]
		}
	}
	return holds(f, want)
}

func holds(f *os.File, want []byte) error {
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s: %d bytes, want %d; first difference at %d", f.Name(), len(got), len(want), firstDifference(got, want))
	}
	return nil
}

// grows has files grow by pieces that the kernel flushes in several requests, and reads
// what is below.
func grows(dir string, r *rand.Rand, going func() bool) error {
	const size = 12 << 20
	content := make([]byte, size)
	for round := 0; going(); round++ {
		f, err := os.Create(dir + "/large")
		if err != nil {
			return err
		}
		for i := range content {
			content[i] = byte(i>>8 + i + round)
		}
		for at := 0; at < size && err == nil && going(); {
			to := min(size, at+1+r.IntN(3<<20))
			if _, err = f.WriteAt(content[at:to], int64(at)); err == nil && r.IntN(3) == 0 {
				err = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
			}
			if at = to; err == nil && (r.IntN(8) == 0 || at == size) {
				err = f.Sync()
			}
			if at == size && err == nil {
				if err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err == nil {
					err = holds(f, content)
				}
			}
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// overwrites changes a file of 1 MiB here and there, in whole pages where flags
// want that.
func overwrites(dir string, r *rand.Rand, going func() bool, flags int) error {
	const size, page = 1 << 20, 4096
	fd, err := unix.Open(dir+"/file", unix.O_RDWR|unix.O_CREAT|flags, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "file")
	defer f.Close()
	memory, err := unix.Mmap(-1, 0, size+page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(memory) }()
	want, buffer := make([]byte, size), memory[:size]
	if _, err := f.WriteAt(buffer, 0); err != nil {
		return err
	}
	for i := 0; going(); i++ {
		off, length := r.IntN(size-64<<10), 1+r.IntN(64<<10)
		if flags&unix.O_DIRECT != 0 {
			off, length = off&^(page-1), (length+page-1)&^(page-1)
		}
		piece := buffer[:length]
		for at := range piece {
			piece[at] = byte(i + at*7)
		}
		if _, err := f.WriteAt(piece, int64(off)); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		copy(want[off:], piece)
		if i%16 == 0 {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("fsync: %w", err)
			}
		}
		if i%32 == 0 {
			if _, err := f.ReadAt(buffer, 0); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			if !bytes.Equal(buffer, want) {
				return fmt.Errorf("first difference at %d", firstDifference(buffer, want))
			}
		}
	}
	return nil
}

// stores changes a file through a shared mapping.
func stores(dir string, r *rand.Rand, going func() bool) error {
	const size = 256 << 10
	f, err := os.Create(dir + "/file")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(memory) }()
	want := make([]byte, size)
	for i := 0; going(); i++ {
		at := r.IntN(size)
		memory[at], want[at] = byte(i), byte(i)
		if i%64 == 0 {
			if err := unix.Msync(memory, unix.MS_SYNC); err != nil {
				return fmt.Errorf("msync: %w", err)
			}
			if err := holds(f, want); err != nil {
				return err
			}
		}
	}
	return nil
}

// nameless uses files whose name is gone, and ones that never had one.
func nameless(dir string, r *rand.Rand, going func() bool) error {
	for i := 0; going(); i++ {
		var fd int
		var err error
		if i%2 == 0 {
			if fd, err = unix.Open(dir+"/f", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600); err == nil {
				err = unix.Unlink(dir + "/f")
			}
		} else {
			fd, err = unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		}
		if err != nil {
			return fmt.Errorf("make: %w", err)
		}
		f := os.NewFile(uintptr(fd), "nameless")
		want := make([]byte, r.IntN(100_000))
		for at := range want {
			want[at] = byte(at * i)
		}
		for at := 0; at < len(want); at += 8192 {
			if _, err := f.WriteAt(want[at:min(len(want), at+8192)], int64(at)); err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("fsync: %w", err)
		}
		if err := holds(f, want); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return fmt.Errorf("close: %w", err)
		}
	}
	return nil
}

// streams lists a directory in small pieces: each name once.
func streams(dir string, _ *rand.Rand, going func() bool) error {
	var want []string
	for i := range 300 {
		name := fmt.Sprintf("a-name-of-some-length-%03d", i)
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			return err
		}
		want = append(want, name)
	}
	for going() {
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		for range 2 {
			var got []string
			for {
				some, err := f.Readdirnames(7)
				got = append(got, some...)
				if err == io.EOF {
					break
				}
				if err != nil {
					return err
				}
			}
			sort.Strings(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("%d names, want %d", len(got), len(want))
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return err
			}
		}
		f.Close()
	}
	return nil
}

// attributes sets and removes an attribute, and changes mode and times.
func attributes(dir string, r *rand.Rand, going func() bool) error {
	file := dir + "/f"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	has := false
	for i := 0; going(); i++ {
		value := fmt.Sprint("value ", i)
		switch r.IntN(4) {
		case 0:
			err := unix.Setxattr(file, "user.test", []byte(value), unix.XATTR_CREATE)
			if has {
				if err := expect("setxattr", err, unix.EEXIST); err != nil {
					return err
				}
				continue
			}
			if err != nil {
				return fmt.Errorf("setxattr: %w", err)
			}
			has = true
			got := make([]byte, 100)
			n, err := unix.Getxattr(file, "user.test", got)
			if err != nil || string(got[:n]) != value {
				return fmt.Errorf("getxattr: %q, %w", got[:max(n, 0)], err)
			}
		case 1:
			err := unix.Removexattr(file, "user.test")
			if has {
				err = expect("removexattr", err, nil)
			} else {
				err = expect("removexattr of none", err, unix.ENODATA)
			}
			if err != nil {
				return err
			}
			has = false
		case 2:
			mode := 0o400 | uint32(r.IntN(0o400))
			if err := unix.Chmod(file, mode); err != nil {
				return fmt.Errorf("chmod: %w", err)
			}
			var st unix.Stat_t
			if err := unix.Stat(file, &st); err != nil || st.Mode&0o777 != mode {
				return fmt.Errorf("mode %o, want %o, %w", st.Mode, mode, err)
			}
		case 3:
			ts := []unix.Timespec{{Sec: int64(i)}, {Sec: int64(2 * i)}}
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, file, ts, 0); err != nil {
				return fmt.Errorf("utimens: %w", err)
			}
		}
	}
	return nil
}
