//go:build linux

package test

import (
	"net/http"
	"strings"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// What must be true of a frozen byokd, beside that everything hangs.

// awaitErased waits until byokd says that no key is left in memory, and returns
// since when, by its audit trail.
func (s *stack) awaitErased() time.Time {
	s.t.Helper()
	s.await("the keys to be erased", s.daemon, func() bool {
		r, ok := s.report()
		return ok && r.Keys[0].Erased
	})
	var erased time.Time
	for _, record := range s.auditRecords() {
		if record.Event == keyguard.AuditErase {
			erased = record.Time
		}
	}
	return erased
}

// assertTold checks that every face of byokd tells the truth while frozen.
func (r revocation) assertTold(s *stack) {
	s.t.Helper()
	report, ok := s.report()
	if !ok {
		s.t.Fatal("byokd does not answer while frozen")
	}
	state, exit := metrics.StateFrozen, 10
	if r.restore == nil {
		state, exit = metrics.StateFinal, 14
	}
	key := report.Keys[0]
	if report.State != state || key.Key != r.key || report.Headline != "External encryption key is not ready" ||
		!strings.Contains(report.Cause, r.cause) || !strings.Contains(report.Cause, s.arn) || !strings.Contains(report.NextStep, r.nextStep) {
		s.t.Errorf("the status says %s, key %v: %s. %s Next: %s", report.State, key.Key, report.Headline, report.Cause, report.NextStep)
	}
	if r.key == keyguard.PendingDeletion && time.Until(key.DeletionDate).Round(time.Hour) != 7*24*time.Hour {
		s.t.Errorf("the status says that the key is deleted at %v", key.DeletionDate)
	}
	s.assertHealth(true, false, true)
	code, text := s.command("status", "--admin", strings.TrimPrefix(s.admin, "http://"))
	if code != exit || !strings.HasPrefix(text, report.Headline+"\n") || !strings.Contains(text, r.cause) {
		s.t.Errorf("byokd status: exit code %d, want %d:\n%s", code, exit, text)
	}
	_, series := s.get("/metrics")
	if !strings.Contains(string(series), `state="frozen"} 1`) {
		s.t.Error("byokd_gate_state does not say frozen")
	}
}

// assertHealth checks the three health endpoints.
func (s *stack) assertHealth(live, ready, started bool) {
	s.t.Helper()
	for path, want := range map[string]bool{"/livez": live, "/readyz": ready, "/startupz": started} {
		code, body := s.get(path)
		if (code == http.StatusOK) != want || code != http.StatusOK && code != http.StatusServiceUnavailable {
			s.t.Errorf("%s answers %d: %s", path, code, body)
		}
	}
}

// assertKeysInMemory is the control of the next: a running daemon has keys, and
// the scan finds them.
func (s *stack) assertKeysInMemory(root secret, data map[seal.KeyID]secret) {
	s.t.Helper()
	f := s.scan(s.needles(root, data))
	if f.byName["key of blocks, key schedule"] == 0 || f.byName["a data key: HKDF extract, HMAC state"] == 0 {
		s.t.Errorf("the scan of a running byokd finds %v", f)
	}
}

// assertErased looks for every key in the frozen daemon.
func (s *stack) assertErased(root secret, data map[seal.KeyID]secret) {
	s.t.Helper()
	if !erasing {
		s.t.Log("this platform has no runtimesecret: what is left in memory is not looked for")
		return
	}
	if f := s.scan(s.needles(root, data)); f.copies > 0 {
		s.t.Errorf("the memory of the frozen byokd holds %v\n%s", f, strings.Join(f.places, "\n"))
	}
}

// assertHeld waits until every client was held for holdFor and answered SlowDown.
func (s *stack) assertHeld(l load) {
	s.t.Helper()
	for _, c := range l.clients {
		if c.name == "stream" || c.name == "multipart" || c.name == "put" {
			continue // a transfer under way waits for as long as the client does; a new put is sent below
		}
		s.await("503 SlowDown for "+c.name, s.daemon, func() bool {
			l.assertUnharmed(s.t, "being held")
			return c.slow.Load() > 0
		})
		if n := c.early.Load(); n > 0 {
			s.t.Errorf("%d of %d requests of %s were not held for %v", n, c.slow.Load(), c.name, holdFor)
		}
	}
	fresh := s.newClient("fresh")
	err := fresh.tolerant(func() error { return fresh.put(s.t.Context(), "fresh", object{0, 100}) })
	if err != nil || fresh.slow.Load() != 1 || fresh.early.Load() != 0 {
		s.t.Errorf("a put begun while frozen: %v (503 SlowDown: %d, held too short: %d)", err, fresh.slow.Load(), fresh.early.Load())
	}
}
