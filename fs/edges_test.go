package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// TestLargestRequests: a READ or WRITE as large as they come touches as many
// blocks as its offset within a block makes it.
func TestLargestRequests(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		fd, err := unix.Open(v.path("f"), unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		data, got := page(maxWrite), page(maxWrite)
		for i := range data {
			data[i] = byte(i>>12 + i)
		}
		// Page 125 begins at byte 4032 of a block: the most unfavourable place.
		for _, pages := range []int64{125, 0, 1, 126, 252} {
			for round := range 2 { // fresh, then in place
				data[0] = byte(round)
				if n, err := unix.Pwrite(fd, data, pages*pageSize); err != nil || n != len(data) {
					t.Fatalf("write at page %d: %d, %v", pages, n, err)
				}
				if n, err := unix.Pread(fd, got, pages*pageSize); err != nil || n != len(got) {
					t.Fatalf("read at page %d: %d, %v", pages, n, err)
				}
				if !bytes.Equal(got, data) {
					t.Errorf("page %d differs", pages)
				}
			}
		}
	})
}

// lowerFDs counts this process's descriptors of files below dir.
func lowerFDs(t testing.TB, dir string) map[string]int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && len(target) >= len(dir) && target[:len(dir)] == dir {
			count[target]++
		}
	}
	return count
}

// TestFirstRewritesTogether: requests that are the first to rewrite blocks of a
// file open its second descriptor once.
func TestFirstRewritesTogether(t *testing.T) {
	path := t.TempDir() + "/f"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{}
	n.file.adopt(fd)
	n.meta.Lock() // so that all of them find no descriptor
	var writers sync.WaitGroup
	for i := range int64(4) {
		writers.Go(func() {
			c := &call{fs: &Filesystem{}}
			if err := c.rewrite(n, page(block), i*block); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond) // that they wait for meta cannot be seen
	n.meta.Unlock()
	writers.Wait()
	if open := lowerFDs(t, path)[path]; open > 2 {
		t.Errorf("%d descriptors", open)
	}
	n.file.close()
	if open := lowerFDs(t, path)[path]; open > 0 {
		t.Errorf("%d descriptors are left", open)
	}
}

// TestModeIsTheCallers: the daemon's own umask has no say.
func TestModeIsTheCallers(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077)) // the daemon's
	v := newVolume(t, Options{})
	if err := unix.Chmod(v.mount, 0o2755); err != nil {
		t.Fatal(err)
	}
	victim := newVictim(t, "make-open", v.mount, "")
	victim.start()
	if got, want := victim.finishes(20*time.Second), "666 2777 666 666 666"; got != want {
		t.Errorf("file, directory, fifo, mknod, linked tmpfile have modes %s, want %s", got, want)
	}
}

// makeOpen makes one inode of each kind with all permissions, and tells what
// became of them.
func makeOpen(dir, _ string) (func() (string, error), error) {
	unix.Umask(0)
	return func() (string, error) {
		fd, err := unix.Open(dir+"/file", unix.O_CREAT|unix.O_WRONLY, 0o666)
		if err != nil {
			return "", err
		}
		tmp, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o666)
		if err != nil {
			return "", err
		}
		err = errors.Join(unix.Close(fd), unix.Mkdir(dir+"/dir", 0o777), unix.Mkfifo(dir+"/fifo", 0o666),
			unix.Mknod(dir+"/mknod", unix.S_IFREG|0o666, 0),
			unix.Linkat(unix.AT_FDCWD, procFD(tmp), unix.AT_FDCWD, dir+"/tmp", unix.AT_SYMLINK_FOLLOW), unix.Close(tmp))
		var modes []string
		for _, name := range []string{"file", "dir", "fifo", "mknod", "tmp"} {
			var st unix.Stat_t
			err = errors.Join(err, unix.Stat(dir+"/"+name, &st))
			modes = append(modes, fmt.Sprintf("%o", st.Mode&0o7777))
		}
		return strings.Join(modes, " "), err
	}, nil
}

// TestFailedAppendIsWithdrawn: a write that fills the disk in the middle fails,
// and nothing of it is behind the end of the file after a restart.
func TestFailedAppendIsWithdrawn(t *testing.T) {
	requireFUSE(t)
	dir := t.TempDir()
	if err := unix.Mount("byokd-test", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	v := newVolumeIn(t, dir, Options{Cache: Writethrough})
	fd, err := unix.Open(v.path("f"), unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	chunk := bytes.Repeat([]byte("x"), 1_000_003)
	size := int64(0)
	for err == nil {
		var n int
		n, err = unix.Pwrite(fd, chunk, size)
		size += int64(max(n, 0))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	var before, after unix.Stat_t
	if err := unix.Fstat(fd, &before); err != nil {
		t.Fatal(err)
	}
	tail := make([]byte, 2*len(chunk))
	n, err := unix.Pread(fd, tail, before.Size-100)
	if err != nil || n != 100 {
		t.Errorf("read of the end: %d, %v", n, err)
	}
	unix.Close(fd)
	v.remount()
	if err := unix.Stat(v.path("f"), &after); err != nil {
		t.Fatal(err)
	}
	if after.Size != before.Size || after.Size < size || after.Size >= size+seal.BlockPayload {
		t.Errorf("%d bytes written, size %d before and %d after a restart", size, before.Size, after.Size)
	}
}

// TestNodesAreSmall: the kernel may know a million inodes, and we each of them.
func TestNodesAreSmall(t *testing.T) {
	if size := unsafe.Sizeof(node{}); size > 400 {
		t.Errorf("a node takes %d bytes", size)
	}
}

// TestRootNotLoaded: an epoch that began without the volume's root gets it with
// the first request that needs it.
func TestRootNotLoaded(t *testing.T) {
	v := newVolume(t, Options{})
	v.unmount()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	f, err := Open(ctx, v.lower, v.guard, v.option, testBinding)
	if err != nil {
		t.Fatal(err)
	}
	v.stop()
	<-v.ended
	v.start() // a guard that was told of no root
	f.guard = v.guard
	if err := f.Mount(v.mount); err != nil {
		t.Fatal(err)
	}
	v.fs = f
	v.settlePoll()
	if err := os.WriteFile(v.path("f"), []byte("written"), 0o644); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(v.path("f")); err != nil || string(got) != "written" {
		t.Errorf("%q, %v", got, err)
	}
}
