package objstore

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errClientLeft is the cause of a context that ended because the client closed
// its connection.
var errClientLeft = errors.New("the client left")

// watchEvery is how often a connection is looked at: a client that leaves has to
// be noticed within a second, and one poll costs about a microsecond.
const watchEvery = 300 * time.Millisecond

// connKey is the context key of the request's connection.
type connKey struct{}

// rawConn returns the connection below TLS.
func rawConn(c net.Conn) net.Conn {
	for {
		wrapped, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return c
		}
		c = wrapped.NetConn()
	}
}

// watchClient calls gone once when the peer of the request's connection has
// closed it. net/http notices that by itself only after the request body was
// read to its end, which a request waiting for a key does not do. As long as the peer
// is there, stays is called every watchEvery. The returned function ends the watch;
// gone or stays may still run once while it does.
func watchClient(ctx context.Context, gone, stays func()) (stop func()) {
	conn, _ := ctx.Value(connKey{}).(net.Conn)
	if conn == nil {
		return func() {}
	}
	sc, ok := rawConn(conn).(syscall.Conn)
	if !ok {
		return func() {}
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return func() {}
	}
	w := &watch{conn: rawConn(conn), raw: raw, gone: gone, stays: stays}
	w.arm()
	return w.stop
}

// watch polls one connection until it is stopped or the peer is gone.
type watch struct {
	conn  net.Conn
	raw   syscall.RawConn
	gone  func()
	stays func()
	looks int // owned by the timer
	mu    sync.Mutex
	timer *time.Timer // guarded by mu
	ended bool        // guarded by mu
}

func (w *watch) arm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	if w.timer == nil {
		w.timer = time.AfterFunc(watchEvery, w.look)
		return
	}
	w.timer.Reset(watchEvery)
}

func (w *watch) look() {
	w.looks++
	// Asking for the peer's socket costs some ten times a poll: every other time.
	if hungUp(w.raw) || w.looks%2 == 0 && peerClosed(w.conn) {
		w.gone()
		return
	}
	w.stays()
	w.arm()
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.timer.Stop()
}

// hungUp reports whether the peer has shut the connection down, also when bytes
// it sent before are still unread.
func hungUp(raw syscall.RawConn) bool {
	var n int
	var events int16
	err := raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, _ = unix.Poll(fds, 0)
		events = fds[0].Revents
	})
	if err != nil {
		return true // closed on our side: nobody is left to answer
	}
	return n > 0 && events&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
}
