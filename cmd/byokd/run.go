package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/keeper"
)

const (
	// forcedGrace is how long a forced stop may still take: one lazy unmount, which returns at once.
	forcedGrace = 3 * time.Second
	// oneSignal is how soon after the first a second signal is the same wish: timeout(1), shells and supervisors signal a
	// process and then its group. Nobody who is impatient is that quick.
	oneSignal = time.Second
)

var (
	errForced = errors.New("stopped without flushing: what was not fsynced may be lost")
	errCutOff = errors.New("stopped at once: requests to the S3 proxy that were under way are cut off; no volume was mounted any more")
)

func newRunCommand(environ []string) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "run --config FILE", Short: "Serve the volume and the buckets of a configuration file", Args: cobra.NoArgs,
		Long: `Serves until SIGTERM or SIGINT, then flushes, unmounts and exits, also while frozen. A second signal, a second
later or more, stops without flushing. While the key cannot be used at the start, byokd waits, not mounted and not ready, and goes
on by itself; the admin listener tells why from the first moment.

With volume.keeper this process is the keeper: it holds the mount and starts a worker that serves it, again
when it is killed, and anew from the installed binary on SIGHUP (byokd upgrade). Callers wait meanwhile.

Exit codes:
  0  stopped after a signal, everything flushed
  1  failed for a reason without a code of its own
  2  wrong command line
  3  the configuration is wrong
  4  the lower directory is refused: foreign files, another key, another cluster, damaged header
  5  the key is misconfigured: wrong region, wrong kind, or the data belongs to another key
  6  the mount point cannot be used, or the mount was ended by somebody else
  7  an address or the control socket cannot be listened at
  8  forced: a second signal, or stopTimeout ran out
  19 the mount of a worker that died cannot be gone on with`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			worker, environ, err := keeper.Connect(environ)
			if err != nil {
				return exitWith(exitFailure, err)
			}
			cfg, warnings, err := loadConfig(file, environ)
			if err != nil {
				return exitWith(exitConfig, err)
			}
			log := newLogger(cfg.Log, cmd.ErrOrStderr())
			if worker != nil {
				return workUntilSignal(cmd.Context(), cfg, log, environ, worker)
			}
			for _, w := range warnings {
				log.Warn(w)
			}
			if cfg.Volume.kept() {
				return keepRunning(log, environ)
			}
			return runUntilSignal(cmd.Context(), cfg, log, environ, nil)
		},
	}
	configFlag(cmd, &file)
	return cmd
}

func newLogger(cfg LogConfig, stderr io.Writer) *zap.Logger {
	level, err := zapcore.ParseLevel(cfg.Level)
	if err != nil {
		panic(err) // validated
	}
	e := zap.NewProductionEncoderConfig()
	e.TimeKey, e.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(e)
	if cfg.Format == "console" {
		e.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		e.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(e)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(stderr)), level))
}

// runUntilSignal serves until the first signal, stops in order, and cuts the stop short at the second or
// when stopTimeout has run out twice over.
func runUntilSignal(ctx context.Context, cfg Config, log *zap.Logger, environ []string, w *keeper.Worker) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)
	if w != nil {
		if err := w.Ready(); err != nil {
			return failure(log, "the keeper is gone", exitFailure, err)
		}
	}
	harden(log)
	if err := checkDescriptors(log); err != nil {
		return err
	}

	serving, stop := context.WithCancel(ctx)
	defer stop()
	d := newDaemon(cfg, log, environ, w)
	done := make(chan error, 1)
	go func() { done <- d.serve(serving) }()

	var began time.Time
	select {
	case err := <-done:
		return err
	case s := <-signals:
		began = time.Now()
		log.Info("stopping", zap.Stringer("signal", s))
	case <-ctx.Done():
	}
	stop()
	deadline := time.After(cfg.StopTimeout.Duration)
	for {
		select {
		case err := <-done:
			return err
		case s := <-signals:
			if time.Since(began) < oneSignal {
				log.Info("stopping already; a second signal that is to stop at once has to come later than this one", zap.Stringer("signal", s))
				continue
			}
			log.Warn("stopping at once", zap.Stringer("signal", s))
		case <-deadline:
			log.Error("the time to stop ran out", zap.Duration("stopTimeout", cfg.StopTimeout.Duration))
		}
		return force(d, done)
	}
}

// force leaves nothing mounted and gives up on the rest.
func force(d *daemon, done <-chan error) error {
	reason := errCutOff
	if d.abandon() {
		reason = errForced
	}
	select {
	case <-done:
	case <-time.After(forcedGrace):
	}
	return &exitError{exitForced, reason}
}

// report logs the error that ends a run; the caller of run prints it for people as well.
func failure(log *zap.Logger, what string, code int, err error) error {
	log.Error(what, zap.Error(err), zap.Int("exit_code", code))
	return &exitError{code, fmt.Errorf("%s: %w", what, err)}
}
