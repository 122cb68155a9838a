package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

func openDescriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// passing answers who takes over with the same descriptor under many names, for which it needs no other itself, unlike a
// Server in this process.
func passing(t *testing.T, path string, many int) (stop func()) {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	fd := memory(t, Device)
	serve := func(c *net.UnixConn) {
		defer c.Close()
		for {
			var r request
			if fds, err := receive(c, &r); err != nil {
				closeAll(fds)
				return
			}
			a, fds := reply{ID: r.ID, Mount: "the mount"}, []int{}
			for i := r.From; r.Op == opHeld && i <= many && len(fds) < fdsMax; i++ {
				name := fmt.Sprint("inode/", i)
				if i == 0 {
					name = Device
				}
				a.Names, fds = append(a.Names, name), append(fds, fd)
			}
			a.More = r.From+len(fds) <= many && len(fds) > 0
			if send(c, a, fds...) != nil {
				return
			}
		}
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if errors.Is(err, unix.EMFILE) {
				continue
			}
			if err != nil {
				return
			}
			serving.Go(func() { serve(c) })
		}
	})
	return func() {
		l.Close()
		serving.Wait()
		unix.Close(fd)
	}
}

// limitDescriptors lets this process have so many more open.
func limitDescriptors(t *testing.T, more int) (lift func()) {
	t.Helper()
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	few := limit
	few.Cur = uint64(openDescriptors(t) + more)
	if err = errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &few)); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTakeWithoutDescriptors: who may not have as many files open as it is to take over is
// told so at once, keeps none of them, and succeeds when it may.
func TestTakeWithoutDescriptors(t *testing.T) {
	const many = 2*fdsMax + 50
	path := filepath.Join(t.TempDir(), "mount.sock")
	defer passing(t, path, many)()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	waits := func(err error) { t.Errorf("it waits: %v", err) }
	for _, more := range []int{10, fdsMax / 2, fdsMax + 10, many + 20} { // the last: the copies do not fit
		before := openDescriptors(t)
		lift := limitDescriptors(t, more)
		_, _, _, err := Take(ctx, path, zap.NewNop(), waits)
		lift()
		if !errors.Is(err, ErrDescriptors) {
			t.Errorf("with %d descriptors left: %v", more, err)
		}
		await(t, "descriptors are left behind", func() bool { return openDescriptors(t) <= before })
	}
	c, device, held, err := Take(ctx, path, zap.NewNop(), waits)
	if err != nil || len(held) != many {
		t.Fatalf("%d descriptors, %v", len(held), err)
	}
	held[Device] = device
	c.forget(held)
}

// reluctant is a Mounter that refuses at first.
type reluctant struct {
	recorder
	refusals atomic.Int64
}

func (r *reluctant) LimitDirty(bytes int64) error {
	if r.refusals.Add(-1) >= 0 {
		return errors.New("not yet")
	}
	return r.recorder.LimitDirty(bytes)
}

// TestRestoredAgain: a node driver that has not taken everything is told again.
func TestRestoredAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mount.sock")
	stop := listening(t, NewServer("the mount", &recorder{}, memory(t, Device)), path)
	c, device, _, err := Take(t.Context(), path, zap.NewNop(), func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(device)
	if err := c.LimitDirty(12345); err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(t.Context())
	var staying sync.WaitGroup
	staying.Go(func() { c.Stay(ctx) })
	stop()
	next := &reluctant{}
	next.refusals.Store(2)
	server := NewServer("the mount", next, -1)
	stop = listening(t, server, path)
	await(t, "the server is not told again", func() bool { return next.limit.Load() == 12345 })
	if !server.HasDevice() {
		t.Error("the server has no device")
	}
	leave()
	staying.Wait()
	stop()
}

// TestDeafServer: a node driver that takes nothing any more holds nobody up for long who
// lets go of files, and one that is reached later learns which.
func TestDeafServer(t *testing.T) {
	near, far := pair(t)
	path := filepath.Join(t.TempDir(), "mount.sock")
	c := &Client{path: path, log: zap.NewNop(), conn: near, waiting: map[uint64]chan answer{}, held: map[string]int{}, untold: map[string]bool{}}
	go c.read(near)
	const descriptors = 3000 // more than a socket holds messages
	server := NewServer("the mount", &recorder{}, memory(t, Device))
	for i := range descriptors {
		fd := memory(t, "text")
		if err := c.remember(fmt.Sprint("inode/", i), fd); err != nil {
			t.Fatal(err)
		}
		if err := server.hold(fmt.Sprint("inode/", i), []int{fd}); err != nil {
			t.Fatal(err)
		}
	}
	released := make(chan struct{})
	go func() {
		defer close(released)
		for i := 1; i < descriptors; i++ {
			c.Release(fmt.Sprint("inode/", i))
		}
	}()
	select {
	case <-released:
	case <-time.After(60 * time.Second):
		t.Fatal("a release waits for a server that takes nothing")
	}
	if c.connection() != nil {
		t.Error("a connection is kept that takes nothing")
	}
	far.Close()

	ctx, leave := context.WithCancel(t.Context())
	var staying sync.WaitGroup
	stop := listening(t, server, path)
	staying.Go(func() { c.Stay(ctx) })
	holds := func() int {
		server.mu.Lock()
		defer server.mu.Unlock()
		return len(server.held)
	}
	// What the deaf one took into its socket it never read; here it is another, which was told nothing.
	c.mu.Lock()
	untold := len(c.untold)
	c.mu.Unlock()
	await(t, "the server is not told what was released", func() bool { return holds() <= 2+descriptors-1-untold })
	leave()
	staying.Wait()
	stop()
}
