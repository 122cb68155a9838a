package main

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"

	"go.uber.org/zap"

	"github.com/byokd/byokd/keyguard"
)

// auditTrail writes one line of JSON per audit record, to its file or to the log.
type auditTrail struct {
	log *zap.Logger

	mu     sync.Mutex
	file   *os.File // nil: to the log; guarded by mu
	failed bool     // the last write failed, and that was logged; guarded by mu
}

// openAudit opens the trail; an empty name sends the records to the log.
func openAudit(name string, log *zap.Logger) (*auditTrail, error) {
	t := &auditTrail{log: log}
	if name == "" {
		return t, nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit.file: %w", err)
	}
	t.file = f
	return t, nil
}

// record appends one record. It is called concurrently by all guards. A full disk must not stop a freeze,
// so that a failure is logged together with the record and nothing else happens.
func (t *auditTrail) record(r keyguard.AuditRecord) {
	line, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain fields only
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file == nil {
		t.log.Info("audit", zap.Any("record", json.RawMessage(line)))
		return
	}
	if _, err = t.file.Write(append(line, '\n')); err == nil {
		t.failed = false
		return
	}
	if !t.failed {
		t.log.Error("the audit file cannot be written; records go to the log until it can", zap.Error(err))
	}
	t.failed = true
	t.log.Warn("audit", zap.Any("record", json.RawMessage(line)))
}

// close closes the file after the last record.
func (t *auditTrail) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file == nil {
		return nil
	}
	err := t.file.Close()
	t.file = nil
	return err
}
