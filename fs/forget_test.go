package fs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// await looks until ok, for as long as a loaded machine may take.
func await(t testing.TB, what func() string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what())
		}
	}
}

// TestDeletedFilesAreLetGo: what a database writes and deletes all day (journals,
// segments, tables) is let go when nobody has it open any more: its descriptors,
// its memory and its space on the lower filesystem.
func TestDeletedFilesAreLetGo(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		before := v.fs.Stats().Inodes
		const files = 300
		for i := range files {
			name := v.path(fmt.Sprint("journal", i))
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(make([]byte, 5000)); err != nil {
				t.Fatal(err)
			}
			switch i % 3 {
			case 0: // closed before it is deleted
				f.Close()
				err = os.Remove(name)
			case 1: // deleted while open
				err = os.Remove(name)
				f.Close()
			case 2: // replaced
				f.Close()
				err = os.Rename(name, v.path("last"))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		deleted := func() int { return deletedBelow(t, v.lower) - 1 } // the reserve has no name, too
		await(t, func() string {
			return fmt.Sprintf("%d of %d deleted files are still held, %d inodes instead of about %d", deleted(), files, v.fs.Stats().Inodes, before)
		}, func() bool { return deleted() == 0 && v.fs.Stats().Inodes <= before+2 })
	})
}

// TestForgottenInodesComeBack: what the kernel forgot for want of memory is
// found again.
func TestForgottenInodesComeBack(t *testing.T) {
	v := newVolume(t, Options{})
	if err := os.MkdirAll(v.path("a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	const files = 200
	name := func(i int) string { return v.path(fmt.Sprint("a/b/f", i)) }
	for i := range files {
		if err := os.WriteFile(name(i), []byte(name(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	open, err := os.Open(name(0))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		t.Skipf("the kernel cannot be told to forget: %v", err)
	}
	await(t, func() string { return fmt.Sprintf("the kernel still knows %d inodes", v.fs.Stats().Inodes) },
		func() bool { return v.fs.Stats().Inodes < files/2 })
	for i := range files {
		if got, err := os.ReadFile(name(i)); err != nil || string(got) != name(i) {
			t.Errorf("%s: %q, %v", name(i), got, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(open.Fd()), &st); err != nil {
		t.Error(err)
	}
}

// deletedBelow counts our descriptors of files below dir that have no name.
func deletedBelow(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if strings.HasPrefix(target, dir) && strings.HasSuffix(target, " (deleted)") {
			count++
		}
	}
	return count
}

// TestForgetStorm: FORGETs that cannot be served at once stay in the kernel rather than
// in a slot each; the device is read all the same, if later, until there are forgetMost.
func TestForgetStorm(t *testing.T) {
	v := newVolume(t, Options{})
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	device, kernel := ends[0], ends[1]
	const requests = 250
	forget := make([]byte, unsafe.Sizeof(fuse.ForgetIn{}))
	*(*fuse.ForgetIn)(unsafe.Pointer(&forget[0])) = fuse.ForgetIn{InHeader: fuse.InHeader{Length: uint32(len(forget)), Opcode: opForget, Unique: 2, NodeId: 1 << 60}}
	for range requests {
		if _, err := unix.Write(kernel, forget); err != nil {
			t.Fatal(err)
		}
	}
	l := newLoop(v.fs, device, nil)
	taken := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.taken
	}

	v.fs.nodes.mu.Lock()
	release := sync.OnceFunc(v.fs.nodes.mu.Unlock)
	t.Cleanup(release) // the volume's end needs the lock
	l.start()
	await(t, func() string { return fmt.Sprintf("%d slots are taken, and no more readers are started late", taken()) },
		func() bool { return int(l.forgetting.Load()) == forgetMost })
	const most = forgetMost + idleReaders
	waits := time.Now().Add(5 * lateAfter)
	await(t, func() string { return "" }, func() bool { return taken() > most || time.Now().After(waits) })
	if at := taken(); at > most {
		t.Errorf("%d slots are taken by %d FORGETs that wait for the nodes, want %d at the most", at, requests, most)
	}
	release()

	await(t, func() string { return "the device is not read any more" }, func() bool {
		unread, err := unix.IoctlGetInt(device, unix.TIOCINQ)
		return err == nil && unread == 0 && l.forgetting.Load() == 0
	})
	unix.Close(kernel) // read returns 0, the end
	await(t, func() string { return fmt.Sprintf("%d slots are still taken", taken()) }, func() bool { return taken() == 0 })
	if err := l.close(); err != nil {
		t.Error(err)
	}
}

// TestFailedRemovalsHoldNothing: what could not be removed, as a directory that is not
// empty, costs no descriptor afterwards, however many were tried.
func TestFailedRemovalsHoldNothing(t *testing.T) {
	v := newVolume(t, Options{})
	const dirs = 200
	if err := os.Mkdir(v.path("empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return v.path(fmt.Sprint("dir", i)) }
	for i := range dirs {
		if err := errors.Join(os.Mkdir(name(i), 0o755), os.Mkdir(name(i)+"/below", 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	v.fs.nodes.heldPaths.Add(maxHeldPaths + 1) // none is kept for speed alone
	for i := range dirs {
		if err := unix.Rmdir(name(i)); !errors.Is(err, unix.ENOTEMPTY) {
			t.Fatalf("rmdir of what is not empty: %v", err)
		}
		if err := unix.Rename(v.path("empty"), name(i)); !errors.Is(err, unix.ENOTEMPTY) {
			t.Fatalf("rename to what is not empty: %v", err)
		}
	}
	if n := countBelow(t, v.lower); n > dirs/10 {
		t.Errorf("%d descriptors below are open for %d directories that could not be removed", n, dirs)
	}
}

// TestNamedLaterHoldsNothing: a file that was made without a name (O_TMPFILE) costs no
// descriptor any more when it has got one and was closed.
func TestNamedLaterHoldsNothing(t *testing.T) {
	v := newVolume(t, Options{})
	const files = 200
	for i := range files {
		fd, err := unix.Open(v.mount, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		name := v.path(fmt.Sprint("f", i))
		_, err = unix.Write(fd, []byte(name))
		if err := errors.Join(err, unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW), unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
	}
	await(t, func() string {
		return fmt.Sprintf("%d descriptors below are open for %d files that nobody has open", countBelow(t, v.lower), files)
	}, func() bool { return countBelow(t, v.lower) < files/10 })
	for i := range files {
		name := v.path(fmt.Sprint("f", i))
		if got, err := os.ReadFile(name); err != nil || string(got) != name {
			t.Fatalf("%s: %q, %v", name, got, err)
		}
	}
}
