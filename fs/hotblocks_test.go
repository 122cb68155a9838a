package fs

import (
	"bytes"
	"context"
	"os"
	"testing"

	"github.com/byokd/byokd/internal/seal"
)

// TestHotBlocks: what was put is got until it is dropped or crowded out, nothing
// else ever, and after a freeze no byte of it is left.
func TestHotBlocks(t *testing.T) {
	var h hotBlocks
	dst := make([]byte, seal.BlockPayload)
	h.put(7, 3, []byte("three of seven"))
	h.put(8, 3, []byte("three of eight"))
	h.put(7, 3, []byte("three again"))
	if n, ok := h.get(7, 3, dst); !ok || string(dst[:n]) != "three again" {
		t.Fatalf("got %q, %t", dst[:n], ok)
	}
	if _, ok := h.get(7, 4, dst); ok {
		t.Fatal("got a block that was not put")
	}
	h.drop(7, 3, 3)
	if _, ok := h.get(7, 3, dst); ok {
		t.Fatal("got a block that was dropped")
	}
	for i := range int64(10 * hotSets * hotWays) {
		h.put(9, i, []byte("many"))
	}
	h.drop(9, 5, 1<<62)
	for i := range int64(10 * hotSets * hotWays) {
		if _, ok := h.get(9, i, dst); ok && i >= 5 {
			t.Fatalf("block %d was dropped with its neighbours", i)
		}
	}
	h.put(7, 3, []byte("secret"))
	h.freeze()
	h.put(7, 4, []byte("secret"))
	for i := range h.sets {
		for _, b := range h.sets[i].ways {
			if b.node != 0 || bytes.ContainsFunc(b.plain, func(r rune) bool { return r != 0 }) {
				t.Fatal("a freeze left a block")
			}
		}
	}
	h.thaw()
	h.put(7, 4, []byte("after"))
	if n, ok := h.get(7, 4, dst); !ok || string(dst[:n]) != "after" {
		t.Fatalf("after the thaw: %q, %t", dst[:n], ok)
	}
}

// TestHotBlocksAreWipedFirst: what is kept of recent writes goes before anything that a
// freeze waits for, however late that is.
func TestHotBlocksAreWipedFirst(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	if err := os.WriteFile(v.path("f"), bytes.Repeat([]byte("plain"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	left := func() (n int) {
		for i := range v.fs.hot.sets {
			s := &v.fs.hot.sets[i]
			s.mu.Lock()
			for _, b := range s.ways {
				n += len(bytes.Trim(b.plain, "\x00"))
			}
			s.mu.Unlock()
		}
		return n
	}
	if left() == 0 {
		t.Fatal("nothing is kept of a write")
	}
	held := heldStir{v.fs.mountServices(), make(chan struct{}), make(chan struct{})}
	services := Services(held)
	v.fs.services.Store(&services)
	v.kms.disable(true)
	<-held.entered
	if n := left(); n > 0 {
		t.Errorf("%d bytes of plaintext are kept while a freeze waits", n)
	}
	close(held.release)
	v.freeze()
	v.thaw()
}

// heldStir holds up what wakes those who wait for requests, once.
type heldStir struct {
	Services
	entered, release chan struct{}
}

func (h heldStir) Stir(ctx context.Context, more func() bool) {
	select {
	case <-h.release:
	default:
		close(h.entered)
		<-h.release
	}
	h.Services.Stir(ctx, more)
}
