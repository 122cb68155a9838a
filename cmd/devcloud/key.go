package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard/kmstest"
)

func (a *app) control() kmstest.Control { return kmstest.Control{Endpoint: a.endpoint} }

// reachable adds the way out to an error that says nobody listens.
func (a *app) reachable(err error) error {
	var dial interface{ Timeout() bool }
	if errors.As(err, &dial) {
		return fmt.Errorf("no devcloud answers at %s (start it with: devcloud serve --dir DIR): %w", a.endpoint, err)
	}
	return err
}

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Show keys, take them away, bring them back",
		Long: `Acts on keys behind AWS's back: without credentials, policies or faults in the
way. KEY is an alias, a key id or an ARN; without it alias/byokd is meant.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	simple := func(use, short, done string) *cobra.Command {
		return &cobra.Command{Use: use + " [KEY]", Short: short, Args: between(0, 1), RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeKey(cmd.Context(), kmstest.KeyCommand{Do: use, Key: keyArg(args, 0)}, done)
		}}
	}
	cmd.AddCommand(
		a.keyListCommand(),
		simple("disable", "Disable the key: every use is refused", "To bring it back: devcloud key enable"),
		simple("enable", "Enable the key again", ""),
		a.scheduleCommand(),
		simple("cancel-deletion", "Cancel the scheduled deletion; the key stays Disabled, as on AWS", "The key is Disabled now, as on AWS. To use it: devcloud key enable"),
		simple("delete", "Destroy the key at once and for good", "Deleted for good: what was encrypted under it cannot be read by anyone again."),
		simple("rotate", "Give the key new material; what exists stays readable", ""),
		a.permissionCommand("deny", "Deny an action through the key policy", "To take it back: devcloud key allow"),
		a.permissionCommand("allow", "Take denials back; allow the action if the policy does not", ""),
		a.setStateCommand(),
		a.policyCommand(),
	)
	return cmd
}

func keyArg(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return setupAlias
}

// changeKey carries out a command and shows the key afterwards.
func (a *app) changeKey(ctx context.Context, command kmstest.KeyCommand, hint string) error {
	keys, err := a.control().Key(ctx, command)
	if err != nil {
		return a.reachable(err)
	}
	shown := false
	for _, k := range keys {
		if named(k, command.Key) {
			fmt.Fprintf(a.stdout, "%s  %s  %s%s\n", k.ARN, aliasText(k), stateText(k), deniedText(k))
			shown = true
		}
	}
	if !shown {
		fmt.Fprintf(a.stdout, "%s  gone\n", command.Key)
	}
	if hint != "" {
		fmt.Fprintln(a.stdout, hint)
	}
	return nil
}

func named(k kmstest.KeyInfo, ref string) bool {
	if ref == k.ARN || ref == k.ID {
		return true
	}
	for _, alias := range k.Aliases {
		if ref == alias || strings.HasSuffix(ref, ":"+alias) && strings.Contains(ref, ":"+k.Region+":") {
			return true
		}
	}
	return false
}

func aliasText(k kmstest.KeyInfo) string {
	if len(k.Aliases) == 0 {
		return "-"
	}
	return strings.Join(k.Aliases, ",")
}

func stateText(k kmstest.KeyInfo) string {
	if k.Deletion == nil {
		return k.State
	}
	left := time.Until(*k.Deletion).Round(time.Second)
	return fmt.Sprintf("%s (deletion at %s, in %s)", k.State, k.Deletion.Format(time.RFC3339), left)
}

func deniedText(k kmstest.KeyInfo) string {
	if len(k.Denied) == 0 {
		return ""
	}
	return "  denied: " + strings.Join(k.Denied, ", ")
}

func (a *app) keyListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "list", Short: "List all keys of all regions", Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		status, err := a.control().Status(cmd.Context())
		if err != nil {
			return a.reachable(err)
		}
		if output == "json" {
			return writeJSON(a.stdout, status.Keys)
		}
		table := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "ALIAS\tSTATE\tREGION\tARN")
		for _, k := range status.Keys {
			fmt.Fprintf(table, "%s\t%s%s\t%s\t%s\n", aliasText(k), stateText(k), deniedText(k), k.Region, k.ARN)
		}
		return table.Flush()
	}}
	outputFlag(cmd, &output)
	return cmd
}

func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "table", "table or json")
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *output != "table" && *output != "json" {
			return usageError{fmt.Errorf("--output %s: want table or json", *output)}
		}
		return run(cmd, args)
	}
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (a *app) scheduleCommand() *cobra.Command {
	after := "7d"
	cmd := &cobra.Command{
		Use:   "schedule-deletion [KEY]",
		Short: "Schedule the key's deletion: unusable at once, destroyed after the waiting period",
		Long: `Puts the key into PendingDeletion: unusable at once, destroyed when the waiting
period has passed. AWS takes 7 to 30 days; here --after may be as short as 30s.
To undo it: devcloud key cancel-deletion and then devcloud key enable.`,
		Args: between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			period, err := parsePeriod(after)
			if err != nil {
				return usageError{err}
			}
			return a.changeKey(cmd.Context(), kmstest.KeyCommand{Do: "schedule-deletion", Key: keyArg(args, 0), AfterSeconds: period.Seconds()},
				"To undo it: devcloud key cancel-deletion, then devcloud key enable")
		},
	}
	cmd.Flags().StringVar(&after, "after", after, "waiting period, e.g. 7d, 12h or 30s")
	return cmd
}

// parsePeriod reads a Go duration or a number of days.
func parsePeriod(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err != nil || n < 1 || n > 3650 {
			return 0, fmt.Errorf("--after %s: want 1d to 3650d", s)
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("--after %s: want a positive duration such as 7d, 12h or 30s", s)
	}
	return d, nil
}

func (a *app) permissionCommand(verb, short, hint string) *cobra.Command {
	var principal string
	cmd := &cobra.Command{
		Use:   verb + " [ACTION] [KEY]",
		Short: short,
		Long: short + `.
ACTION is a KMS action such as Decrypt or GenerateDataKey*; without it all are
meant. The change is made in the key's policy, so that get-key-policy shows it
and put-key-policy can repair it.`,
		Example: "  devcloud key " + verb + "\n  devcloud key " + verb + " Decrypt alias/byokd",
		Args:    between(0, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			action, key := "*", setupAlias
			switch {
			case len(args) == 2:
				action, key = args[0], args[1]
			case len(args) == 1 && (strings.HasPrefix(args[0], "alias/") || strings.HasPrefix(args[0], "arn:")):
				key = args[0]
			case len(args) == 1:
				action = args[0]
			}
			return a.changeKey(cmd.Context(), kmstest.KeyCommand{Do: verb, Key: key, Action: action, Principal: principal}, hint)
		},
	}
	cmd.Flags().StringVar(&principal, "principal", kmstest.TenantRole, "ARN of the role or user concerned, or * for everybody")
	return cmd
}

func (a *app) setStateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "set-state STATE [KEY]",
		Short: "Force Unavailable, PendingImport, Creating, Updating, Enabled or Disabled",
		Long: `Forces a state that AWS reaches on other ways: Unavailable (custom key store
down), PendingImport (imported key material expired), Creating, Updating. To
come back: devcloud key enable.`,
		Args: between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeKey(cmd.Context(), kmstest.KeyCommand{Do: "set-state", Key: keyArg(args, 1), State: args[0]}, "")
		},
	}
}

func (a *app) policyCommand() *cobra.Command {
	var file string
	var documented bool
	cmd := &cobra.Command{
		Use:   "policy [KEY]",
		Short: "Print the key's policy, or replace it",
		Args:  between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key := keyArg(args, 0)
			text := kmstest.DocumentedPolicy(kmstest.DefaultAccount, kmstest.TenantRole)
			switch {
			case file != "" && documented:
				return usageError{errors.New("--put and --documented exclude each other")}
			case file != "":
				var err error
				if text, err = a.readText(file); err != nil {
					return err
				}
			case !documented:
				text, err := a.control().Policy(cmd.Context(), key)
				if err != nil {
					return a.reachable(err)
				}
				fmt.Fprintln(a.stdout, text)
				return nil
			}
			return a.changeKey(cmd.Context(), kmstest.KeyCommand{Do: "put-policy", Key: key, Policy: text}, "")
		},
	}
	cmd.Flags().StringVar(&file, "put", "", "replace the policy with this file's content (- reads the standard input)")
	cmd.Flags().BoolVar(&documented, "documented", false, "replace the policy with the documented one")
	return cmd
}

func (a *app) readText(file string) (string, error) {
	if file == "-" {
		raw, err := io.ReadAll(io.LimitReader(a.stdin, 1<<20))
		return string(raw), err
	}
	raw, err := os.ReadFile(file)
	return string(raw), err
}
