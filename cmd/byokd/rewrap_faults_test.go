package main

import (
	"strings"
	"testing"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// TestRewrapMeetsEveryError lets KMS answer with every error it has while byokd moves to another key: when
// re-encrypting and when comparing the result. A refusal ends the command with its cause, an outage is waited
// out; byokd serves on in either case, and what was begun can be taken back or begun anew.
func TestRewrapMeetsEveryError(t *testing.T) {
	s := newMoveSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	s.write(t, p, "before")
	tests := []struct {
		code   string // AWS's name; "" cuts the connection
		status int
		exit   int // 0: an outage; the command goes on when it is over
		says   string
	}{
		{"DisabledException", 400, exitFrozen, "key_disabled"},
		{"KMSInvalidStateException", 400, exitFrozen, "invalid_state"},
		{"NotFoundException", 400, exitFrozen, "key_deleted"},
		{"AccessDeniedException", 400, exitFrozen, "access_denied"},
		{"InvalidCiphertextException", 400, exitFailure, "invalid_ciphertext"},
		{"IncorrectKeyException", 400, exitFailure, "wrong_key"},
		{"DependencyTimeoutException", 503, exitOK, ""},
		{"KeyUnavailableException", 500, exitOK, ""},
		{"KMSInternalException", 500, exitOK, ""},
		{"ThrottlingException", 400, exitOK, ""},
		{"LimitExceededException", 400, exitOK, ""},
		{"ExpiredTokenException", 400, exitOK, ""},
		{"SomethingNewException", 400, exitOK, ""},
		{"", 0, exitOK, ""},
	}
	phases := map[string]kmstest.Fault{
		"re-encrypting": {Operations: []string{"ReEncrypt", "Encrypt"}}, // Encrypt stands in where ReEncrypt is denied
		"comparing":     {Operations: []string{"Decrypt"}, Key: s.second},
	}
	for phase, where := range phases {
		for _, test := range tests {
			t.Run(phase+"/"+test.code, func(t *testing.T) {
				where.Kind, where.Code, where.Status = kmstest.FaultError, test.code, test.status
				if test.code == "" {
					where.Kind = kmstest.FaultCut
				}
				s.moveDuring(t, where, test.exit, test.says)
				s.mustRead(t, p, "before")
			})
		}
	}
	report, _ := s.rewrap(t, exitOK, "--to", s.second, "--dry-run")
	if report.Volume.Under(s.second) {
		t.Errorf("refused moves have changed the volume: %+v", report.Volume)
	}
	s.rewrap(t, exitOK, "--to", s.second)
	s.mustRead(t, p, "before")
	p.awaitState(t, exitOK)
	p.stop(t)
}

// moveDuring moves to the second key while a fault is there. An outage (want is exitOK) ends once it was met,
// and the move that then succeeded is taken back.
func (s *moveSite) moveDuring(t *testing.T, f kmstest.Fault, want int, says string) {
	t.Helper()
	seq := s.kms.LastCall()
	injected, err := s.kms.Inject(f)
	if err != nil {
		t.Fatal(err)
	}
	met := make(chan error, 1)
	go func() {
		_, err := s.kms.WaitCall(t.Context(), seq, func(c kmstest.Call) bool { return c.Fault == string(f.Kind) })
		if want == exitOK {
			s.kms.ClearFault(injected.ID)
		}
		met <- err
	}()
	code, _, errs := byokd(t, nil, "key", "rewrap", "--config", s.config, "--to", s.second)
	s.kms.ClearFault(injected.ID)
	if code != want || !strings.Contains(errs, says) {
		t.Errorf("exit code %d, want %d; it says:\n%s", code, want, errs)
	}
	if err := <-met; err != nil {
		t.Errorf("KMS was not asked: %v", err)
	}
	s.rewrap(t, exitOK, "--to", s.first, "--finish")
}
