package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// row is one state of the key as the whole daemon shows it. keyguard/awskms has the table of every error of
// AWS KMS; here it is the faces: exit codes, health, status text, series, log and audit file.
type row struct {
	take, give    func(s *site) error // give nil: nothing brings it back
	key           string              // label of byokd_key_state
	cause, step   string              // in the status
	refusesStart  int                 // exit code of a start, 0: it waits
	startCause    string              // where the start tells something else
	frozen        int                 // exit code of byokd status once frozen
	event, reason string              // of the audit file, while running
}

func rows() map[string]row {
	inject := func(f kmstest.Fault) func(*site) error {
		return func(s *site) error { _, err := s.kms.Inject(f); return err }
	}
	clear := func(s *site) error { s.kms.Clear(); return nil }
	return map[string]row{
		"disabled": {key: "disabled", cause: "is disabled", step: "enable-key", frozen: exitFrozen, event: "freeze", reason: "key_disabled",
			take: func(s *site) error { return s.kms.Disable(s.arn) }, give: func(s *site) error { return s.kms.Enable(s.arn) }},
		"pending deletion": {key: "pending_deletion", cause: "scheduled for deletion on ", step: "cancel-key-deletion", frozen: exitFrozen, event: "freeze", reason: "pending_deletion",
			take: func(s *site) error { return s.kms.ScheduleDeletion(s.arn, 7*24*time.Hour) },
			give: func(s *site) error {
				if err := s.kms.CancelDeletion(s.arn); err != nil {
					return err
				}
				return s.kms.Enable(s.arn)
			}},
		"deleted": {key: "deleted", cause: "This is final", step: "no way back", frozen: exitFinal, event: "freeze", reason: "key_deleted",
			refusesStart: exitMisconfigured, startCause: "knows no such key", take: func(s *site) error { return s.kms.Delete(s.arn) }},
		"access denied": {key: "access_denied", cause: "kms:Decrypt is denied to " + kmstest.TenantRole, step: "put-key-policy", frozen: exitFrozen, event: "freeze", reason: "access_denied",
			take: func(s *site) error { return s.kms.Deny(s.arn, "Decrypt", "") }, give: func(s *site) error { return s.kms.Allow(s.arn, "Decrypt", "") }},
		"unavailable": {key: "unavailable", cause: "key material is missing or has expired", step: "import-key-material", frozen: exitFrozen, event: "freeze", reason: "pending_import",
			take: func(s *site) error { return s.kms.SetState(s.arn, "PendingImport") }, give: func(s *site) error { return s.kms.SetState(s.arn, "Enabled") }},
		"misconfigured": {key: "misconfigured", cause: "belongs to another cluster", step: "Name the key", frozen: exitFrozen, event: "freeze", reason: "invalid_ciphertext",
			refusesStart: exitMisconfigured, startCause: "belongs to another cluster",
			take: inject(kmstest.Fault{Kind: kmstest.FaultError, Status: 400, Code: "InvalidCiphertextException", Operations: []string{"Decrypt"}}), give: clear},
		"unreachable": {key: "unreachable", cause: "cannot be asked", step: "goes on by itself", frozen: exitFrozen, event: "freeze", reason: "connection",
			take: inject(kmstest.Fault{Kind: kmstest.FaultCut}), give: clear},
	}
}

// TestFaces goes through the states at the start and while running, on real processes.
func TestFaces(t *testing.T) {
	var all sync.WaitGroup
	together := make(chan struct{}, 4)
	for name, r := range rows() {
		for phase, check := range map[string]func(*testing.T, *site, row){"at the start": rowAtStart, "running": rowRunning} {
			all.Go(func() {
				together <- struct{}{}
				defer func() { <-together }()
				t.Run(name+"/"+phase, func(t *testing.T) {
					s := newSite(t)
					s.withoutVolume(t, map[string]string{"probeInterval: 100ms": "probeInterval: 100ms, outageGrace: 2100ms",
						"stopTimeout: 30s": fmt.Sprintf("audit: {file: %q}", s.config+".audit")})
					check(t, s, r)
				})
			})
		}
	}
	all.Wait()
}

func do(t *testing.T, s *site, what func(*site) error) {
	t.Helper()
	if err := what(s); err != nil {
		t.Fatal(err)
	}
}

func rowAtStart(t *testing.T, s *site, r row) {
	do(t, s, r.take)
	p := s.start(t)
	if r.refusesStart != 0 {
		p.awaitEnd(t, r.refusesStart)
		if text := p.text(); !strings.Contains(text, r.startCause) || !strings.Contains(text, "External encryption key is not ready") || !strings.Contains(text, "Next step: ") {
			t.Errorf("a refused start says:\n%s", text)
		}
		return
	}
	p.awaitFace(t, s, r, exitWaiting, `state="starting"} 1`)
	p.assertHealth(t, 200, 503, 503)
	if !strings.Contains(p.text(), `"msg":"key state"`) {
		t.Errorf("the log does not tell the key's state:\n%s", p.text())
	}
	do(t, s, r.give)
	p.awaitState(t, exitOK)
	p.assertHealth(t, 200, 200, 200)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

func rowRunning(t *testing.T, s *site, r row) {
	p := s.start(t)
	p.awaitState(t, exitOK)
	do(t, s, r.take)
	p.awaitFace(t, s, r, r.frozen, `state="frozen"} 1`)
	p.assertHealth(t, 200, 503, 200)
	p.awaitAudit(t, s, r)
	if !strings.Contains(p.text(), `"to":"Frozen"`) {
		t.Errorf("the log does not tell the freeze:\n%s", p.text())
	}
	if r.give != nil {
		do(t, s, r.give)
		p.awaitState(t, exitOK)
		p.assertHealth(t, 200, 200, 200)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// awaitFace waits until status, page and metrics tell the row.
func (p *process) awaitFace(t *testing.T, s *site, r row, code int, gate string) {
	t.Helper()
	text := ""
	p.await(t, "the status to tell "+r.cause, func() bool {
		text = p.awaitState(t, code)
		_, series := p.probe(t, "/metrics")
		return strings.Contains(text, r.cause) && strings.Contains(series, gate) &&
			strings.Contains(series, fmt.Sprintf(`byokd_key_state{guard="primary",state=%q} 1`, r.key))
	})
	if !strings.HasPrefix(text, "External encryption key is not ready\n") || !strings.Contains(text, r.step) || !strings.Contains(text, s.arn) {
		t.Errorf("the status says:\n%s", text)
	}
}

func (p *process) assertHealth(t *testing.T, live, ready, started int) {
	t.Helper()
	for path, want := range map[string]int{"/livez": live, "/readyz": ready, "/startupz": started} {
		if code, body := p.probe(t, path); code != want {
			t.Errorf("%s: %d, want %d: %s", path, code, want, body)
		}
	}
}

func (p *process) awaitAudit(t *testing.T, s *site, r row) {
	t.Helper()
	p.await(t, "the audit record of the "+r.event, func() bool {
		text, err := os.ReadFile(s.config + ".audit")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var a keyguard.AuditRecord
			if err := json.Unmarshal([]byte(line), &a); err == nil && string(a.Event) == r.event && string(a.Reason) == r.reason && a.KeyARN == s.arn {
				return true
			}
		}
		return false
	})
}

// A process whose own probes are a minute apart freezes with the first of its fleet.
func TestFleetFreezesTogether(t *testing.T) {
	s := newSite(t)
	secret := filepath.Join(filepath.Dir(s.config), "fleet-secret")
	s.write(t, secret, strings.Repeat("correct horse ", 3)+"\n", 0o600)
	quick, slow := freeUDP(t), freeUDP(t)
	member := func(listen, interval string) *process {
		all := map[string]string{"probeInterval: 100ms": interval,
			"stopTimeout: 30s": fmt.Sprintf("fleet: {peers: [%q, %q], listen: %q, secretFile: %q}", quick, slow, listen, secret)}
		s.withoutVolume(t, maps.Clone(all))
		p := s.start(t)
		p.awaitState(t, exitOK)
		return p
	}
	slowOne := member(slow, "probeInterval: 1m, outageGrace: 2m")
	quickOne := member(quick, "probeInterval: 100ms")
	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for _, p := range []*process{quickOne, slowOne} {
		p.awaitState(t, exitFrozen)
	}
	if took := time.Since(began); took > 20*time.Second { // its own probe would come after 51 s to 60 s
		t.Errorf("frozen after %v: no hint came", took)
	}
	if err := s.kms.Enable(s.arn); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*process{quickOne, slowOne} {
		p.awaitState(t, exitOK)
		p.signal(t, unix.SIGTERM)
		p.awaitEnd(t, exitOK)
	}
}

// freeUDP finds an address for hints.
func freeUDP(t *testing.T) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().String()
}

// A byokd that crashes leaves no core dump, and nobody but root may look into it,
// not even its own user: the limits and the owner of /proc/PID say so.
func TestNoCoreDumps(t *testing.T) {
	s := newSite(t)
	s.withoutVolume(t, nil)
	p := s.start(t)
	p.awaitState(t, exitOK)
	proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "limits")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
			found = true
			if f := strings.Fields(rest); len(f) < 2 || f[0] != "0" || f[1] != "0" {
				t.Errorf("core dumps are limited to %s", strings.TrimSpace(rest))
			}
		}
	}
	if !found {
		t.Errorf("no limit of core dumps:\n%s", limits)
	}
	if os.Geteuid() != 0 { // as root, the files of a dumpable process belong to root as well
		var of unix.Stat_t
		if err := unix.Stat(proc+"mem", &of); err != nil || of.Uid != 0 {
			t.Errorf("the memory belongs to user %d: the process is dumpable (%v)", of.Uid, err)
		}
	}
	p.signal(t, unix.SIGABRT)
	<-p.ended
	if state := p.cmd.ProcessState.Sys().(syscall.WaitStatus); state.CoreDump() {
		t.Error("a core was dumped")
	}
}

// Volume, documents and backups under keys of their own, the last in another region: whichever is lost,
// the other two serve, and status and metrics say which it is.
func TestEachKeyFreezesItsOwn(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	arns := map[string]string{"orchestration disk": s.arn}
	for resource, region := range map[string]string{"documents": "", "backups": "eu-west-1"} {
		arn, err := s.kms.CreateKey(region, "", "", false)
		if err != nil {
			t.Fatal(err)
		}
		arns[resource] = arn
	}
	s.configure(t, map[string]string{
		"probeInterval: 100ms}}": fmt.Sprintf("probeInterval: 100ms}, second: {arn: %q, endpoint: %q, probeInterval: 100ms}, third: {arn: %q, endpoint: %q, probeInterval: 100ms}}",
			arns["documents"], s.endpoint, arns["backups"], s.endpoint),
		"mount: ": "key: primary, mount: ",
		"documents: {upstream: {bucket: sealed-documents, endpoint: \"http://127.0.0.1:9\"}}": "documents: {key: second, upstream: {bucket: sealed-documents, endpoint: \"http://127.0.0.1:9\"}}, " +
			"backups: {key: third, upstream: {bucket: sealed-backups, region: eu-west-1, endpoint: \"http://127.0.0.1:9\"}}",
	})
	p := s.start(t)
	p.awaitState(t, exitOK)
	guards := map[string]string{"orchestration disk": "primary", "documents": "second", "backups": "third"}
	for lost, arn := range arns {
		if err := s.kms.Disable(arn); err != nil {
			t.Fatal(err)
		}
		p.await(t, lost+" to be frozen, and nothing else", func() bool {
			table := p.awaitState(t, exitFrozen)
			_, series := p.probe(t, "/metrics")
			for resource, guard := range guards {
				state := "open"
				if resource == lost {
					state = "frozen"
				}
				if !strings.Contains(series, fmt.Sprintf(`byokd_gate_state{guard=%q,state=%q} 1`, guard, state)) {
					return false
				}
			}
			return strings.Contains(table, arn)
		})
		if lost != "orchestration disk" { // there the call would hang
			if err := os.WriteFile(filepath.Join(s.mount, "a"), []byte("x"), 0o600); err != nil {
				t.Errorf("without the key of %s the volume fails: %v", lost, err)
			}
		}
		if err := s.kms.Enable(arn); err != nil {
			t.Fatal(err)
		}
		p.awaitState(t, exitOK)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}
