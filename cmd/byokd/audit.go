package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/keyguard"
)

// auditKept is how many full audit files are kept beside the one that is written: FILE.1, the
// youngest, to FILE.10.
const auditKept = 10

// auditTrail writes one line of JSON per audit record, to its file or to the log. docs/AUDIT.md describes
// the lines. It is called by the guards' journals, never by what freezes or thaws: a disk that hangs or is
// full holds up nothing but the trail.
type auditTrail struct {
	log   *zap.Logger
	name  string // "": to the log; changed by close alone, under mu
	limit int64  // bytes after which a new file is begun; 0: never

	mu     sync.Mutex
	file   *os.File // nil without a name; guarded by mu
	size   int64    // of file before the present record, if it is a regular one; guarded by mu
	failed bool     // the last write failed, and that was logged; guarded by mu
	stuck  bool     // the last change of files failed, and that was logged; guarded by mu
}

// openAudit opens the trail; an empty name sends the records to the log.
func openAudit(name string, limit int64, log *zap.Logger) (*auditTrail, error) {
	t := &auditTrail{log: log, name: name, limit: limit}
	if name == "" {
		return t, nil
	}
	if err := t.open(); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("audit.file: %w; type: mkdir -p %s", err, filepath.Dir(name))
	} else if err != nil {
		return nil, fmt.Errorf("audit.file: %w", err)
	}
	return t, nil
}

// open makes the file of that name the one that is written.
func (t *auditTrail) open() error {
	f, err := os.OpenFile(t.name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	if t.file != nil {
		t.file.Close() // unbuffered: nothing is lost
	}
	t.file, t.size = f, info.Size()
	return nil
}

// record appends one record. It is called concurrently by all guards. A failure is logged together with
// the record.
func (t *auditTrail) record(r keyguard.AuditRecord) {
	line, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain fields only
	}
	line = append(line, '\n')
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.name == "" {
		t.log.Info("audit", zap.Any("record", json.RawMessage(line)))
		return
	}
	t.makeRoom(int64(len(line)))
	if err = t.write(line); err == nil {
		t.failed = false
		return
	}
	if !t.failed {
		t.log.Error("the audit file cannot be written; records go to the log until it can", zap.Error(err))
	}
	t.failed = true
	t.log.Warn("audit", zap.Any("record", json.RawMessage(line)))
}

// write appends a line as a whole or not at all.
func (t *auditTrail) write(line []byte) error {
	n, err := t.file.Write(line)
	if err == nil || n == 0 {
		return err
	}
	// A full disk took the beginning of it. Another byokd (byokd seal) may write to the same file.
	if info, statErr := t.file.Stat(); statErr == nil && info.Size() == t.size+int64(n) {
		err = errors.Join(err, t.file.Truncate(t.size))
	}
	return err
}

// makeRoom goes on in a new file when this one would grow too large, or when somebody else has moved it
// away (logrotate). What cannot be done is logged, and the old file is written on.
func (t *auditTrail) makeRoom(more int64) {
	own, err := t.file.Stat()
	if err != nil || !own.Mode().IsRegular() {
		return // a pipe, /dev/stdout
	}
	t.size = own.Size()
	there, err := os.Stat(t.name)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && !os.SameFile(own, there):
		err = t.open()
	case err == nil && t.limit > 0 && t.size > 0 && t.size+more > t.limit:
		if err = t.rotate(); err == nil {
			err = t.open()
		}
	}
	if err != nil && !t.stuck {
		t.log.Error("no new audit file can be begun; the old one is written on", zap.Error(err))
	}
	t.stuck = err != nil
}

// rotate moves every file on by one. The oldest goes.
func (t *auditTrail) rotate() error {
	older := func(n int) string { return fmt.Sprintf("%s.%d", t.name, n) }
	for n := auditKept - 1; n >= 1; n-- {
		if err := os.Rename(older(n), older(n+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Rename(t.name, older(1))
}

// auditCloseLimit is how long the end of byokd waits for a write that hangs.
const auditCloseLimit = time.Second

// close closes the file after the last record.
func (t *auditTrail) close() error {
	closed, file := make(chan error, 1), t.name // which changes here alone
	go func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.file == nil {
			closed <- nil
			return
		}
		closed <- t.file.Close()
		t.file, t.name = nil, ""
	}()
	select {
	case err := <-closed:
		return err
	case <-time.After(auditCloseLimit):
		t.log.Error("writing the audit file hangs; its last records are lost", zap.String("file", file))
		return nil
	}
}
