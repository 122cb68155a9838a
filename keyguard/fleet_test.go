package keyguard

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/keyguard/fleet"
)

// crowdKMS is one key that everybody asks. Answers take some milliseconds.
type crowdKMS struct {
	mu       sync.Mutex
	disabled bool        // mu
	calls    []time.Time // mu
}

func (k *crowdKMS) ARN() string { return fakeARN }

func (k *crowdKMS) answer(ctx context.Context, op string) error {
	if op != "DescribeKey" { // which has a quota of its own
		k.mu.Lock()
		k.calls = append(k.calls, time.Now())
		k.mu.Unlock()
	}
	if err := sleep(ctx, 5*time.Millisecond+rand.N(10*time.Millisecond)); err != nil {
		return &KMSError{Op: op, State: Unreachable, Reason: ReasonTimeout, Err: err}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.disabled && op != "DescribeKey" {
		return &KMSError{Op: op, State: Disabled, Reason: ReasonKeyDisabled, Err: errors.New("disabled")}
	}
	return nil
}

func (k *crowdKMS) GenerateProbe(ctx context.Context, _ Binding) ([]byte, Receipt, error) {
	return []byte("probe"), Receipt{}, k.answer(ctx, "GenerateDataKeyWithoutPlaintext")
}
func (k *crowdKMS) Probe(ctx context.Context, _ []byte, _ Binding) (Receipt, error) {
	return Receipt{}, k.answer(ctx, "Decrypt")
}
func (k *crowdKMS) GenerateDataKey(context.Context, Binding, func([]byte) error) ([]byte, Receipt, error) {
	panic("no pod of the simulation makes data keys")
}
func (k *crowdKMS) Unwrap(context.Context, []byte, Binding, func([]byte) error) (Receipt, error) {
	panic("no pod of the simulation unwraps keys")
}
func (k *crowdKMS) Describe(ctx context.Context) (Description, error) {
	err := k.answer(ctx, "DescribeKey")
	k.mu.Lock()
	defer k.mu.Unlock()
	state := Enabled
	if k.disabled {
		state = Disabled
	}
	return Description{State: state}, err
}

func (k *crowdKMS) set(disabled bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disabled = disabled
}

// rate is how many calls a second there were in a span, and the most in 100 ms of it.
func (k *crowdKMS) rate(from, to time.Time) (mean float64, peak int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	slots := map[int64]int{}
	n := 0
	for _, at := range k.calls {
		if at.Before(from) || !at.Before(to) {
			continue
		}
		n++
		slot := at.Sub(from).Milliseconds() / 100
		slots[slot]++
		peak = max(peak, slots[slot])
	}
	return float64(n) / to.Sub(from).Seconds(), peak
}

// wire carries the datagrams of the simulation: a millisecond each, some are lost.
type wire struct {
	lost    float64
	mu      sync.Mutex
	sockets map[netip.AddrPort]*crowdSocket // mu
	sent    int                             // mu
}

// crowdSocket is one pod's end of the wire.
type crowdSocket struct {
	wire   *wire
	local  netip.AddrPort
	in     chan datagram
	closed chan struct{}
	once   sync.Once
}

type datagram struct {
	from netip.AddrPort
	b    []byte
}

func (w *wire) socket(local netip.AddrPort) *crowdSocket {
	s := &crowdSocket{wire: w, local: local, in: make(chan datagram, 64), closed: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sockets[local] = s
	return s
}

func (s *crowdSocket) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(s.local) }

func (s *crowdSocket) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

func (s *crowdSocket) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	select {
	case d := <-s.in:
		return copy(b, d.b), d.from, nil
	case <-s.closed:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (s *crowdSocket) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	s.wire.mu.Lock()
	defer s.wire.mu.Unlock()
	s.wire.sent++
	target := s.wire.sockets[to]
	if target == nil || rand.Float64() < s.wire.lost {
		return len(b), nil
	}
	time.AfterFunc(time.Millisecond, func() {
		select {
		case target.in <- datagram{s.local, b}:
		default: // the receive buffer is full
		}
	})
	return len(b), nil
}

// crowd is a design of the simulation.
type crowd struct {
	name    string
	hints   bool
	stretch time.Duration
	lost    float64
}

// crowdFigures is what a design does.
type crowdFigures struct {
	open, frozen        float64 // KMS calls a second
	peak                int     // in any 100 ms from the change of the key on
	first, last, reopen time.Duration
	datagrams           int
}

// TestThousandPodsOnOneKey lets a thousand guards watch one key, in virtual time:
// each for itself, with hints, and with hints and stretched intervals. It prints
// what each design asks of KMS and how soon the fleet has closed.
func TestThousandPodsOnOneKey(t *testing.T) {
	designs := []crowd{
		{name: "each for itself (naive)"},
		{name: "hints", hints: true},
		{name: "hints, stretched to 10 s", hints: true, stretch: 10 * time.Second},
		{name: "same, 30 % of hints lost", hints: true, stretch: 10 * time.Second, lost: 0.3},
	}
	var text strings.Builder
	results := map[string]crowdFigures{}
	for _, c := range designs {
		synctest.Test(t, func(t *testing.T) { results[c.name] = c.simulate(t) })
		o := results[c.name]
		fmt.Fprintf(&text, "%-26s %6.0f %6.0f %10d %9v %9v %9v %10d\n", c.name, o.open, o.frozen, o.peak,
			o.first.Round(time.Millisecond), o.last.Round(time.Millisecond), o.reopen.Round(time.Millisecond), o.datagrams)
	}
	t.Logf("%d pods on one key\n%-26s %6s %6s %10s %9s %9s %9s %10s\n%s", crowdSize, "design",
		"KMS/s", "frozen", "peak/100ms", "first", "last", "all open", "datagrams", &text)

	naive, hinted, stretched, lossy := results[designs[0].name], results[designs[1].name], results[designs[2].name], results[designs[3].name]
	if hinted.last >= naive.last/2 {
		t.Errorf("with hints the last pod closes after %v, without after %v", hinted.last, naive.last)
	}
	if stretched.open > naive.open/5 {
		t.Errorf("stretched, the fleet asks %.0f times a second; each for itself %.0f", stretched.open, naive.open)
	}
	if stretched.last > interval+time.Second {
		t.Errorf("stretched, the last pod closes after %v", stretched.last)
	}
	if lossy.last > 10*time.Second+time.Second { // its own interval; it will be far less
		t.Errorf("with lost hints, the last pod closes after %v", lossy.last)
	}
	for name, o := range results {
		if o.peak > 550 { // 5500 a second is the smallest quota of AWS KMS
			t.Errorf("%s: %d calls in 100 ms", name, o.peak)
		}
		if o.reopen > thawLimit {
			t.Errorf("%s: all open %v after the key was usable; promised %v", name, o.reopen, thawLimit)
		}
	}
}

// simulate runs one design: half a minute open, a freeze, some seconds frozen, a thaw.
func (c crowd) simulate(t *testing.T) (o crowdFigures) {
	kms := &crowdKMS{}
	w := &wire{lost: c.lost, sockets: map[netip.AddrPort]*crowdSocket{}}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	guards := make([]*Guard, crowdSize)
	addresses := make([]netip.Addr, crowdSize)
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
	}
	for i := range guards {
		options := Options{Name: "pod", Probe: []byte("probe"), Clock: &bubbleClock{}}
		var f *fleet.Fleet
		if c.hints {
			f = c.join(t, w, addresses, i)
			running.Go(func() { f.Run(ctx) })
			member := f.Member(fakeARN, func() { guards[i].Poke() })
			options.Fleet, options.StretchTo = member, c.stretch
		}
		g, err := New(kms, options)
		if err != nil {
			t.Fatal(err)
		}
		g.collect = func(context.Context) error { return nil }
		guards[i] = g
	}
	for _, g := range guards {
		time.Sleep(rand.N(20 * time.Millisecond)) // pods start one after the other, in ten seconds
		running.Go(func() { g.Run(ctx) })
	}
	time.Sleep(20 * time.Second) // until everybody has found its place
	from := time.Now()
	time.Sleep(10 * time.Second)
	o.open, _ = kms.rate(from, time.Now())

	changed := time.Now()
	kms.set(true)
	o.first, o.last = reaching(guards, Frozen, changed)
	_, o.peak = kms.rate(changed, time.Now())
	time.Sleep(time.Second)
	from = time.Now()
	time.Sleep(3 * time.Second)
	o.frozen, _ = kms.rate(from, time.Now())

	restored := time.Now()
	kms.set(false)
	_, o.reopen = reaching(guards, Open, restored)
	w.mu.Lock()
	o.datagrams = w.sent
	w.mu.Unlock()
	cancel()
	running.Wait()
	return o
}

// join makes pod i a member.
func (c crowd) join(t *testing.T, w *wire, addresses []netip.Addr, i int) *fleet.Fleet {
	t.Helper()
	f, err := fleet.Join(fleet.Options{Peers: []string{"pods:9182"}, Socket: w.socket(netip.AddrPortFrom(addresses[i], 9182)),
		Secret: []byte("a secret of thirty-two bytes ...."),
		Lookup: func(context.Context, string) ([]netip.Addr, error) { return slices.Clone(addresses), nil }})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// reaching waits until every gate is in a state, and tells when the first and the last was.
func reaching(guards []*Guard, gate GateState, since time.Time) (first, last time.Duration) {
	first = time.Hour
	for _, g := range guards {
		for {
			changed := g.Changed() // before Status, so that no change falls between
			if g.Status().Gate == gate {
				break
			}
			<-changed
		}
		at := g.Status().Since.Sub(since)
		first, last = min(first, at), max(last, at)
	}
	return first, last
}

// A member of a fleet comes to its moment of the interval with one shorter pause,
// and stays there, also when its timers are a little early or late.
func TestStaggerOnlyShortens(t *testing.T) {
	const size, interval = 7, 10 * time.Second
	for rank := range size {
		now := time.Unix(1_700_000_000, 123_456_789)
		slot := interval * time.Duration(rank) / size
		for i := range 50 {
			d := staggered(interval, now, rank, size)
			if d > interval || d <= 0 || i > 0 && d < interval-interval/50 {
				t.Fatalf("pause %d of member %d is %v", i, rank, d)
			}
			now = now.Add(d + rand.N(20*time.Millisecond) - 10*time.Millisecond)
			off := (time.Duration(now.UnixNano()) - slot + interval/2) % interval
			if off -= interval / 2; off.Abs() > interval/40 {
				t.Fatalf("after pause %d, member %d of %d is %v off its moment", i, rank, size, off)
			}
		}
	}
}
