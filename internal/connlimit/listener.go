package connlimit

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// busySilence is how long a connection with an authentic request is left alone. A
// transfer moves bytes more often, unless its key is frozen or its client hangs.
const busySilence = time.Minute

// Listener is a net.Listener with a limit.
type Listener struct {
	net.Listener
	limit   int
	evicted func() // told each connection that was closed for another; may be nil
	now     func() time.Time

	mu   sync.Mutex
	open map[*conn]struct{} // guarded by mu
}

// New bounds the connections that l has open at once. evicted, if not nil, is called
// for each connection that is closed because of the limit, from Accept.
func New(l net.Listener, limit int, evicted func()) *Listener {
	if limit < 1 {
		panic("connlimit: a limit below 1")
	}
	if evicted == nil {
		evicted = func() {}
	}
	return &Listener{Listener: l, limit: limit, evicted: evicted, now: time.Now, open: map[*conn]struct{}{}}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, owner: l}
		c.last.Store(l.now().UnixNano())
		if l.admit(c) {
			return c, nil
		}
		raw.Close()
		l.evicted()
	}
}

// admit gives a connection its place, if need be that of another.
func (l *Listener) admit(c *conn) bool {
	l.mu.Lock()
	var victim *conn
	if len(l.open) >= l.limit {
		if victim = l.victim(); victim == nil {
			l.mu.Unlock()
			return false
		}
		delete(l.open, victim)
	}
	l.open[c] = struct{}{}
	l.mu.Unlock()
	if victim != nil {
		victim.Conn.Close()
		l.evicted()
	}
	return true
}

// victim finds the connection whose place is taken next, or nil. The caller holds mu.
func (l *Listener) victim() *conn {
	var idle, busy *conn
	for c := range l.open {
		oldest := &idle
		if c.busy.Load() > 0 {
			oldest = &busy
		}
		if *oldest == nil || c.last.Load() < (*oldest).last.Load() {
			*oldest = c
		}
	}
	if idle == nil && busy != nil && l.now().UnixNano()-busy.last.Load() >= int64(busySilence) {
		return busy
	}
	return idle
}

// conn is a connection that knows when it last moved a byte.
type conn struct {
	net.Conn
	owner *Listener
	last  atomic.Int64 // UnixNano of the last byte, or of Accept
	busy  atomic.Int32 // authentic requests on it
}

// NetConn returns the connection below, as crypto/tls.Conn does.
func (c *conn) NetConn() net.Conn { return c.Conn }

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.moved(n)
	return n, err
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.moved(n)
	return n, err
}

func (c *conn) moved(n int) {
	if n > 0 {
		c.last.Store(c.owner.now().UnixNano())
	}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.open, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// Busy marks a connection as carrying an authentic request until done is called. It
// may be any that wraps one of a Listener; of others it does nothing.
func Busy(c net.Conn) (done func()) {
	for c != nil {
		if known, ok := c.(*conn); ok {
			known.busy.Add(1)
			return func() { known.busy.Add(-1) }
		}
		wrapped, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = wrapped.NetConn()
	}
	return func() {}
}
