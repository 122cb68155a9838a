package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKilledOnce kills the worker while files and directories are open.
func TestKilledOnce(t *testing.T) {
	k := newKeptVolume(t)
	f, err := os.Create(k.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	if _, err := f.Write(want); err != nil {
		t.Fatal(err)
	}
	gone, err := os.OpenFile(k.path("gone"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer gone.Close()
	if _, err := gone.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(k.path("gone")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		k.kill(unix.SIGKILL)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"f", "/proc/self/fd/" + fmt.Sprint(gone.Fd())} {
			path := name
			if name == "f" {
				path = k.path("f")
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
			}
		}
		if err := os.WriteFile(k.path("new"), want[:100], 0o600); err != nil {
			t.Fatal(err)
		}
		names, err := os.ReadDir(k.dir + "/mount")
		if err != nil || len(names) != 2 {
			t.Fatalf("%v, %v", names, err)
		}
	}
}

// TestRequestThatCrashes: a request that ends the worker each time it is served
// fails, after some attempts; others go on.
func TestRequestThatCrashes(t *testing.T) {
	k := newKeptVolume(t, keptVariable+"_CRASHES=1")
	f, err := os.Create(k.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("before"); err != nil {
		t.Fatal(err)
	}
	before := k.count.Load()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 1<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("the call that crashes the worker: %v, want EIO", err)
	}
	if n := k.count.Load() - before; n != maxAttempts {
		t.Errorf("%d workers have died of it, want %d", n, maxAttempts)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(k.path("f")); string(got) != "before" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if !strings.Contains(k.said.String(), "a request ends byokd each time it is served") {
		t.Error("nobody was told")
	}
}

// TestKeyAwayAtRestart: a worker that comes to a mount without its key answers what
// needs none, lets callers wait, and takes away what the kernel has cached.
func TestKeyAwayAtRestart(t *testing.T) {
	k := newKeptVolume(t)
	if err := os.WriteFile(k.path("f"), []byte("cached"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(k.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil { // clean, so that the kernel can let go of it
		t.Fatal(err)
	}
	if _, err := io.ReadAll(f); err != nil {
		t.Fatal(err)
	}
	k.disable()
	k.kill(unix.SIGKILL)
	time.Sleep(coldAfter + dropWithin + 200*time.Millisecond) // the promised second
	reader := exec.Command("cat", k.path("f"))
	var out bytes.Buffer
	reader.Stdout = &out
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- reader.Wait() }()
	var st unix.Statfs_t
	if err := unix.Statfs(k.dir+"/mount", &st); err != nil {
		t.Error(err)
	}
	killed := exec.Command("cat", k.path("other")) // for the same name it would wait for the other caller, in the kernel
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Errorf("a read without a key has ended: %v, %q", err, out.String())
	case <-time.After(300 * time.Millisecond):
	}
	_ = killed.Process.Kill()
	if err := killed.Wait(); err == nil {
		t.Error("a caller that was killed has read")
	}
	k.enable()
	if err := <-ended; err != nil || out.String() != "cached" {
		t.Errorf("after the key's return: %v, %q", err, out.String())
	}
}

// put makes a file beside the volume, which tells the worker what to do, or takes it
// away.
func (k *keptVolume) put(name string, there bool) {
	k.t.Helper()
	err := os.Remove(filepath.Join(k.dir, name))
	if there {
		err = os.WriteFile(filepath.Join(k.dir, name), nil, 0o600)
	}
	if err != nil {
		k.t.Fatal(err)
	}
}

// TestFailedSyncToldOverDeaths: a sync that failed below is told once to each handle
// that was open, whichever worker was told of it, and whichever is asked.
func TestFailedSyncToldOverDeaths(t *testing.T) {
	k := newKeptVolume(t, keptVariable+"_FAILS=1", keptVariable+"_DIES=1", keptVariable+"_CACHE=writethrough")
	var open []*os.File
	for range 3 {
		f, err := os.OpenFile(k.path("f"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		open = append(open, f)
	}
	sync := func(i int, want error) {
		t.Helper()
		if err := open[i].Sync(); !errors.Is(err, want) || (want == nil) != (err == nil) {
			t.Errorf("fsync by handle %d: %v, want %v", i, err, want)
		}
	}
	if _, err := open[0].WriteString("lost"); err != nil {
		t.Fatal(err)
	}
	k.put("fail", true)
	sync(0, unix.EIO)
	k.put("fail", false)
	k.kill(unix.SIGKILL)
	sync(0, nil)
	before := k.count.Load()
	k.put("die", true)
	sync(1, unix.EIO) // the worker that was to tell it has died over it
	if k.count.Load() == before {
		t.Error("the worker did not die")
	}
	sync(1, nil)
	k.kill(unix.SIGKILL)
	k.kill(unix.SIGKILL)
	sync(2, unix.EIO)
	for i := range open {
		sync(i, nil)
	}
	late, err := os.OpenFile(k.path("f"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	open = append(open, late)
	sync(3, nil)
}

// journalBytes is how much memory the journal of the present worker takes.
func (k *keptVolume) journalBytes() int64 {
	k.t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", k.pid.Load()))
	if err != nil {
		k.t.Fatal(err)
	}
	for _, fd := range fds {
		var st unix.Stat_t
		if target, _ := os.Readlink(fd); strings.Contains(target, "byokd-journal") && unix.Stat(fd, &st) == nil {
			return st.Blocks * 512
		}
	}
	k.t.Fatal("the worker has no journal open")
	return 0
}

// TestFreezeGivesBuffersBack: the buffers of requests that were served before a freeze are not
// kept in memory through it, and there again for those after it.
func TestFreezeGivesBuffersBack(t *testing.T) {
	k := newKeptVolume(t, keptVariable+"_CACHE=writethrough")
	const writers, few = 16, (idleReaders + 2) * slotChunk
	var stop atomic.Bool
	var done sync.WaitGroup
	write := func(i int) error {
		f, err := os.OpenFile(k.path(fmt.Sprint("f", i)), os.O_RDWR|os.O_CREATE|unix.O_SYNC, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt(bytes.Repeat([]byte{byte(i)}, maxWrite), 0)
		return err
	}
	for i := range writers {
		done.Go(func() {
			for !stop.Load() {
				if err := write(i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	await(t, func() string { return fmt.Sprintf("%d writers have %d bytes of buffers", writers, k.journalBytes()) },
		func() bool { return k.journalBytes() > 2*few })
	stop.Store(true)
	done.Wait()
	k.disable()
	await(t, func() string { return "it does not freeze" }, k.frozen)
	await(t, func() string { return fmt.Sprintf("%d bytes of buffers are kept while frozen", k.journalBytes()) },
		func() bool { return k.journalBytes() <= few })
	k.enable()
	for i := range writers {
		if err := write(i); err != nil {
			t.Error(err)
		}
	}
}
