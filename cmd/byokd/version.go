package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/seal"
)

// buildVersion is the tag or commit that this program was built from, as the Go toolchain recorded it.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "unknown"
	}
	return info.Main.Version
}

// erasureGuaranteed is false in builds without GOEXPERIMENT=runtimesecret.
const erasureGuaranteed = seal.ErasureGuaranteed

// erasureLabel says it in metrics and JSON.
func erasureLabel() string {
	if erasureGuaranteed {
		return "guaranteed"
	}
	return "best_effort"
}

// erasure says in words what becomes of keys in memory at a freeze.
func erasure() string {
	if erasureGuaranteed {
		return "guaranteed (runtimesecret)"
	}
	return "best effort (built without GOEXPERIMENT=runtimesecret)"
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version and how this program was built", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "byokd %s %s/%s %s\nkey erasure: %s\n",
				buildVersion(), runtime.GOOS, runtime.GOARCH, runtime.Version(), erasure())
			return exitWith(exitFailure, err)
		},
	}
}
