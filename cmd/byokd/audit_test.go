package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
)

// auditOf opens a trail in a directory of its own and returns what it logs.
func auditOf(t *testing.T, limit int64) (*auditTrail, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	trail, err := openAudit(filepath.Join(t.TempDir(), "audit.jsonl"), limit, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { trail.close() })
	return trail, logs
}

// numbers reads the epochs of the records of a file, in order.
func numbers(t *testing.T, name string) (all []uint64) {
	t.Helper()
	text, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var r keyguard.AuditRecord
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%s: %q: %v", name, line, err)
		}
		all = append(all, r.Epoch)
	}
	return all
}

// No record is lost or cut by a rotation, no file grows above the limit, ten old ones are kept.
func TestAuditRotates(t *testing.T) {
	const limit, records = 1000, 100
	trail, _ := auditOf(t, limit)
	for n := range uint64(records) {
		trail.record(keyguard.AuditRecord{Event: keyguard.AuditThaw, Epoch: n, Time: time.Unix(0, 0)})
	}
	var all []uint64
	for n := auditKept + 1; n >= 0; n-- {
		name := fmt.Sprintf("%s.%d", trail.name, n)
		if n == 0 {
			name = trail.name
		}
		these := numbers(t, name)
		if n > auditKept && these != nil || n <= auditKept && these == nil {
			t.Errorf("%s has %d records", filepath.Base(name), len(these))
		}
		if info, err := os.Stat(name); err == nil && (info.Size() > limit || info.Mode().Perm() != 0o600) {
			t.Errorf("%s: %d bytes, mode %v", filepath.Base(name), info.Size(), info.Mode())
		}
		all = append(all, these...)
	}
	for i, n := range all {
		if want := uint64(records - len(all) + i); n != want {
			t.Fatalf("record %d stands where %d should: %v", n, want, all)
		}
	}
}

// logrotate and the like move the file away: the next record begins a new one.
func TestAuditFollowsItsName(t *testing.T) {
	trail, logs := auditOf(t, 0)
	trail.record(keyguard.AuditRecord{Epoch: 1})
	if err := os.Rename(trail.name, trail.name+".moved"); err != nil {
		t.Fatal(err)
	}
	trail.record(keyguard.AuditRecord{Epoch: 2})
	if old, now := numbers(t, trail.name+".moved"), numbers(t, trail.name); !reflect.DeepEqual(old, []uint64{1}) || !reflect.DeepEqual(now, []uint64{2}) {
		t.Errorf("%v moved away, %v there", old, now)
	}
	if logs.Len() != 0 {
		t.Errorf("it was logged: %v", logs.All())
	}
}

// What the file cannot take is in the log, and the file goes on as soon as it can.
func TestAuditThatCannotBeWritten(t *testing.T) {
	trail, logs := auditOf(t, 0)
	readOnly, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	writable := trail.file
	trail.file = readOnly
	trail.record(keyguard.AuditRecord{Epoch: 1})
	trail.record(keyguard.AuditRecord{Epoch: 2})
	if errors, records := logs.FilterLevelExact(zap.ErrorLevel).Len(), logs.FilterMessage("audit").Len(); errors != 1 || records != 2 {
		t.Errorf("%d errors and %d records in the log, want 1 and 2: %v", errors, records, logs.All())
	}
	trail.file = writable
	trail.record(keyguard.AuditRecord{Epoch: 3})
	if got := numbers(t, trail.name); !reflect.DeepEqual(got, []uint64{3}) {
		t.Errorf("the file has %v", got)
	}
	readOnly.Close()
}

// An audit trail that nobody empties holds up neither freeze nor thaw nor stop.
func TestStuckAuditHoldsUpNothing(t *testing.T) {
	s := newSite(t)
	pipe := filepath.Join(t.TempDir(), "audit")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	end, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	s.withoutVolume(t, map[string]string{"stopTimeout: 30s": fmt.Sprintf("audit: {file: %q}", pipe)})
	p := s.start(t)
	p.awaitState(t, exitOK)
	if err := end.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := end.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) { // until it is full
		t.Fatal(err)
	}
	for range 3 {
		if err := s.kms.Disable(s.arn); err != nil {
			t.Fatal(err)
		}
		p.awaitState(t, exitFrozen)
		if err := s.kms.Enable(s.arn); err != nil {
			t.Fatal(err)
		}
		p.awaitState(t, exitOK)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// Every field and every event stands in the documented schema.
func TestAuditIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/AUDIT.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Za-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		documented[row[1]] = true
	}
	expected := map[string]bool{}
	typ := reflect.TypeFor[keyguard.AuditRecord]()
	for i := range typ.NumField() {
		name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		expected[name] = true
	}
	for _, event := range keyguard.AuditEvents() {
		expected[string(event)] = true
	}
	for name := range expected {
		if !documented[name] {
			t.Errorf("docs/AUDIT.md has no row for %s", name)
		}
	}
	for name := range documented {
		if !expected[name] {
			t.Errorf("docs/AUDIT.md describes %s, which does not exist", name)
		}
	}
}
