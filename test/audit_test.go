//go:build linux

package test

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"strings"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// assertAuditJoins joins byokd's audit trail with the log of the KMS, as an auditor
// joins it with CloudTrail: by request id, in both directions.
func (s *stack) assertAuditJoins() {
	s.t.Helper()
	page, err := s.control.Calls(s.t.Context(), 0, 0, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	calls := map[string]kmstest.Call{}
	for _, c := range page.Calls {
		if c.Service == "kms" && c.AccessKey == kmstest.TenantAccessKey {
			calls[c.RequestID] = c
		}
	}
	if len(page.Calls) == 0 || len(calls) == 0 {
		s.t.Fatal("the KMS has no log of calls")
	}
	oldest := page.Calls[0].Time
	records := s.auditRecords()
	told := map[string]keyguard.AuditRecord{}
	for _, r := range records {
		if r.RequestID == "" || r.Time.Before(oldest) {
			continue
		}
		c, known := calls[r.RequestID]
		if !known {
			s.t.Errorf("the KMS does not know the request of %+v", r)
			continue
		}
		told[r.RequestID] = r
		s.assertSame(r, c)
	}
	for id, c := range calls {
		if _, ok := told[id]; !ok && strings.HasPrefix(c.Operation, "GenerateDataKey") && c.Error == "" {
			s.t.Errorf("the audit trail does not tell of %s %s at %v", c.Operation, id, c.Time)
		}
	}
	seen := map[keyguard.AuditEvent]int{}
	for _, r := range records {
		seen[r.Event]++
	}
	for _, event := range []keyguard.AuditEvent{keyguard.AuditCreate, keyguard.AuditFreeze, keyguard.AuditErase, keyguard.AuditThaw, keyguard.AuditStop} {
		if seen[event] == 0 {
			s.t.Errorf("no record of %s among %v", event, seen)
		}
	}
}

// assertSame compares one record with the call it names.
func (s *stack) assertSame(r keyguard.AuditRecord, c kmstest.Call) {
	s.t.Helper()
	if c.Key != r.KeyARN {
		s.t.Errorf("%s tells of the key %s, the call %s was about %s", r.Event, r.KeyARN, c.RequestID, c.Key)
	}
	switch r.Event {
	case keyguard.AuditRefusal:
		if c.Error == "" || c.Operation != r.Operation {
			s.t.Errorf("a refusal of %s is told (%s); the KMS answered %s with %q", r.Operation, r.Detail, c.Operation, c.Error)
		}
	case keyguard.AuditUnwrap, keyguard.AuditCreate:
		if c.Error != "" || c.Operation != r.Operation || !maps.Equal(c.EncryptionContext, r.Binding) {
			s.t.Errorf("%s by %s under %v is told; the KMS answered %s under %v with %q", r.Event, r.Operation, r.Binding, c.Operation, c.EncryptionContext, c.Error)
		}
	}
}

// auditRecords reads byokd's audit trail.
func (s *stack) auditRecords() (all []keyguard.AuditRecord) {
	s.t.Helper()
	text, err := os.ReadFile(s.dir + "/audit.jsonl")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		var r keyguard.AuditRecord
		if err := json.Unmarshal(line, &r); err != nil {
			s.t.Fatalf("audit: %v in %s", err, line)
		}
		all = append(all, r)
	}
	return all
}
