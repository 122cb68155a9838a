package fs

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

// TestUseKeysWhileFrozen: who reads the lower directory gets no key while frozen, and gets it after the thaw.
func TestUseKeysWhileFrozen(t *testing.T) {
	v := newVolume(t, Options{})
	v.freeze()
	var thawed atomic.Bool
	early := errors.New("a key although frozen")
	ended := make(chan error, 1)
	go func() {
		ended <- v.fs.UseKeys(context.Background(), func(root *seal.Root) error {
			if !thawed.Load() || root == nil {
				return early
			}
			return nil
		})
	}()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { left <- v.fs.UseKeys(ctx, func(*seal.Root) error { return early }) }()
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves is told %v", err)
	}
	thawed.Store(true)
	v.thaw()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestStill: blocks are read when no writer is at work on them: neither one that rewrites in place, nor one that
// lets the file grow.
func TestStill(t *testing.T) {
	for _, c := range []struct {
		name string
		off  int64
	}{{"in place", 5000}, {"growing", 20_000}} {
		t.Run(c.name, func(t *testing.T) {
			v := newVolume(t, Options{Cache: Writethrough})
			var armed atomic.Bool
			writes, goOn := make(chan struct{}), make(chan struct{})
			v.setFault(faultFunc("write", func() error {
				if armed.CompareAndSwap(true, false) {
					close(writes)
					<-goOn
				}
				return nil
			}))
			f, err := os.Create(v.path("file"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.Write(make([]byte, 20_000)); err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			written := make(chan error, 1)
			go func() {
				_, err := f.WriteAt(make([]byte, 100), c.off)
				written <- err
			}()
			<-writes
			lower, err := os.Open(v.lowerFiles()[0])
			if err != nil {
				t.Fatal(err)
			}
			defer lower.Close()
			var released atomic.Bool
			early := errors.New("read while a writer was at work")
			read := make(chan error, 1)
			go func() {
				var found error
				err := v.fs.Still(int(lower.Fd()), 1, 1, func() {
					if !released.Load() {
						found = early
					}
				})
				read <- errors.Join(err, found)
			}()
			for deadline := time.Now().Add(10 * time.Second); !stillWaits() && len(read) == 0; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("it neither waits nor reads")
				}
			}
			released.Store(true)
			close(goOn)
			if err := errors.Join(<-written, <-read); err != nil {
				t.Error(err)
			}
		})
	}
}

// stillWaits tells whether a goroutine waits in Still.
func stillWaits() bool {
	stacks := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		state, _, _ := strings.Cut(stack, "\n") // goroutine 7 [sync.Cond.Wait]:
		if strings.Contains(state, "[sync.") && strings.Contains(stack, ".(*Filesystem).Still(") {
			return true
		}
	}
	return false
}
