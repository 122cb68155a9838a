package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

const testARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

var testSecret = bytes.Repeat([]byte("secret! "), 4)

func TestHintsAreAuthenticated(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	h := hint{sender: id{1}, key: idOf(testARN), at: now}
	good := h.seal(testSecret)
	if len(good) != hintSize || bytes.Contains(good, []byte(testARN)) {
		t.Errorf("a hint of %d bytes", len(good))
	}
	if got, err := open(testSecret, good, now.Add(time.Second)); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	tests := map[string]struct {
		b    []byte
		at   time.Time
		want error
	}{
		"empty":        {nil, now, errForm},
		"short":        {good[:hintSize-1], now, errForm},
		"long":         {append(bytes.Clone(good), 0), now, errForm},
		"other magic":  {append([]byte("byokdH2"), good[len(magic):]...), now, errForm},
		"other secret": {h.seal(bytes.Repeat([]byte("x"), 32)), now, errMAC},
		"old":          {good, now.Add(freshness + time.Second), errStale},
		"early":        {good, now.Add(-freshness - time.Second), errStale},
	}
	for name, test := range tests {
		if _, err := open(testSecret, test.b, test.at); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	for i := range good { // no byte can be changed
		changed := bytes.Clone(good)
		changed[i] ^= 1
		if _, err := open(testSecret, changed, now); err == nil {
			t.Errorf("a hint with another byte %d is taken", i)
		}
	}
}

// member is one process of a test's fleet.
type member struct {
	*Member
	fleet  *Fleet
	socket *net.UDPConn
	looks  atomic.Int64
	looked chan struct{}
	logs   *observer.ObservedLogs
}

// newFleet runs n members on loopback, each knowing all.
func newFleet(t *testing.T, n int) []*member {
	t.Helper()
	var all []*member
	var peers []string
	for range n {
		socket, err := Listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, &member{socket: socket, looked: make(chan struct{}, 100)})
		peers = append(peers, socket.LocalAddr().String())
	}
	for _, m := range all {
		core, logs := observer.New(zapcore.WarnLevel)
		m.logs = logs
		var err error
		if m.fleet, err = Join(Options{Peers: peers, Socket: m.socket, Secret: testSecret, Logger: zap.New(core)}); err != nil {
			t.Fatal(err)
		}
		m.Member = m.fleet.Member(testARN, func() {
			m.looks.Add(1)
			m.looked <- struct{}{}
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- m.fleet.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // until it has looked its peers up
			if _, size := m.Place(); size == n {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the peers are not found")
			}
		}
	}
	return all
}

func (m *member) mustLook(t *testing.T) {
	t.Helper()
	select {
	case <-m.looked:
	case <-time.After(10 * time.Second):
		t.Fatal("no hint arrived")
	}
}

// Everybody but the sender looks, once.
func TestHintsReachTheOthers(t *testing.T) {
	all := newFleet(t, 4)
	ranks := map[int]bool{}
	for _, m := range all {
		rank, _ := m.Place()
		ranks[rank] = true
	}
	if len(ranks) != len(all) {
		t.Errorf("%d members have %d places", len(all), len(ranks))
	}
	all[0].Hint()
	for _, m := range all[1:] {
		m.mustLook(t)
	}
	all[0].Hint() // within a second of the first
	all[1].Hint() // was hinted: passes it on
	other := all[2].fleet.Member("arn:aws:kms:eu-central-1:111122223333:key/other", func() {})
	other.Hint() // nobody else watches that key; and it shows that what came before was heard
	flush(t, all)
	for i, m := range all {
		if n := m.looks.Load(); n != 1 && i > 0 || n != 0 && i == 0 {
			t.Errorf("member %d looked %d times", i, n)
		}
	}
}

// flush waits until every member has heard what was sent to it before.
func flush(t *testing.T, all []*member) {
	t.Helper()
	for _, m := range all {
		done := make(chan struct{}, 1)
		name := fmt.Sprintf("flush %p", m)
		m.fleet.Member(name, func() { done <- struct{}{} })
		for sent := false; !sent; { // datagrams may be lost, hints are limited: say it again
			m.fleet.mu.Lock()
			m.fleet.members[idOf(name)].hinted = time.Time{}
			m.fleet.mu.Unlock()
			from := all[0]
			if from == m {
				from = all[1]
			}
			message := hint{sender: from.fleet.self, key: idOf(name), at: time.Now()}.seal(testSecret)
			if _, err := from.socket.WriteToUDPAddrPort(message, addressOf(m)); err != nil {
				t.Fatal(err)
			}
			select {
			case <-done:
				sent = true
			case <-time.After(time.Second):
			}
		}
	}
}

func addressOf(m *member) netip.AddrPort { return m.socket.LocalAddr().(*net.UDPAddr).AddrPort() }

// A flood of hints, forged and true, causes one look a second at most; what is
// forged is counted.
func TestFloodIsLimited(t *testing.T) {
	all := newFleet(t, 2)
	forged := hint{sender: id{9}, key: idOf(testARN), at: time.Now()}.seal(bytes.Repeat([]byte("x"), SecretSize))
	genuine := hint{sender: id{9}, key: idOf(testARN), at: time.Now()}.seal(testSecret)
	began := time.Now()
	for range 200 {
		for _, b := range [][]byte{forged, genuine, []byte("noise")} {
			if _, err := all[0].socket.WriteToUDPAddrPort(b, addressOf(all[1])); err != nil {
				t.Fatal(err)
			}
		}
	}
	flush(t, all)
	if n, most := all[1].looks.Load(), int64(time.Since(began)/hintPause)+1; n < 1 || n > most {
		t.Errorf("%d looks, want 1 to %d", n, most)
	}
	all[1].fleet.tellRefused()
	if all[1].logs.FilterMessage("datagrams that are not authentic hints were dropped").Len() != 2 {
		t.Errorf("forged datagrams are not told: %v", all[1].logs.All())
	}
}

func TestJoinChecksItsOptions(t *testing.T) {
	socket, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for name, o := range map[string]Options{
		"no port":      {Peers: []string{"byokd"}, Secret: testSecret},
		"port name":    {Peers: []string{"byokd:http"}, Secret: testSecret},
		"no host":      {Peers: []string{":9182"}, Secret: testSecret},
		"short secret": {Peers: []string{"byokd:9182"}, Secret: testSecret[:SecretSize-1]},
	} {
		o.Socket = socket
		if _, err := Join(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// When the names cannot be looked up, the members known stay.
func TestLookupFailureKeepsTheMembers(t *testing.T) {
	socket, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	broken := false
	f, err := Join(Options{Peers: []string{"byokd:9182"}, Socket: socket, Secret: testSecret,
		Lookup: func(context.Context, string) ([]netip.Addr, error) {
			if broken {
				return nil, errors.New("no such host")
			}
			return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::ffff:192.0.2.2"), netip.MustParseAddr("192.0.2.1")}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	m := f.Member(testARN, func() {})
	f.lookUp(t.Context())
	if _, size := m.Place(); size != 2 {
		t.Errorf("%d members, want 2", size)
	}
	broken = true
	f.lookUp(t.Context())
	if rank, size := m.Place(); size != 2 || rank < 0 || rank > 1 {
		t.Errorf("place %d of %d after a failed look-up", rank, size)
	}
}
