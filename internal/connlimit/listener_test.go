package connlimit

import (
	"net"
	"testing"
	"time"
)

// site is a Listener on loopback with a clock of the test, which moves with each connection.
type site struct {
	*testing.T
	*Listener
	clock   time.Time
	evicted int
}

func newSite(t *testing.T, limit int) *site {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s := &site{T: t, clock: time.Unix(1e9, 0)}
	s.Listener = New(l, limit, func() { s.evicted++ })
	s.now = func() time.Time { return s.clock }
	return s
}

// dial returns both ends of a new connection.
func (s *site) dial() (client, server net.Conn) {
	s.Helper()
	s.clock = s.clock.Add(time.Second)
	client, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { client.Close() })
	server, err = s.Accept()
	if err != nil {
		s.Fatal(err)
	}
	return client, server
}

// closed reports whether the server has closed a connection on which it sends nothing.
func (s *site) closed(client net.Conn, expect bool) {
	s.Helper()
	wait := 20 * time.Millisecond // an open one would be silent for ever
	if expect {
		wait = 10 * time.Second
	}
	if err := client.SetReadDeadline(time.Now().Add(wait)); err != nil {
		s.Fatal(err)
	}
	_, err := client.Read(make([]byte, 1))
	timeout, ok := err.(net.Error)
	if open := ok && timeout.Timeout(); open == expect {
		s.Errorf("closed is %v, want %v: %v", !open, expect, err)
	}
}

func TestTheLongestSilentOneGoes(t *testing.T) {
	s := newSite(t, 3)
	a, atA := s.dial()
	b, _ := s.dial()
	c, atC := s.dial()
	// a speaks, so that b is the oldest.
	s.clock = s.clock.Add(time.Second)
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := atA.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	d, _ := s.dial()
	s.closed(b, true)
	for _, open := range []net.Conn{a, c, d} {
		s.closed(open, false)
	}
	// One that is closed by its server makes room.
	atC.Close()
	s.dial()
	if s.evicted != 1 || len(s.open) != 3 {
		t.Errorf("%d were closed for others, %d are open", s.evicted, len(s.open))
	}
}

// wrapped stands for TLS.
type wrapped struct{ net.Conn }

func (w wrapped) NetConn() net.Conn { return w.Conn }

func TestAuthenticRequestsStay(t *testing.T) {
	s := newSite(t, 2)
	a, atA := s.dial()
	doneA := Busy(wrapped{atA})
	b, _ := s.dial()
	c, atC := s.dial() // takes the place of b, though a is older
	s.closed(b, true)
	s.closed(a, false)
	Busy(atC)

	// Nobody's place can be taken: the new one is closed, and the next takes that of a once it is through.
	refused, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer refused.Close()
	s.clock = s.clock.Add(time.Second)
	accepted := make(chan net.Conn)
	go func() {
		conn, err := s.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- conn
	}()
	s.closed(refused, true)
	doneA()
	d, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	Busy(<-accepted)
	s.closed(a, true)
	s.closed(c, false)

	// One with a request that has been silent for a minute.
	s.clock = s.clock.Add(busySilence)
	e, _ := s.dial()
	s.closed(c, true)
	s.closed(e, false)
	Busy(refused)() // not ours: nothing happens
}
