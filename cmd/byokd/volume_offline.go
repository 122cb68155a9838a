package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/internal/volumeread"
	"github.com/byokd/byokd/keyguard"
)

// openOffline opens a volume that no byokd serves, with its keys. lower may be empty: then the
// configuration says where it is.
func openOffline(ctx context.Context, lower string, from *keySource) (*volumeread.Volume, error) {
	if lower == "" {
		if from.cfg.Volume == nil {
			return nil, exitWith(exitUsage, errors.New("which volume? Give its lower directory, or a --config that has a volume"))
		}
		lower = from.cfg.Volume.Lower
	}
	v, err := volumeread.Open(lower)
	if err != nil {
		return nil, exitWith(exitLower, err)
	}
	if err := unlockOffline(ctx, v, from); err != nil {
		v.Close()
		return nil, err
	}
	return v, nil
}

// unlockOffline has KMS unwrap the root key, in whichever form one of the keys that may be asked can.
func unlockOffline(ctx context.Context, v *volumeread.Volume, from *keySource) error {
	h := v.Header()
	from.binding = keyguard.BindingOf(h.Binding)
	if len(from.context) > 0 {
		from.binding = keyguard.BindingOf(from.context)
	}
	form := seal.KeyringKey{ID: h.Volume, Forms: map[string][]byte{}}
	for _, f := range h.Forms() {
		form.Forms[f.KeyARN] = f.WrappedRoot
	}
	err := v.Unlock(func(f func(root *seal.Root) error) error { return from.open(ctx, form, f) })
	if errors.Is(err, errNoKey) {
		return exitWith(exitDamaged, fmt.Errorf("%w. The volume's header says %s. If that is a key of yours: --key %s", errNoKey, h.KeyARN, h.KeyARN))
	}
	return err
}

// sizeBelow adds up what is to be read, for a progress that knows its end. What cannot be read does not count.
func sizeBelow(lower string) (total int64) {
	_ = filepath.WalkDir(lower, func(_ string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if info, err := d.Info(); err == nil {
			total += info.Size()
		}
		return nil
	})
	return total
}

// progress tells how far a long run is, on a line of its own: once a second to a terminal, which is written
// over, else twice a minute.
type progress struct {
	out      io.Writer
	what     string
	total    int64
	began    time.Time
	told     time.Time
	interval time.Duration
	terminal bool
}

func newProgress(out io.Writer, what string, total int64) *progress {
	p := &progress{out: out, what: what, total: total, began: time.Now(), told: time.Now(), interval: 30 * time.Second}
	if f, ok := out.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		p.terminal = err == nil
	}
	if p.terminal {
		p.interval = time.Second
	}
	return p
}

// tell is called often; done is in the same measure as total.
func (p *progress) tell(done int64) {
	now := time.Now()
	if now.Sub(p.told) < p.interval {
		return
	}
	p.told = now
	end := "\n"
	if p.terminal {
		end = "\x1b[K\r"
	}
	fmt.Fprint(p.out, p.line(done, now.Sub(p.began)), end)
}

func (p *progress) line(done int64, took time.Duration) string {
	rate := float64(done) / max(took.Seconds(), 1e-3)
	left := "?"
	if rate > 0 {
		left = time.Duration(float64(max(0, p.total-done)) / rate * float64(time.Second)).Round(time.Second).String()
	}
	return fmt.Sprintf("%s: %s of %s, %s/s, %s left", p.what, bytesInWords(done), bytesInWords(p.total), bytesInWords(int64(rate)), left)
}

// finish leaves the line of a terminal.
func (p *progress) finish() {
	if p.terminal && p.told != p.began {
		fmt.Fprint(p.out, "\x1b[K")
	}
}
