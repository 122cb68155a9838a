package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/inject"
)

func newInjectCheckCommand() *cobra.Command {
	var namespace, revision, kubeconfig string
	cmd := &cobra.Command{
		Use: "check", Short: "Try, without creating anything, whether pods of a namespace are injected (Kubernetes)", Args: cobra.NoArgs,
		Long: `Asks the API server by dry run what it would do with three pods: one that is to be injected, one with a misspelt annotation,
which the webhook has to deny, and one that no webhook knows, which the policy has to deny. It needs the right to create
pods in the namespace. helm test runs it.

Exit codes:
  0   all three are as they should be
  1   the API server cannot be asked
  17  at least one is not`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := kubeConfig(kubeconfig)
			if err != nil {
				return exitWith(exitFailure, err)
			}
			trials, err := inject.Try(cmd.Context(), config, namespace, revision)
			if err != nil {
				return exitWith(exitFailure, err)
			}
			failed := false
			for _, t := range trials {
				if t.Err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "ok      %s\n", t.What)
					continue
				}
				failed = true
				fmt.Fprintf(cmd.OutOrStdout(), "FAILED  %s: %v\n", t.What, t.Err)
			}
			if failed {
				return exitWith(exitChecks, errors.New("the cluster does not do what byokd needs; see above"))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&namespace, "namespace", "default", "namespace of the pods")
	cmd.Flags().StringVar(&revision, "revision", "", "the injector to ask, where there are several")
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server, outside of a cluster")
	return cmd
}
