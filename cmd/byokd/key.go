package main

import "github.com/spf13/cobra"

func newKeyCommand(environ []string) *cobra.Command {
	parent := &cobra.Command{
		Use: "key", Short: "Create, check and replace KMS keys, and print their policy", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	parent.AddCommand(newRewrapCommand(environ))
	return parent
}
