package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStatusTellsOfTheLowerDirectory renames the lower directory away, puts it back and deletes it: status, exit code, readiness,
// metrics and log follow, though the key is well all the time.
func TestStatusTellsOfTheLowerDirectory(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	for _, step := range []struct {
		do            func() error
		exit, ready   int
		state, status string
	}{
		{func() error { return os.Rename(s.lower, s.lower+".elsewhere") }, exitImpaired, 200, "moved", "leads elsewhere"},
		{func() error { return os.Rename(s.lower+".elsewhere", s.lower) }, exitOK, 200, "well", "External encryption key is ready"},
		{func() error { return os.RemoveAll(s.lower) }, exitFailure, 503, "removed", "has been deleted"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		table := p.awaitState(t, step.exit)
		if !strings.Contains(table, step.status) || (step.exit != exitOK) != strings.Contains(table, "\nNext step: ") {
			t.Errorf("%s: status says:\n%s", step.state, table)
		}
		if code, body := p.probe(t, "/readyz"); code != step.ready || step.ready != 200 && !strings.Contains(body, step.status) {
			t.Errorf("%s: readyz %d: %s", step.state, code, body)
		}
		if code, _ := p.probe(t, "/livez"); code != 200 {
			t.Errorf("%s: livez %d", step.state, code)
		}
		if _, body := p.probe(t, "/metrics"); !strings.Contains(body, `byokd_fs_lower_state{state="`+step.state+`"} 1`) || !strings.Contains(body, `byokd_fs_lower_errors_total{errno="EIO"} 0`) {
			t.Errorf("%s: the metrics do not say so", step.state)
		}
	}
	if err := os.WriteFile(filepath.Join(s.mount, "file"), nil, 0o600); err == nil {
		t.Error("a file was made in a directory that is gone")
	}
	for _, line := range []string{"the lower directory is not well", "the lower directory is well again"} {
		if !strings.Contains(p.text(), line) {
			t.Errorf("the log lacks %q", line)
		}
	}
}
