package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/internal/volumeread"
)

// checkProgressEvery is how often a running byokd tells how far its check is.
const checkProgressEvery = time.Second

// servedProgress is a line of progress of a check by a running byokd.
type servedProgress struct {
	Done   int64  `json:"done"` // bytes
	Total  int64  `json:"total"`
	Frozen string `json:"frozen,omitempty"` // why the check waits
}

// busy asks the byokd of the configuration to check the volume that it serves.
func (c *checking) busy(ctx context.Context, lower string) error {
	cfg := c.from.cfg
	if c.from.loaded && cfg.Volume != nil && cfg.Admin.Socket != "" && (lower == "" || sameDirectory(lower, cfg.Volume.Lower)) {
		err := c.askServer(ctx, cfg.Admin.Socket)
		if !errors.Is(err, control.ErrNoAnswer) {
			return err
		}
	}
	return exitWith(exitLower, fmt.Errorf("%w. Or have the byokd that serves it check it: byokd check --socket SOCKET, which is admin.socket of its configuration", volumeread.ErrBusy))
}

func sameDirectory(a, b string) bool {
	x, err := os.Stat(a)
	y, other := os.Stat(b)
	return err == nil && other == nil && os.SameFile(x, y)
}

// askServer has the byokd at a socket check its volume.
func (c *checking) askServer(ctx context.Context, socket string) error {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	waits := ""
	text, err := control.NewClient(socket).Call(ctx, "check", nil, func(line json.RawMessage) {
		var p servedProgress
		if json.Unmarshal(line, &p) != nil {
			return
		}
		if c.progress == nil {
			c.progress = newProgress(c.stderr, "checking", p.Total)
		}
		c.progress.tell(p.Done)
		if p.Frozen != waits {
			if waits = p.Frozen; waits != "" {
				fmt.Fprintf(c.stderr, "frozen, the check goes on after the thaw: %s\n", waits)
			}
		}
	})
	if c.progress != nil {
		c.progress.finish()
	}
	var failed *control.Failure
	switch {
	case errors.Is(err, control.ErrNoAnswer):
		return exitWith(exitNoAnswer, fmt.Errorf("%w; is it running, and is admin.socket set in its configuration?", err))
	case errors.As(err, &failed):
		return exitWith(failed.Code, err)
	case err != nil:
		return err
	}
	if err := json.Unmarshal(text, &c.report); err != nil {
		return err
	}
	return c.tell()
}

// check reads every block of the mounted volume while it is served.
func (o *operator) check(ctx context.Context, _ control.Peer, _ json.RawMessage, progress func(any)) (any, error) {
	v := o.d.volume
	if v == nil {
		return nil, &control.Failure{Code: exitUsage, Text: "this byokd serves no volume"}
	}
	f := v.mounted.Load()
	if s := v.guard.Status(); f == nil || !s.Ready() {
		return nil, &control.Failure{Code: exitFrozen, Text: "the volume cannot be checked now: " + s.Headline() + "\nNext step: " + s.NextStep()}
	}
	if !o.checking.TryLock() {
		return nil, &control.Failure{Code: exitFailure, Text: "a check of this volume is under way: wait for its end"}
	}
	defer o.checking.Unlock()
	served, err := volumeread.OpenServed(v.cfg.Volume.Lower, f)
	if err != nil {
		return nil, &control.Failure{Code: exitLower, Text: err.Error()}
	}
	defer served.Close()
	if err := served.Unlock(usingKeysOf(ctx, f)); err != nil {
		return nil, err
	}
	return o.walk(ctx, served, progress)
}

// usingKeysOf gives a walk the keys of the gate: it waits while the volume is frozen.
func usingKeysOf(ctx context.Context, f *fs.Filesystem) volumeread.Keys {
	return func(use func(root *seal.Root) error) error { return f.UseKeys(ctx, use) }
}

// walk checks, and tells each second how far it is.
func (o *operator) walk(ctx context.Context, served *volumeread.Volume, progress func(any)) (any, error) {
	v, began := o.d.volume, time.Now()
	var done, total atomic.Int64
	check := newVolumeCheck(v.cfg.Volume.Lower, served, done.Store)
	check.report.Served = true
	ended := make(chan error, 1)
	go func() {
		total.Store(sizeBelow(v.cfg.Volume.Lower))
		ended <- check.run(ctx)
	}()
	for tick := time.NewTicker(checkProgressEvery); ; {
		select {
		case err := <-ended:
			tick.Stop()
			if err != nil {
				return nil, fmt.Errorf("the check has ended early: %w", err)
			}
			check.report.Seconds = time.Since(began).Seconds()
			return check.report, nil
		case <-tick.C:
			p := servedProgress{Done: done.Load(), Total: total.Load()}
			if s := v.guard.Status(); !s.Ready() {
				p.Frozen = s.Headline()
			}
			progress(p)
		}
	}
}
