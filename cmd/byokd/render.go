package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/inject"
)

func newRenderCommand() *cobra.Command {
	var sidecar sidecarFlags
	var files []string
	cmd := &cobra.Command{
		Use: "render -f FILE", Short: "Put byokd into the labelled pods of a manifest, as the webhook would (Kubernetes)", Args: cobra.NoArgs,
		Long: `Reads manifests (Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, ReplicationController, Job, CronJob and Lists of them,
in any number of documents), does to every pod or template with the label byokd.io/inject: "true" what ` + "`byokd inject`" + `
would, and writes the result to standard output. All else passes through as it is. Warnings go to standard error.
What it has written it leaves as it is; so does the webhook.

Exit codes:
  0   done
  1   a file cannot be read, or is no manifest
  2   wrong command line
  18  a pod is denied, as the webhook would; nothing is written`,
		Example: "  byokd render -f statefulset.yaml | kubectl apply -f -\n  helm template … | byokd render -f - >rendered.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, err := sidecar.settings()
			if err != nil {
				return exitWith(exitUsage, err)
			}
			in, err := openAll(files, cmd.InOrStdin())
			if err != nil {
				return exitWith(exitFailure, err)
			}
			return render(in, settings, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringSliceVarP(&files, "filename", "f", nil, "manifest to read, - for standard input; may be given several times (required)")
	if err := cmd.MarkFlagRequired("filename"); err != nil {
		panic(err) // the flag was just made
	}
	sidecar.add(cmd.Flags(), "off")
	return cmd
}

// openAll reads the files one after another, as documents of one manifest.
func openAll(files []string, stdin io.Reader) (io.Reader, error) {
	var all []byte
	for i, name := range files {
		text, err := os.ReadFile(name)
		if name == "-" {
			text, err = io.ReadAll(stdin)
		}
		if err != nil {
			return nil, err
		}
		if i > 0 {
			all = append(all, "\n---\n"...)
		}
		all = append(all, text...)
	}
	return bytes.NewReader(all), nil
}

func render(in io.Reader, settings inject.Settings, stdout, stderr io.Writer) error {
	rendered, findings, err := inject.Render(in, settings)
	if err != nil {
		return exitWith(exitFailure, err)
	}
	var denied error
	for _, f := range findings {
		for _, w := range f.Warnings {
			fmt.Fprintf(stderr, "warning: %s: %s\n", f.Object, w.Text)
		}
		if f.Denial != nil {
			denied = errors.Join(denied, fmt.Errorf("%s is denied: %w", f.Object, f.Denial))
		}
	}
	if denied != nil {
		return exitWith(exitDenied, denied)
	}
	_, err = stdout.Write(rendered)
	return exitWith(exitFailure, err)
}
