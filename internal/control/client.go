package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"

	"golang.org/x/sys/unix"
)

const prefix = "/v1/"

func cutOperation(path string) (string, bool) { return strings.CutPrefix(path, prefix) }

// ErrNoAnswer is returned by Call when no byokd listens at the socket.
var ErrNoAnswer = errors.New("no byokd listens")

// Client asks the byokd behind one socket.
type Client struct{ path string }

// NewClient talks to nobody yet.
func NewClient(path string) Client { return Client{path} }

// Call asks for an operation and returns its result. progress is called for each
// line of progress; it may be nil. Errors are *Failure when byokd could not do it,
// wrap ErrNoAnswer when there is none, and ctx's when that ended.
func (c Client) Call(ctx context.Context, operation string, request any, progress func(json.RawMessage)) (json.RawMessage, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://byokd"+prefix+operation, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", c.path)
		}}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("byokd refuses: %s", strings.TrimSpace(string(text)))
	}
	return follow(resp.Body, progress)
}

// explain tells what is wrong with the socket.
func (c Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w at %s", ErrNoAnswer, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s is for root and the user that byokd runs as: %w", c.path, err)
	}
	return err
}

// follow reads the lines of an answer to its end.
func follow(body io.Reader, progress func(json.RawMessage)) (json.RawMessage, error) {
	lines := json.NewDecoder(body)
	for {
		var l line
		if err := lines.Decode(&l); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, fmt.Errorf("byokd's answer was cut off, so whether it is done is not known; ask again: %w", err)
		}
		switch {
		case l.Error != nil:
			return nil, l.Error
		case l.Progress != nil:
			if progress != nil {
				progress(l.Progress)
			}
		default:
			return l.Result, nil
		}
	}
}
