package fs

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestCloserClosesAll: what is to be closed elsewhere is, each once, by a few goroutines,
// which end.
func TestCloserClosesAll(t *testing.T) {
	const pipes = 200
	var c closer
	var ends []int32
	for range pipes {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(p[0])
		ends = append(ends, int32(p[0]))
		c.close(descriptors{2: int32(p[1]) + 1})
		c.mu.Lock()
		if c.workers > closeWorkers {
			t.Errorf("%d goroutines close", c.workers)
		}
		c.mu.Unlock()
	}
	c.close(descriptors{})
	c.wait()
	for _, end := range ends {
		if n, err := unix.Read(int(end), make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("the other end of a pipe is still open: %d, %v", n, err)
		}
	}
	if c.workers != 0 || len(c.waiting) != 0 {
		t.Errorf("%d goroutines and %d descriptors are left", c.workers, len(c.waiting))
	}
}

// TestForgetDoesNotCloseItself: while a close of what the kernel has forgotten takes its
// time, others are forgotten.
func TestForgetDoesNotCloseItself(t *testing.T) {
	v := newVolume(t, Options{})
	nodes := v.fs.nodes
	nodes.closing.mu.Lock() // as if all were busy
	nodes.closing.workers = closeWorkers
	nodes.closing.mu.Unlock()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	const id = 1 << 60
	nodes.mu.Lock()
	n := nodes.newNode(id)
	n.lookups.Store(1)
	n.path.Store(int32(p[1]) + 1)
	nodes.heldPaths.Add(1)
	nodes.byID[id] = n
	nodes.mu.Unlock()
	nodes.forget(id, 1, nil, 1)
	if _, err := unix.Read(p[0], make([]byte, 1)); err != unix.EAGAIN {
		t.Errorf("closed already: %v", err)
	}
	nodes.closing.mu.Lock()
	waiting := len(nodes.closing.waiting)
	nodes.closing.workers = 0
	nodes.closing.mu.Unlock()
	if waiting != 1 {
		t.Errorf("%d descriptors wait to be closed, want 1", waiting)
	}
	nodes.closing.close(descriptors{2: dupOf(t, p[0]) + 1}) // now a goroutine takes both
	await(t, func() string { return "what was forgotten is not closed" }, func() bool {
		_, err := unix.Read(p[0], make([]byte, 1))
		return err == nil
	})
}

func dupOf(t *testing.T, fd int) int32 {
	t.Helper()
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return int32(other)
}
