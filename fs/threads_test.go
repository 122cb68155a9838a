package fs

import (
	"fmt"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
)

// manyFiles is more than there may be threads, and well below what makes Go end a process.
const manyFiles = 2000

// onManyFiles does something to as many files at once, in a thread each.
func onManyFiles(dir string, do func(fd int) error) (func() (string, error), error) {
	fds := make([]int, manyFiles)
	for i := range fds {
		var err error
		if fds[i], err = unix.Open(fmt.Sprint(dir, "/", i), unix.O_RDWR|unix.O_CREAT, 0o600); err != nil {
			return nil, err
		}
		if _, err := unix.Pwrite(fds[i], []byte("text"), 0); err != nil {
			return nil, err
		}
	}
	// What is read below must come from there.
	for _, fd := range fds {
		if err := unix.Fsync(fd); err != nil {
			return nil, err
		}
		if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
			return nil, err
		}
	}
	return func() (string, error) {
		var all sync.WaitGroup
		var right atomic.Int32
		for _, fd := range fds {
			all.Go(func() {
				runtime.LockOSThread()
				if do(fd) == nil {
					right.Add(1)
				}
			})
		}
		all.Wait()
		return fmt.Sprint(right.Load()), nil
	}, nil
}

func syncManyFiles(dir, _ string) (func() (string, error), error) {
	return onManyFiles(dir, unix.Fsync)
}

func readManyFiles(dir, _ string) (func() (string, error), error) {
	return onManyFiles(dir, func(fd int) error {
		b := make([]byte, 10)
		if n, err := unix.Pread(fd, b, 0); err != nil || string(b[:n]) != "text" {
			return fmt.Errorf("%q, %w", b, err)
		}
		return nil
	})
}

// stuckDisk has operations below hang, each in its thread, until release is called.
type stuckDisk struct {
	armed atomic.Bool
	pipe  [2]int
	stuck atomic.Int32
}

func newStuckDisk(t *testing.T, v *volume, op string) *stuckDisk {
	t.Helper()
	d := &stuckDisk{}
	if err := unix.Pipe2(d.pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	v.setFault(func(got string, length int) (int, error) {
		if got == op && d.armed.Load() {
			d.stuck.Add(1)
			_, _ = unix.Read(d.pipe[0], make([]byte, 1))
		}
		return length, nil
	})
	return d
}

// setFault stands before each operation on a lower file that is opened from now on.
func (v *volume) setFault(fault faultBelow) {
	v.fs.nodes.mu.Lock() // nodes are made under it
	defer v.fs.nodes.mu.Unlock()
	v.fs.nodes.fault = fault
}

// release lets everything go on. It is called once.
func (d *stuckDisk) release() {
	d.armed.Store(false)
	unix.Close(d.pipe[1])
}

// TestStuckCallsHaveFewThreads: where the disk hangs, what thousands of callers ask for takes
// a bounded number of threads, and all are served when it goes on. Meanwhile who comes
// can be killed, and a freeze closes the gate.
func TestStuckCallsHaveFewThreads(t *testing.T) {
	v := newVolume(t, Options{})
	d := newStuckDisk(t, v, "sync")
	p := newVictim(t, "sync-many", v.mount, v.path("none"))
	before := pprof.Lookup("threadcreate").Count()
	d.armed.Store(true)
	p.start()
	l := v.fs.loop.Load()
	await(t, func() string { return fmt.Sprintf("%d calls are at work", l.atWork()) },
		func() bool {
			return waitingThreads(p.cmd.Process.Pid) == manyFiles && d.stuck.Load() > atWorkMax/2 && l.atWork() > atWorkMax
		})
	if more := pprof.Lookup("threadcreate").Count() - before; more > atWorkMax+200 {
		t.Errorf("%d calls that hang have %d threads", manyFiles, more)
	}
	// Nothing more is read now: the kernel lets go by itself of who comes then and is killed.
	late := exec.Command("stat", "-f", v.mount)
	if err := late.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, func() string { return "stat -f does not wait" }, func() bool { return waitingThreads(late.Process.Pid) == 1 })
	if err := late.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := late.Wait(); err == nil {
		t.Error("stat -f was answered")
	}
	v.kms.disable(true) // the gate closes all the same; the keys go when the calls that hang have ended
	v.await("freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen })
	if v.guard.Status().Erased {
		t.Error("the keys of calls that hang are told erased")
	}
	d.release()
	v.await("erasure", func(s keyguard.Status) bool { return s.Erased })
	v.thaw()
	if got := p.finishes(60 * time.Second); got != fmt.Sprint(manyFiles) {
		t.Errorf("%s of %d calls were answered rightly", got, manyFiles)
	}
}

// TestStuckPagesHaveFewThreads: a freeze while pages of thousands of files are held for good
// takes a bounded number of threads, over any number of attempts.
func TestStuckPagesHaveFewThreads(t *testing.T) {
	v := newVolume(t, Options{})
	d := newStuckDisk(t, v, "read")
	p := newVictim(t, "read-many", v.mount, v.path("none"))
	before := pprof.Lookup("threadcreate").Count()
	d.armed.Store(true)
	p.start()
	await(t, func() string { return "the callers do not hang" }, func() bool { return waitingThreads(p.cmd.Process.Pid) >= manyFiles/2 })
	v.kms.disable(true)
	v.await("freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen })
	l := v.fs.loop.Load()
	for range 20 { // each drops all that is marked anew
		v.fs.drop(t.Context(), l, v.fs.touched(v.fs.nodes.all()))
	}
	if dropping, more := v.fs.dropping.Load(), pprof.Lookup("threadcreate").Count()-before; dropping > dropThreadsMax || more > dropThreadsMax+maxTurns+200 {
		t.Errorf("pages of %d files have %d threads, of which %d drop them", manyFiles, more, dropping)
	}
	d.release()
	v.thaw()
	if got := p.finishes(60 * time.Second); got != fmt.Sprint(manyFiles) {
		t.Errorf("%s of %d calls were answered rightly", got, manyFiles)
	}
	await(t, func() string { return fmt.Sprintf("%d threads are left", v.fs.dropping.Load()) }, func() bool { return v.fs.dropping.Load() == 0 })
}
