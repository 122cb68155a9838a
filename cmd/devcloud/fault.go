package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard/kmstest"
)

func (a *app) faultCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fault",
		Short: "Disturb the service: throttle, latency, error, hang, cut; clear ends it",
		Long: `Disturbs calls until cleared or until --count calls were hit. Faults of service
kms hit KMS calls of everybody; the devcloud commands themselves are never hit.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		a.injectCommand("throttle", "Answer ThrottlingException (S3: SlowDown)", 0),
		a.injectCommand("latency DURATION", "Delay every call, e.g. by 300ms", 1),
		a.injectCommand("error", "Answer a server error (HTTP 500; see --status, --code)", 0),
		a.injectCommand("hang", "Give no answer until cleared", 0),
		a.injectCommand("cut", "Reset the connection of every call", 0),
		a.faultListCommand(), a.clearCommand(),
	)
	return cmd
}

func (a *app) injectCommand(use, short string, args int) *cobra.Command {
	var f kmstest.Fault
	cmd := &cobra.Command{Use: use, Short: short, Args: between(args, args), RunE: func(cmd *cobra.Command, args []string) error {
		f.Kind = kmstest.FaultKind(cmd.Name())
		if f.Kind == kmstest.FaultLatency {
			d, err := time.ParseDuration(args[0])
			if err != nil || d < time.Millisecond {
				return usageError{fmt.Errorf("latency %s: want a duration such as 300ms", args[0])}
			}
			f.DelayMillis = d.Milliseconds()
		}
		added, err := a.control().Inject(cmd.Context(), f)
		if err != nil {
			return a.reachable(err)
		}
		fmt.Fprintf(a.stdout, "fault %d: %s\nTo end it: devcloud fault clear %d\n", added.ID, faultText(added), added.ID)
		return nil
	}}
	flags := cmd.Flags()
	flags.StringVar(&f.Service, "service", "kms", "kms, sts, s3 or *")
	flags.StringSliceVar(&f.Operations, "operation", nil, "only these operations, e.g. Decrypt or GenerateDataKey* (for s3: HTTP methods)")
	flags.StringVar(&f.AccessKey, "access-key", "", "only calls of this access key, e.g. byokd-tenant")
	flags.StringVar(&f.Region, "region", "", "only calls signed for this region")
	flags.StringVar(&f.Key, "key-arn", "", "only calls about this key")
	flags.IntVar(&f.Count, "count", 0, "end after so many calls; 0 means until cleared")
	if strings.HasPrefix(use, "error") || strings.HasPrefix(use, "throttle") {
		flags.IntVar(&f.Status, "status", 0, "HTTP status instead of the usual one")
		flags.StringVar(&f.Code, "code", "", "AWS error name instead of the usual one, e.g. DependencyTimeoutException")
	}
	return cmd
}

func faultText(f kmstest.Fault) string {
	parts := []string{string(f.Kind)}
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+" "+value)
		}
	}
	if f.DelayMillis > 0 {
		parts = append(parts, (time.Duration(f.DelayMillis) * time.Millisecond).String())
	}
	add("with", f.Code)
	add("for", f.Service)
	add("on", strings.Join(f.Operations, ","))
	add("by", f.AccessKey)
	add("in", f.Region)
	add("about", f.Key)
	if f.Count > 0 {
		parts = append(parts, fmt.Sprintf("for %d more calls", f.Count))
	}
	return strings.Join(parts, " ")
}

func (a *app) faultListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "list", Short: "List the active faults", Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		status, err := a.control().Status(cmd.Context())
		if err != nil {
			return a.reachable(err)
		}
		if output == "json" {
			return writeJSON(a.stdout, status.Faults)
		}
		if len(status.Faults) == 0 {
			fmt.Fprintln(a.stdout, "no faults")
		}
		for _, f := range status.Faults {
			fmt.Fprintf(a.stdout, "%d  %s\n", f.ID, faultText(f))
		}
		return nil
	}}
	outputFlag(cmd, &output)
	return cmd
}

func (a *app) clearCommand() *cobra.Command {
	return &cobra.Command{Use: "clear [ID]", Short: "End one fault, or all", Args: between(0, 1), RunE: func(cmd *cobra.Command, args []string) error {
		id := 0
		if len(args) == 1 {
			var err error
			if id, err = strconv.Atoi(args[0]); err != nil || id < 1 {
				return usageError{fmt.Errorf("clear %s: want the number of a fault", args[0])}
			}
		}
		n, err := a.control().Clear(cmd.Context(), id)
		if err != nil {
			return a.reachable(err)
		}
		fmt.Fprintf(a.stdout, "cleared %d\n", n)
		return nil
	}}
}
