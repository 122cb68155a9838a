package metrics

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// Limits of the admin listener. It is for people, kubelet and Prometheus: small requests, quick answers.
const (
	readTimeout  = 5 * time.Second
	writeTimeout = 15 * time.Second // a scrape of a few hundred series takes milliseconds
	idleTimeout  = 90 * time.Second // above Prometheus' default scrape interval of 60 s, to keep its connection
	maxHeader    = 16 << 10
	maxWatchers  = 32               // streams of /v1/events at once: open panels and `byokd status --watch`
	refresh      = time.Second      // an open panel shows the traffic of the last seconds
	heartbeat    = 10 * time.Second // a stream shows that it lives, and the clock of the countdown moves; panel.js waits for two and a half
)

//go:embed panel.css panel.js
var assets embed.FS

// Server is the admin listener's handler with its limits.
type Server struct {
	panel    *Panel
	registry *Registry
	hosts    []string
	log      *zap.Logger
	traffic  *trafficMeter
	watchers atomic.Int32
}

// NewServer returns a Server. hosts are names, besides localhost and IP addresses, by which it may be
// asked.
func NewServer(p *Panel, r *Registry, hosts []string, log *zap.Logger) *Server {
	known := make([]string, len(hosts))
	for i, h := range hosts {
		known[i] = strings.ToLower(h)
	}
	return &Server{panel: p, registry: r, hosts: known, log: log,
		traffic: &trafficMeter{gather: r.prom, now: time.Now}}
}

// Serve answers on l until ctx ends, then returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler: s.Handler(), ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, ErrorLog: zap.NewStdLog(s.log),
		BaseContext: func(net.Listener) context.Context { return ctx }, // ends the event streams
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("the admin listener ended: %w", err)
	}
	return nil
}

// Handler returns the admin pages.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.registry.prom, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { health(w, "ready", s.panel.Ready) })
	mux.HandleFunc("GET /startupz", func(w http.ResponseWriter, _ *http.Request) { health(w, "started", s.panel.Started) })
	mux.HandleFunc("GET /v1/status", s.status)
	mux.HandleFunc("GET /v1/events", s.events)
	mux.HandleFunc("GET /{$}", s.index)
	for _, name := range []string{"panel.css", "panel.js"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { http.ServeFileFS(w, r, assets, name) })
	}
	return s.guarded(mux)
}

// guarded refuses foreign Host headers, by which a web page could read this listener through a name that
// it rebinds to 127.0.0.1, and forbids browsers everything that the panel does not need.
func (s *Server) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "+
			"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if !s.knownHost(r.Host) {
			http.Error(w, "this name is not known here; add it to admin.hosts", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) knownHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.ToLower(strings.Trim(host, "[]"))
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return host == "localhost" || slices.Contains(s.hosts, host)
}

// health answers a probe: 200 and the word, or 503 with the reason in plain text.
func health(w http.ResponseWriter, word string, ask func() (Report, bool)) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	r, ok := ask()
	if ok {
		fmt.Fprintln(w, word)
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	fmt.Fprintln(w, r.Headline)
	for _, line := range []string{r.Cause, r.NextStep} {
		if line != "" {
			fmt.Fprintln(w, line)
		}
	}
	for _, resource := range r.Resources {
		if resource.State == StateWaiting && resource.Note != "" {
			fmt.Fprintf(w, "%s: %s\n", resource.Name, resource.Note)
		}
	}
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(s.report()); err != nil {
		s.log.Debug("a status was not delivered", zap.Error(err))
	}
}

// report is the panel's with the traffic.
func (s *Server) report() Report {
	r := s.panel.Report()
	traffic, err := s.traffic.report()
	if err != nil {
		s.log.Warn("the traffic cannot be told", zap.Error(err))
	}
	r.Traffic = traffic
	return r
}

func (s *Server) index(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if err := document(s.report()).Render(w); err != nil {
		s.log.Debug("the page was not delivered", zap.Error(err))
	}
}

// events streams the report as server-sent events: once at the beginning, at every change and at each
// heartbeat. With ?as=panel it streams the panel as it is rendered, whenever that looks different.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	if s.watchers.Add(1) > maxWatchers {
		s.watchers.Add(-1)
		http.Error(w, "too many watchers", http.StatusServiceUnavailable)
		return
	}
	defer s.watchers.Add(-1)
	pause, next := heartbeat, s.statusEvent
	if r.URL.Query().Get("as") == "panel" {
		pause, next = refresh, s.panelEvents()
	}
	w.Header().Set("Content-Type", "text/event-stream")
	stream := http.NewResponseController(w)
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		changed := s.panel.Changed() // before the report, so that no change falls between
		event, err := next()
		if err != nil {
			s.log.Error("the status cannot be written", zap.Error(err))
			return
		}
		if event != "" {
			if stream.SetWriteDeadline(time.Now().Add(writeTimeout)) != nil {
				return
			}
			if _, err := io.WriteString(w, event); err != nil || stream.Flush() != nil {
				return
			}
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

func (s *Server) statusEvent() (string, error) {
	body, err := json.Marshal(s.report())
	return "event: status\ndata: " + string(body) + "\n\n", err
}

// panelEvents returns the source of one stream of the rendered panel: "" when it looks as it did, and at
// each heartbeat a sign of life all the same.
func (s *Server) panelEvents() func() (string, error) {
	last, sent := "", time.Time{}
	return func() (string, error) {
		report := s.report()
		var html strings.Builder
		if err := panelMarkup(report).Render(&html); err != nil {
			return "", err
		}
		if html.String() == last && report.Time.Sub(sent) < heartbeat {
			return "", nil
		}
		last, sent = html.String(), report.Time
		body, err := json.Marshal(map[string]any{"html": last, "time": report.Time})
		return "event: panel\ndata: " + string(body) + "\n\n", err
	}
}
