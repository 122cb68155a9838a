package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// followWait is how long one request waits for the next call; the server allows 30 s.
const followWait = 25 * time.Second

func (a *app) callsCommand() *cobra.Command {
	var output string
	var follow bool
	var last int
	cmd := &cobra.Command{
		Use:   "calls",
		Short: "Show who asked KMS for what, and the outcome; --follow waits for more",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.reachable(a.calls(cmd.Context(), last, follow, output == "json"))
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new calls until interrupted")
	cmd.Flags().IntVarP(&last, "last", "n", 20, "how many past calls to show; 0 means all kept ones")
	outputFlag(cmd, &output)
	return cmd
}

func (a *app) calls(ctx context.Context, last int, follow, asJSON bool) error {
	after, limit, wait := uint64(0), last, time.Duration(0)
	for {
		page, err := a.control().Calls(ctx, after, limit, wait)
		if err != nil {
			return err
		}
		for _, c := range page.Calls {
			if asJSON {
				if err := json.NewEncoder(a.stdout).Encode(c); err != nil {
					return err
				}
				continue
			}
			fmt.Fprintln(a.stdout, callText(c))
		}
		if !follow {
			return nil
		}
		after, limit, wait = page.Last, 0, followWait
	}
}

// callText is a call on one line.
func callText(c kmstest.Call) string {
	parts := []string{c.Time.Local().Format("15:04:05.000"), c.Service, c.Operation}
	if c.Principal != "" {
		parts = append(parts, "by "+c.Principal[strings.LastIndexByte(c.Principal, ':')+1:])
	}
	if c.Key != "" {
		parts = append(parts, "on "+c.Key)
	}
	if len(c.EncryptionContext) > 0 {
		var pairs []string
		for _, k := range slices.Sorted(maps.Keys(c.EncryptionContext)) {
			pairs = append(pairs, fmt.Sprintf("%q=%q", k, c.EncryptionContext[k]))
		}
		parts = append(parts, "{"+strings.Join(pairs, " ")+"}")
	}
	if c.Fault != "" {
		parts = append(parts, "fault:"+c.Fault)
	}
	outcome := "ok"
	if c.Error != "" {
		outcome = c.Error
	}
	return strings.Join(append(parts, outcome, c.RequestID), "  ")
}
