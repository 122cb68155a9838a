package fs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// TestLateCallbacks: what a freeze still does after its thaw, because its callback was late, changes nothing; in
// the next freeze it does.
func TestLateCallbacks(t *testing.T) {
	v := newVolume(t, Options{})
	v.freeze()
	ended := v.guard.Status().Epoch
	v.thaw()
	l := v.fs.loop.Load()
	wiping := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.frozen
	}
	for _, c := range []struct {
		name   string
		epoch  uint64
		frozen bool
	}{{"late", ended, false}, {"in time", v.guard.Status().Epoch, true}} {
		transition := keyguard.Transition{Epoch: c.epoch}
		v.fs.leftover.Store(7)
		v.fs.Draining(t.Context(), transition)
		v.fs.leftover.Store(7)
		v.fs.DrainLate(t.Context())
		v.fs.Frozen(t.Context(), transition)
		for what, is := range map[string]bool{"closed": v.fs.closed.Load(), "reads held back": v.fs.holdReads.Load(), "slots wiped": wiping(), "no hot blocks": v.fs.hot.off.Load(), "leftover counted": v.fs.leftover.Load() != 7, "nodes held": v.fs.nodes.held} {
			if is != c.frozen {
				t.Errorf("%s: %s is %v", c.name, what, is)
			}
		}
	}
	v.fs.Thawed(keyguard.Transition{Epoch: v.guard.Status().Epoch + 1})
}

// TestStartOnFullDisk: a volume can be mounted although there is no space to note its header's generation, which is
// done at the next start then.
func TestStartOnFullDisk(t *testing.T) {
	v := newVolumeIn(t, newDisk(t, 16, 20, "", ""), Options{})
	if err := os.WriteFile(v.path("file"), []byte("there"), 0o600); err != nil {
		t.Fatal(err)
	}
	v.unmount()
	mark := filepath.Join(v.lower, seal.VolumeMarkName)
	if err := os.Remove(mark); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(filepath.Dir(v.lower), "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for size := int64(1); err == nil; size++ { // allocated at once, to the last block
		err = unix.Fallocate(int(f.Fd()), 0, 0, size*block)
	}
	if f.Close(); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	v.open()
	for name, want := range map[string]bool{mark: false, durable.TempName(mark): false, v.path("file"): true} {
		if _, err := os.Stat(name); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	v.unmount()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	v.open()
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("with space again: %v", err)
	}
}
