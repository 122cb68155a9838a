package keyguard

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var messageNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// messages are the situations whose words are frozen.
func messages() []Status {
	var all []Status
	add := func(gate GateState, key KeyState, reason Reason, change func(*Status)) {
		s := Status{Name: "primary", KeyARN: fakeARN, Key: key, Gate: gate, Reason: reason}
		if change != nil {
			change(&s)
		}
		all = append(all, s)
	}
	deletion := func(in time.Duration) func(*Status) {
		return func(s *Status) { s.DeletionDate = messageNow.Add(in) }
	}
	denied := func(s *Status) {
		s.MissingAction, s.Principal = "kms:Decrypt", "arn:aws:iam::111122223333:role/byokd-tenant"
		s.Detail = "AccessDeniedException: … because no resource-based policy allows the kms:Decrypt action"
	}
	add(Starting, Unknown, ReasonNone, nil)
	add(Open, Enabled, ReasonNone, nil)
	add(Open, Enabled, ReasonSlow, nil)
	add(Open, Enabled, ReasonNone, func(s *Status) { s.Warning = "kms:DescribeKey is refused for this key (access_denied)" })
	add(Open, Enabled, ReasonNone, func(s *Status) { s.MaterialExpires = messageNow.Add(50 * time.Hour) })
	add(Frozen, Disabled, ReasonKeyDisabled, func(s *Status) {
		s.Siblings = []string{"arn:aws:kms:eu-west-1:111122223333:key/mrk-1"}
	})
	add(Thawing, Enabled, ReasonNone, nil)
	add(Stopping, Enabled, ReasonNone, nil)
	add(Starting, Disabled, ReasonKeyDisabled, nil)
	add(Starting, Disabled, ReasonKeyDisabled, func(s *Status) { s.Resumes = true })
	add(Draining, Disabled, ReasonKeyDisabled, nil)
	add(Frozen, Disabled, ReasonKeyDisabled, nil)
	add(Frozen, PendingDeletion, ReasonPendingDeletion, deletion(6*24*time.Hour+3*time.Hour))
	add(Frozen, PendingDeletion, ReasonPendingDeletion, deletion(90*time.Second))
	add(Frozen, PendingDeletion, ReasonPendingDeletion, deletion(-time.Second))
	add(Starting, PendingDeletion, ReasonPendingDeletion, nil)
	add(Frozen, Deleted, ReasonKeyDeleted, nil)
	add(Starting, Deleted, ReasonKeyDeleted, nil)
	add(Frozen, AccessDenied, ReasonAccessDenied, denied)
	add(Starting, AccessDenied, ReasonAccessDenied, nil)
	for _, reason := range []Reason{ReasonPendingImport, ReasonKeyStoreDown, ReasonKeyCreating, ReasonInvalidState} {
		add(Frozen, Unavailable, reason, nil)
	}
	for _, reason := range []Reason{ReasonKeyNotFound, ReasonWrongKey, ReasonInvalidCiphertext, ReasonWrongKind, ReasonWrongRegion, ReasonBadRequest} {
		add(Stopping, Misconfigured, reason, nil)
	}
	for _, reason := range []Reason{ReasonThrottled, ReasonServiceFault, ReasonTimeout, ReasonDNS, ReasonTLS, ReasonConnection,
		ReasonCredentials, ReasonClockSkew, ReasonKeyStoreDown, ReasonInvalidState, ReasonUnknownFault} {
		add(Degraded, Unreachable, reason, func(s *Status) { s.LeaseUntil = messageNow.Add(42 * time.Second) })
	}
	add(Degraded, Unreachable, ReasonTimeout, nil)
	add(Frozen, Unreachable, ReasonTimeout, nil)
	add(Starting, Unreachable, ReasonConnection, func(s *Status) { s.Detail = "dial tcp 10.0.0.1:443:\nconnect: connection refused." })
	held := func(s *Status) {
		s.OperatorFreeze, s.OperatorBy, s.OperatorSince = true, "uid 0", messageNow.Add(-time.Minute)
	}
	add(Starting, Enabled, ReasonNone, held)
	add(Draining, Enabled, ReasonNone, held)
	add(Frozen, Enabled, ReasonNone, held)
	add(Frozen, Disabled, ReasonKeyDisabled, held)
	add(Frozen, Disabled, ReasonKeyDisabled, func(s *Status) {
		held(s)
		s.OperatorFreeze, s.OperatorPending = false, ThawIntent
	})
	return all
}

func TestMessagesAreFrozen(t *testing.T) {
	var text strings.Builder
	for _, s := range messages() {
		fmt.Fprintf(&text, "## %v, key %v, reason %q\n%s\n%s\n", s.Gate, s.Key, s.Reason, s.Headline(), s.causeAt(messageNow))
		if next := s.NextStep(); next != "" {
			fmt.Fprintf(&text, "→ %s\n", next)
		}
		fmt.Fprintln(&text)
	}
	file := filepath.Join("testdata", "messages.golden")
	if *update {
		if err := os.WriteFile(file, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := text.String(); got != string(want) {
		gotLines, wantLines := strings.Split(got, "\n"), strings.Split(string(want), "\n")
		for i := range gotLines {
			if i >= len(wantLines) || gotLines[i] != wantLines[i] {
				t.Fatalf("line %d of %s: %q (run with -update if that is meant)", i+1, file, gotLines[i])
			}
		}
		t.Fatalf("%s has %d lines, want %d", file, len(wantLines), len(gotLines))
	}
}

// Every status that is not ready says so first, and what to do wherever
// something can be done.
func TestEveryStatusHasWords(t *testing.T) {
	for _, gate := range GateStates() {
		for _, key := range KeyStates() {
			s := Status{KeyARN: fakeARN, Gate: gate, Key: key}
			name := fmt.Sprintf("%v/%v", gate, key)
			if ready := s.Headline() == "External encryption key is ready"; ready != (gate == Open || gate == Degraded) {
				t.Errorf("%s: headline %q", name, s.Headline())
			}
			if s.Cause() == "" || strings.ContainsAny(s.Cause(), "\n") {
				t.Errorf("%s: cause %q", name, s.Cause())
			}
			if key != Enabled && key != Unknown && s.NextStep() == "" {
				t.Errorf("%s: no next step", name)
			}
		}
	}
}

// Where KMS or the control socket are not where commands look by themselves, the next steps name them.
func TestNextStepsNameTheirAddresses(t *testing.T) {
	const endpoint = "https://vpce-1.kms.eu-central-1.vpce.amazonaws.com"
	for _, s := range messages() {
		s.Endpoint, s.Socket = endpoint, "/srv/byokd.sock"
		next := s.NextStep()
		if strings.Contains(next, "aws kms ") || strings.Contains(next, ".amazonaws.com:443") || strings.Contains(next, "byokd thaw") && !strings.HasSuffix(next, "byokd thaw --socket /srv/byokd.sock") {
			t.Errorf("%v, key %v, reason %q: %s", s.Gate, s.Key, s.Reason, next)
		}
		if s.Key == Disabled && !strings.Contains(next, "aws --endpoint-url "+endpoint+" kms enable-key") || s.Key == Unreachable && s.Reason == ReasonTimeout && !strings.Contains(next, endpoint+";") {
			t.Errorf("%v, key %v, reason %q: %s", s.Gate, s.Key, s.Reason, next)
		}
	}
}

func TestStatesAsText(t *testing.T) {
	for _, s := range KeyStates() {
		text, _ := json.Marshal(s)
		var back KeyState
		if err := json.Unmarshal(text, &back); err != nil || back != s {
			t.Errorf("%v became %v: %v", s, back, err)
		}
	}
	for _, s := range GateStates() {
		text, _ := json.Marshal(s)
		var back GateState
		if err := json.Unmarshal(text, &back); err != nil || back != s {
			t.Errorf("%v became %v: %v", s, back, err)
		}
	}
	var key KeyState
	var gate GateState
	if key.UnmarshalText([]byte("Sleepy")) == nil || gate.UnmarshalText([]byte("Ajar")) == nil {
		t.Error("accepted an unknown state")
	}
}
