package fs

import (
	"bytes"
	"context"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/awskms"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// keys is a KMS over HTTP with three keys, asked by the real client.
type keys struct {
	*testing.T
	server  *kmstest.Server
	url     string
	a, b, c *awskms.Client
}

func newKeys(t *testing.T) *keys {
	t.Helper()
	server, err := kmstest.New(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(server)
	t.Cleanup(func() { web.Close(); server.Close() })
	k := &keys{T: t, server: server, url: web.URL}
	for _, client := range []**awskms.Client{&k.a, &k.b, &k.c} {
		arn, err := server.CreateKey("", "", "", false)
		if err != nil {
			t.Fatal(err)
		}
		*client = k.client(arn)
	}
	return k
}

func (k *keys) client(arn string) *awskms.Client {
	k.Helper()
	cfg := aws.Config{Credentials: credentials.NewStaticCredentialsProvider(kmstest.TenantAccessKey, kmstest.TenantSecret, "")}
	client, err := awskms.New(cfg, arn, awskms.Options{Endpoint: k.url})
	if err != nil {
		k.Fatal(err)
	}
	return client
}

// guard starts a guard of a key.
func (k *keys) guard(kms keyguard.KMS) *keyguard.Guard {
	k.Helper()
	g, err := keyguard.New(kms, keyguard.Options{Name: "primary", ProbeBinding: keyguard.Binding{Cluster: "acme", Resource: "probe"}})
	if err != nil {
		k.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	k.Cleanup(func() {
		cancel()
		<-ended
	})
	return g
}

var rewrapBinding = keyguard.Binding{Cluster: "acme", Resource: "volume/orchestration/1"}

// volume makes a volume under key a and returns its lower directory.
func (k *keys) volume() string {
	k.Helper()
	lower := k.TempDir()
	if _, err := CreateVolume(k.Context(), lower, k.guard(k.a), rewrapBinding, OwnershipSealed); err != nil {
		k.Fatal(err)
	}
	return lower
}

// to are the options of a move by ReEncrypt.
func (k *keys) to(client *awskms.Client, finish bool) RewrapOptions {
	return RewrapOptions{To: client, Finish: finish,
		Rewrap: func(ctx context.Context, from string, wrapped []byte, b keyguard.Binding) ([]byte, error) {
			again, _, _, err := awskms.Rewrap(ctx, k.client(from), client, wrapped, b)
			return again, err
		}}
}

// opens fails the test unless the volume opens under the key.
func (k *keys) opens(lower string, kms keyguard.KMS) {
	k.Helper()
	f, err := Open(k.Context(), lower, k.guard(kms), Options{}, rewrapBinding)
	if err != nil {
		k.Errorf("under %s: %v", kms.ARN(), err)
		return
	}
	if got := OwnershipOf(f.Header()); got != OwnershipSealed {
		k.Errorf("under %s the volume has ownership %v", kms.ARN(), got)
	}
	f.Close()
}

func (k *keys) refused(lower string, kms keyguard.KMS, want error) {
	k.Helper()
	f, err := Open(k.Context(), lower, k.guard(kms), Options{}, rewrapBinding)
	if !errors.Is(err, want) {
		k.Errorf("under %s: %v, want %v", kms.ARN(), err, want)
	}
	if err == nil {
		f.Close()
	}
}

func (k *keys) mustRewrap(lower string, o RewrapOptions) RewrapReport {
	k.Helper()
	report, err := Rewrap(k.Context(), lower, o)
	if err != nil {
		k.Fatal(err)
	}
	return report
}

func TestRewrap(t *testing.T) {
	k := newKeys(t)
	lower := k.volume()
	k.refused(lower, k.b, ErrOtherKey)
	if r := k.mustRewrap(lower, k.to(k.b, false)); !r.Changed || r.Generation != 2 || !slices.Equal(r.KMS, []string{k.a.ARN(), k.b.ARN()}) {
		t.Errorf("%+v", r)
	}
	k.opens(lower, k.a)
	k.opens(lower, k.b)
	if r := k.mustRewrap(lower, k.to(k.b, false)); r.Changed {
		t.Errorf("once more: %+v", r)
	}
	if _, err := Rewrap(t.Context(), lower, k.to(k.c, false)); !errors.Is(err, ErrMoving) {
		t.Errorf("to a third key in between: %v", err)
	}
	if r := k.mustRewrap(lower, k.to(k.b, true)); !r.Changed || r.Generation != 3 || !slices.Equal(r.KMS, []string{k.b.ARN()}) {
		t.Errorf("%+v", r)
	}
	k.opens(lower, k.b)
	k.refused(lower, k.a, ErrOtherKey)
	if err := k.server.Disable(k.a.ARN()); err != nil {
		t.Fatal(err)
	}
	k.opens(lower, k.b)

	// Straight to the third and back, in one go.
	if r := k.mustRewrap(lower, k.to(k.c, true)); !slices.Equal(r.KMS, []string{k.c.ARN()}) || r.Generation != 5 {
		t.Errorf("%+v", r)
	}
	k.opens(lower, k.c)
	// A move is taken back by finishing it to where it came from.
	k.mustRewrap(lower, k.to(k.b, false))
	if r := k.mustRewrap(lower, k.to(k.c, true)); !slices.Equal(r.KMS, []string{k.c.ARN()}) {
		t.Errorf("taken back: %+v", r)
	}
	k.refused(lower, k.b, ErrOtherKey)
	status, err := RewrapStatus(lower)
	if err != nil || !slices.Equal(status.KMS, []string{k.c.ARN()}) {
		t.Errorf("%+v, %v", status, err)
	}
}

// killed is what a test's step function panics with: nothing after it runs, as after a kill.
type killed struct{ step int }

// TestRewrapKilledAtEachStep: whatever the step at which the rewrap dies, the volume opens under the key that
// it was under, and the next run completes the move.
func TestRewrapKilledAtEachStep(t *testing.T) {
	k := newKeys(t)
	steps := 0
	for step := 1; ; step++ {
		lower, n := k.volume(), 0
		o := k.to(k.b, true)
		o.Step = func(RewrapStep) error {
			if n++; n == step {
				panic(killed{step})
			}
			return nil
		}
		if done := !dies(func() { k.mustRewrap(lower, o) }); done {
			steps = step - 1
			break
		}
		status, err := RewrapStatus(lower)
		if err != nil {
			t.Fatalf("killed at step %d: %v", step, err)
		}
		for _, kms := range []*awskms.Client{k.a, k.b} {
			if status.Under(kms.ARN()) {
				k.opens(lower, kms)
			}
		}
		if !status.Under(k.a.ARN()) && status.Generation < 3 {
			t.Errorf("killed at step %d: %+v", step, status)
		}
		if r := k.mustRewrap(lower, k.to(k.b, true)); !slices.Equal(r.KMS, []string{k.b.ARN()}) {
			t.Errorf("after a kill at step %d: %+v", step, r)
		}
		k.opens(lower, k.b)
	}
	if steps != 9 {
		t.Errorf("the rewrap has %d steps, want 9: 6 and 3 more to finish", steps)
	}
}

func dies(f func()) (died bool) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case killed:
			died = true
		default:
			panic(p)
		}
	}()
	f()
	return false
}

// TestRewrapFailsAtEachCall: each call of KMS fails once, in turn, as does each write; the volume stays as it
// was, and the next run completes the move.
func TestRewrapFailsAtEachCall(t *testing.T) {
	k := newKeys(t)
	refusals := map[string]func(lower string) (undo func()){}
	for _, action := range []string{"ReEncryptFrom", "ReEncryptTo", "GenerateDataKeyWithoutPlaintext", "Decrypt"} {
		refusals[action] = func(string) func() {
			key := k.b.ARN()
			if action == "ReEncryptFrom" {
				key = k.a.ARN()
			}
			actions := []string{action}
			if action == "ReEncryptFrom" || action == "ReEncryptTo" { // and the other way
				actions = append(actions, "Encrypt")
				key2 := k.b.ARN()
				mustDo(t, k.server.Deny(key2, "Encrypt", ""))
			}
			mustDo(t, k.server.Deny(key, action, ""))
			return func() {
				for _, a := range actions {
					mustDo(t, k.server.Allow(k.a.ARN(), a, ""))
					mustDo(t, k.server.Allow(k.b.ARN(), a, ""))
				}
			}
		}
	}
	for _, name := range []string{seal.VolumeHeaderName, seal.VolumeMarkName} {
		refusals["write "+name] = func(lower string) func() { // a directory in the way of the temporary file
			trap := filepath.Join(lower, name+".tmp", "x")
			mustDo(t, os.MkdirAll(trap, 0o700))
			return func() { mustDo(t, os.RemoveAll(filepath.Dir(trap))) }
		}
	}
	for name, refuse := range refusals {
		lower := k.volume()
		undo := refuse(lower)
		_, err := Rewrap(t.Context(), lower, k.to(k.b, false))
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		undo()
		k.opens(lower, k.a)
		if r := k.mustRewrap(lower, k.to(k.b, true)); !slices.Equal(r.KMS, []string{k.b.ARN()}) {
			t.Errorf("%s, then once more: %+v", name, r)
		}
		k.opens(lower, k.b)
	}
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestRewrapWithoutReEncrypt: where ReEncrypt is not allowed, Decrypt and Encrypt do.
func TestRewrapWithoutReEncrypt(t *testing.T) {
	k := newKeys(t)
	lower := k.volume()
	mustDo(t, k.server.Deny(k.a.ARN(), "ReEncrypt*", ""))
	k.mustRewrap(lower, k.to(k.b, true))
	k.opens(lower, k.b)
	away, err := k.server.CreateKey("eu-west-1", "", "", false) // where ReEncrypt does not reach
	mustDo(t, err)
	k.mustRewrap(lower, k.to(k.client(away), true))
	k.opens(lower, k.client(away))
}

// TestOldHeaderIsRefused: a header of before a rewrap that somebody puts back is noticed, by a byokd that
// starts and by one that runs.
func TestOldHeaderIsRefused(t *testing.T) {
	k := newKeys(t)
	lower := k.volume()
	path := filepath.Join(lower, seal.VolumeHeaderName)
	markPath := filepath.Join(lower, seal.VolumeMarkName)
	old, err := os.ReadFile(path)
	mustDo(t, err)
	oldMark, err := os.ReadFile(markPath)
	mustDo(t, err)
	k.mustRewrap(lower, k.to(k.b, true))
	newest, err := os.ReadFile(path)
	mustDo(t, err)

	mustDo(t, os.WriteFile(path, old, 0o600))
	k.refused(lower, k.a, ErrOldHeader)
	if _, err := Rewrap(t.Context(), lower, k.to(k.b, false)); !errors.Is(err, ErrOldHeader) {
		t.Errorf("rewrap of an old header: %v", err)
	}
	// The record may be changed by nobody either.
	mark, err := os.ReadFile(markPath)
	mustDo(t, err)
	mustDo(t, os.WriteFile(markPath, bytes.Replace(mark, []byte("generation: 3"), []byte("generation: 1"), 1), 0o600))
	k.refused(lower, k.a, seal.ErrTampered)
	mustDo(t, os.WriteFile(markPath, mark, 0o600))

	mustDo(t, os.WriteFile(path, newest, 0o600))
	f, err := Open(t.Context(), lower, k.guard(k.b), Options{}, rewrapBinding)
	mustDo(t, err)
	defer f.Close()
	// A running byokd remembers by itself, whatever is on disk.
	mustDo(t, os.WriteFile(path, old, 0o600))
	mustDo(t, os.WriteFile(markPath, oldMark, 0o600))
	if _, err := f.Rewrap(t.Context(), k.to(k.c, false)); !errors.Is(err, ErrOldHeader) {
		t.Errorf("rewrap by a running byokd: %v", err)
	}
	mustDo(t, os.WriteFile(path, newest, 0o600))
	if r, err := f.Rewrap(t.Context(), k.to(k.c, false)); err != nil || !r.Under(k.c.ARN()) || !r.Under(k.b.ARN()) {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Rewrap(t.Context(), lower, k.to(k.c, true)); !errors.Is(err, ErrBusy) {
		t.Errorf("beside a running byokd: %v", err)
	}
}

// A volume without a record, of an earlier byokd, gets one.
func TestMarkIsMadeAtTheStart(t *testing.T) {
	k := newKeys(t)
	lower := k.volume()
	markPath := filepath.Join(lower, seal.VolumeMarkName)
	mustDo(t, os.Remove(markPath))
	k.opens(lower, k.a)
	if mark, err := readMark(lower); err != nil || mark == nil || mark.Generation != 1 {
		t.Errorf("%+v, %v", mark, err)
	}
}
