package csinode

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// publish mounts for a pod as kubelet's call does, without a sidecar, and returns the
// path of the socket.
func (d *Driver) publish(t *testing.T) (v *volume, socket string) {
	t.Helper()
	pod := filepath.Join(d.options.KubeletDir, "pods/uid/volumes")
	run := filepath.Join(pod, "kubernetes.io~empty-dir/run")
	target := filepath.Join(pod, "kubernetes.io~csi/data/mount")
	if err := errors.Join(os.MkdirAll(run, 0o755), os.MkdirAll(filepath.Dir(target), 0o755), unix.Mount("tmpfs", run, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(run, unix.MNT_DETACH) })
	v, err := d.mount(record{ID: "id", Target: target, PodUID: "uid", Run: "run", Pod: "ns/pod/data"})
	if err != nil {
		t.Fatal(err)
	}
	d.volumes["id"] = v
	t.Cleanup(func() {
		d.forget("id")
		if err := unmount(target); err != nil {
			t.Error(err)
		}
	})
	return v, filepath.Join(run, socketName)
}

// dial connects as a sidecar.
func dial(t *testing.T, socket string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// tell sends a message and waits for its answer.
func tell(t *testing.T, c *net.UnixConn, message string, fds ...int) {
	t.Helper()
	if _, _, err := c.WriteMsgUnix([]byte(message), unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
}

// soon fails the test when call takes longer than a minute.
func soon(t *testing.T, what string, call func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); call() }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatalf("%s hangs", what)
	}
}

// TestSidecarThatReadsNothing: one that asks and asks and takes no answer holds up
// neither the driver nor the end of its mount.
func TestSidecarThatReadsNothing(t *testing.T) {
	d := newTestDriver(t)
	v, socket := d.publish(t)
	c := dial(t, socket)
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	for err := error(nil); err == nil; { // until nobody takes more
		_, err = c.Write([]byte(`{"id":1,"op":"held"}`))
	}
	soon(t, "the count of mounts", func() { d.Mounts() })
	soon(t, "the end of the mount", func() { d.forget(v.ID) })
}

// TestSidecarThatServesNothing: calls of the mount by the driver hang when the sidecar
// that asks for them does not serve it, and cost it few threads.
func TestSidecarThatServesNothing(t *testing.T) {
	d := newTestDriver(t)
	v, socket := d.publish(t)
	before := pprof.Lookup("threadcreate").Count()
	c := dial(t, socket)
	defer c.Close()
	const calls = 100
	for i := range calls {
		if _, err := fmt.Fprintf(c, `{"id":%d,"op":"flush"}`, i); err != nil {
			t.Fatal(err)
		}
	}
	for range calls {
		if _, err := c.Read(make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	if more := pprof.Lookup("threadcreate").Count() - before; more > calls/3 {
		t.Errorf("%d calls that were given up left %d threads", calls, more)
	}
	soon(t, "the end of the mount", func() { d.forget(v.ID) })
}

// TestSidecarsThatComeAndGo: the mount is looked after once, however many sidecars were
// there for a moment.
func TestSidecarsThatComeAndGo(t *testing.T) {
	d := newTestDriver(t)
	v, socket := d.publish(t)
	fd, err := unix.MemfdCreate("init", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const times = 50
	for i := range times {
		c := dial(t, socket)
		tell(t, c, `{"id":1,"op":"hold","name":"init"}`, fd)
		c.Close()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			if now, clients := v.server.Serving(); !now && clients == i+1 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("sidecar %d has left, and its connection stays", i+1)
			}
		}
	}
	var stacks bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 2); err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(stacks.Bytes(), []byte("csinode.(*Driver).deserted(")); n > 1 {
		t.Errorf("%d look after the mount", n)
	}
	soon(t, "the end of the mount", func() { d.forget(v.ID) })
}

// TestNoDescriptorForASidecar: a driver that could not let a sidecar in, for want of a
// descriptor, lets the next in when it has some.
func TestNoDescriptorForASidecar(t *testing.T) {
	d := newTestDriver(t)
	_, socket := d.publish(t)
	var limit unix.Rlimit
	open, err := os.ReadDir("/proc/self/fd")
	if err = errors.Join(err, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = uint64(len(open)) // of which one was that of the look: it goes to the sidecar's end
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	first, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	lift := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err = errors.Join(err, lift); err != nil {
		t.Fatal(err)
	}
	first.Close()
	c := dial(t, socket)
	defer c.Close()
	tell(t, c, `{"id":1,"op":"hello","version":1}`)
}
