package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

const (
	exitFailed = 1 // the server or the command failed
	exitUsage  = 2 // the command line is wrong
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// app is what the commands share.
type app struct {
	endpoint string // of the running devcloud
	stdin    io.Reader
	stdout   io.Writer
	stderr   io.Writer
}

// usageError is a mistake in the command line.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, endpoint: getenv("DEVCLOUD_ENDPOINT")}
	if a.endpoint == "" {
		a.endpoint = defaultEndpoint
	}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil, errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "devcloud: %v\nTry: devcloud --help\n", err)
		return exitUsage
	}
	fmt.Fprintln(stderr, "devcloud:", err)
	return exitFailed
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "devcloud",
		Short: "A stand-in for AWS (KMS, STS, S3) on loopback, for trying and testing byokd",
		Long: `devcloud is a stand-in for AWS on loopback: KMS with true key states and
policies, STS GetCallerIdentity and S3 on a directory, at one endpoint.
It is for trying and testing only; nothing in it is protected.

  devcloud serve --dir ./cloud --setup     start it
  devcloud key disable                     take the key alias/byokd away
  devcloud key enable                      bring it back
  devcloud fault cut                       reset every connection to KMS
  devcloud fault clear                     end all faults
  devcloud calls --follow                  watch who asks KMS for what

The real command line works too, for example:
  AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_REGION=eu-central-1 \
    aws --endpoint-url http://127.0.0.1:4566 kms describe-key --key-id alias/byokd`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&a.endpoint, "endpoint", a.endpoint, "where the running devcloud listens (or DEVCLOUD_ENDPOINT)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(a.serveCommand(), a.setupCommand(), a.keyCommand(), a.faultCommand(), a.callsCommand(), a.certificateCommand())
	return root
}

// noArgs and atMost are cobra's checks with our error type.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unknown argument %q for %q", args[0], cmd.CommandPath())}
	}
	return nil
}

func between(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			return usageError{fmt.Errorf("usage: %s", cmd.UseLine())}
		}
		return nil
	}
}
