package kmstest

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// Local is a Server listening on a free port of 127.0.0.1. Safe for concurrent use.
type Local struct {
	*Server
	addr string

	mu   sync.Mutex
	http *http.Server // guarded by mu; nil while down
}

// Start makes a server and listens. Close ends both.
func Start(o Options) (*Local, error) {
	s, err := New(o)
	if err != nil {
		return nil, err
	}
	l := &Local{Server: s, addr: "127.0.0.1:0"}
	if err := l.Up(); err != nil {
		s.Close()
		return nil, err
	}
	return l, nil
}

// URL is the endpoint to give to an SDK. It stays the same across Down and Up.
func (l *Local) URL() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return "http://" + l.addr
}

// Down stops listening and resets every connection: callers are refused.
func (l *Local) Down() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.http != nil {
		l.http.Close()
		l.http = nil
	}
}

// Up listens again on the same port.
func (l *Local) Up() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.http != nil {
		return nil
	}
	listener, err := net.Listen("tcp", l.addr)
	if err != nil {
		return fmt.Errorf("kmstest: %w", err)
	}
	l.addr = listener.Addr().String()
	l.http = &http.Server{Handler: l.Server, ReadHeaderTimeout: 10 * time.Second}
	go l.http.Serve(listener)
	return nil
}

// Close stops listening, cuts calls under way and closes the server.
func (l *Local) Close() error {
	l.Interrupt()
	l.mu.Lock()
	if l.http != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if l.http.Shutdown(ctx) != nil {
			l.http.Close()
		}
		cancel()
		l.http = nil
	}
	l.mu.Unlock()
	return l.Server.Close()
}
