// byokd keeps the disk and the objects of a stateful workload readable exactly as long as its owner's
// AWS KMS key is. See `byokd help` and docs/ARCHITECTURE.md.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

// Exit codes. They are part of the interface: scripts and probes rely on them, and docs/OPERATIONS.md
// lists them (a test compares).
const (
	exitOK            = 0  // clean stop; status: ready
	exitFailure       = 1  // something failed that has no code of its own
	exitUsage         = 2  // wrong command line
	exitConfig        = 3  // the configuration is wrong
	exitLower         = 4  // the lower directory is refused: foreign files, another key, damaged header
	exitMisconfigured = 5  // the key cannot be used for this, whatever its state
	exitMount         = 6  // the mount point cannot be used, or the mount ended by itself
	exitListen        = 7  // an address cannot be listened at
	exitForced        = 8  // a second signal, or the time to stop ran out: stopped without flushing
	exitDamaged       = 9  // decrypt, seal, check: sealed bytes are damaged, cut short, foreign or under another key
	exitFrozen        = 10 // status: frozen; decrypt, seal, check, key rewrap: KMS refuses the key
	exitWaiting       = 11 // status: not started yet, usually waiting for the key
	exitDegraded      = 12 // status: serving while KMS cannot be reached, until the lease ends
	exitStopping      = 13 // status: stopping
	exitFinal         = 14 // status: frozen for good, the key is deleted
	exitRecorded      = 15 // freeze, thaw: recorded, carried out when the key is back
	exitStillNeeded   = 16 // key rewrap --finish: something still needs the old key
	exitChecks        = 17 // preflight, key verify: at least one check failed
	exitDenied        = 18 // render: a pod is denied, as the webhook would
	exitTakeOver      = 19 // the mount of a worker that died cannot be gone on with
	exitNoAnswer      = 20 // status, freeze, thaw: no byokd answers at the address or socket
	exitImpaired      = 21 // status: serving, but a resource is not well for a reason other than its key
)

// exitError carries an exit code with an error.
type exitError struct {
	code int
	err  error // nil when everything was said already
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

func exitWith(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

//go:embed reference.yaml
var configReference string

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// run is the whole program; it returns the exit code. Nothing else exits.
func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) int {
	root := newCommand(environ)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.InitDefaultCompletionCmd() // byokd completion bash|zsh|fish|powershell; it keeps the output that is set now
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	var coded *exitError
	if !errors.As(err, &coded) {
		// cobra's own: unknown commands and flags.
		fmt.Fprintf(stderr, "byokd: %v\nTry: %s --help\n", err, cmd.CommandPath())
		return exitUsage
	}
	if coded.err != nil {
		fmt.Fprintf(stderr, "byokd: %v\n", coded.err)
	}
	return coded.code
}

func newCommand(environ []string) *cobra.Command {
	root := &cobra.Command{
		Use:   "byokd",
		Short: "Bring your own key: an encrypted disk and bucket that freeze when the key is taken away",
		Long: "byokd mounts an encrypted filesystem and serves an encrypting S3 endpoint. While the owner's AWS KMS key\n" +
			"cannot be used, reads and writes wait and no plain data leaves; when it can be used again, they go on.",
		SilenceErrors: true, SilenceUsage: true,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(
		newRunCommand(environ),
		newStatusCommand(environ),
		newExplainCommand(environ),
		newFreezeCommand(),
		newThawCommand(),
		newUpgradeCommand(),
		newPreflightCommand(environ),
		newIdentityCommand(environ),
		newKeyCommand(environ),
		newDecryptCommand(environ),
		newSealCommand(environ),
		newCheckCommand(environ),
		newConfigCommand(environ),
		newInjectCommand(),
		newRenderCommand(),
		newProbeCommand(environ),
		newVersionCommand(),
		newSentinelCommand(),
		newNodeCommand(),
		newSeamCommand(),
	)
	return root
}

func newConfigCommand(environ []string) *cobra.Command {
	parent := &cobra.Command{Use: "config", Short: "Check a configuration, or explain its fields"}
	var file string
	check := &cobra.Command{
		Use: "check --config FILE", Short: "Tell everything that is wrong with a configuration file", Args: cobra.NoArgs,
		Long: "Reads the file as `byokd run` would, with the overrides from the environment, and tells every fault with its\n" +
			"line. Looks at no key, directory or network. Exit code 0 when sound, 3 when not.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, warnings, err := loadConfig(file, environ)
			for _, w := range warnings {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
			}
			if err != nil {
				return exitWith(exitConfig, err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is sound.\n", file)
			return nil
		},
	}
	configFlag(check, &file)
	reference := &cobra.Command{
		Use: "reference", Short: "Print every field with its explanation and default, as a configuration file", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := io.WriteString(cmd.OutOrStdout(), configReference)
			return exitWith(exitFailure, err)
		},
	}
	parent.AddCommand(check, reference)
	return parent
}

func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "config", "", "the configuration file (required)")
	if err := cmd.MarkFlagRequired("config"); err != nil {
		panic(err) // the flag was just made
	}
}
