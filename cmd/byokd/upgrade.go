package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/control"
)

// upgradeWait bounds the wait for the new worker: it starts in a moment, and waits for its key as callers do.
const upgradeWait = 30 * time.Second

// workerReport is who serves.
type workerReport struct {
	PID     int    `json:"pid"`
	Version string `json:"version"`
}

func newUpgradeCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use: "upgrade", Short: "Go on with the byokd that is installed now, without unmounting", Args: cobra.NoArgs,
		Long: `Replaces the worker of a running byokd with a keeper (volume.keeper) by one of the binary that lies where the
running one was started from: put the new one there first, by renaming it into place. Calls on the mount wait for the
moment that it takes, and none fails; connections to the S3 proxy break, and clients try again. A binary that cannot go
on with the mount is refused, or given up for the one before. The keeper itself stays the old one until byokd is stopped
and started. SIGHUP does the same.

Exit codes:
  0   another worker serves
  1   not upgraded; the text says why
  13  byokd is stopping
  20  no byokd listens at the socket`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var before workerReport
			if err := callDaemon(cmd, socket, "worker", nil, &before); err != nil {
				return err
			}
			var asked workerReport
			err := callDaemon(cmd, socket, "upgrade", nil, &asked)
			var failed *control.Failure
			if errors.As(err, &failed) { // any other error may be the end of the worker that was asked
				return err
			}
			after, err := awaitWorker(cmd.Context(), socket, before.PID)
			if err != nil {
				return exitWith(exitFailure, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "byokd %s serves (process %d), after byokd %s (process %d)\n", after.Version, after.PID, before.Version, before.PID)
			return exitWith(exitFailure, err)
		},
	}
	socketFlag(cmd, &socket)
	return cmd
}

// awaitWorker waits until another process than pid answers.
func awaitWorker(ctx context.Context, socket string, pid int) (workerReport, error) {
	ctx, cancel := context.WithTimeout(ctx, upgradeWait)
	defer cancel()
	for {
		var r workerReport
		text, err := control.NewClient(socket).Call(ctx, "worker", nil, func(json.RawMessage) {})
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err == nil && r.PID != pid {
			return r, nil
		}
		select {
		case <-time.After(20 * time.Millisecond): // between two looks
		case <-ctx.Done():
			return r, fmt.Errorf("no other worker answers; the log of byokd says why (%w)", ctx.Err())
		}
	}
}

// worker tells who serves.
func (o *operator) worker(context.Context, control.Peer, json.RawMessage, func(any)) (any, error) {
	return workerReport{PID: os.Getpid(), Version: buildVersion()}, nil
}

// upgrade has the keeper replace this process.
func (o *operator) upgrade(context.Context, control.Peer, json.RawMessage, func(any)) (any, error) {
	w := o.d.worker
	if w == nil {
		return nil, &control.Failure{Code: exitFailure, Text: "this byokd has no keeper (volume.keeper): stop it and start the other one"}
	}
	program, err := os.Executable()
	if err == nil {
		err = suits(strings.TrimSuffix(program, " (deleted)")) // so says the kernel once another file is there
	}
	if err == nil {
		err = w.Upgrade()
	}
	if err != nil {
		return nil, &control.Failure{Code: exitFailure, Text: "not upgraded: " + err.Error()}
	}
	return workerReport{PID: os.Getpid(), Version: buildVersion()}, nil
}
