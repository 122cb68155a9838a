package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// maxRequest bounds a request: a few names and flags.
	maxRequest = 64 << 10
	// headerTimeout bounds the time for a request's header to arrive.
	headerTimeout = 10 * time.Second
)

// Operation carries out one request. progress may be called any number of times,
// not concurrently, before it returns; what it is given and the result are
// written as JSON. ctx ends when the client leaves or the server stops. An error
// that is a *Failure keeps its code.
type Operation func(ctx context.Context, from Peer, request json.RawMessage, progress func(any)) (result any, err error)

// Failure is an error with the exit code that the command shall end with.
type Failure struct {
	Code int    `json:"code"`
	Text string `json:"text"`
}

func (f *Failure) Error() string { return f.Text }

// line is one line of an answer.
type line struct {
	Progress json.RawMessage `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *Failure        `json:"error,omitempty"`
}

// Server answers requests on a socket.
type Server struct {
	operations map[string]Operation
	log        *zap.Logger
	owner      uint32 // the user that this process runs as
}

// NewServer makes a server of the operations by name.
func NewServer(operations map[string]Operation, log *zap.Logger) *Server {
	return &Server{operations: operations, log: log, owner: uint32(os.Geteuid())}
}

type peerKey struct{}

// Serve answers until ctx ends, then cuts what is under way and removes the
// socket. It returns nil after ctx.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			peer, err := peerOf(conn)
			if err != nil {
				return ctx // without a peer in it: refused
			}
			return context.WithValue(ctx, peerKey{}, peer)
		},
		ErrorLog: zap.NewStdLog(s.log),
	}
	var closing sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { closing.Go(func() { _ = server.Close() }) })
	err := server.Serve(listener)
	if !stop() {
		closing.Wait()
		return nil
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("control: %w", err)
}

// ServeHTTP carries out one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	peer, known := r.Context().Value(peerKey{}).(Peer)
	if !known || peer.UID != 0 && peer.UID != s.owner {
		s.log.Warn("a request of another user was refused", zap.Stringer("from", peer), zap.String("path", r.URL.Path))
		http.Error(w, "only root and the user that byokd runs as may ask", http.StatusForbidden)
		return
	}
	name, _ := cutOperation(r.URL.Path)
	operation, found := s.operations[name]
	if !found || r.Method != http.MethodPost {
		http.Error(w, "no such operation", http.StatusNotFound)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		http.Error(w, "the request cannot be read", http.StatusBadRequest)
		return
	}
	s.answer(w, r, operation, peer, body)
}

// answer streams an operation's lines.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, operation Operation, peer Peer, body []byte) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out, flusher := json.NewEncoder(w), http.NewResponseController(w)
	write := func(l line) { // a client that left is told by the context
		if out.Encode(l) == nil {
			_ = flusher.Flush()
		}
	}
	result, err := operation(r.Context(), peer, body, func(v any) { write(line{Progress: encode(v)}) })
	if err == nil {
		write(line{Result: encode(result)})
		return
	}
	var failed *Failure
	if !errors.As(err, &failed) {
		failed = &Failure{Code: 1, Text: err.Error()}
	}
	write(line{Error: &Failure{Code: failed.Code, Text: err.Error()}})
}

func encode(v any) json.RawMessage {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // plain fields only
	}
	return text
}
