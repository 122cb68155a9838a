package keyguard

import (
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A thread that does not take its signal holds up the erasure; one that says that
// it has seen to itself does not.
func TestAwaitSignalsWaitsForEveryThread(t *testing.T) {
	if err := awaitSignals(t.Context()); err != nil {
		t.Fatal(err)
	}
	blocked, unblock, ended := make(chan struct{}), make(chan bool), make(chan struct{})
	go func() { // a thread with SIGURG blocked and pending, as in a call that cannot be interrupted
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with its signal mask
		mask, old := unix.Sigset_t{}, unix.Sigset_t{}
		mask.Val[0] = 1 << (unix.SIGURG - 1)
		if err := unix.PthreadSigmask(unix.SIG_BLOCK, &mask, &old); err != nil {
			t.Error(err)
		}
		if err := unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGURG); err != nil {
			t.Error(err)
		}
		close(blocked)
		if named := <-unblock; named {
			name := append([]byte(HangingThread), 0)
			if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0); err != nil {
				t.Error(err)
			}
			blocked <- struct{}{}
		}
		<-unblock
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil); err != nil {
			t.Error(err)
		}
	}()
	<-blocked
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := awaitSignals(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a signal pending: %v", err)
	}
	blocked = make(chan struct{})
	unblock <- true
	<-blocked
	if err := awaitSignals(t.Context()); err != nil {
		t.Errorf("with a thread that has seen to itself: %v", err)
	}
	unblock <- false
	<-ended
}
