package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/keyguard"
)

func newRewrapCommand(environ []string) *cobra.Command {
	var file, output string
	var q rewrapRequest
	cmd := &cobra.Command{
		Use: "rewrap --config FILE --to ARN", Short: "Move volume and buckets to another KMS key; no data is rewritten", Args: cobra.NoArgs,
		Long: `Puts the root key of the volume and the data keys of the buckets under another KMS key as well, while byokd goes on
serving; then, with --finish, takes them from the old one. No file and no object is rewritten, no ETag changes.

  1. byokd key rewrap --config FILE --to ARN            everything opens under both keys now
  2. set keys.NAME.arn to ARN in the configuration and restart byokd, everywhere
  3. byokd key rewrap --config FILE --to ARN --finish   everything opens under the new key alone
  4. disable the old key, and delete it when nothing was missed

It may be stopped or killed at any time and begun anew. Each new form is unwrapped with the new key and compared before
it is written. --finish refuses while anything still needs the old key, and says what. A move is taken back by
finishing it --to the old key.

When byokd runs (admin.socket), it does the work, with its own role; else this command does, with its own credentials.
Needed are kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new one, or kms:Decrypt and kms:Encrypt; and on
the new key what the documented policy allows (byokd key policy).

Exit codes:
  0   done, or with --dry-run: listed
  1   failed; what was done stays done, begin anew
  2   wrong command line
  3   the configuration is wrong
  4   the volume's header is damaged, or an older one was put back
  5   the key to move to cannot be used
  10  KMS refuses one of the keys; the text says which and what to do
  16  --finish: something still needs the old key`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cfg, _, err := loadConfig(file, environ)
			if err != nil {
				return exitWith(exitConfig, err)
			}
			report, err := rewrapAnywhere(cmd, cfg, q)
			if err != nil {
				return err
			}
			if output == outputJSON {
				return writeJSON(cmd.OutOrStdout(), report)
			}
			writeRewrap(cmd.OutOrStdout(), q, report)
			return nil
		},
	}
	configFlag(cmd, &file)
	outputFlag(cmd, &output)
	cmd.Flags().StringVar(&q.To, "to", "", "ARN of the KMS key to move to (required)")
	if err := cmd.MarkFlagRequired("to"); err != nil {
		panic(err) // the flag was just made
	}
	cmd.Flags().StringVar(&q.Key, "key", "", "which key of the configuration moves (the only one)")
	cmd.Flags().StringVar(&q.From, "from", "", "ARN of the old key, where configuration and volume do not tell it")
	cmd.Flags().BoolVar(&q.Finish, "finish", false, "take everything from the old key, if nothing needs it any more")
	cmd.Flags().BoolVar(&q.DryRun, "dry-run", false, "only list what is under which key and what needs the old one")
	cmd.Flags().BoolVar(&q.Scan, "scan", false, "look into every object for data keys that the bucket's keyring does not list")
	return cmd
}

// rewrapAnywhere lets the running byokd do it, or does it here when none runs.
func rewrapAnywhere(cmd *cobra.Command, cfg Config, q rewrapRequest) (*rewrapReport, error) {
	if cfg.Admin.Socket != "" {
		var report rewrapReport
		err := callDaemon(cmd, cfg.Admin.Socket, "rewrap", q, &report)
		if !errors.Is(err, control.ErrNoAnswer) {
			return &report, err
		}
	}
	trail, err := openAudit(cfg.Audit.File, cfg.Audit.MaxSize.Bytes, zap.NewNop())
	if err != nil {
		return nil, exitWith(exitConfig, err)
	}
	job := &rewrapJob{cfg: cfg, request: q, audit: trail.record,
		progress: func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }}
	if cfg.Volume != nil {
		if _, err := fs.RewrapStatus(cfg.Volume.Lower); !errors.Is(err, fs.ErrNotInitialised) {
			job.volume = func(ctx context.Context, o fs.RewrapOptions) (fs.RewrapReport, error) {
				return fs.Rewrap(ctx, cfg.Volume.Lower, o)
			}
		}
	}
	report, err := job.run(cmd.Context())
	return report, errors.Join(codedRewrap(err), exitWith(exitFailure, trail.close()))
}

// codedRewrap gives an error its exit code.
func codedRewrap(err error) error {
	var failed *control.Failure
	var kms *keyguard.KMSError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &failed):
		return &exitError{failed.Code, err}
	case errors.Is(err, fs.ErrOldHeader):
		return &exitError{exitLower, err}
	case errors.Is(err, fs.ErrBusy):
		return &exitError{exitFailure, fmt.Errorf("%w; set admin.socket in its configuration, so that it can be asked to do this itself", err)}
	}
	if errors.As(err, &kms) && kms.State != keyguard.Unreachable && kms.State != keyguard.Misconfigured {
		return &exitError{exitFrozen, err}
	}
	return &exitError{exitFailure, err}
}

// rewrap is the operation of a running byokd.
func (o *operator) rewrap(ctx context.Context, _ control.Peer, request json.RawMessage, progress func(any)) (any, error) {
	var q rewrapRequest
	decoder := json.NewDecoder(bytes.NewReader(request))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&q); err != nil {
		return nil, &control.Failure{Code: exitUsage, Text: "the request cannot be read: " + err.Error()}
	}
	o.rewrapping.Lock()
	defer o.rewrapping.Unlock()
	job := &rewrapJob{cfg: o.d.cfg, request: q, audit: o.d.audit.record, running: true, progress: func(line string) { progress(line) }}
	if v := o.d.volume; v != nil {
		job.volume = func(ctx context.Context, options fs.RewrapOptions) (fs.RewrapReport, error) {
			f := v.mounted.Load()
			if f == nil {
				return fs.RewrapReport{}, errors.New("the volume is not served yet: bring its key back first (byokd status)")
			}
			return f.Rewrap(ctx, options)
		}
	}
	report, err := job.run(ctx)
	var coded *exitError
	if errors.As(codedRewrap(err), &coded) {
		return nil, &control.Failure{Code: coded.code, Text: err.Error()}
	}
	return report, nil
}

func writeRewrap(out io.Writer, q rewrapRequest, r *rewrapReport) {
	fmt.Fprintf(out, "key %s\n  to   %s\n", r.Key, r.To)
	if r.From != "" {
		fmt.Fprintf(out, "  from %s\n", r.From)
	}
	if v := r.Volume; v != nil {
		fmt.Fprintf(out, "volume in %s: generation %d, opens under %s\n", v.Lower, v.Generation, strings.Join(v.KMS, " and "))
	}
	for _, b := range r.Buckets {
		if b.Keys == 0 {
			fmt.Fprintf(out, "bucket %s: no data keys yet\n", b.Name)
			continue
		}
		fmt.Fprintf(out, "bucket %s: %d of %d data keys open under the new key; wrapped by %s\n", b.Name, b.Keys-b.Waiting, b.Keys, strings.Join(b.KMS, " and "))
	}
	switch {
	case r.Finished:
		fmt.Fprintln(out, "Finished: nothing here needs another key. Keep the old one disabled for a while before you delete it.")
	case len(r.Needs) > 0:
		fmt.Fprintf(out, "Still in need of the old key:\n  - %s\n", strings.Join(r.Needs, "\n  - "))
	default:
		fmt.Fprintf(out, "Nothing here needs the old key any more, which still opens it too. To end that: byokd key rewrap --config FILE --to %s --finish\n", q.To)
	}
}
