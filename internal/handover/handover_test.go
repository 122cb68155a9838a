package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// recorder is a Mounter that remembers what it was asked.
type recorder struct{ limit atomic.Int64 }

func (r *recorder) LimitDirty(bytes int64) error { r.limit.Store(bytes); return nil }
func (r *recorder) Flush() error                 { return errors.New("no such mount") }
func (r *recorder) Stir() error                  { return nil }
func (r *recorder) Killed(threads []uint32) (killed []uint32) {
	for _, tid := range threads {
		if tid%2 == 0 {
			killed = append(killed, tid)
		}
	}
	return killed
}

// listening serves s at path until stop is called.
func listening(t *testing.T, s *Server, path string) (stop func()) {
	t.Helper()
	_ = os.Remove(path)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			serving.Go(func() { _ = s.Serve(c) })
		}
	})
	return func() {
		l.Close()
		s.Close()
		serving.Wait()
	}
}

// memory is a descriptor whose content is text.
func memory(t *testing.T, text string) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err == nil {
		_, err = unix.Write(fd, []byte(text))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func content(t *testing.T, fd int) string {
	t.Helper()
	b := make([]byte, 100)
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// TestEmptyMessageWithDescriptor: an empty message reads as the end of the connection, and
// the descriptors that come with it must not stay with who serves many mounts.
func TestEmptyMessageWithDescriptor(t *testing.T) {
	s := NewServer("the mount", &recorder{}, memory(t, Device))
	defer s.Close()
	fd := memory(t, "left behind")
	defer unix.Close(fd)
	open := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, f := range all {
			if name, _ := os.Readlink("/proc/self/fd/" + f.Name()); strings.HasPrefix(name, "/memfd:test") {
				n++
			}
		}
		return n
	}
	before := open()
	near, far := pair(t)
	// By hand, since Go sends a byte where there is none.
	rights := unix.UnixRights(fd, fd)
	message := unix.Msghdr{Control: &rights[0]}
	message.SetControllen(len(rights))
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed unix.Errno
	if err := raw.Control(func(socket uintptr) {
		_, _, failed = unix.Syscall(unix.SYS_SENDMSG, socket, uintptr(unsafe.Pointer(&message)), 0)
	}); err != nil || failed != 0 {
		t.Fatal(err, failed)
	}
	if err := s.Serve(near); err != nil { // it is the end
		t.Error(err)
	}
	if after := open(); after != before {
		t.Errorf("%d descriptors stay", after-before)
	}
}

// TestHeldOverDeaths: what a client deposits reaches its successor, over the death of
// either side; more than go with one message.
func TestHeldOverDeaths(t *testing.T) {
	const many = 2*fdsMax + 50
	path := filepath.Join(t.TempDir(), "mount.sock")
	mounter := &recorder{}
	stop := listening(t, NewServer("the mount", mounter, memory(t, Device)), path)
	never := func(error) {}
	c, device, held, err := Take(t.Context(), path, zap.NewNop(), never)
	if err != nil || content(t, device) != Device || len(held) != 0 || c.Mount() != "the mount" {
		t.Fatalf("%v, %v", held, err)
	}
	defer func() { c.forget(map[string]int{Device: device}) }()
	for i := range many {
		name := fmt.Sprint("inode/", i)
		fd := memory(t, name)
		if err := c.Hold(name, fd); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	c.Release("inode/7")
	c.Release(Device) // is not
	if err := c.Hold(strings.Repeat("x", nameMax+1), device); err == nil {
		t.Error("a name without bounds is taken")
	}
	c.Release(strings.Repeat("x", nameMax+1))
	if err := c.LimitDirty(12345); err != nil || mounter.limit.Load() != 12345 {
		t.Errorf("limit %d, %v", mounter.limit.Load(), err)
	}
	if killed := c.Killed([]uint32{1, 2, 3, 4}); fmt.Sprint(killed) != "[2 4]" {
		t.Errorf("killed: %v", killed)
	}

	// Another server: the client tells it everything.
	ctx, leave := context.WithCancel(context.Background())
	stayed := make(chan struct{})
	go func() { defer close(stayed); c.Stay(ctx) }()
	stop()
	if killed := c.Killed([]uint32{2}); killed != nil {
		t.Errorf("without a server %v are killed", killed)
	}
	mounter = &recorder{}
	server := NewServer("the mount", mounter, -1)
	stop = listening(t, server, path)
	defer func() { stop() }()
	await(t, "the new server is not told", func() bool { return mounter.limit.Load() == 12345 })

	// A second client is refused while the first is there, and then gets it all.
	busy, cancel := context.WithCancel(context.Background())
	refused := make(chan error, 1)
	_, _, _, err = Take(busy, path, zap.NewNop(), func(err error) { refused <- err; cancel() })
	if why := <-refused; err == nil || !strings.Contains(why.Error(), "another byokd") {
		t.Errorf("a second client: %v", why)
	}
	leave()
	<-stayed
	next, nextDevice, held, err := Take(t.Context(), path, zap.NewNop(), never)
	if err != nil || content(t, nextDevice) != Device {
		t.Fatal(err)
	}
	defer func() { next.forget(held); unix.Close(nextDevice) }()
	for i := range many {
		name := fmt.Sprint("inode/", i)
		fd, found := held[name]
		if found != (i != 7) || found && content(t, fd) != name {
			t.Errorf("%s is held: %v", name, found)
		}
	}
}

// TestRefused: what is not of the protocol is refused, and the connection with it
// where nothing else can be told.
func TestRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mount.sock")
	server := NewServer("the mount", &recorder{}, -1)
	stop := listening(t, server, path)
	defer stop()
	for message, want := range map[string]string{
		`{"id":1,"op":"hello","version":99}`:           "one release",
		`{"id":1,"op":"open"}`:                         "unknown operation",
		`{"id":1,"op":"hold","name":"no descriptor"}`:  "0 descriptors",
		`{"id":1,"op":"flush"}`:                        "no such mount",
		`{"id":1,"op":"hello","version":1,"key":true}`: "", // cut off
		`not JSON`: "",
	} {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		var a reply
		if _, err = c.Write([]byte(message)); err == nil {
			_, err = receive(c, &a)
		}
		if want == "" && err == nil || want != "" && !strings.Contains(a.Error, want) {
			t.Errorf("%s: %q, %v", message, a.Error, err)
		}
		c.Close()
		await(t, "the server keeps a client that is gone", func() bool { now, _ := server.Serving(); return !now })
	}
}
