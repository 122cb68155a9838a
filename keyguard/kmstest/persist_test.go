package kmstest

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

var testTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestStateSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	blob := w.wrap(w.arn, nil)
	must(w.admin.RotateKeyOnDemand(w.ctx, &kms.RotateKeyOnDemandInput{KeyId: &w.arn}))(t)
	must(w.admin.TagResource(w.ctx, &kms.TagResourceInput{KeyId: &w.arn, Tags: []types.Tag{{TagKey: aws.String("a"), TagValue: aws.String("b")}}}))(t)
	must(w.admin.CreateGrant(w.ctx, &kms.CreateGrantInput{KeyId: &w.arn, GranteePrincipal: aws.String(TenantRole), Operations: []types.GrantOperation{"Decrypt"}}))(t)
	pending := must(w.CreateKey("eu-west-1", "", "", true))(t)
	for _, err := range []error{w.Deny(w.arn, "Encrypt", ""), w.Disable(w.arn), w.ScheduleDeletion(pending, time.Hour)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before, last := must(w.Keys())(t), w.LastCall()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	l := start(t, Options{Dir: dir})
	after := must(l.Keys())(t)
	if len(after) != len(before) {
		t.Fatalf("%d keys, had %d", len(after), len(before))
	}
	for i := range after {
		a, b := after[i], before[i]
		if a.ARN != b.ARN || a.State != b.State || a.Material != b.Material || a.Grants != b.Grants || strings.Join(a.Denied, ",") != strings.Join(b.Denied, ",") ||
			(a.Deletion == nil) != (b.Deletion == nil) || a.Deletion != nil && !a.Deletion.Equal(*b.Deletion) {
			t.Errorf("%+v, had %+v", a, b)
		}
	}
	if l.LastCall() != last || len(l.Calls()) != int(last) {
		t.Errorf("the log has %d calls up to %d, had %d", len(l.Calls()), l.LastCall(), last)
	}
	again := &world{Local: l, t: t, ctx: t.Context(), admin: admin(t, l), tenant: tenant(t, l), arn: w.arn}
	if _, err := again.unwrap(w.arn, blob, nil); code(t, err) != "DisabledException" {
		t.Errorf("the key was disabled: %v", err)
	}
	if err := l.Enable("alias/byokd"); err != nil {
		t.Fatal(err)
	}
	if out := must(again.unwrap(w.arn, blob, nil))(t); string(out.Plaintext) != "secret" {
		t.Error("the old ciphertext does not open")
	}
}

// TestAcknowledgedIsOnDisk holds that a changing call was written when it was
// answered: the directory is copied as a kill -9 would leave it.
func TestAcknowledgedIsOnDisk(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	blob := w.wrap(w.arn, nil)
	for i := range 3 {
		steps := []func() error{func() error { return w.Disable(w.arn) }, func() error { return w.Enable(w.arn) }, func() error { return w.Rotate(w.arn) }}
		if err := steps[i](); err != nil {
			t.Fatal(err)
		}
		copied := t.TempDir()
		if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(copied, stateFile+".new"), []byte("{half a st"), 0o600) // a crash in the middle of the next write
		s := must(New(Options{Dir: copied}))(t)
		if a, b := must(s.Keys())(t)[0], must(w.Keys())(t)[0]; a.State != b.State || a.Material != b.Material {
			t.Errorf("on disk %+v, acknowledged %+v", a, b)
		}
		s.Close()
	}
	must(w.unwrap(w.arn, blob, nil))(t)
}

func TestADirectoryHasOneServer(t *testing.T) {
	dir := t.TempDir()
	first := must(New(Options{Dir: dir}))(t)
	if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second server: %v", err)
	}
	first.Close()
	must(New(Options{Dir: dir}))(t).Close()
}

func TestDamagedStateIsRefused(t *testing.T) {
	for name, text := range map[string]string{"no JSON": "{", "future version": `{"version":99}`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), stateFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAChangeThatCannotBeWrittenIsNotMade(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	if err := os.Mkdir(filepath.Join(dir, stateFile+".new"), 0o700); err != nil { // the next write fails
		t.Fatal(err)
	}
	if _, err := w.admin.DisableKey(w.ctx, &kms.DisableKeyInput{KeyId: &w.arn}); code(t, err) != "KMSInternalException" {
		t.Errorf("%v", err)
	}
	if m := w.describe(w.arn); m.KeyState != types.KeyStateEnabled {
		t.Errorf("the key is %s although the change failed", m.KeyState)
	}
	if err := os.Remove(filepath.Join(dir, stateFile+".new")); err != nil {
		t.Fatal(err)
	}
	must(w.admin.DisableKey(w.ctx, &kms.DisableKeyInput{KeyId: &w.arn}))(t)
}

func TestCallLogSurvivesATornLine(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	w.describe(w.arn)
	w.Close()
	path := filepath.Join(dir, callsFile)
	f := must(os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0))(t)
	f.WriteString(`{"seq":99,"operat`)
	f.Close()
	l := start(t, Options{Dir: dir})
	n := len(l.Calls())
	if err := l.Disable(w.arn); err != nil {
		t.Fatal(err)
	}
	l.Close()
	again := start(t, Options{Dir: dir})
	if calls := again.Calls(); n != 1 || len(calls) != 2 || calls[1].Operation != "Disable" || calls[1].Seq != 2 {
		t.Errorf("%d calls, then %+v", n, calls)
	}
}

// TestChangesAndUsesTogether lets everybody at once change and use a key: every
// answer is one that some order of the calls explains, and the last state is on disk.
func TestChangesAndUsesTogether(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	blob := w.wrap(w.arn, nil)
	changing := make(chan error, 1)
	go func() {
		for range 30 {
			for _, change := range []func(string) error{w.Disable, w.Enable, w.Rotate} {
				if err := change(w.arn); err != nil {
					changing <- err
					return
				}
			}
		}
		changing <- w.Disable(w.arn)
	}()
	var users sync.WaitGroup
	for range 4 {
		users.Go(func() {
			for range 30 {
				out, err := w.unwrap(w.arn, blob, nil)
				if err == nil && string(out.Plaintext) != "secret" || err != nil && code(t, err) != "DisabledException" {
					t.Errorf("%+v %v", out, err)
				}
			}
		})
	}
	users.Wait()
	if err := <-changing; err != nil {
		t.Fatal(err)
	}
	if _, err := w.unwrap(w.arn, blob, nil); code(t, err) != "DisabledException" {
		t.Errorf("a call after Disable returned: %v", err)
	}
	w.Close()
	s := must(New(Options{Dir: dir}))(t)
	defer s.Close()
	if k := must(s.Keys())(t)[0]; k.State != stateDisabled {
		t.Errorf("on disk the key is %s", k.State)
	}
}
