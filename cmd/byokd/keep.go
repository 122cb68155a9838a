package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/keeper"
	"github.com/byokd/byokd/metrics"
)

// With a keeper (volume.keeper) `byokd run` is two processes: this one becomes the keeper, which starts the
// worker as `byokd run` with the same arguments and a word in the environment, and again when it dies.

// suitWithin bounds the question to a new binary whether it can be the worker.
const suitWithin = 10 * time.Second

// kept reports whether a keeper holds the volume's mount; v may be nil. With auto that depends on the lower
// directory, or, where there is none yet, on the one that it will be made in.
func (v *VolumeConfig) kept() bool {
	if v == nil || v.Keeper != keeperAuto || v.MountSocket != "" {
		return v != nil && v.Keeper == keeperOn
	}
	if outsideMounts(v.Lower) != nil {
		return false // nor will it be served, and the directory may not answer
	}
	dir := v.Lower
	for dir != filepath.Dir(dir) {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			break
		}
		dir = filepath.Dir(dir)
	}
	return fs.OpensByHandle(dir)
}

// keepRunning is the keeper's life. The worker has said everything that there is to say.
func keepRunning(log *zap.Logger, environ []string) error {
	program, err := os.Executable()
	if err != nil {
		return exitWith(exitFailure, err)
	}
	harden(log)
	if err := enoughDescriptors(log); err != nil {
		return err
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	code, err := keeper.Run(keeper.Options{Program: program, Args: os.Args, Env: environ,
		Files: [3]*os.File{os.Stdin, os.Stdout, os.Stderr}, Signals: signals,
		Suits: suits, CannotTakeOver: exitTakeOver, Sentinel: startSentinel, Log: log.Named("keeper")})
	if err != nil {
		return failure(log, "no worker can be started", exitFailure, err)
	}
	if code != exitOK {
		return &exitError{code, nil}
	}
	return nil
}

// workUntilSignal is the worker's life: that of a byokd without a keeper, whose end in order is announced.
func workUntilSignal(ctx context.Context, cfg Config, log *zap.Logger, environ []string, w *keeper.Worker) error {
	err := runUntilSignal(ctx, cfg, log, environ, w)
	code := exitOK
	var coded *exitError
	switch {
	case errors.As(err, &coded):
		code = coded.code
	case err != nil:
		code = exitFailure
	}
	return errors.Join(err, w.Farewell(code))
}

// seam is what keeper and worker of different builds must agree on.
func seam() string { return fmt.Sprintf("keeper %d, journal %d", keeper.Version, fs.JournalVersion) }

const seamCommand = "worker-seam"

func newSeamCommand() *cobra.Command {
	return &cobra.Command{
		Use: seamCommand, Short: "print what a keeper must know of its worker's binary (asked by byokd run)", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), seam())
			return exitWith(exitFailure, err)
		},
	}
}

// suits asks a binary whether it can be the worker of this keeper.
func suits(program string) error {
	ctx, cancel := context.WithTimeout(context.Background(), suitWithin)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, seamCommand).Output()
	if err != nil {
		return fmt.Errorf("%s %s: %w", program, seamCommand, err)
	}
	if got := strings.TrimSpace(string(out)); got != seam() {
		return fmt.Errorf("it works with %q, this one with %q: stop byokd and start it again", got, seam())
	}
	return nil
}

// keep connects the volume with its keeper.
func (v *volume) keep() *fs.Keep {
	w := v.worker
	if w == nil {
		return nil
	}
	return &fs.Keep{Device: v.device, Journal: v.journal, Hold: w.Hold, Faulted: w.Cause == keeper.Fault,
		Release: func(node uint64) { v.toldKeeper(w.Release(node)) }, Held: w.Held,
		Refused: func(string) { v.workers.Refused() },
		Deposit: func(device, journal int) error {
			return errors.Join(w.Deposit("device", device), w.Deposit("journal", journal))
		}}
}

// toldKeeper logs that the keeper does not listen, which means that this process is about to be ended with it.
func (v *volume) toldKeeper(err error) {
	if err != nil {
		v.log.Warn("the keeper cannot be told", zap.Error(err))
	}
}

// takesOver says that the mount is there already.
func (v *volume) takesOver() bool { return v.device >= 0 && v.journal >= 0 }

// guardMount sees to it that the mount does not outlive who serves it.
func (v *volume) guardMount() (stop func()) {
	if w := v.worker; w != nil { // the keeper does; it lives on if this process does not
		v.toldKeeper(w.Mounted(v.cfg.Volume.Mount))
		v.toldKeeper(w.Serving())
		return func() {}
	}
	stop, err := startSentinel(v.cfg.Volume.Mount)
	if err != nil {
		v.log.Warn("without a sentinel, a byokd killed in a freeze may hang until the mount is ended by hand (umount -f -l)", zap.Error(err))
		return func() {}
	}
	return stop
}

// serveOn goes on with the mount of the worker before, before the key is asked: its callers wait, and may be
// killed meanwhile. It ends as serve does.
func (v *volume) serveOn(ctx context.Context) error {
	f, err := v.openLocked()
	if err != nil {
		return err
	}
	defer v.close(f)
	if err := f.Mount(v.cfg.Volume.Mount); err != nil {
		v.resource.Failed(err.Error(), "")
		return failure(v.log, "the mount of the worker before cannot be gone on with", exitTakeOver, err)
	}
	defer v.guardMount()()
	unlocked, err := v.unlock(ctx, f)
	if err != nil {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.cfg.share(2))
		defer cancel()
		return errors.Join(err, f.Unmount(limit))
	}
	if unlocked {
		took := time.Since(v.worker.Died)
		v.workers.Recovered(took)
		v.log.Info("the mount of the worker before is served", zap.Stringer("its end", v.worker.Cause), zap.Duration("callers waited", took.Round(time.Millisecond)))
	}
	return v.untilEnd(ctx, f)
}

// restarts are what the page says of workers before this one.
func (v *volume) restarts() []metrics.Fact {
	w := v.worker
	if w == nil {
		return nil
	}
	total := uint64(0)
	for _, n := range w.Restarts {
		total += n
	}
	text := "never"
	if total > 0 {
		text = fmt.Sprintf("%d times, last %s (%s)", total, w.Died.UTC().Format(time.RFC3339), w.Cause)
	}
	return []metrics.Fact{{Name: "Worker restarted", Value: text}}
}
