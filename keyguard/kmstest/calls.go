package kmstest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// Call is one entry of the call log, a small CloudTrail. It holds no secret:
// neither plaintexts nor ciphertexts.
type Call struct {
	Seq               uint64            `json:"seq"` // grows by one with each call, across restarts
	Time              time.Time         `json:"time"`
	Service           string            `json:"service"` // kms or sts; what a control did is logged as devcloud
	Operation         string            `json:"operation"`
	Principal         string            `json:"principal,omitempty"` // claimed by the access key; see Error for refused signatures
	AccessKey         string            `json:"access_key,omitempty"`
	Region            string            `json:"region,omitempty"`
	Key               string            `json:"key,omitempty"` // key ARN, or what the request said if it names no key
	EncryptionContext map[string]string `json:"encryption_context,omitempty"`
	Status            int               `json:"status,omitempty"` // HTTP status; 0 when no answer was given
	Error             string            `json:"error,omitempty"`  // AWS error name; empty on success
	Message           string            `json:"message,omitempty"`
	Fault             string            `json:"fault,omitempty"` // the injected fault that answered or delayed the call
	RequestID         string            `json:"request_id"`
	TookMicros        int64             `json:"took_us"`
	Source            string            `json:"source,omitempty"`
	Agent             string            `json:"agent,omitempty"`
}

// callFileLimit bounds the log file: at that size it becomes calls.jsonl.1, so
// at most twice as much lies on disk. One call is about 600 bytes: one probe a
// second fills it in seven hours, and a start reads at most 32 MiB.
const callFileLimit = 16 << 20

// callLog is a ring in memory and an append-only file. The file is not synced
// per call: a kill -9 loses nothing, a power cut the last seconds.
type callLog struct {
	limit int
	path  string // "" in memory

	mu      sync.Mutex
	ring    []Call        // guarded by mu; the last limit calls in order
	seq     uint64        // guarded by mu; of the last call
	file    *os.File      // guarded by mu
	size    int64         // guarded by mu; of the file
	changed chan struct{} // guarded by mu; closed and replaced at each call
}

func newCallLog(limit int) *callLog {
	return &callLog{limit: limit, changed: make(chan struct{})}
}

func openCallLog(path string, limit int) (*callLog, error) {
	l := newCallLog(limit)
	l.path = path
	for _, p := range []string{path + ".1", path} {
		if err := l.load(p); err != nil {
			return nil, err
		}
	}
	return l, l.reopen()
}

// load reads a log file into the ring. A line cut short by a crash is skipped.
func (l *callLog) load(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		var c Call
		if len(line) > 0 && json.Unmarshal(line, &c) == nil {
			l.keep(c)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (l *callLog) keep(c Call) {
	l.seq = max(l.seq, c.Seq)
	l.ring = append(l.ring, c)
	if len(l.ring) >= 2*l.limit {
		l.ring = append([]Call(nil), l.ring[len(l.ring)-l.limit:]...)
	}
}

// reopen opens the file for appending and ends a line that a crash cut short.
func (l *callLog) reopen() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.file, l.size = f, info.Size()
	last := []byte{'\n'}
	if l.size > 0 {
		if _, err := f.ReadAt(last, l.size-1); err != nil {
			f.Close()
			return err
		}
	}
	if last[0] != '\n' {
		n, err := f.Write([]byte{'\n'})
		l.size += int64(n)
		return err
	}
	return nil
}

// add appends a call. A log that cannot be written does not fail the call.
func (l *callLog) add(c Call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.Seq = l.seq + 1
	l.keep(c)
	close(l.changed)
	l.changed = make(chan struct{})
	if l.file == nil {
		return
	}
	line, err := json.Marshal(c)
	if err != nil {
		return
	}
	n, _ := l.file.Write(append(bytes.TrimSpace(line), '\n'))
	if l.size += int64(n); l.size >= callFileLimit {
		l.turnOver()
	}
}

func (l *callLog) turnOver() {
	if os.Rename(l.path, l.path+".1") != nil {
		return
	}
	l.file.Close()
	l.file, l.size = nil, 0
	l.reopen() // on failure file stays nil and the ring goes on alone
}

// since returns the kept calls with a greater sequence number, and a channel
// that is closed at the next call.
func (l *callLog) since(seq uint64) ([]Call, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.ring[max(0, len(l.ring)-l.limit):]
	for len(kept) > 0 && kept[0].Seq <= seq {
		kept = kept[min(len(kept), int(min(uint64(len(kept)), seq-kept[0].Seq+1))):]
	}
	return append([]Call(nil), kept...), l.changed
}

func (l *callLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// Calls returns the calls the log keeps, oldest first.
func (s *Server) Calls() []Call { return s.CallsSince(0) }

// CallsSince returns the kept calls after a sequence number, oldest first.
func (s *Server) CallsSince(seq uint64) []Call {
	calls, _ := s.calls.since(seq)
	return calls
}

// LastCall returns the sequence number of the last call; 0 if there was none.
func (s *Server) LastCall() uint64 {
	s.calls.mu.Lock()
	defer s.calls.mu.Unlock()
	return s.calls.seq
}

// WaitCall waits for the first call after a sequence number that match accepts.
func (s *Server) WaitCall(ctx context.Context, after uint64, match func(Call) bool) (Call, error) {
	for {
		calls, changed := s.calls.since(after)
		for _, c := range calls {
			if match(c) {
				return c, nil
			}
			after = c.Seq
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Call{}, ctx.Err()
		}
	}
}
