package metrics

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// fakeGuard is a guard whose status the test sets.
type fakeGuard struct {
	mu      sync.Mutex
	status  keyguard.Status
	changed chan struct{}
}

func newFakeGuard(name string, gate keyguard.GateState, key keyguard.KeyState) *fakeGuard {
	return &fakeGuard{changed: make(chan struct{}), status: keyguard.Status{Name: name,
		KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/" + name, Endpoint: "http://127.0.0.1:4566", Gate: gate, Key: key, Since: time.Now()}}
}

func (g *fakeGuard) Status() keyguard.Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.status
}

func (g *fakeGuard) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

func (g *fakeGuard) set(gate keyguard.GateState, key keyguard.KeyState, reason keyguard.Reason) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.status.Gate, g.status.Key, g.status.Reason, g.status.Since = gate, key, reason, time.Now()
	close(g.changed)
	g.changed = make(chan struct{})
}

// system is everything that cmd connects, with fakes below.
type system struct {
	guard   *fakeGuard
	disk    *Resource
	buckets []*Resource
	panel   *Panel
	server  *httptest.Server
	objects *Objects
	fs      *FS
	guards  keyguard.Observer
}

func newSystem(t *testing.T, buckets ...string) *system {
	t.Helper()
	registry := NewRegistry("v1", "guaranteed")
	s := &system{guard: newFakeGuard("primary", keyguard.Starting, keyguard.Unknown), panel: NewPanel("v1", "acme", "guaranteed")}
	s.guards = registry.NewGuards().Observer("primary")
	registry.AddGuard(s.guard)
	s.panel.AddGuard(s.guard)
	s.disk = s.panel.AddResource("orchestration disk", "volume", "/data", s.guard)
	for _, name := range buckets {
		s.buckets = append(s.buckets, s.panel.AddResource(name, "bucket", "s3://"+name+" at 127.0.0.1:9000, sealed in s3://acme-"+name, s.guard))
	}
	s.fs = registry.NewFS(func() (VolumeGauges, bool) {
		return VolumeGauges{LowerFreeBytes: 1, ParkedCalls: 2, Writeback: true, Inodes: 3, UndrainedFiles: 4, ForeignNames: 5,
			Lower: fs.LowerFull, LowerFailures: []uint64{0, 0, 6, 0, 0}}, true
	})
	registry.NewWorkers(map[string]uint64{"killed": 1}).Refused()
	s.objects = registry.NewObjects([]string{"documents"})
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { s.panel.Watch(ctx) })
	s.server = httptest.NewUnstartedServer(NewServer(s.panel, registry, []string{"Panel.example"}, zap.NewNop()).Handler())
	s.server.Config.BaseContext = func(net.Listener) context.Context { return ctx }
	s.server.Start()
	t.Cleanup(func() { cancel(); watching.Wait(); s.server.Close() })
	return s
}

func (s *system) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := s.server.Client().Get(s.server.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestStatesAreStateSets(t *testing.T) {
	s := newSystem(t)
	for _, gate := range keyguard.GateStates() {
		s.guard.set(gate, keyguard.Disabled, keyguard.ReasonKeyDisabled)
		_, text := s.get(t, "/metrics")
		ones := 0
		for _, other := range keyguard.GateStates() {
			value := "0"
			if other == gate {
				value = "1"
				ones++
			}
			if want := `byokd_gate_state{guard="primary",state="` + strings.ToLower(other.String()) + `"} ` + value + "\n"; !strings.Contains(text, want) {
				t.Errorf("gate %v: %q is missing", gate, want)
			}
		}
		if want := `byokd_key_state{guard="primary",state="disabled"} 1`; ones != 1 || !strings.Contains(text, want) {
			t.Errorf("gate %v: %q is missing", gate, want)
		}
	}
}

func TestHealthInEachState(t *testing.T) {
	for _, c := range []struct {
		gate            keyguard.GateState
		key             keyguard.KeyState
		served, serving bool
		state           State
		ready, started  int
	}{
		{keyguard.Starting, keyguard.Unknown, false, false, StateWaiting, 503, 503},
		{keyguard.Starting, keyguard.Disabled, false, false, StateWaiting, 503, 503},
		{keyguard.Starting, keyguard.Deleted, false, false, StateFinal, 503, 503},
		{keyguard.Open, keyguard.Enabled, false, false, StateWaiting, 503, 503}, // usable, not mounted yet
		{keyguard.Open, keyguard.Enabled, true, true, StateReady, 200, 200},
		{keyguard.Degraded, keyguard.Unreachable, true, true, StateDegraded, 200, 200},
		{keyguard.Draining, keyguard.Disabled, true, true, StateFrozen, 503, 200},
		{keyguard.Frozen, keyguard.Disabled, true, true, StateFrozen, 503, 200},
		{keyguard.Frozen, keyguard.Deleted, true, true, StateFinal, 503, 200},
		{keyguard.Thawing, keyguard.Enabled, true, true, StateFrozen, 503, 200},
		{keyguard.Stopping, keyguard.Enabled, true, true, StateStopping, 503, 200},
	} {
		s := newSystem(t)
		s.guard.set(c.gate, c.key, "")
		if c.serving {
			s.disk.Serving()
		}
		if got := s.panel.Report().State; got != c.state {
			t.Errorf("%v/%v: state %s, want %s", c.gate, c.key, got, c.state)
		}
		if code, _ := s.get(t, "/livez"); code != 200 {
			t.Errorf("%v/%v: livez %d: liveness must never kill a pod for its key", c.gate, c.key, code)
		}
		code, body := s.get(t, "/readyz")
		if code != c.ready {
			t.Errorf("%v/%v: readyz %d, want %d", c.gate, c.key, code, c.ready)
		}
		if frozen := c.gate == keyguard.Frozen || c.gate == keyguard.Starting; frozen && !strings.HasPrefix(body, "External encryption key is not ready\n") {
			t.Errorf("%v/%v: readyz says %q first", c.gate, c.key, body)
		}
		if code, _ := s.get(t, "/startupz"); code != c.started {
			t.Errorf("%v/%v: startupz %d, want %d", c.gate, c.key, code, c.started)
		}
	}
}

func TestStartedStaysTrueThroughAFreeze(t *testing.T) {
	s := newSystem(t)
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Serving()
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	if code, _ := s.get(t, "/startupz"); code != 200 {
		t.Errorf("startupz %d: a freeze is no reason to start again", code)
	}
	s.panel.Stopping()
	if r, ready := s.panel.Ready(); ready || r.State != StateStopping {
		t.Errorf("ready while stopping: %s", r.State)
	}
}

func TestAFailedResourceIsNotHiddenByAHealthyKey(t *testing.T) {
	s := newSystem(t)
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Failed("somebody else has unmounted it", "")
	r, ready := s.panel.Ready()
	if ready || r.State != StateFailed || !strings.Contains(r.Cause, "unmounted") {
		t.Errorf("ready %v, %s: %s", ready, r.State, r.Cause)
	}
}

// A resource that is not well serves, and is ready; the key's state comes before it, the resource's failure first.
func TestAnImpairedResourceIsReadyAndToldOf(t *testing.T) {
	s := newSystem(t)
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Impaired("The disk is full.", "Make it larger.")
	code, _ := s.get(t, "/readyz")
	r := s.panel.Report()
	if code != http.StatusOK || r.State != StateImpaired || r.Headline != "The orchestration disk serves, but is not well" || r.Cause != "The disk is full." || r.NextStep != "Make it larger." {
		t.Errorf("readyz %d, %s: %s: %s: %s", code, r.State, r.Headline, r.Cause, r.NextStep)
	}
	if code, _ := s.get(t, "/startupz"); code != http.StatusOK {
		t.Errorf("startupz %d", code)
	}
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	if r := s.panel.Report(); r.State != StateFrozen || !strings.HasPrefix(r.Headline, "External encryption key is not ready") || r.Resources[0].Next != "Make it larger." {
		t.Errorf("frozen: %s: %s; the resource says %q", r.State, r.Headline, r.Resources[0].Next)
	}
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Failed("The disk is read-only.", "See why.")
	code, body := s.get(t, "/readyz")
	if code != http.StatusServiceUnavailable || body != "The orchestration disk is not ready\nThe disk is read-only.\nSee why.\n" {
		t.Errorf("readyz %d: %s", code, body)
	}
	s.disk.Serving()
	if r, ready := s.panel.Ready(); !ready || r.State != StateReady || r.Resources[0].Next != "" {
		t.Errorf("mended: ready %v, %s, next step %q", ready, r.State, r.Resources[0].Next)
	}
}

// A next step must work as it stands, also where KMS is a stand-in.
func TestNextStepNamesTheEndpoint(t *testing.T) {
	s := newSystem(t)
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	const want = "aws --endpoint-url http://127.0.0.1:4566 kms enable-key"
	if r := s.panel.Report(); !strings.Contains(r.NextStep, want) || !strings.Contains(r.Keys[0].NextStep, want) {
		t.Errorf("%q, %q", r.NextStep, r.Keys[0].NextStep)
	}
}

func TestForeignHostsAreRefused(t *testing.T) {
	s := newSystem(t)
	for host, want := range map[string]int{
		"127.0.0.1:9180": 200, "localhost": 200, "[::1]:9180": 200, "10.1.2.3": 200, "panel.example:9180": 200,
		"PANEL.example": 200, "evil.example": 421, "localhost.evil.example": 421, "127.0.0.1.nip.io": 421,
	} {
		for _, path := range []string{"/", "/v1/status", "/metrics", "/livez"} {
			req := httptest.NewRequest(http.MethodGet, path, nil)
			req.Host = host
			w := httptest.NewRecorder()
			s.server.Config.Handler.ServeHTTP(w, req)
			if w.Code != want {
				t.Errorf("Host %s, %s: %d, want %d", host, path, w.Code, want)
			}
			if csp := w.Header().Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'") {
				t.Errorf("%s: Content-Security-Policy %q", path, csp)
			}
		}
	}
}

func TestOnlyReadingIsAllowed(t *testing.T) {
	s := newSystem(t)
	for _, path := range []string{"/", "/v1/status", "/readyz", "/metrics"} {
		resp, err := s.server.Client().Post(s.server.URL+path, "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, resp.StatusCode)
		}
	}
}

// The page must work under its own policy: no inline script or style, nothing from elsewhere.
func TestPanelKeepsItsPolicy(t *testing.T) {
	s := newSystem(t)
	_, page := s.get(t, "/")
	for _, forbidden := range []string{"http://", "https://", "<style", "style=", "onclick", "<script>"} {
		if strings.Contains(page, forbidden) {
			t.Errorf("the page contains %q", forbidden)
		}
	}
	for path, kind := range map[string]string{"/panel.js": "text/javascript", "/panel.css": "text/css"} {
		resp, err := s.server.Client().Get(s.server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || !strings.HasPrefix(got, kind) {
			t.Errorf("%s: %d %s", path, resp.StatusCode, got)
		}
	}
}

func TestEventsFollowTheState(t *testing.T) {
	s := newSystem(t)
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Serving()
	resp, err := s.server.Client().Get(s.server.URL + "/v1/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	reports := make(chan Report)
	go func() {
		defer close(reports)
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				var r Report
				if err := json.Unmarshal([]byte(data), &r); err != nil {
					t.Error(err)
					return
				}
				reports <- r
			}
		}
	}()
	await := func(want State) Report {
		t.Helper()
		for r := range reports {
			if r.State == want {
				return r
			}
		}
		t.Fatalf("the stream ended before %s", want)
		return Report{}
	}
	await(StateReady)
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	if r := await(StateFrozen); r.Headline != "External encryption key is not ready" || r.Resources[0].State != StateFrozen {
		t.Errorf("%+v", r)
	}
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	for r := await(StateReady); len(r.History) < 3; r = await(StateReady) { // the history may follow a moment later
	}
	go func() {
		for range reports { //nolint:revive // drained so that the reader ends
		}
	}()
}

func TestHistoryKeepsTheLastAndIsBounded(t *testing.T) {
	p := NewPanel("v1", "acme", "guaranteed")
	for i := range 5 * historyLimit {
		gate := keyguard.Open
		if i%2 == 1 {
			gate = keyguard.Frozen
		}
		p.record(keyguard.Status{Name: "g", Gate: gate, Key: keyguard.Enabled, Epoch: uint64(i)})
		p.record(keyguard.Status{Name: "g", Gate: gate, Key: keyguard.Enabled, LastSuccess: time.Now()}) // nothing new
	}
	h := p.Report().History
	if len(h) != historyLimit || h[0].Gate != keyguard.Frozen || h[1].Gate != keyguard.Open {
		t.Errorf("%d entries, newest %v", len(h), h[0])
	}
}

// Answers are told by their code, and those of an upstream that makes codes up become no end of series.
func TestObjectAnswersAreBounded(t *testing.T) {
	r := NewRegistry("v1", "guaranteed")
	o := r.NewObjects([]string{"documents"})
	for _, e := range []objstore.Event{{Status: 200}, {Status: 404, Code: "NoSuchKey"}, {Status: 0, Code: "SealBroken"}, {Status: 499, Code: "ClientLeft"}} {
		o.Done(e)
	}
	for i := range 5 * maxCodes {
		o.Done(objstore.Event{Status: 500, Code: fmt.Sprint("Code", i)})
	}
	o.Done(objstore.Event{Status: 404, Code: "NoSuchKey"})
	families, err := r.prom.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "byokd_s3_requests_total" {
			for _, m := range f.GetMetric() {
				counts[m.GetLabel()[1].GetValue()] = m.GetCounter().GetValue() // after bucket, before op
			}
		}
	}
	if counts["ok"] != 1 || counts["NoSuchKey"] != 2 || counts["SealBroken"] != 1 || counts["ClientLeft"] != 1 || counts["other"] < 3*maxCodes || len(counts) > maxCodes+2 {
		t.Errorf("%d codes: %v", len(counts), counts)
	}
}

// A filesystem operation must not pay for its metrics with garbage.
func TestDoneAllocatesNothing(t *testing.T) {
	f := NewRegistry("v1", "guaranteed").NewFS(func() (VolumeGauges, bool) { return VolumeGauges{}, false })
	f.Done("read", 4096, time.Microsecond, 0)
	if n := testing.AllocsPerRun(1000, func() { f.Done("read", 4096, time.Microsecond, 0) }); n != 0 {
		t.Errorf("%v allocations per operation", n)
	}
}

func BenchmarkDone(b *testing.B) {
	f := NewRegistry("v1", "guaranteed").NewFS(func() (VolumeGauges, bool) { return VolumeGauges{}, false })
	b.ReportAllocs()
	for b.Loop() {
		f.Done("read", 4096, time.Microsecond, 0)
	}
}

// Readiness that is kept through a freeze is one that was there before it; nothing else keeps it.
func TestReadyWhileFrozen(t *testing.T) {
	s := newSystem(t)
	s.panel.KeepReady()
	ready := func(want int, when string) {
		t.Helper()
		if got, body := s.get(t, "/readyz"); got != want {
			t.Errorf("%s: %d %s", when, got, body)
		}
	}
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	ready(http.StatusServiceUnavailable, "frozen before anything has served")
	s.guard.set(keyguard.Open, keyguard.Enabled, keyguard.ReasonNone)
	s.disk.Serving()
	ready(http.StatusOK, "open")
	s.guard.set(keyguard.Frozen, keyguard.Disabled, keyguard.ReasonKeyDisabled)
	ready(http.StatusOK, "frozen")
	if _, body := s.get(t, "/v1/status"); !strings.Contains(body, `"state": "frozen"`) {
		t.Errorf("the status hides the freeze: %s", body)
	}
	s.guard.set(keyguard.Frozen, keyguard.Deleted, keyguard.ReasonKeyDeleted)
	ready(http.StatusServiceUnavailable, "frozen for good")
	s.guard.set(keyguard.Open, keyguard.Enabled, keyguard.ReasonNone)
	s.disk.Failed("gone", "")
	ready(http.StatusServiceUnavailable, "failed")
}
