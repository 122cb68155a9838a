package handover

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Mounter does for a client what the client may not do itself. Its methods are called
// concurrently.
type Mounter interface {
	// LimitDirty bounds what the kernel may hold dirty of the mount, in bytes.
	LimitDirty(bytes int64) error
	// Flush has the kernel begin to write back what it holds dirty of the mount, and
	// Stir has it ask for STATFS once. They wait for whoever serves the mount, until it
	// is ended.
	Flush() error
	Stir() error
	// Killed returns those of the threads that are being killed, or are gone.
	Killed(threads []uint32) []uint32
}

// Device is the name under which the FUSE device is held.
const Device = "device"

const (
	// heldMax bounds what one client may have held: as many files as a process may
	// have open, on most machines.
	heldMax = 1 << 16
	nameMax = 64

	// serviceTime bounds the wait for the mounter, since a drain ends before, and for a
	// client to take its answer.
	serviceTime = 2 * time.Second
	// servedMax is how many requests are under way at a time, and hangingMax how many of
	// them may wait for whoever serves the mount: each has a thread, and a process that
	// serves nodes must not run out of them because of one mount.
	servedMax  = 64
	hangingMax = 4
)

// Server is one mount's end of the protocol. What it holds stays until Close, over
// the death of clients.
//
// A client is not trusted: it may send what it wants, read nothing, and have
// descriptors held whose close waits for itself. So nothing is sent and nothing is
// closed under mu.
type Server struct {
	mount   string
	mounter Mounter
	turns   chan struct{} // servedMax; taken by requests under way
	hanging chan struct{} // hangingMax; taken by calls of the mounter that wait

	mu    sync.Mutex
	held  map[string]int // guarded by mu
	conn  *net.UnixConn  // the client's; guarded by mu, nil while there is none
	gone  bool           // Close was called; guarded by mu
	peers int            // clients so far; guarded by mu
}

// NewServer serves a mount, which is called mount in logs. The FUSE device dev
// becomes the server's; -1 when the client has it.
func NewServer(mount string, mounter Mounter, dev int) *Server {
	s := &Server{mount: mount, mounter: mounter, held: map[string]int{}, turns: make(chan struct{}, servedMax), hanging: make(chan struct{}, hangingMax)}
	if dev >= 0 {
		s.held[Device] = dev
	}
	return s
}

// Serving reports whether a client is connected, and how many there have been.
func (s *Server) Serving() (now bool, clients int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil, s.peers
}

// HasDevice reports whether the FUSE device is held.
func (s *Server) HasDevice() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, held := s.held[Device]
	return held
}

// Alone calls f with the FUSE device while there is no client, and lets none in
// meanwhile. It does not, and returns false, when there is one, or none has been there
// that knew the mount (it would have deposited something), or the device is not held.
func (s *Server) Alone(f func(device int)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	device, held := s.held[Device]
	if s.gone || s.conn != nil || !held || len(s.held) < 2 {
		return false
	}
	f(device)
	return true
}

// Close gives up everything that is held and ends the client's connection.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	fds := slices.Collect(maps.Values(s.held))
	clear(s.held)
	go closeAll(fds)
	if s.conn != nil {
		_ = s.conn.Close()
	}
}

// Serve serves one client until it goes. The error says why a client is refused or
// was cut off; nil when it went by itself.
func (s *Server) Serve(c *net.UnixConn) error {
	defer c.Close()
	if err := s.admit(c); err != nil {
		refuse(c, err)
		return err
	}
	var calls sync.WaitGroup
	defer calls.Wait()
	defer func() {
		s.mu.Lock()
		s.conn = nil
		s.mu.Unlock()
	}()
	for {
		var r request
		fds, err := receive(c, &r)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, unix.ECONNRESET):
			return nil
		case err != nil:
			return err
		}
		if r.Op == opHold || r.Op == opRelease { // in order
			_ = s.answer(c, r, fds) // a client that is gone is seen by the next receive
			continue
		}
		s.turns <- struct{}{}
		calls.Go(func() {
			defer func() { <-s.turns }()
			_ = s.answer(c, r, fds)
		})
	}
}

// refuse answers the first request, so that the client learns why: were it left
// unread, the client would see no more than a reset.
func refuse(c *net.UnixConn, why error) {
	_ = c.SetReadDeadline(time.Now().Add(serviceTime))
	var r request
	if fds, err := receive(c, &r); err == nil {
		closeAll(fds)
		_ = send(c, reply{ID: r.ID, Error: why.Error()})
	}
}

// admit makes c the client, if there is none.
func (s *Server) admit(c *net.UnixConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.gone:
		return errors.New("the mount has been taken away")
	case s.conn != nil:
		return errors.New("another byokd serves this mount")
	}
	s.conn = c
	s.peers++
	return nil
}

// answer carries one request out. What of fds is not kept is closed.
func (s *Server) answer(c *net.UnixConn, r request, fds []int) error {
	a := reply{ID: r.ID}
	var err error
	switch r.Op {
	case opHello:
		if a.Mount = s.mount; r.Version != Version {
			err = fmt.Errorf("protocol version %d, not %d: byokd and the node driver have to be of one release", r.Version, Version)
		}
	case opHeld:
		return s.sendHeld(c, a, r.From)
	case opHold:
		err = s.hold(r.Name, fds)
		fds = nil
	case opRelease: // nobody waits for an answer
		s.release(r.Name)
		closeAll(fds)
		return nil
	case opLimit:
		err = s.mounter.LimitDirty(r.Bytes)
	case opFlush:
		err = s.within(s.mounter.Flush)
	case opStir:
		err = s.within(s.mounter.Stir)
	case opKilled:
		a.Threads = s.mounter.Killed(r.Threads)
	default:
		err = fmt.Errorf("unknown operation %q", r.Op)
	}
	closeAll(fds)
	if err != nil {
		a.Error = err.Error()
	}
	return tell(c, a)
}

// tell sends an answer. A client that does not take it is cut off.
func tell(c *net.UnixConn, a reply, fds ...int) error {
	err := c.SetWriteDeadline(time.Now().Add(serviceTime))
	if err == nil {
		err = send(c, a, fds...)
	}
	if err != nil {
		_ = c.Close()
	}
	return err
}

// within has the mounter do something, and leaves it behind after serviceTime.
func (s *Server) within(call func() error) error {
	late := time.NewTimer(serviceTime)
	defer late.Stop()
	done := make(chan error, 1)
	select {
	case s.hanging <- struct{}{}:
		go func() {
			err := call()
			<-s.hanging
			done <- err
		}()
	case <-late.C:
		return errors.New("earlier calls of this mount still wait for who serves it")
	}
	select {
	case err := <-done:
		return err
	case <-late.C:
		return context.DeadlineExceeded
	}
}

// hold keeps a descriptor, which becomes the server's.
func (s *Server) hold(name string, fds []int) error {
	if len(fds) != 1 || name == "" || len(name) > nameMax {
		closeAll(fds)
		return fmt.Errorf("%d descriptors under a name of %d bytes", len(fds), len(name))
	}
	s.mu.Lock()
	before, known := s.held[name]
	refused := s.gone || !known && len(s.held) >= heldMax
	if !refused {
		s.held[name] = fds[0]
	}
	s.mu.Unlock()
	switch {
	case refused:
		closeAll(fds)
		return errors.New("no more descriptors are held")
	case known:
		unix.Close(before)
	}
	return nil
}

func (s *Server) release(name string) {
	if name == Device {
		return
	}
	s.mu.Lock()
	fd, known := s.held[name]
	delete(s.held, name)
	s.mu.Unlock()
	if known {
		unix.Close(fd)
	}
}

// sendHeld sends what is held from the from-th on, the device first.
func (s *Server) sendHeld(c *net.UnixConn, a reply, from int) error {
	var fds []int
	var err error
	if a.Names, fds, a.More, err = s.heldFrom(from); err != nil {
		a.Error = err.Error()
	}
	defer closeAll(fds)
	return tell(c, a, fds...)
}

// heldFrom returns names and copies of what is held from the from-th on, as many as go
// with a message, and whether there are more.
func (s *Server) heldFrom(from int) (names []string, fds []int, more bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names = slices.Collect(maps.Keys(s.held))
	slices.SortFunc(names, func(x, y string) int {
		if (x == Device) != (y == Device) {
			if x == Device {
				return -1
			}
			return 1
		}
		return cmp.Compare(x, y)
	})
	names = names[min(max(from, 0), len(names)):]
	if more = len(names) > fdsMax; more {
		names = names[:fdsMax]
	}
	for _, name := range names {
		fd, err := duplicate(s.held[name])
		if err != nil {
			closeAll(fds)
			return nil, nil, false, err
		}
		fds = append(fds, fd)
	}
	return names, fds, more, nil
}
