package fleet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// lookupEvery is how old the list of members may become. A member that is not
	// listed yet probes on its own, as all did without a fleet.
	lookupEvery   = 15 * time.Second
	lookupTimeout = 5 * time.Second

	// hintPause bounds what hints may cause: one probe a second for each key, and
	// one round of hints to everybody a second.
	hintPause = time.Second
	// Who was hinted in the last while passes the hint on to a few only, or a thousand
	// members would send a million datagrams. With gossip of them, a member misses
	// all hints with 30 % lost once in 60,000 times.
	lately = 5 * time.Second
	gossip = 8
	// spread of the probes that one hint causes, for each member: a thousand of them
	// ask within 300 ms, 3300 a second, below the smallest quota of AWS KMS.
	spread = 300 * time.Microsecond

	// SecretSize is the least length of the shared secret, in bytes.
	SecretSize = 32

	maxMembers = 10_000
)

// Socket is what a Fleet needs of a *net.UDPConn.
type Socket interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	LocalAddr() net.Addr // a *net.UDPAddr
	Close() error
}

// Listen opens the UDP socket for hints.
func Listen(address string) (*net.UDPConn, error) {
	resolved, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return nil, err
	}
	return net.ListenUDP("udp", resolved)
}

// Options of a Fleet. Lookup and Logger may be left out.
type Options struct {
	// Peers are the DNS names of the members, each with the port at which they
	// listen: name:port. One name is enough where it has everybody's address, as a
	// headless service has.
	Peers []string
	// Socket is where hints come in and go out. Run closes it.
	Socket Socket
	// Secret authenticates hints; SecretSize bytes at least. It is copied.
	Secret []byte
	// Lookup finds the members' addresses; default: DNS.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	Logger *zap.Logger
}

// Fleet is the membership of one process.
type Fleet struct {
	o      Options
	port   uint16 // our own
	self   id
	owned  map[netip.Addr]bool // addresses of this machine
	places atomic.Pointer[places]

	mu      sync.Mutex
	members map[id]*Member // mu; by key
	refused map[error]int  // mu; datagrams that were not hints, since the last look-up
}

// places is one look at the list of members. It is immutable.
type places struct {
	others []netip.AddrPort
	rank   int
	size   int
}

// Join makes a member. Run must be called for anything to happen.
func Join(o Options) (*Fleet, error) {
	for _, peer := range o.Peers {
		if _, _, err := hostPort(peer); err != nil {
			return nil, fmt.Errorf("fleet: peers: %q: %w", peer, err)
		}
	}
	if len(o.Secret) < SecretSize {
		return nil, fmt.Errorf("fleet: the secret has %d bytes; at least %d are needed", len(o.Secret), SecretSize)
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Lookup == nil {
		o.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	o.Secret = slices.Clone(o.Secret)
	f := &Fleet{o: o, owned: map[netip.Addr]bool{},
		members: map[id]*Member{}, refused: map[error]int{}}
	rand.Read(f.self[:])
	f.places.Store(&places{size: 1})
	return f, f.ownAddresses()
}

// hostPort splits name:port.
func hostPort(peer string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(peer)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", 0, errors.New("write name:port")
	}
	return host, uint16(n), nil
}

// ownAddresses finds out which of the members' addresses is ours.
func (f *Fleet) ownAddresses() error {
	local := f.o.Socket.LocalAddr().(*net.UDPAddr).AddrPort()
	f.port = local.Port()
	if !local.Addr().IsUnspecified() {
		f.owned[local.Addr().Unmap()] = true
		return nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("fleet: the addresses of this machine: %w", err)
	}
	for _, a := range all {
		if network, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(network.IP); ok {
				f.owned[ip.Unmap()] = true
			}
		}
	}
	return nil
}

// Run looks the members up and hears hints until ctx ends; then it closes the
// socket. The error is that of a socket that broke.
func (f *Fleet) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { f.o.Socket.Close() })
	defer stop()
	var looking sync.WaitGroup
	looking.Go(func() { f.look(ctx) })
	defer looking.Wait()
	defer cancel()
	buf := make([]byte, hintSize+1) // one more, so that a longer datagram is not taken for a hint
	for {
		n, from, err := f.o.Socket.ReadFromUDPAddrPort(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("fleet: the socket ended: %w", err)
		case err == nil:
			f.hear(buf[:n], from)
		}
	}
}

// look keeps the list of members current.
func (f *Fleet) look(ctx context.Context) {
	for {
		f.lookUp(ctx)
		timer := time.NewTimer(lookupEvery - mathrand.N(lookupEvery/3))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// lookUp asks for the members once. When that fails, those known stay.
func (f *Fleet) lookUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	f.tellRefused()
	var all []netip.AddrPort
	for _, peer := range f.o.Peers {
		host, port, err := hostPort(peer)
		if err != nil {
			panic(err) // Join has checked it
		}
		addresses, err := f.o.Lookup(ctx, host)
		if err != nil {
			if ctx.Err() != context.Canceled {
				f.o.Logger.Warn("the peers cannot be looked up; those known stay", zap.String("peers", peer), zap.Error(err))
			}
			return
		}
		for _, a := range addresses {
			all = append(all, netip.AddrPortFrom(a.Unmap(), port))
		}
	}
	f.place(all)
}

// place finds our place among all members.
func (f *Fleet) place(all []netip.AddrPort) {
	slices.SortFunc(all, netip.AddrPort.Compare)
	all = slices.Compact(all)
	if len(all) > maxMembers {
		f.o.Logger.Warn("too many peers; the rest is not hinted", zap.Int("peers", len(all)), zap.Int("limit", maxMembers))
		all = all[:maxMembers]
	}
	next := &places{size: max(len(all), 1), rank: -1}
	for i, a := range all {
		if f.owned[a.Addr()] && a.Port() == f.port && next.rank < 0 {
			next.rank = i
			continue
		}
		next.others = append(next.others, a)
	}
	if next.rank < 0 { // not listed (yet): any place is as good as another
		next.rank = int(f.self[0])<<8 | int(f.self[1])
		next.rank %= next.size
	}
	f.places.Store(next)
}

// tellRefused logs what came to the port that was no hint.
func (f *Fleet) tellRefused() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for err, n := range f.refused {
		f.o.Logger.Warn("datagrams that are not authentic hints were dropped", zap.Error(err), zap.Int("count", n))
	}
	clear(f.refused)
}

// hear takes one datagram.
func (f *Fleet) hear(b []byte, from netip.AddrPort) {
	h, err := open(f.o.Secret, b, time.Now())
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.refused[err]++
		return
	}
	m := f.members[h.key]
	if h.sender == f.self || m == nil {
		return // our own, or about a key that we do not watch
	}
	now := time.Now()
	if now.Sub(m.hinted) < hintPause || now.Sub(m.told) < hintPause {
		return // looking, or has looked
	}
	m.hinted = now
	f.o.Logger.Debug("a peer saw a refusal; looking", zap.Stringer("peer", from))
	time.AfterFunc(mathrand.N(spread*time.Duration(f.places.Load().size)+1), m.look)
}

// Member is the part of a fleet that watches one key.
type Member struct {
	fleet *Fleet
	key   id
	look  func()

	hinted time.Time // fleet.mu; when a hint was last acted upon
	told   time.Time // fleet.mu; when we last hinted
}

// Member registers a guard of the key keyARN. look is called, in a goroutine of
// its own, when a peer has hinted: it must make the guard probe and not block.
func (f *Fleet) Member(keyARN string, look func()) *Member {
	m := &Member{fleet: f, key: idOf(keyARN), look: look}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members[m.key] = m
	return m
}

// Place tells how many members there are and which of them this one is, from 0.
func (m *Member) Place() (rank, size int) {
	p := m.fleet.places.Load()
	return p.rank, p.size
}

// Hint tells all others to look, or a few of them if one has just told us; at most
// once a second.
func (m *Member) Hint() {
	f := m.fleet
	now := time.Now()
	f.mu.Lock()
	again, first := now.Sub(m.told) < hintPause, now.Sub(m.hinted) >= lately
	if !again {
		m.told = now
	}
	f.mu.Unlock()
	if again {
		return
	}
	others := f.places.Load().others
	if !first && len(others) > gossip {
		few := make([]netip.AddrPort, gossip)
		for i := range few {
			few[i] = others[mathrand.IntN(len(others))]
		}
		others = few
	}
	message := hint{sender: f.self, key: m.key, at: now}.seal(f.o.Secret)
	go func() {
		for _, to := range others {
			_, _ = f.o.Socket.WriteToUDPAddrPort(message, to) // lost is lost: they probe on their own
		}
	}()
}
