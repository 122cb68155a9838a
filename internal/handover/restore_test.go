package handover

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// TestReleasedWhileRestored: what is released while a new node driver is told what is
// held is not held by that driver for ever.
func TestReleasedWhileRestored(t *testing.T) {
	near, far := pair(t)
	c := &Client{log: zap.NewNop(), conn: near, waiting: map[uint64]chan answer{}, held: map[string]int{}, untold: map[string]bool{}}
	go c.read(near)
	const descriptors = 50
	for i := range descriptors {
		fd := memory(t, "text")
		if err := c.remember(fmt.Sprint("inode ", i), fd); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := far.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	restored := make(chan error, 1)
	go func() { restored <- c.restore(ctx); c.Release("last") }()

	held, released := map[string]bool{}, false // as the driver sees it
	for {
		var r request
		fds, err := receive(far, &r)
		if err != nil {
			t.Fatal(err)
		}
		closeAll(fds)
		if r.Op == opRelease {
			delete(held, r.Name)
			if r.Name == "last" {
				break
			}
			continue
		}
		held[r.Name] = true
		if !released { // the restoration waits for this answer
			released = true
			for i := range descriptors {
				c.Release(fmt.Sprint("inode ", i))
			}
		}
		if err := send(far, reply{ID: r.ID}); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-restored; err != nil {
		t.Fatal(err)
	}
	if len(held) > 0 {
		t.Errorf("the driver holds %d descriptors that were released", len(held))
	}
}
