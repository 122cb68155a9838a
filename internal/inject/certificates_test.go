package inject

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
)

var serverNames = []string{"byokd-inject.byokd-system.svc", "127.0.0.1"}

// trusts tells whether an API server with this bundle takes the certificate.
func trusts(t *testing.T, bundle []byte, c *certificates, now time.Time) error {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		t.Fatal("an empty bundle")
	}
	for _, name := range serverNames {
		if _, err := c.server.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: now}); err != nil {
			return err
		}
	}
	return nil
}

// Over three years, with API servers and replicas that are late by one look each, every handshake succeeds.
func TestRenewalsOverlap(t *testing.T) {
	const step = 24 * time.Hour // far more than settle: the worst that a late API server or replica can be
	begin := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	var served, late *certificates
	var trusted, lateTrust []byte
	servers, authorities := map[string]bool{}, map[string]bool{}
	recently := false // the look before this one has changed something
	for now := begin; now.Before(begin.AddDate(3, 0, 0)); now = now.Add(step) {
		if served != nil && recently { // a round trip through the Secret
			data, err := served.secret()
			if err != nil {
				t.Fatal(err)
			}
			if served, err = parseCertificates(data); err != nil {
				t.Fatal(err)
			}
		}
		next, changed, err := served.renewed(serverNames, trusted, now)
		if err != nil {
			t.Fatal(err)
		}
		if !changed && !bytes.Equal(next.server.Certificate[0], served.server.Certificate[0]) {
			t.Fatal("a change that is not told")
		}
		late, served = served, next
		lateTrust, trusted = trusted, next.bundle()
		servers[string(next.server.Certificate[0])] = true
		authorities[string(next.authorities[0].certificate.Raw)] = true
		if late == nil || !changed && !recently && now.YearDay()%10 > 0 {
			recently = changed
			continue
		}
		recently = changed
		for what, err := range map[string]error{"present": trusts(t, trusted, served, now), "late API server": trusts(t, lateTrust, served, now), "late replica": trusts(t, trusted, late, now)} {
			if err != nil {
				t.Fatalf("%s, %v after the beginning: %v", what, now.Sub(begin), err)
			}
		}
		if n := len(next.authorities); n > 3 {
			t.Fatalf("%d authorities are trusted", n)
		}
	}
	if n := len(authorities); n < 6 || n > 7 || len(servers) < 30 { // one in half a year, one in 30 days, each up to a step late
		t.Errorf("%d authorities and %d certificates in three years", len(authorities), len(servers))
	}
}

// A new authority signs nothing before the webhook configuration names it, however long that takes.
func TestNothingIsSignedBeforeItIsTrusted(t *testing.T) {
	begin := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	first, _, err := (*certificates)(nil).renewed(serverNames, nil, begin)
	if err != nil {
		t.Fatal(err)
	}
	old := first.bundle()
	// Keep the server's certificate fresh, then come to the moment of the next authority with a configuration that
	// nobody may write.
	now := begin.Add(authorityLife/2 + time.Hour)
	first.server, err = first.authorities[0].sign(serverNames, now.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	second := first
	for range 100 {
		if second, _, err = second.renewed(serverNames, old, now); err != nil {
			t.Fatal(err)
		}
		if err := trusts(t, old, second, now); err != nil {
			t.Fatalf("at %v: %v", now, err)
		}
		now = now.Add(time.Hour)
	}
	if len(second.authorities) != 2 {
		t.Fatalf("%d authorities", len(second.authorities))
	}
	third, changed, err := second.renewed(serverNames, second.bundle(), now)
	if err != nil || !changed || third.server.Leaf.CheckSignatureFrom(third.authorities[0].certificate) != nil {
		t.Errorf("the new authority does not sign once it is trusted: %v %v", changed, err)
	}
}

func TestNamesThatChangeAreCertifiedAtOnce(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	first, _, err := (*certificates)(nil).renewed([]string{"old.svc"}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	second, changed, err := first.renewed(serverNames, first.bundle(), now.Add(time.Second))
	if err != nil || !changed {
		t.Fatal(changed, err)
	}
	if err := trusts(t, first.bundle(), second, now.Add(time.Second)); err != nil {
		t.Error(err)
	}
}

func TestDamagedSecrets(t *testing.T) {
	c, _, err := (*certificates)(nil).renewed(serverNames, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	whole, err := c.secret()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseCertificates(nil); !errors.Is(err, errNoCertificates) {
		t.Error(err)
	}
	other, _, err := (*certificates)(nil).renewed(serverNames, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.secret()
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{secretServer, secretServerKey, secretAuthorities, secretAuthorityKey} {
		for what, value := range map[string][]byte{"absent": nil, "no PEM": []byte("x"), "another's": foreign[key], "cut": whole[key][:len(whole[key])/2]} {
			if what == "another's" && (key == secretServer || key == secretAuthorities) {
				continue // fails by its key, below
			}
			data := map[string][]byte{}
			for k, v := range whole {
				data[k] = v
			}
			data[key] = value
			if _, err := parseCertificates(data); err == nil {
				t.Errorf("%s %s is taken", key, what)
			}
		}
	}
}

// cluster is a Store and a Cluster in memory. Safe for concurrent use.
type cluster struct {
	mu      sync.Mutex
	data    map[string][]byte
	trust   []byte
	version [2]int // of Secret and configuration
	fail    error  // of every call
	persist bool   // SetCertificates applies and fails all the same
	writes  int
	events  []string
}

func (c *cluster) Certificates(context.Context) (map[string][]byte, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.version[0] == 0 {
		return nil, "", c.fail
	}
	return c.data, fmt.Sprint(c.version[0]), c.fail
}

func (c *cluster) SetCertificates(_ context.Context, data map[string][]byte, version string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if version == "" && c.version[0] > 0 || version != "" && version != fmt.Sprint(c.version[0]) {
		return ErrConflict
	}
	c.data = data
	c.version[0]++
	c.writes++
	if c.persist {
		return errors.New("the answer is lost")
	}
	return nil
}

func (c *cluster) Trust(context.Context) ([]byte, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trust, fmt.Sprint(c.version[1]), c.fail
}

func (c *cluster) SetTrust(_ context.Context, bundle []byte, version string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if version != fmt.Sprint(c.version[1]) {
		return ErrConflict
	}
	c.trust = bundle
	c.version[1]++
	return nil
}

func rotatorOf(t *testing.T, c *cluster, now func() time.Time) *Rotator {
	return &Rotator{Store: c, Names: serverNames, Observer: &observed{}, Log: zaptest.NewLogger(t), Now: now}
}

// Replicas that begin at once end with one certificate, which the API servers trust.
func TestReplicasAgree(t *testing.T) {
	for range 20 {
		c := &cluster{}
		now := time.Now()
		var rotators []*Rotator
		var all sync.WaitGroup
		for range 4 {
			k := rotatorOf(t, c, func() time.Time { return now })
			rotators = append(rotators, k)
			all.Go(func() { k.look(t.Context()) })
		}
		all.Wait()
		for _, k := range rotators {
			k.look(t.Context())
			got, err := k.Certificate(nil)
			if err != nil || k.Ready() != nil {
				t.Fatal(err, k.Ready())
			}
			if want, _ := rotators[0].Certificate(nil); !bytes.Equal(got.Certificate[0], want.Certificate[0]) {
				t.Error("two certificates")
			}
			if err := trusts(t, c.trust, k.present.Load(), now); err != nil {
				t.Error(err)
			}
		}
		if c.writes != 1 {
			t.Errorf("%d writes", c.writes)
		}
	}
}

// While the API server fails, what there is serves; a write whose answer was lost is found.
func TestRotatorRidesOutFailures(t *testing.T) {
	c := &cluster{persist: true}
	now := time.Now()
	k := rotatorOf(t, c, func() time.Time { return now })
	if k.look(t.Context()); k.Ready() == nil {
		t.Error("ready without a certificate")
	}
	c.persist = false
	if k.look(t.Context()); k.Ready() != nil {
		t.Fatal(k.Ready())
	}
	if c.writes != 1 {
		t.Errorf("%d writes: what the first one left was not found", c.writes)
	}
	c.fail = errors.New("API server down")
	now = now.Add(24 * time.Hour)
	if k.look(t.Context()); k.Ready() != nil {
		t.Errorf("a certificate that holds is not served: %v", k.Ready())
	}
	now = now.Add(serverLife)
	if k.look(t.Context()); k.Ready() == nil {
		t.Error("ready with a certificate that has ended")
	}
	c.fail = nil
	if k.look(t.Context()); k.Ready() != nil {
		t.Error(k.Ready())
	}
}
