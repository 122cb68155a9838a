package inject

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Limits of the webhook's listener: its clients are API servers, which wait 5 s.
const (
	readTimeout  = 5 * time.Second
	writeTimeout = 10 * time.Second
	idleTimeout  = 90 * time.Second
	maxHeader    = 16 << 10
	// stopTimeout is for requests that have begun when a stop is asked for.
	stopTimeout = 10 * time.Second
)

// Server is the webhook and its health.
type Server struct {
	Reviewer *Reviewer
	// Certificate is for each handshake.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Ready tells why reviews cannot be answered, nil when they can.
	Ready func() error
	// Metrics answers /metrics.
	Metrics http.Handler
	Log     *zap.Logger

	stopping atomic.Bool
}

// Serve answers reviews on webhook by TLS, and health and metrics on admin, until ctx ends; then it ends the requests
// that have begun and returns nil.
func (s *Server) Serve(ctx context.Context, webhook, admin net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("POST "+Path, s.Reviewer)
	reviews := s.server(mux)
	reviews.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.Certificate}
	health := s.server(s.admin())

	ended := make(chan error, 2)
	go func() { ended <- reviews.ServeTLS(webhook, "", "") }()
	go func() { ended <- health.Serve(admin) }()
	var err error
	select {
	case err = <-ended:
		err = fmt.Errorf("a listener ended: %w", err)
	case <-ctx.Done():
	}
	s.stopping.Store(true) // not ready from now on
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return errors.Join(err, reviews.Shutdown(stop), health.Shutdown(stop))
}

func (s *Server) server(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, ErrorLog: zap.NewStdLog(s.Log)}
}

// admin answers kubelet and Prometheus. Alive is who answers: a restart mends no certificate.
func (s *Server) admin() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.Metrics)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.stopping.Load() {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
		} else if err := s.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		} else {
			fmt.Fprintln(w, "ready")
		}
	})
	return mux
}
