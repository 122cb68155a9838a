package kmstest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// ControlPath is the prefix of the control interface. It needs no credentials:
// it answers on loopback only, and to a browser only for pages of its own origin.
//
//	GET    /_devcloud/status                    Status
//	POST   /_devcloud/key      KeyCommand       []KeyInfo
//	GET    /_devcloud/policy?key=REF            the policy document
//	POST   /_devcloud/faults   Fault            Fault
//	DELETE /_devcloud/faults[?id=N]             {"cleared":N}
//	GET    /_devcloud/calls?after=N&limit=N&wait=SECONDS   CallPage
const ControlPath = "/_devcloud/"

// Status is everything the page and the command line show.
type Status struct {
	Account  string    `json:"account"`
	Time     time.Time `json:"time"`
	Keys     []KeyInfo `json:"keys"`
	Faults   []Fault   `json:"faults"`
	Held     int       `json:"held"` // calls that wait in a hang or a delay right now
	LastCall uint64    `json:"last_call"`
}

// KeyCommand changes one key.
type KeyCommand struct {
	// Do is disable, enable, schedule-deletion, cancel-deletion, delete, deny,
	// allow, rotate, set-state or put-policy.
	Do  string `json:"do"`
	Key string `json:"key"`
	// Action and Principal are for deny and allow; see Server.Deny.
	Action    string `json:"action,omitempty"`
	Principal string `json:"principal,omitempty"`
	// AfterSeconds is the waiting period of schedule-deletion; 0 means 7 days.
	AfterSeconds float64 `json:"after_seconds,omitempty"`
	State        string  `json:"state,omitempty"`  // set-state
	Policy       string  `json:"policy,omitempty"` // put-policy
}

// CallPage is a piece of the call log. Last is the sequence number to ask after.
type CallPage struct {
	Calls []Call `json:"calls"`
	Last  uint64 `json:"last"`
}

// errForeign answers a request that a browser made for another web site.
var errForeign = errors.New("this interface answers only to loopback names and pages of its own origin")

// CheckLocal refuses requests that another web site may have made a browser
// send: a Host that is no loopback name (DNS rebinding), a changing request of
// another origin (forgery), or one in a form a plain HTML form could send.
func CheckLocal(r *http.Request) error {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if !loopbackName(host) {
		return errForeign
	}
	if http.NewCrossOriginProtection().Check(r) != nil {
		return errForeign
	}
	if r.Method == http.MethodPost && !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
		return errors.New("send application/json")
	}
	return nil
}

func loopbackName(host string) bool {
	host = strings.Trim(host, "[]")
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.IsLoopback()
	}
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

func (s *Server) serveControl(w http.ResponseWriter, r *http.Request) {
	if err := CheckLocal(r); err != nil {
		reply(w, http.StatusForbidden, map[string]string{"error": err.Error()})
		return
	}
	var out any
	var err error
	switch r.Method + " " + strings.TrimPrefix(r.URL.Path, ControlPath) {
	case "GET status":
		out, err = s.status()
	case "POST key":
		out, err = s.commandKey(w, r)
	case "GET policy":
		out, err = s.policyText(r)
	case "POST faults":
		out, err = s.injectPosted(w, r)
	case "DELETE faults":
		out, err = s.clearAsked(r)
	case "GET calls":
		out, err = s.callPage(r)
	default:
		reply(w, http.StatusNotFound, map[string]string{"error": "no such control: " + r.Method + " " + limitString(r.URL.Path, 200)})
		return
	}
	if err != nil {
		reply(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
		return
	}
	reply(w, http.StatusOK, out)
}

func reply(w http.ResponseWriter, status int, out any) {
	body, err := json.Marshal(out)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(append(body, '\n'))
}

func readControlBody(w http.ResponseWriter, r *http.Request, into any) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyLimit))
	if err != nil {
		return err
	}
	return strictJSON(body, into)
}

func (s *Server) status() (*Status, error) {
	keys, err := s.Keys()
	if err != nil {
		return nil, err
	}
	held, _ := s.faults.holding()
	return &Status{Account: s.account, Time: s.now(), Keys: keys, Faults: s.Faults(), Held: held, LastCall: s.LastCall()}, nil
}

// defaultWait is the waiting period of schedule-deletion if none is given, AWS's least.
const defaultWait = 7 * 24 * time.Hour

func (s *Server) commandKey(w http.ResponseWriter, r *http.Request) (any, error) {
	var cmd KeyCommand
	if err := readControlBody(w, r, &cmd); err != nil {
		return nil, err
	}
	if err := s.Command(cmd); err != nil {
		return nil, err
	}
	return s.Keys()
}

// Command carries out a KeyCommand.
func (s *Server) Command(cmd KeyCommand) error {
	switch cmd.Do {
	case "disable":
		return s.Disable(cmd.Key)
	case "enable":
		return s.Enable(cmd.Key)
	case "schedule-deletion":
		after := time.Duration(cmd.AfterSeconds * float64(time.Second))
		if after < 0 {
			return fmt.Errorf("the waiting period is negative")
		}
		if after == 0 {
			after = defaultWait
		}
		return s.ScheduleDeletion(cmd.Key, after)
	case "cancel-deletion":
		return s.CancelDeletion(cmd.Key)
	case "delete":
		return s.Delete(cmd.Key)
	case "deny":
		return s.Deny(cmd.Key, cmd.Action, cmd.Principal)
	case "allow":
		return s.Allow(cmd.Key, cmd.Action, cmd.Principal)
	case "rotate":
		return s.Rotate(cmd.Key)
	case "set-state":
		return s.SetState(cmd.Key, cmd.State)
	case "put-policy":
		return s.PutPolicy(cmd.Key, cmd.Policy)
	}
	return fmt.Errorf("unknown command %q", cmd.Do)
}

func (s *Server) policyText(r *http.Request) (any, error) {
	text, err := s.Policy(r.URL.Query().Get("key"))
	return map[string]string{"policy": text}, err
}

func (s *Server) injectPosted(w http.ResponseWriter, r *http.Request) (any, error) {
	var f Fault
	if err := readControlBody(w, r, &f); err != nil {
		return nil, err
	}
	return s.Inject(f)
}

func (s *Server) clearAsked(r *http.Request) (any, error) {
	asked := r.URL.Query().Get("id")
	if asked == "" {
		return map[string]int{"cleared": s.Clear()}, nil
	}
	id, err := strconv.Atoi(asked)
	if err != nil || !s.ClearFault(id) {
		return nil, fmt.Errorf("no fault %q", asked)
	}
	return map[string]int{"cleared": 1}, nil
}

// maxWait bounds how long one request for calls may wait for the next call.
const maxWait = 30 * time.Second

func (s *Server) callPage(r *http.Request) (any, error) {
	q := r.URL.Query()
	after, err1 := strconv.ParseUint("0"+q.Get("after"), 10, 64)
	limit, err2 := strconv.Atoi("0" + q.Get("limit"))
	seconds, err3 := strconv.ParseFloat("0"+q.Get("wait"), 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	calls, changed := s.calls.since(after)
	if len(calls) == 0 && seconds > 0 {
		timer := time.NewTimer(min(maxWait, time.Duration(seconds*float64(time.Second))))
		defer timer.Stop()
		select {
		case <-changed:
		case <-timer.C:
		case <-s.faults.closed:
		case <-r.Context().Done():
		}
		calls, _ = s.calls.since(after)
	}
	last := after
	if len(calls) > 0 {
		last = calls[len(calls)-1].Seq
	}
	if limit > 0 && len(calls) > limit {
		calls = calls[len(calls)-limit:]
	}
	if calls == nil {
		calls = []Call{}
	}
	return &CallPage{Calls: calls, Last: last}, nil
}
