package handover

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair is a connection with both its ends.
func pair(t *testing.T) (near, far *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

// FuzzServe: whatever a client sends after or before its hello, with or without a
// descriptor, the server refuses or answers, and the next client is served.
func FuzzServe(f *testing.F) {
	hello := `{"id":1,"op":"hello","version":1}`
	for _, second := range []string{
		`{"id":2,"op":"held","from":0}`, `{"id":2,"op":"held","from":-1}`, `{"id":2,"op":"held","from":9223372036854775807}`,
		`{"id":2,"op":"hold","name":"inode/1"}`, `{"id":2,"op":"hold"}`, `{"id":2,"op":"release","name":"device"}`,
		`{"id":2,"op":"limit","bytes":-1}`, `{"id":2,"op":"flush"}`, `{"id":2,"op":"stir"}`,
		`{"id":2,"op":"killed","threads":[1,2,4294967295]}`, `{"id":2,"op":"killed","threads":[-1]}`, `{"op":"?"}`, `{`, "", "[]", hello,
	} {
		f.Add([]byte(hello), []byte(second), true)
		f.Add([]byte(second), []byte(hello), false)
	}
	f.Fuzz(func(t *testing.T, first, second []byte, withDescriptor bool) {
		if len(first) > messageMax || len(second) > messageMax {
			return // the kernel may not take more
		}
		s := NewServer("the mount", &recorder{}, memory(t, Device))
		defer s.Close()
		near, far := pair(t)
		served := make(chan error, 1)
		go func() { served <- s.Serve(near) }()
		var rights []byte
		if withDescriptor {
			fd := memory(t, "deposited")
			defer unix.Close(fd)
			rights = unix.UnixRights(fd)
		}
		for _, text := range [][]byte{first, second} {
			if _, _, err := far.WriteMsgUnix(text, rights, nil); err != nil {
				break // it has been refused
			}
		}
		_ = far.CloseWrite()
		if err := far.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for { // what it answers, until it has hung up
			var a reply
			fds, err := receive(far, &a)
			closeAll(fds)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the server neither answers nor hangs up")
			}
			if err != nil {
				break
			}
		}
		far.Close()
		awaitServed(t, served)

		near, far = pair(t)
		go func() { served <- s.Serve(near) }()
		if err := send(far, request{ID: 1, Op: opHello, Version: Version}); err != nil {
			t.Fatal(err)
		}
		if err := far.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		var a reply
		if _, err := receive(far, &a); err != nil || a.Error != "" || a.Mount != "the mount" {
			t.Fatalf("the next client: %+v, %v", a, err)
		}
		far.Close()
		awaitServed(t, served)
	})
}

func awaitServed(t *testing.T, served <-chan error) {
	t.Helper()
	select {
	case <-served:
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not let go of a client that has left")
	}
}
