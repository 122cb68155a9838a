package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"
)

// asClient makes this binary a client that asks "echo" at the socket it names.
const asClient = "CONTROL_TEST_SOCKET"

func TestMain(m *testing.M) {
	if path := os.Getenv(asClient); path != "" {
		_, err := NewClient(path).Call(context.Background(), "echo", "x", nil)
		fmt.Print(err)
		return
	}
	os.Exit(m.Run())
}

// serve serves operations at a socket until the test ends.
func serve(t *testing.T, operations map[string]Operation) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- NewServer(operations, zap.NewNop()).Serve(ctx, l) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	return path, stop
}

func echo(_ context.Context, from Peer, request json.RawMessage, progress func(any)) (any, error) {
	for i := range 3 {
		progress(i)
	}
	return fmt.Sprintf("%s from %d", request, from.UID), nil
}

func TestCall(t *testing.T) {
	path, stop := serve(t, map[string]Operation{
		"echo": echo,
		"fail": func(context.Context, Peer, json.RawMessage, func(any)) (any, error) {
			return nil, fmt.Errorf("because: %w", &Failure{Code: 15, Text: "so"})
		},
		"plain": func(context.Context, Peer, json.RawMessage, func(any)) (any, error) { return nil, errors.New("plain") },
	})
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info.Mode(), err)
	}
	var seen []string
	result, err := NewClient(path).Call(t.Context(), "echo", "hello", func(p json.RawMessage) { seen = append(seen, string(p)) })
	want := fmt.Sprintf(`"\"hello\" from %d"`, os.Getuid())
	if err != nil || string(result) != want || strings.Join(seen, "") != "012" {
		t.Errorf("%s, %v, %v", result, err, seen)
	}
	var failed *Failure
	if _, err := NewClient(path).Call(t.Context(), "fail", nil, nil); !errors.As(err, &failed) || failed.Code != 15 || failed.Text != "because: so" {
		t.Errorf("%v", err)
	}
	if _, err := NewClient(path).Call(t.Context(), "plain", nil, nil); !errors.As(err, &failed) || failed.Code != 1 {
		t.Errorf("%v", err)
	}
	if _, err := NewClient(path).Call(t.Context(), "unknown", nil, nil); err == nil || !strings.Contains(err.Error(), "no such operation") {
		t.Errorf("%v", err)
	}
	stop()
	if _, err := NewClient(path).Call(t.Context(), "echo", nil, nil); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// What is cut off must not look done.
func TestAnswerCutOff(t *testing.T) {
	begun := make(chan struct{})
	path, stop := serve(t, map[string]Operation{"hang": func(ctx context.Context, _ Peer, _ json.RawMessage, progress func(any)) (any, error) {
		progress("begun")
		<-ctx.Done()
		panic(http.ErrAbortHandler) // the connection breaks in the middle
	}})
	done := make(chan error, 1)
	go func() {
		_, err := NewClient(path).Call(context.Background(), "hang", nil, func(json.RawMessage) { close(begun) })
		done <- err
	}()
	<-begun
	stop()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("%v", err)
	}
}

// The operation ends when its client leaves.
func TestClientLeaves(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	path, _ := serve(t, map[string]Operation{"hang": func(ctx context.Context, _ Peer, _ json.RawMessage, _ func(any)) (any, error) {
		close(begun)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}})
	ctx, leave := context.WithCancel(t.Context())
	go func() {
		<-begun
		leave()
	}()
	if _, err := NewClient(path).Call(ctx, "hang", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	<-ended
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("beside a living one: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as a killed process would leave it
	l.Close()
	if l, err = Listen(path); err != nil {
		t.Errorf("after a killed one: %v", err)
	} else {
		l.Close()
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		path:                               "no socket",
		filepath.Join(dir, "absent", "s"):  "mkdir -p",
		"/tmp/" + strings.Repeat("x", 120): "at most 107 bytes",
	} {
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// Another user is refused by the kernel's word, even where the mode would let them in.
func TestOtherUsersAreRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to be somebody else")
	}
	path, _ := serve(t, map[string]Operation{"echo": echo})
	ask := func() string {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asClient+"="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	program, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, open := range []string{path, filepath.Dir(path), filepath.Dir(filepath.Dir(path)), filepath.Dir(program), filepath.Dir(filepath.Dir(program)), program} {
		restore, err := os.Stat(open)
		if err != nil {
			t.Fatal(err)
		}
		if open == path {
			continue // first with its own mode
		}
		if err := os.Chmod(open, restore.Mode().Perm()|0o055); err != nil {
			t.Fatal(err)
		}
	}
	if got := ask(); !strings.Contains(got, "is for root and the user that byokd runs as") {
		t.Errorf("with mode 0600: %s", got)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if got := ask(); !strings.Contains(got, "only root and the user that byokd runs as may ask") {
		t.Errorf("with mode 0666: %s", got)
	}
}
