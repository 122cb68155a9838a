package fs

import (
	"errors"
	"testing"

	"github.com/byokd/byokd/keyguard"
)

// TestSettledAfterFrozen: a freeze whose last step has not ended, for it missed
// its deadline, is not taken for one that left nothing in the kernel.
func TestSettledAfterFrozen(t *testing.T) {
	v := newVolume(t, Options{})
	v.fs.Draining(t.Context(), keyguard.Transition{})
	if err := v.fs.Settled(); !errors.Is(err, ErrUndrained) {
		t.Errorf("between draining and frozen: %v, want %v", err, ErrUndrained)
	}
	v.fs.Frozen(t.Context(), keyguard.Transition{})
	if err := v.fs.Settled(); err != nil {
		t.Errorf("frozen: %v", err)
	}
	v.fs.Thawed(keyguard.Transition{})
	if err := v.fs.Flush(t.Context()); err != nil {
		t.Errorf("flush of a volume that serves: %v", err)
	}
}
