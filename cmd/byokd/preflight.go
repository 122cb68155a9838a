package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/awskey"
	"github.com/byokd/byokd/objstore"
)

const (
	// clockWarn and clockFail are how far this machine's clock may be off AWS's: AWS refuses signatures that
	// are 5 minutes off.
	clockWarn = 30 * time.Second
	clockFail = 4 * time.Minute
	// upstreamCall bounds one question to a bucket.
	upstreamCall = 10 * time.Second
)

func newPreflightCommand(environ []string) *cobra.Command {
	var file, output string
	cmd := &cobra.Command{
		Use: "preflight --config FILE", Short: "Check keys, permissions and this machine before byokd is started", Args: cobra.NoArgs,
		Long: `Checks what byokd run needs, where and as it will run, and changes nothing: every key of the configuration (region,
state, kind, and each permission of the documented policy, tried with DryRun), the buckets, kernel, /dev/fuse, the lower
directory, the mount point, the addresses and the socket to listen at, and the clock. It may be run beside a running byokd.

Exit codes: 0 everything that is required passes (there may be warnings), 2 wrong command line, 3 the configuration is
wrong, 17 something failed.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cfg, _, err := loadConfig(file, environ)
			if err != nil {
				return exitWith(exitConfig, err)
			}
			groups, err := preflight(cmd.Context(), cfg, environ)
			if err != nil {
				return exitWith(exitConfig, err)
			}
			return groups.tell(cmd.OutOrStdout(), output)
		},
	}
	configFlag(cmd, &file)
	outputFlag(cmd, &output)
	return cmd
}

// checkGroup is what was checked about one thing.
type checkGroup struct {
	Name   string         `json:"name"`
	About  string         `json:"about,omitempty"`
	Checks []awskey.Check `json:"checks"`
}

// checkGroups is a whole preflight.
type checkGroups []checkGroup

// preflight checks everything of a configuration.
func preflight(ctx context.Context, cfg Config, environ []string) (checkGroups, error) {
	names := slices.Sorted(maps.Keys(cfg.Keys))
	first := cfg.Keys[names[0]]
	sts := "" // the address of KMS is not that of STS, but for a stand-in
	if isLocal(first.Endpoint) {
		sts = first.Endpoint
	}
	groups, err := identityGroup(ctx, regionOfARN(first.ARN), sts, environ)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		region := ""
		if cfg.Volume != nil && cfg.Volume.Key == name {
			region = cfg.Cluster.Region
		}
		group, err := keyGroup(ctx, "key "+name, cfg.Keys[name], region, map[string]string{"byokd:cluster": cfg.Cluster.ID, "byokd:resource": "preflight"}, groups.role())
		if err != nil {
			return nil, err
		}
		groups = append(groups, group)
	}
	groups = append(groups, bucketGroups(ctx, cfg)...)
	return append(groups, machineGroup(cfg), listenersGroup(ctx, cfg), volumeGroup(cfg)).withoutEmpty(), nil
}

func (g checkGroups) withoutEmpty() checkGroups {
	return slices.DeleteFunc(g, func(c checkGroup) bool { return len(c.Checks) == 0 })
}

// role is the one that the identity's group tells.
func (g checkGroups) role() string {
	for _, group := range g {
		if group.Name == "identity" {
			return group.About
		}
	}
	return ""
}

// identityGroup checks credentials and clock. Not to be told who we are is a warning: STS may be out of reach
// where KMS is not.
func identityGroup(ctx context.Context, region, endpoint string, environ []string) (checkGroups, error) {
	if region == "" {
		return nil, fmt.Errorf("not the ARN of a KMS key, arn:aws:kms:REGION:ACCOUNT:key/ID")
	}
	id, err := whoAmI(ctx, new(awsConfigs), region, endpoint, environ)
	if err != nil {
		return checkGroups{{Name: "identity", Checks: []awskey.Check{{Name: "credentials", Result: awskey.Warn, Detail: oneLine(err.Error()),
			NextStep: "Check the AWS credentials (IRSA or Pod Identity of the service account): aws sts get-caller-identity --region " + region}}}}, nil
	}
	clock := awskey.Check{Name: "clock", Result: awskey.Pass, Detail: "agrees with AWS"}
	if off := id.Clock.Abs(); off > clockWarn {
		clock.Result, clock.Detail = awskey.Warn, fmt.Sprintf("%v off AWS's", id.Clock)
		clock.NextStep = "Set this machine's clock (chrony, NTP); AWS refuses requests that are more than 5 minutes off"
		if off > clockFail {
			clock.Result = awskey.Fail
		}
	}
	return checkGroups{{Name: "identity", About: id.Role, Checks: []awskey.Check{{Name: "credentials", Result: awskey.Pass, Detail: id.ARN}, clock}}}, nil
}

// keyGroup checks one key.
func keyGroup(ctx context.Context, name string, key KeyConfig, region string, context map[string]string, role string) (checkGroup, error) {
	var configs awsConfigs
	client, err := configs.newKMS(ctx, key)
	if err != nil {
		return checkGroup{}, err
	}
	cfg, err := configs.in(ctx, regionOfARN(key.ARN))
	if err != nil {
		return checkGroup{}, err
	}
	checks := awskey.CheckKey(ctx, awskey.Key{ARN: key.ARN, Region: region, Context: context, Role: role, Endpoint: key.Endpoint,
		KMS: client, Client: newKMSClient(cfg, regionOfARN(key.ARN), key.Endpoint)})
	return checkGroup{Name: name, About: key.ARN, Checks: checks}, nil
}

// bucketGroups checks that each upstream bucket answers.
func bucketGroups(ctx context.Context, cfg Config) (groups checkGroups) {
	if cfg.Objects == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Objects.Buckets)) {
		b := cfg.Objects.Buckets[name]
		c := awskey.Check{Name: "upstream", Result: awskey.Pass, Detail: "answers and may be listed"}
		if err := askUpstream(ctx, b.Upstream); err != nil {
			c.Result, c.Detail = awskey.Fail, oneLine(err.Error())
			c.NextStep = upstreamNextStep(b.Upstream)
		}
		groups = append(groups, checkGroup{Name: "bucket " + name, About: "s3://" + b.Upstream.Bucket, Checks: []awskey.Check{c}})
	}
	return groups
}

// upstreamNextStep is what to do about a bucket that cannot be used.
func upstreamNextStep(u UpstreamConfig) string {
	aws := "aws"
	if u.Endpoint != "" {
		aws += " --endpoint-url " + u.Endpoint
	}
	return fmt.Sprintf("Check name, region and permissions of the bucket, with the credentials that byokd has: %s s3api list-objects-v2 --bucket %s --region %s --max-items 1", aws, u.Bucket, u.Region)
}

func askUpstream(ctx context.Context, u UpstreamConfig) error {
	ctx, cancel := context.WithTimeout(ctx, upstreamCall)
	defer cancel()
	up, err := new(awsConfigs).newUpstream(ctx, u)
	if err != nil {
		return err
	}
	_, err = up.List(ctx, objstore.ListQuery{Kind: objstore.ListV2, Limit: 1})
	return err
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// tell prints the groups and turns failures into the exit code.
func (g checkGroups) tell(out io.Writer, output string) error {
	failed, warned := 0, 0
	for _, group := range g {
		for _, c := range group.Checks {
			switch c.Result {
			case awskey.Fail:
				failed++
			case awskey.Warn:
				warned++
			}
		}
	}
	if output == outputJSON {
		err := writeJSON(out, struct {
			Passed   bool        `json:"passed"`
			Failures int         `json:"failures"`
			Warnings int         `json:"warnings"`
			Groups   checkGroups `json:"groups"`
		}{failed == 0, failed, warned, g})
		if err != nil {
			return err
		}
	} else if err := g.table(out, failed, warned); err != nil {
		return exitWith(exitFailure, err)
	}
	if failed > 0 {
		return &exitError{code: exitChecks}
	}
	return nil
}

func (g checkGroups) table(out io.Writer, failed, warned int) error {
	for _, group := range g {
		fmt.Fprintln(out, strings.TrimRight(strings.ToUpper(group.Name)+"  "+group.About, " "))
		w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
		for _, c := range group.Checks {
			fmt.Fprintf(w, "  %s\t%s\t%s\n", c.Result, c.Name, c.Detail)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	steps := map[string]bool{}
	for _, group := range g {
		for _, c := range group.Checks {
			if c.Result == awskey.Fail && c.NextStep != "" && !steps[c.NextStep] {
				steps[c.NextStep] = true
				fmt.Fprintf(out, "\n%s, %s: %s\n", group.Name, c.Name, c.NextStep)
			}
		}
	}
	verdict := "Everything that is required passes."
	if failed > 0 {
		verdict = "Failures: " + fmt.Sprint(failed) + "."
	}
	if warned > 0 {
		verdict += fmt.Sprintf(" Warnings: %d.", warned)
	}
	_, err := fmt.Fprintf(out, "\n%s\n", verdict)
	return err
}
