package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// byokd runs a command of the program in this process and returns what it said.
func byokd(t *testing.T, environ []string, args ...string) (code int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), args, environ, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// withSocket configures a control socket and an audit file, and returns their paths.
func (s *site) withSocket(t *testing.T, replace map[string]string) (socket, audit string) {
	t.Helper()
	dir := filepath.Dir(s.config)
	socket, audit = filepath.Join(dir, "control.sock"), filepath.Join(dir, "audit.jsonl")
	all := map[string]string{`admin: {listen: "localhost:0"}`: fmt.Sprintf("admin: {listen: \"localhost:0\", socket: %q}\naudit: {file: %q}", socket, audit)}
	for old, new := range replace {
		all[old] = new
	}
	s.configure(t, all)
	return socket, audit
}

// auditEvents lists events and reasons of an audit file.
func auditEvents(t *testing.T, name string) (events []string) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var r struct{ Event, Reason, Detail string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		events = append(events, r.Event+" "+r.Reason+" "+r.Detail)
	}
	return events
}

func contains(events []string, prefix string) bool {
	for _, e := range events {
		if strings.HasPrefix(e, prefix) {
			return true
		}
	}
	return false
}

// Freeze and thaw on request, with the key there and with the key away; in status, metrics and audit.
func TestOperatorFreezeAndThaw(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	socket, audit := s.withSocket(t, nil)
	p := s.start(t)
	p.awaitState(t, exitOK)
	if info, err := os.Stat(socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("%v %v", info.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(s.mount, "a"), []byte("acknowledged"), 0o600); err != nil {
		t.Fatal(err)
	}

	if code, out, errs := byokd(t, nil, "freeze", "--socket", socket); code != exitOK || out != "primary: frozen\n" {
		t.Fatalf("freeze: %d %s %s", code, out, errs)
	}
	table := p.awaitState(t, exitFrozen)
	for _, want := range []string{"Access is frozen on request (uid 0", "is enabled", "byokd thaw --socket " + socket + "\n", "frozen on request"} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in:\n%s", want, table)
		}
	}
	_, metrics := p.probe(t, "/metrics")
	for _, want := range []string{`byokd_operator_freeze{guard="primary"} 1`, `byokd_freezes_total{guard="primary",reason="operator"} 1`, `byokd_key_state{guard="primary",state="enabled"} 1`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if code, body := p.probe(t, "/readyz"); code != 503 || !strings.Contains(body, "frozen on request") {
		t.Errorf("readyz %d %s", code, body)
	}
	if code, out, errs := byokd(t, nil, "thaw", "--socket", socket, "--key", "primary"); code != exitOK || !strings.Contains(out, "thawed") {
		t.Fatalf("thaw: %d %s %s", code, out, errs)
	}
	if got, err := os.ReadFile(filepath.Join(s.mount, "a")); string(got) != "acknowledged" {
		t.Errorf("read %q, %v", got, err)
	}

	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	p.await(t, "the gate to be closed", func() bool { return strings.Contains(p.awaitState(t, exitFrozen), "Frozen") })
	if code, out, _ := byokd(t, nil, "freeze", "--socket", socket); code != exitRecorded || !strings.Contains(out, "recorded") || !strings.Contains(out, "is disabled") {
		t.Errorf("freeze while disabled: %d %s", code, out)
	}
	if table := p.awaitState(t, exitFrozen); !strings.Contains(table, "a freeze was asked for") || !strings.Contains(table, "stays frozen when the key is back") {
		t.Errorf("status:\n%s", table)
	}
	if err := s.kms.Enable(s.arn); err != nil {
		t.Fatal(err)
	}
	p.await(t, "the recorded freeze", func() bool { return contains(auditEvents(t, audit), "operator_freeze operator carried out") })
	p.awaitState(t, exitFrozen)
	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	p.await(t, "the refusal", func() bool { return strings.Contains(p.awaitState(t, exitFrozen), "enable-key") })
	var report operatorReport
	code, out, _ := byokd(t, nil, "thaw", "--socket", socket, "-o", "json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitRecorded || !report.recorded() {
		t.Errorf("thaw while disabled: %d %s %v", code, out, err)
	}
	if err := s.kms.Enable(s.arn); err != nil {
		t.Fatal(err)
	}
	p.awaitState(t, exitOK)

	if code, _, errs := byokd(t, nil, "freeze", "--socket", socket, "--key", "other"); code != exitUsage || !strings.Contains(errs, "there are: primary") {
		t.Errorf("%d %s", code, errs)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if code, _, errs := byokd(t, nil, "thaw", "--socket", socket); code != exitNoAnswer || !strings.Contains(errs, "admin.socket") {
		t.Errorf("%d %s", code, errs)
	}
	events := auditEvents(t, audit)
	for _, want := range []string{"operator_freeze operator asked for by uid 0", "freeze operator", "operator_thaw operator asked for by uid 0", "freeze key_disabled"} {
		if !contains(events, want) {
			t.Errorf("the audit has no %q:\n%s", want, strings.Join(events, "\n"))
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, errs := byokd(t, nil, "completion", shell); code != exitOK || !strings.Contains(out, "byokd") {
			t.Errorf("%s: %d %s", shell, code, errs)
		}
	}
	if code, out, _ := byokd(t, nil, "__complete", "key", ""); code != exitOK || !strings.Contains(out, "rewrap") || !strings.Contains(out, "policy") {
		t.Errorf("%d %s", code, out)
	}
	if code, out, _ := byokd(t, nil, "__complete", "preflight", "-o", ""); code != exitOK || !strings.Contains(out, "json") {
		t.Errorf("%d %s", code, out)
	}
}

// A byokd that is killed while frozen on request stays frozen when it is started anew.
func TestOperatorFreezeOutlivesAKill(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	socket, _ := s.withSocket(t, nil)
	p := s.start(t)
	p.awaitState(t, exitOK)
	if code, _, errs := byokd(t, nil, "freeze", "--socket", socket); code != exitOK {
		t.Fatal(errs)
	}
	p.signal(t, unix.SIGKILL)
	<-p.ended
	p = s.start(t)
	p.await(t, "the key to be told", func() bool {
		return strings.Contains(p.awaitState(t, exitWaiting), "frozen on request (an earlier run")
	})
	if mountedOn(t, s.mount) {
		t.Error("it is mounted")
	}
	if code, out, errs := byokd(t, nil, "thaw", "--socket", socket); code != exitOK {
		t.Fatalf("%d %s %s", code, out, errs)
	}
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	p = s.start(t)
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}
