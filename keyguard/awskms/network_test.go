package awskms

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// middlebox stands between a client and a server and may lose what passes, as a firewall
// that forgets connections does: nobody is told.
type middlebox struct {
	net.Listener
	to    string
	loses atomic.Bool // everything of every connection, new ones too

	mu     sync.Mutex
	conns  map[net.Conn]*atomic.Bool // mu; from clients; true: all of it is lost
	wasted map[net.Conn]bool         // mu; those that were asked something since
	all    sync.WaitGroup
}

// newMiddlebox starts one before the rig's front.
func newMiddlebox(t *testing.T, w *rig) *middlebox {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &middlebox{Listener: listener, to: w.front.Listener.Addr().String(), conns: map[net.Conn]*atomic.Bool{}}
	m.all.Go(m.serve)
	t.Cleanup(func() {
		listener.Close()
		m.mu.Lock()
		for conn := range m.conns {
			conn.Close()
		}
		m.mu.Unlock()
		m.all.Wait()
	})
	w.endpoint = "https://" + listener.Addr().String()
	w.watch(w.arn)
	return m
}

func (m *middlebox) serve() {
	for {
		client, err := m.Accept()
		if err != nil {
			return
		}
		lost := new(atomic.Bool)
		m.mu.Lock()
		m.conns[client] = lost
		m.mu.Unlock()
		m.all.Go(func() { m.join(client, lost) })
	}
}

// join passes bytes on between a client and the server until one of them leaves.
func (m *middlebox) join(client net.Conn, lost *atomic.Bool) {
	defer client.Close()
	server, err := net.Dial("tcp", m.to)
	if err != nil {
		return
	}
	var both sync.WaitGroup
	pass := func(to, from net.Conn) {
		defer to.Close()
		block := make([]byte, 4096)
		for {
			n, err := from.Read(block)
			if err != nil {
				return
			}
			if lost.Load() || m.loses.Load() {
				if from == client && n > farewell {
					m.tried(client)
				}
				continue
			}
			if _, err := to.Write(block[:n]); err != nil {
				return
			}
		}
	}
	both.Go(func() { pass(client, server) })
	both.Go(func() { pass(server, client) })
	both.Wait()
}

// forget loses what passes on the connections that there are, and not on later ones.
func (m *middlebox) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wasted = map[net.Conn]bool{}
	for _, lost := range m.conns {
		lost.Store(true)
	}
}

// farewell is more than TLS says when it closes a connection, and less than any question.
const farewell = 100

// tried notes that a client has asked something on a lost connection.
func (m *middlebox) tried(client net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wasted != nil {
		m.wasted[client] = true
	}
}

// fooled counts the connections that were asked something after they were forgotten.
func (m *middlebox) fooled() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.wasted)
}

// TestSilentNetwork: where connections are taken and nothing comes back, or half of it,
// work goes on for the lease, then waits, and goes on by itself.
func TestSilentNetwork(t *testing.T) {
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for name, set := range map[string]func(*rig, *middlebox, bool){
		"lost after the connection":    func(_ *rig, m *middlebox, on bool) { m.loses.Store(on) },
		"lost in the midst of answers": func(w *rig, _ *middlebox, on bool) { w.halves.Store(on) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newRig(t, server.Server)
			m := newMiddlebox(t, w)
			w.open()
			load := w.startLoad()
			for range 2 {
				set(w, m, true)
				w.awaitTold(behaviour{name: name, state: keyguard.Unreachable, reason: keyguard.ReasonTimeout, cause: "does not answer", nextStep: goesOn, silent: true}, keyguard.Frozen)
				w.mustNotEnter()
				if n := load.leaked(); n != 0 {
					t.Errorf("%d passes were good after the gate had closed", n)
				}
				set(w, m, false)
				w.awaitGate(keyguard.Open) // how soon: keyguard's TestLostCallsDoNotDelayTheNext
			}
			load.finish()
		})
	}
}

// TestForgottenConnections: where the connections that a guard keeps warm are dead without
// its knowing, at the moment the key is taken away or given back, no more than one call is
// lost to them: what is asked again 250 ms later has a connection of its own.
func TestForgottenConnections(t *testing.T) {
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w := newRig(t, server.Server)
	w.options.ProbeInterval, w.options.OutageGrace = keyguard.DefaultProbeInterval, keyguard.DefaultOutageGrace
	m := newMiddlebox(t, w)
	w.open()
	for range 3 {
		for gate, change := range map[keyguard.GateState]func(string) error{keyguard.Frozen: w.kms.Disable, keyguard.Open: w.kms.Enable} {
			if w.guard.Status().Ready() == (gate == keyguard.Open) {
				continue
			}
			m.forget()
			w.must(change(w.arn))
			w.awaitGate(gate)
			if n := m.fooled(); n > 1 {
				t.Errorf("%v: calls were lost to %d dead connections", gate, n)
			}
		}
	}
}

// TestWrongClock: a machine whose clock is hours off, in either direction, also all of a
// sudden, works as long as KMS's answers tell the time; where they do not, the status says why.
func TestWrongClock(t *testing.T) {
	var off atomic.Int64
	clock := func() time.Time { return time.Now().Add(time.Duration(off.Load())) }
	server, err := kmstest.Start(kmstest.Options{SignatureClock: clock})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	off.Store(int64(3 * time.Hour))
	w := newRig(t, server.Server)
	w.date = clock
	w.options.OutageGrace = keyguard.DefaultOutageGrace
	w.watch(w.arn)
	w.open()
	for _, skew := range []time.Duration{-26 * time.Hour, 0, 7 * time.Minute} {
		off.Store(int64(skew))
		before := w.guard.Status()
		w.written("probes to be granted", func() bool { // the status tells nobody that only the lease is a new one
			s := w.guard.Status()
			return s.Gate == keyguard.Open && s.LastSuccess.After(before.LastSuccess.Add(3*rigInterval))
		})
		if s := w.guard.Status(); s.Epoch != before.Epoch {
			t.Errorf("%v off: the gate was closed: %+v", skew, s)
		}
		if _, _, err := w.guard.Create(t.Context(), binding); err != nil {
			t.Errorf("%v off: %v", skew, err)
		}
		w.must(w.kms.Disable(w.arn))
		s := w.awaitGate(keyguard.Frozen)
		if s.Key != keyguard.Disabled {
			t.Errorf("%v off: frozen because of %+v", skew, s)
		}
		off.Add(int64(2 * time.Hour)) // while frozen
		w.must(w.kms.Enable(w.arn))
		w.awaitGate(keyguard.Open)
	}
}

// TestGrantAlone: a role that may use the key by a grant only is served while it lasts.
func TestGrantAlone(t *testing.T) {
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w := newRig(t, server.Server)
	arn, err := server.CreateKey("", "", `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::`+kmstest.DefaultAccount+`:root"},"Action":"kms:*","Resource":"*"}]}`, false)
	w.must(err)
	w.options.OutageGrace = keyguard.DefaultOutageGrace
	w.watch(arn)
	admin := asAdmin(t, server.URL(), kmstest.DefaultRegion)
	grant := func() *string {
		t.Helper()
		out, err := admin.CreateGrant(t.Context(), &kms.CreateGrantInput{KeyId: &arn, GranteePrincipal: aws.String(kmstest.TenantRole), Operations: []types.GrantOperation{
			types.GrantOperationDecrypt, types.GrantOperationGenerateDataKey, types.GrantOperationGenerateDataKeyWithoutPlaintext, types.GrantOperationDescribeKey}})
		w.must(err)
		return out.GrantId
	}
	denied := func(gate keyguard.GateState) func(keyguard.Status) bool {
		return func(s keyguard.Status) bool { return s.Gate == gate && s.Key == keyguard.AccessDenied }
	}
	w.start()
	w.await("that nothing is granted", denied(keyguard.Starting))
	id := grant()
	w.awaitGate(keyguard.Open)
	for range 2 {
		_, err = admin.RevokeGrant(t.Context(), &kms.RevokeGrantInput{KeyId: &arn, GrantId: id})
		w.must(err)
		w.await("the freeze", denied(keyguard.Frozen))
		w.mustNotEnter()
		id = grant()
		w.awaitGate(keyguard.Open)
	}
}

// TestKeyThatIsFoundAgain: who is told for a while that the key does not exist, as by the
// endpoint of another Region behind a wrong name, is frozen and goes on by itself.
func TestKeyThatIsFoundAgain(t *testing.T) {
	server, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w := newRig(t, server.Server)
	w.options.OutageGrace = keyguard.DefaultOutageGrace
	w.watch(w.arn)
	w.open()
	b := behaviour{fault: answer(400, "NotFoundException", "Key does not exist")}
	w.take(b)
	w.await("the freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen && s.Key == keyguard.Deleted })
	w.mustNotEnter()
	w.give(b)
	w.awaitGate(keyguard.Open)
}
