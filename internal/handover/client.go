package handover

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// dialEvery is the pause between two attempts to reach the server.
	dialEvery = 200 * time.Millisecond
	// answerTime bounds the wait for an answer: the server's own bound and some.
	answerTime = serviceTime + time.Second
	// restoreEvery is the pause before a server is told again what it has not taken.
	restoreEvery = 2 * time.Second
)

// Errors of a Client.
var (
	// ErrNotConnected: the node driver is away for a moment.
	ErrNotConnected = errors.New("handover: the node driver does not answer")
	// ErrDescriptors: this process may not have as many files open as are to be taken
	// over, which no waiting changes.
	ErrDescriptors = errors.New("handover: no descriptor is left for what the node driver passes: raise the limit of open files (LimitNOFILE=, --ulimit nofile=)")
)

// Client is byokd's end. It connects again when the server was away, tells it again
// what it is to hold, and what the limit is. It implements fs.Services.
type Client struct {
	path string
	log  *zap.Logger

	// order is held while held changes and the server is told so, that it is told in
	// that order: else a copy could reach a new server after its release. Before mu.
	order sync.Mutex

	// sending is held while a message is sent: a deadline is of the connection, and the
	// next sender's would give the one before more time.
	sending sync.Mutex

	mu      sync.Mutex
	conn    *net.UnixConn          // guarded by mu; nil while not connected
	ended   error                  // why there is no connection, where that is known; guarded by mu
	next    uint64                 // guarded by mu
	waiting map[uint64]chan answer // guarded by mu
	held    map[string]int         // copies of ours, guarded by mu
	untold  map[string]bool        // released while no server could be told; guarded by mu
	limit   int64                  // the last one asked for, 0 for none; guarded by mu

	mount string // set by Take
}

// Mount is what is served, for people.
func (c *Client) Mount() string { return c.mount }

type answer struct {
	reply
	fds []int
}

// Take connects to the server at path, waiting for one until ctx ends, and takes over
// what it holds: the FUSE device, and what a predecessor left. Both become the
// caller's. waits is called with the reason of a wait, and again when it is another.
// Where ctx goes on the error is final, such as ErrDescriptors.
func Take(ctx context.Context, path string, log *zap.Logger, waits func(error)) (c *Client, device int, held map[string]int, err error) {
	c = &Client{path: path, log: log, waiting: map[uint64]chan answer{}, held: map[string]int{}, untold: map[string]bool{}}
	for told := ""; ; {
		if held, err = c.take(ctx); err == nil {
			break
		}
		if errors.Is(err, errLostDescriptors) || errors.Is(err, unix.EMFILE) {
			return nil, -1, nil, fmt.Errorf("%w (%w)", ErrDescriptors, err)
		}
		if ctx.Err() == nil && err.Error() != told {
			waits(err)
			told = err.Error()
		}
		select {
		case <-time.After(dialEvery):
		case <-ctx.Done():
			return nil, -1, nil, errors.Join(ctx.Err(), err)
		}
	}
	for name, fd := range held {
		if err := c.remember(name, fd); err != nil {
			c.forget(held)
			return nil, -1, nil, fmt.Errorf("%w (%w)", ErrDescriptors, err)
		}
	}
	device = held[Device]
	delete(held, Device)
	return c, device, held, nil
}

// forget gives up the connection, what was taken over and the copies of it.
func (c *Client) forget(taken map[string]int) {
	c.drop(nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	closeAll(slices.Collect(maps.Values(c.held)))
	clear(c.held)
	closeAll(slices.Collect(maps.Values(taken)))
}

func (c *Client) take(ctx context.Context) (map[string]int, error) {
	if err := c.connect(ctx); err != nil {
		return nil, err
	}
	held := map[string]int{}
	for {
		a, err := c.ask(ctx, request{Op: opHeld, From: len(held)})
		if err == nil && len(a.fds) != len(a.Names) {
			err = fmt.Errorf("handover: %d descriptors for %d names", len(a.fds), len(a.Names))
		}
		if err != nil {
			closeAll(a.fds)
			c.forget(held)
			return nil, err
		}
		for i, name := range a.Names {
			held[name] = a.fds[i]
		}
		if !a.More {
			break
		}
	}
	if _, ok := held[Device]; !ok {
		c.forget(held)
		return nil, errors.New("the node driver has no FUSE device to pass: the mount's last byokd died while it was away itself")
	}
	return held, nil
}

// connect makes a connection and says hello.
func (c *Client) connect(ctx context.Context) error {
	var dialer net.Dialer
	made, err := dialer.DialContext(ctx, "unixpacket", c.path)
	if err != nil {
		return err
	}
	conn := made.(*net.UnixConn)
	c.mu.Lock()
	c.conn, c.ended = conn, nil
	c.mu.Unlock()
	go c.read(conn)
	a, err := c.ask(ctx, request{Op: opHello, Version: Version})
	if err != nil {
		c.drop(nil)
		return err
	}
	if c.mount == "" {
		c.mount = a.Mount // the first time; nobody else has c yet
	}
	return nil
}

// read passes the answers on until the connection ends.
func (c *Client) read(conn *net.UnixConn) {
	for {
		var a answer
		var err error
		a.fds, err = receive(conn, &a.reply)
		if err != nil {
			c.lost(conn, err)
			return
		}
		c.mu.Lock()
		to := c.waiting[a.ID]
		delete(c.waiting, a.ID)
		if to != nil {
			to <- a // there is room; under mu, so that await finds it or is not waiting any more
		}
		c.mu.Unlock()
		if to == nil {
			closeAll(a.fds) // nobody waits any more
		}
	}
}

// lost tells those who wait that no answer comes, and why.
func (c *Client) lost(conn *net.UnixConn, why error) {
	_ = conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != conn {
		return
	}
	c.conn, c.ended = nil, why
	for id, ch := range c.waiting {
		close(ch)
		delete(c.waiting, id)
	}
}

// drop ends the connection that there is.
func (c *Client) drop(why error) {
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		c.lost(conn, why)
	}
}

// notConnected is ErrNotConnected, with what ended the connection.
func (c *Client) notConnected() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended == nil {
		return ErrNotConnected
	}
	return fmt.Errorf("%w: %w", ErrNotConnected, c.ended)
}

// send sends a message within serviceTime, or gives the connection up: a server that
// takes nothing any more must not hold up who lets go of files.
func (c *Client) send(conn *net.UnixConn, r request, fds ...int) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	err := conn.SetWriteDeadline(time.Now().Add(serviceTime))
	if err == nil {
		err = send(conn, r, fds...)
	}
	if err != nil {
		c.lost(conn, err)
	}
	return err
}

// ask sends a request and waits for the answer.
func (c *Client) ask(ctx context.Context, r request, fds ...int) (answer, error) {
	id, to, err := c.tell(r, fds...)
	if err != nil {
		return answer{}, err
	}
	return c.await(ctx, id, to)
}

// tell sends a request, whose answer await takes.
func (c *Client) tell(r request, fds ...int) (id uint64, to chan answer, err error) {
	to = make(chan answer, 1)
	c.mu.Lock()
	conn := c.conn
	if conn == nil {
		c.mu.Unlock()
		return 0, nil, ErrNotConnected
	}
	c.next++
	r.ID = c.next
	c.waiting[r.ID] = to
	c.mu.Unlock()
	if err := c.send(conn, r, fds...); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", ErrNotConnected, err)
	}
	return r.ID, to, nil
}

// await waits for the answer to the request with the id.
func (c *Client) await(ctx context.Context, id uint64, to chan answer) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	select {
	case a, ok := <-to:
		switch {
		case !ok:
			return answer{}, c.notConnected()
		case a.Error != "":
			closeAll(a.fds)
			return answer{}, fmt.Errorf("the node driver says: %s", a.Error)
		}
		return a, nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
		select {
		case a := <-to: // it came at that moment, and its descriptors are ours
			closeAll(a.fds)
		default:
		}
		return answer{}, ctx.Err()
	}
}

// Stay connects again whenever the server was away, and tells it what it is to know
// until it has taken all of it, until ctx ends.
func (c *Client) Stay(ctx context.Context) {
	tick := time.NewTicker(dialEvery)
	defer tick.Stop()
	informed := c.connection() // the connection whose server knows all
	var failed time.Time
	told := ""
	for {
		select {
		case <-ctx.Done():
			c.drop(nil)
			return
		case <-tick.C:
		}
		conn := c.connection()
		if conn != nil && (conn == informed || time.Since(failed) < restoreEvery) {
			continue
		}
		if conn == nil {
			if c.connect(ctx) != nil {
				continue
			}
			conn = c.connection()
		}
		if err := c.restore(ctx); err != nil {
			failed = time.Now()
			if ctx.Err() == nil && err.Error() != told {
				c.log.Warn("the node driver is back, but has not taken all that it is to hold; it is told again", zap.Error(err))
				told = err.Error()
			}
			continue
		}
		informed, told = conn, ""
		c.log.Info("the node driver is back")
	}
}

func (c *Client) connection() *net.UnixConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn
}

// restore tells a new server what the old one knew, and one that was there all the time
// what it could not be told.
func (c *Client) restore(ctx context.Context) error {
	c.mu.Lock()
	limit := c.limit
	names, untold := slices.Collect(maps.Keys(c.held)), slices.Collect(maps.Keys(c.untold))
	c.mu.Unlock()
	for _, name := range untold {
		c.releaseAgain(name)
	}
	for _, name := range names {
		if err := c.holdAgain(ctx, name); err != nil {
			return err
		}
	}
	if limit == 0 {
		return nil
	}
	_, err := c.ask(ctx, request{Op: opLimit, Bytes: limit})
	return err
}

// holdAgain passes a new server the copy of what is called name, unless it was released
// meanwhile.
func (c *Client) holdAgain(ctx context.Context, name string) error {
	c.order.Lock()
	c.mu.Lock()
	fd, known := c.held[name]
	c.mu.Unlock()
	if !known {
		c.order.Unlock()
		return nil
	}
	id, to, err := c.tell(request{Op: opHold, Name: name}, fd)
	c.order.Unlock()
	if err != nil {
		return err
	}
	_, err = c.await(ctx, id, to)
	return err
}

func duplicate(fd int) (int, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	return dup, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
}

// remember keeps a copy of a descriptor for the next server.
func (c *Client) remember(name string, fd int) error {
	dup, err := duplicate(fd)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if before, known := c.held[name]; known {
		unix.Close(before)
	}
	c.held[name] = dup
	delete(c.untold, name)
	return nil
}

// LimitDirty implements fs.Services.
func (c *Client) LimitDirty(bytes int64) error {
	c.mu.Lock()
	c.limit = bytes
	c.mu.Unlock()
	_, err := c.ask(context.Background(), request{Op: opLimit, Bytes: bytes})
	return err
}

// Flush implements fs.Services.
func (c *Client) Flush(ctx context.Context) {
	if _, err := c.ask(ctx, request{Op: opFlush}); err != nil && ctx.Err() == nil {
		c.log.Warn("the kernel could not be asked to write back: a freeze takes longer", zap.Error(err))
	}
}

// Stir implements fs.Services.
func (c *Client) Stir(ctx context.Context, more func() bool) {
	for more() && ctx.Err() == nil {
		if _, err := c.ask(ctx, request{Op: opStir}); err != nil {
			return
		}
	}
}

// Killed implements fs.Services. While the server is away nobody is known to be killed.
func (c *Client) Killed(threads []uint32) []uint32 {
	const most = 4096 // a message holds as many
	var killed []uint32
	for len(threads) > 0 {
		n := min(len(threads), most)
		a, err := c.ask(context.Background(), request{Op: opKilled, Threads: threads[:n]})
		if err != nil {
			return killed
		}
		killed, threads = append(killed, a.Threads...), threads[n:]
	}
	return killed
}

// Hold implements fs.Services.
func (c *Client) Hold(name string, fd int) error {
	c.order.Lock()
	if err := c.remember(name, fd); err != nil {
		c.order.Unlock()
		return err
	}
	id, to, err := c.tell(request{Op: opHold, Name: name}, fd)
	c.order.Unlock()
	if err != nil {
		return err
	}
	_, err = c.await(context.Background(), id, to)
	return err
}

// Release implements fs.Services. It does not wait for an answer. The device is held
// for as long as there is a mount.
func (c *Client) Release(name string) {
	if name == Device {
		return
	}
	c.order.Lock()
	defer c.order.Unlock()
	c.mu.Lock()
	fd, known := c.held[name]
	delete(c.held, name)
	if known {
		c.untold[name] = true
	}
	c.mu.Unlock()
	if known {
		unix.Close(fd)
	}
	c.tellReleased(name)
}

// releaseAgain tells the server of a release that it was not told of, unless the name
// is held again.
func (c *Client) releaseAgain(name string) {
	c.order.Lock()
	defer c.order.Unlock()
	c.mu.Lock()
	untold := c.untold[name]
	c.mu.Unlock()
	if untold {
		c.tellReleased(name)
	}
}

// tellReleased tells the server of a release, if it is there; order is held.
func (c *Client) tellReleased(name string) {
	conn := c.connection()
	if conn == nil || c.send(conn, request{Op: opRelease, Name: name}) != nil {
		return
	}
	c.mu.Lock()
	delete(c.untold, name)
	c.mu.Unlock()
}
