package kmstest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Control drives the control interface of a devcloud in another process. It is
// safe for concurrent use. Errors of the server carry its text.
type Control struct {
	Endpoint string // e.g. http://127.0.0.1:4566
}

// Status returns keys and faults.
func (c Control) Status(ctx context.Context) (*Status, error) {
	out := new(Status)
	return out, c.do(ctx, http.MethodGet, "status", nil, out)
}

// Key carries out a command on a key and returns all keys.
func (c Control) Key(ctx context.Context, cmd KeyCommand) ([]KeyInfo, error) {
	var out []KeyInfo
	return out, c.do(ctx, http.MethodPost, "key", cmd, &out)
}

// Policy returns a key's policy document.
func (c Control) Policy(ctx context.Context, key string) (string, error) {
	var out struct{ Policy string }
	err := c.do(ctx, http.MethodGet, "policy?key="+url.QueryEscape(key), nil, &out)
	return out.Policy, err
}

// Inject adds a fault.
func (c Control) Inject(ctx context.Context, f Fault) (Fault, error) {
	var out Fault
	return out, c.do(ctx, http.MethodPost, "faults", f, &out)
}

// Clear ends one fault, or with id 0 all, and returns how many.
func (c Control) Clear(ctx context.Context, id int) (int, error) {
	path := "faults"
	if id != 0 {
		path += "?id=" + strconv.Itoa(id)
	}
	var out struct{ Cleared int }
	return out.Cleared, c.do(ctx, http.MethodDelete, path, nil, &out)
}

// Calls returns the last limit calls (0 means all kept ones) after a sequence
// number; with none there it waits so long for the next (at most 30 s).
func (c Control) Calls(ctx context.Context, after uint64, limit int, wait time.Duration) (*CallPage, error) {
	out := new(CallPage)
	path := fmt.Sprintf("calls?after=%d&limit=%d&wait=%g", after, limit, wait.Seconds())
	return out, c.do(ctx, http.MethodGet, path, nil, out)
}

// controlTimeout bounds a control request: the longest wait for calls and 10 s more.
const controlTimeout = maxWait + 10*time.Second

// answerLimit bounds what is read of an answer: 10,000 calls of some 600 bytes, with room.
const answerLimit = 64 << 20

func (c Control) do(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	r, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.Endpoint, "/")+ControlPath+path, body)
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(response.Body, answerLimit))
	if err != nil {
		return err
	}
	if response.StatusCode == http.StatusOK {
		return json.Unmarshal(raw, out)
	}
	var refusal struct{ Error string }
	if json.Unmarshal(raw, &refusal) != nil || refusal.Error == "" {
		return fmt.Errorf("%s answered HTTP %d: is it devcloud?", c.Endpoint, response.StatusCode)
	}
	return fmt.Errorf("%s", refusal.Error)
}
