package fs

import (
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faultFunc stands before the operations below of a name.
func faultFunc(name string, f func() error) faultBelow {
	return func(op string, length int) (int, error) {
		if op == name {
			return length, f()
		}
		return length, nil
	}
}

// openTwice makes a file with content and opens it by two handles.
func openTwice(t *testing.T, v *volume, content []byte) (first, second *os.File) {
	t.Helper()
	first, err := os.Create(v.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })
	if second, err = os.OpenFile(v.path("f"), os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.Close() })
	if _, err := first.Write(content); err != nil {
		t.Fatal(err)
	}
	return first, second
}

// TestTruncateTellsFailedSync: a truncate syncs the shortened block, and the
// kernel tells what it then finds lost of earlier writes to nobody else. So who
// wrote is told by fsync, and the size is what a restart would find.
func TestTruncateTellsFailedSync(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	var failing atomic.Bool
	failing.Store(true)
	v.setFault(faultFunc("sync", func() error {
		if failing.Load() {
			return unix.EIO
		}
		return nil
	}))
	first, second := openTwice(t, v, make([]byte, 100))
	if err := os.Truncate(v.path("f"), 60); !errors.Is(err, unix.EIO) {
		t.Fatalf("truncate: %v", err)
	}
	failing.Store(false)
	for _, f := range []*os.File{first, second} {
		if err := f.Sync(); !errors.Is(err, unix.EIO) {
			t.Errorf("the fsync after it: %v, want EIO", err)
		}
		if err := f.Sync(); err != nil {
			t.Errorf("told twice: %v", err)
		}
	}
	if err := first.Truncate(100); err != nil {
		t.Fatal(err)
	}
	if err := first.Sync(); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second.Close()
	v.remount()
	if info, err := os.Stat(v.path("f")); err != nil || info.Size() != 100 {
		t.Errorf("after a truncate to 100 and a restart: %d bytes, %v", info.Size(), err)
	}
}

// TestSyncBesideOursFails: the kernel has one fsync of a file at a time, but a
// sync of our own may come beside it, and a failure is told to one of the two
// system calls only, for both use our descriptor. They come one after the other, and
// an fsync that waited for ours is not answered with success when that was told a failure.
func TestSyncBesideOursFails(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	var calls, below, most atomic.Int32
	fail := make(chan struct{})
	v.setFault(faultFunc("sync", func() error {
		most.Store(max(most.Load(), below.Add(1)))
		defer below.Add(-1)
		if calls.Add(1) == 1 { // ours, which is late to return
			<-fail
			return unix.EIO
		}
		return nil
	}))
	f, _ := openTwice(t, v, make([]byte, 100))
	var open *node
	for _, n := range v.fs.nodes.all() {
		if n.file.isOpen() {
			open = n
		}
	}
	v.fs.settleLower(open)
	await(t, func() string { return "our sync does not reach the disk" }, func() bool { return calls.Load() == 1 })
	result := make(chan error)
	go func() { result <- f.Sync() }()
	select { // it may not come to the disk, which shows by nothing happening
	case err := <-result:
		t.Fatalf("the fsync did not wait for ours: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(fail)
	if err := <-result; !errors.Is(err, unix.EIO) {
		t.Errorf("the fsync that waited for ours: %v, want EIO", err)
	}
	if err := f.Sync(); err != nil {
		t.Errorf("told twice: %v", err)
	}
	if most.Load() != 1 {
		t.Errorf("%d syncs of one file at a time", most.Load())
	}
}

// TestFailedSyncToldToWhoOpensNext: where a sync of our own fails while nobody has the file
// open, those who open it next are told, each once, until one was.
func TestFailedSyncToldToWhoOpensNext(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	var failing atomic.Bool
	v.setFault(faultFunc("sync", func() error {
		if failing.Load() {
			return unix.EIO
		}
		return nil
	}))
	if err := os.WriteFile(v.path("f"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	handles := v.fs.handles
	await(t, func() string { return "the file stays open" }, func() bool {
		handles.mu.Lock()
		defer handles.mu.Unlock()
		return len(handles.byFh) == 0
	})
	failing.Store(true)
	for _, n := range v.fs.nodes.all() {
		n.content.RLock()
		isFile := n.hasID
		n.content.RUnlock()
		if isFile {
			v.fs.settleLower(n)
		}
	}
	v.fs.background.Wait()
	failing.Store(false)
	open := func() *os.File {
		f, err := os.OpenFile(v.path("f"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	first, second := open(), open()
	for _, f := range []*os.File{first, second} {
		if err := f.Sync(); !errors.Is(err, unix.EIO) {
			t.Errorf("fsync: %v, want EIO", err)
		}
		if err := f.Sync(); err != nil {
			t.Errorf("told twice: %v", err)
		}
	}
	if err := open().Sync(); err != nil {
		t.Errorf("who opens it when others were told: %v", err)
	}
}
