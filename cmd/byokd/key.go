package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/awskey"
	"github.com/byokd/byokd/internal/keypolicy"
)

// The names that the documentation gives to a key.
const (
	defaultAlias       = "camunda-saas-byok"
	defaultDescription = "KMS key for Camunda SaaS BYOK"
)

func newKeyCommand(environ []string) *cobra.Command {
	parent := &cobra.Command{
		Use: "key", Short: "Create, check and replace KMS keys, and print their policy", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	parent.AddCommand(newKeyCreateCommand(), newKeyVerifyCommand(environ), newKeyPolicyCommand(), newRewrapCommand(environ))
	return parent
}

func newKeyPolicyCommand() *cobra.Command {
	var account, role string
	var minimal bool
	cmd := &cobra.Command{
		Use: "policy --account ID --role ARN", Short: "Print the documented key policy for an account and byokd's role", Args: cobra.NoArgs,
		Long: `Prints the key policy of the documentation: the account keeps control of its key, and byokd's role may use it and make
grants for encrypted EBS volumes. --minimal prints the smaller one of the older documentation, under which everything
works but byokd key rewrap. The role is what byokd identity prints where byokd runs.

Exit codes: 0 printed, 2 no account id or role ARN.`,
		Example: "  byokd key policy --account 111122223333 --role arn:aws:iam::444455556666:role/tenant > policy.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := keypolicy.Text(policyKind(minimal), account, role)
			if err != nil {
				return exitWith(exitUsage, err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), text)
			return exitWith(exitFailure, err)
		},
	}
	cmd.Flags().StringVar(&account, "account", "", "id of the account that owns the key, 12 digits (required)")
	cmd.Flags().StringVar(&role, "role", "", "ARN of the IAM role that byokd runs under (required)")
	cmd.Flags().BoolVar(&minimal, "minimal", false, "the smaller policy of the older documentation")
	requireFlags(cmd, "account", "role")
	return cmd
}

func policyKind(minimal bool) keypolicy.Kind {
	if minimal {
		return keypolicy.Minimal
	}
	return keypolicy.Full
}

func requireFlags(cmd *cobra.Command, names ...string) {
	for _, name := range names {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // the flag was just made
		}
	}
}

// keyCreation is the command line of key create.
type keyCreation struct {
	options          awskey.CreateOptions
	account, role    string
	endpoint, output string
	minimal          bool
}

func newKeyCreateCommand() *cobra.Command {
	var c keyCreation
	cmd := &cobra.Command{
		Use: "create --region REGION --role ARN", Short: "Create a KMS key for byokd, or complete one", Args: cobra.NoArgs,
		Long: `Creates a symmetric KMS key with the documented policy, an alias, tags and yearly rotation, with the credentials of the
key's owner, and prints its ARN. With --replica-region the key is a multi-Region primary, and a replica with an alias
of the same name is made there, for backups in another region.

It can be run again at any time: what exists is kept, what is missing is completed, and no second key is made. An alias
that points at a key which cannot be used for this is refused. The same without byokd: the two scripts in deploy/scripts.

Exit codes: 0 the key is there and can be used, 1 failed; what was made stays, run it again, 2 wrong command line.`,
		Example: "  byokd key create --region eu-central-1 --replica-region eu-west-1 --role arn:aws:iam::444455556666:role/tenant --dry-run",
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&c.options.Region, "region", "", "region of the key: that of the cluster (required)")
	flags.StringVar(&c.options.ReplicaRegion, "replica-region", "", "region of a replica: that of the backups")
	flags.StringVar(&c.role, "role", "", "ARN of the IAM role that byokd runs under (required)")
	flags.StringVar(&c.account, "account", "", "id of the account that owns the key (that of the credentials)")
	flags.StringVar(&c.options.Alias, "alias", defaultAlias, "alias of the key, without alias/")
	flags.StringVar(&c.options.Description, "description", defaultDescription, "description of the key")
	flags.StringToStringVar(&c.options.Tags, "tag", nil, "tag of the key, NAME=VALUE; repeat for several")
	flags.BoolVar(&c.minimal, "minimal", false, "the smaller policy of the older documentation")
	flags.BoolVar(&c.options.ReplacePolicy, "replace-policy", false, "also replace the policy of a key that exists")
	flags.BoolVar(&c.options.DryRun, "dry-run", false, "only tell what would be done")
	flags.StringVar(&c.endpoint, "endpoint", "", "address of KMS and STS, for a stand-in")
	outputFlag(cmd, &c.output)
	requireFlags(cmd, "region", "role")
	return cmd
}

func (c *keyCreation) run(cmd *cobra.Command) error {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	ctx := cmd.Context()
	cfg, err := new(awsConfigs).in(ctx, c.options.Region)
	if err != nil {
		return exitWith(exitFailure, err)
	}
	if c.account == "" {
		id, err := awskey.WhoAmI(ctx, cfg, c.endpoint, "")
		if err != nil {
			return exitWith(exitFailure, err)
		}
		c.account = id.Account
	}
	if c.options.Policy, err = keypolicy.Text(policyKind(c.minimal), c.account, c.role); err != nil {
		return exitWith(exitUsage, err)
	}
	if c.options.ReplicaRegion == c.options.Region {
		return exitWith(exitUsage, errors.New("--replica-region: the same as --region"))
	}
	if strings.HasPrefix(c.options.Alias, "alias/") || c.options.Alias == "" {
		return exitWith(exitUsage, errors.New("--alias: give it without alias/"))
	}
	c.options.Client = func(region string) *kms.Client { return newKMSClient(cfg, region, c.endpoint) }
	c.options.Tell = func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }
	created, err := awskey.Create(ctx, c.options)
	if err != nil {
		return exitWith(exitFailure, err)
	}
	if c.output == outputJSON {
		return writeJSON(cmd.OutOrStdout(), created)
	}
	writeCreated(cmd.OutOrStdout(), created, c.options)
	return nil
}

func writeCreated(out io.Writer, k awskey.Created, o awskey.CreateOptions) {
	if k.ARN != "" {
		fmt.Fprintf(out, "%s  %s\n", o.Region, k.ARN)
	}
	if k.Replica != "" {
		fmt.Fprintf(out, "%s  %s\n", o.ReplicaRegion, k.Replica)
	}
}

// newKMSClient makes a client of the SDK, with its usual retries, for what is done once. Each attempt ends.
func newKMSClient(cfg aws.Config, region, endpoint string) *kms.Client {
	transport, ok := cfg.HTTPClient.(*awshttp.BuildableClient) // with the authorities of AWS_CA_BUNDLE
	if !ok {
		transport = awshttp.NewBuildableClient()
	}
	return kms.NewFromConfig(cfg, func(o *kms.Options) {
		o.Region = region
		o.HTTPClient = transport.WithTimeout(callLimit)
		if endpoint != "" {
			o.BaseEndpoint = aws.String(endpoint)
		}
	})
}

func newKeyVerifyCommand(environ []string) *cobra.Command {
	var arn, region, endpoint, output string
	cmd := &cobra.Command{
		Use: "verify --key ARN", Short: "Check a KMS key: state, kind, region, and each permission of the documented policy", Args: cobra.NoArgs,
		Long: `Looks at a key with the credentials at hand (run it where and as byokd runs) and tries each permission of the
documented policy, with DryRun: nothing is changed and nothing is decrypted. byokd preflight does this for every key
of a configuration, and looks at the machine as well.

Exit codes: 0 everything that is required passes, 2 wrong command line, 17 something failed.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			ctx := cmd.Context()
			groups, err := identityGroup(ctx, regionOfARN(arn), endpoint, environ)
			if err != nil {
				return exitWith(exitUsage, err)
			}
			group, err := keyGroup(ctx, "key", KeyConfig{ARN: arn, Endpoint: endpoint}, region, map[string]string{"byokd:purpose": "verify"}, groups.role())
			if err != nil {
				return exitWith(exitUsage, err)
			}
			return append(groups, group).tell(cmd.OutOrStdout(), output)
		},
	}
	cmd.Flags().StringVar(&arn, "key", "", "ARN of the key (required)")
	cmd.Flags().StringVar(&region, "region", "", "the region that it must be in: that of the cluster")
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "address of KMS, for a VPC endpoint or a stand-in")
	outputFlag(cmd, &output)
	requireFlags(cmd, "key")
	return cmd
}

func newIdentityCommand(environ []string) *cobra.Command {
	var region, endpoint, output string
	cmd := &cobra.Command{
		Use: "identity", Short: "Print the IAM role that the owner of a key must allow", Args: cobra.NoArgs,
		Long: `Asks AWS who the credentials at hand belong to and prints the ARN of the role, as a key policy names it. Run it where
and as byokd runs; the credentials are found as byokd run finds them (environment, IRSA, Pod Identity, instance).

Exit codes: 0 printed, 1 AWS does not tell.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			id, err := whoAmI(cmd.Context(), new(awsConfigs), region, endpoint, environ)
			if err != nil {
				return exitWith(exitFailure, err)
			}
			if output == outputJSON {
				return writeJSON(cmd.OutOrStdout(), id)
			}
			fmt.Fprintln(cmd.OutOrStdout(), id.Role)
			return nil
		},
	}
	cmd.Flags().StringVar(&region, "region", "", "region to ask in (that of the environment)")
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "address of STS, for a stand-in")
	outputFlag(cmd, &output)
	return cmd
}

// whoAmI asks AWS, in a region or in that of the environment.
func whoAmI(ctx context.Context, configs *awsConfigs, region, endpoint string, environ []string) (awskey.Identity, error) {
	cfg, err := configs.in(ctx, region)
	if err != nil {
		return awskey.Identity{}, err
	}
	if cfg.Region == "" {
		return awskey.Identity{}, errors.New("no region: say --region, or set AWS_REGION")
	}
	assumed := ""
	if i := slices.IndexFunc(environ, func(v string) bool { return strings.HasPrefix(v, "AWS_ROLE_ARN=") }); i >= 0 {
		assumed = strings.TrimPrefix(environ[i], "AWS_ROLE_ARN=")
	}
	return awskey.WhoAmI(ctx, cfg, endpoint, assumed)
}
