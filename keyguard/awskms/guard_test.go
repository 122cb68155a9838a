package awskms

import (
	"context"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// await waits for a status and returns how long it took.
func await(t *testing.T, g *keyguard.Guard, what string, ok func(keyguard.Status) bool) time.Duration {
	t.Helper()
	began := time.Now()
	deadline := time.After(30 * time.Second)
	for {
		changed := g.Changed()
		if ok(g.Status()) {
			return time.Since(began)
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: status %+v", what, g.Status())
		}
	}
}

// TestGuardOnTheRealClient is the whole chain below the filesystem, in real time.
func TestGuardOnTheRealClient(t *testing.T) {
	server := startKMS(t)
	keyARN, err := server.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(t, configuration(t, kmstest.TenantAccessKey, kmstest.TenantSecret), keyARN, server.URL())
	g, err := keyguard.New(client, keyguard.Options{Name: "primary", ProbeBinding: binding, ProbeInterval: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	gate := func(want keyguard.GateState) func(keyguard.Status) bool {
		return func(s keyguard.Status) bool { return s.Gate == want }
	}
	await(t, g, "open", gate(keyguard.Open))
	id, wrapped, err := g.Create(ctx, binding)
	if err != nil {
		t.Fatal(err)
	}
	g.Pin(id, wrapped, binding)
	sealed := sealName(t, g, id)

	cycles := []struct {
		name       string
		take, give func() error
		state      keyguard.KeyState
	}{
		{"disable", func() error { return server.Disable(keyARN) }, func() error { return server.Enable(keyARN) }, keyguard.Disabled},
		{"schedule deletion", func() error { return server.ScheduleDeletion(keyARN, time.Hour) }, func() error {
			if err := server.CancelDeletion(keyARN); err != nil {
				return err
			}
			return server.Enable(keyARN)
		}, keyguard.PendingDeletion},
		{"deny", func() error { return server.Deny(keyARN, "kms:Decrypt", kmstest.TenantRole) },
			func() error { return server.Allow(keyARN, "kms:Decrypt", kmstest.TenantRole) }, keyguard.AccessDenied},
		{"unavailable", func() error { return server.SetState(keyARN, "Unavailable") },
			func() error { return server.SetState(keyARN, "Enabled") }, keyguard.Unavailable},
	}
	for _, c := range cycles {
		if err := c.take(); err != nil {
			t.Fatal(err)
		}
		freeze := await(t, g, c.name, gate(keyguard.Frozen))
		await(t, g, c.name+" explained", func(s keyguard.Status) bool { return s.Key == c.state && s.Erased })
		if err := c.give(); err != nil {
			t.Fatal(err)
		}
		thaw := await(t, g, c.name+" given back", gate(keyguard.Open))
		t.Logf("%s: frozen after %v, open after %v", c.name, freeze, thaw)
		if freeze > time.Second || thaw > 2*time.Second {
			t.Errorf("%s: frozen after %v, open after %v", c.name, freeze, thaw)
		}
		if again := sealName(t, g, id); again != sealed {
			t.Errorf("%s: the pinned root is another one after the thaw", c.name)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// sealName uses a root as the filesystem does.
func sealName(t *testing.T, g *keyguard.Guard, id seal.KeyID) string {
	t.Helper()
	p, err := g.Enter(context.Background(), keyguard.Work, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Exit()
	root := p.Keys().Root(id)
	if root == nil {
		t.Fatal("the root is not loaded")
	}
	var sealed string
	seal.Do(func() { sealed, err = root.SealName("journal") })
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func TestRefusedStartIsTold(t *testing.T) {
	server := startKMS(t)
	client := newClient(t, configuration(t, kmstest.TenantAccessKey, kmstest.TenantSecret), testARN, server.URL())
	g, err := keyguard.New(client, keyguard.Options{ProbeBinding: binding})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := g.Run(ctx); err == nil {
		t.Errorf("Run of a key that does not exist went on: %+v", g.Status())
	}
}
