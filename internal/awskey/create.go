package awskey

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/byokd/byokd/internal/keypolicy"
)

const (
	// aliasTag marks the keys that Create makes with the alias that they are for,
	// so that one whose making was interrupted is found again.
	aliasTag = "byokd:alias"

	// readyWait bounds waiting for a key to become usable: AWS speaks of seconds, for
	// replicas of up to some minutes. readyPause lies between two looks.
	readyWait  = 5 * time.Minute
	readyPause = time.Second
)

// CreateOptions describe the key to be made.
type CreateOptions struct {
	Alias         string // without "alias/"
	Region        string
	ReplicaRegion string // "" for a single-Region key
	Description   string
	Policy        string
	ReplacePolicy bool // also of a key that exists
	Tags          map[string]string
	DryRun        bool
	// Client makes a client for a region.
	Client func(region string) *kms.Client
	// Tell is told each thing that is done, or would be; may be nil.
	Tell func(string)
}

// Created is the key, as it is after Create.
type Created struct {
	ARN     string   `json:"arn"`               // "" in a dry run that would make it
	Replica string   `json:"replica,omitempty"` // ARN of the replica
	Actions []string `json:"actions"`           // what was done or, in a dry run, would be
}

// Create makes a symmetric key with alias, policy, tags and yearly rotation, and a
// replica with an alias of the same name if asked for, and waits until they can be
// used. What exists already is kept.
func Create(ctx context.Context, o CreateOptions) (Created, error) {
	c := &creation{o: o, home: o.Client(o.Region)}
	if o.Tell == nil {
		c.o.Tell = func(string) {}
	}
	key, err := c.key(ctx)
	if err != nil {
		return c.made, err
	}
	if key == nil { // a dry run without a key: the rest follows
		c.plan()
		return c.made, nil
	}
	c.made.ARN = aws.ToString(key.Arn)
	for _, step := range []func(context.Context, *types.KeyMetadata) error{c.tags, c.policy, c.rotation, c.replica} {
		if err := step(ctx, key); err != nil {
			return c.made, err
		}
	}
	return c.made, nil
}

// creation is one run.
type creation struct {
	o    CreateOptions
	home *kms.Client
	made Created
	old  bool // the key was there with its alias
}

// do tells and does one thing; in a dry run it only tells.
func (c *creation) do(what string, f func() error) error {
	c.made.Actions = append(c.made.Actions, what)
	if c.o.DryRun {
		c.o.Tell("would " + what)
		return nil
	}
	c.o.Tell(what)
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// plan tells what a dry run would do with a key that is still to be made.
func (c *creation) plan() {
	tell := func(what string) { _ = c.do(what, nil) }
	tell("give it the alias " + c.o.Alias + " in " + c.o.Region)
	tell("switch yearly rotation on")
	if c.o.ReplicaRegion != "" {
		tell("replicate it to " + c.o.ReplicaRegion)
		tell("give the replica the alias " + c.o.Alias + " in " + c.o.ReplicaRegion)
	}
}

// key finds the key or makes it, with its alias. nil in a dry run that would make it.
func (c *creation) key(ctx context.Context) (*types.KeyMetadata, error) {
	found, err := c.aliased(ctx, c.home)
	if err != nil {
		return nil, err
	}
	if found != nil {
		c.old = true
		return found, c.fits(found)
	}
	left, err := c.unnamed(ctx)
	if err != nil {
		return nil, err
	}
	if left == nil {
		err := c.do("create a key in "+c.o.Region, func() error {
			out, err := c.home.CreateKey(ctx, &kms.CreateKeyInput{Description: aws.String(c.o.Description), Policy: aws.String(c.o.Policy),
				MultiRegion: aws.Bool(c.o.ReplicaRegion != ""), Tags: c.tagList()})
			if err == nil {
				left = out.KeyMetadata
			}
			return err
		})
		if err != nil || left == nil {
			return nil, err
		}
	}
	if left, err = ready(ctx, c.home, aws.ToString(left.Arn)); err != nil {
		return nil, err
	}
	return left, c.alias(ctx, c.home, "it", c.o.Region, left)
}

func (c *creation) alias(ctx context.Context, client *kms.Client, who, region string, key *types.KeyMetadata) error {
	return c.do("give "+who+" the alias "+c.o.Alias+" in "+region, func() error {
		_, err := client.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: aws.String("alias/" + c.o.Alias), TargetKeyId: key.Arn})
		return err
	})
}

// aliased is the key behind the alias; nil without one.
func (c *creation) aliased(ctx context.Context, client *kms.Client) (*types.KeyMetadata, error) {
	out, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/" + c.o.Alias)})
	var absent *types.NotFoundException
	if errors.As(err, &absent) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for alias/%s: %w", c.o.Alias, err)
	}
	return out.KeyMetadata, nil
}

// fits refuses a key of that name that cannot be what is asked for.
func (c *creation) fits(k *types.KeyMetadata) error {
	arn := aws.ToString(k.Arn)
	switch {
	case k.KeyState == types.KeyStateDisabled:
		return fmt.Errorf("alias/%s is %s, which is disabled. Enable it (aws kms enable-key --key-id %s --region %s), or choose another alias", c.o.Alias, arn, arn, c.o.Region)
	case k.KeyState == types.KeyStatePendingDeletion || k.KeyState == types.KeyStatePendingReplicaDeletion:
		return fmt.Errorf("alias/%s is %s, whose deletion is scheduled. Cancel that and enable it, or choose another alias", c.o.Alias, arn)
	case k.KeySpec != types.KeySpecSymmetricDefault || k.KeyUsage != types.KeyUsageTypeEncryptDecrypt:
		return fmt.Errorf("alias/%s is %s, which is no symmetric key for encryption and decryption (%s, %s). Choose another alias", c.o.Alias, arn, k.KeySpec, k.KeyUsage)
	case c.o.ReplicaRegion != "" && !aws.ToBool(k.MultiRegion):
		return fmt.Errorf("alias/%s is %s, a single-Region key, which cannot be replicated. Choose another alias, or make a key of its own in %s", c.o.Alias, arn, c.o.ReplicaRegion)
	}
	return nil
}

// unnamed finds a key that an interrupted run made without giving it its alias.
func (c *creation) unnamed(ctx context.Context) (*types.KeyMetadata, error) {
	pages := kms.NewListKeysPaginator(c.home, &kms.ListKeysInput{})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the keys in %s: %w", c.o.Region, err)
		}
		for _, k := range page.Keys {
			tags, err := c.home.ListResourceTags(ctx, &kms.ListResourceTagsInput{KeyId: k.KeyArn})
			if err != nil {
				continue // a key that we may not look at is none of ours
			}
			if !slices.ContainsFunc(tags.Tags, func(t types.Tag) bool {
				return aws.ToString(t.TagKey) == aliasTag && aws.ToString(t.TagValue) == c.o.Alias
			}) {
				continue
			}
			out, err := c.home.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: k.KeyArn})
			if err != nil {
				return nil, err
			}
			usable := out.KeyMetadata.KeyState == types.KeyStateEnabled || out.KeyMetadata.KeyState == types.KeyStateCreating
			if aliases, err := c.home.ListAliases(ctx, &kms.ListAliasesInput{KeyId: k.KeyArn}); err != nil {
				return nil, err
			} else if len(aliases.Aliases) == 0 && usable && c.fits(out.KeyMetadata) == nil {
				return out.KeyMetadata, nil
			}
		}
	}
	return nil, nil
}

func (c *creation) tagList() []types.Tag {
	tags := []types.Tag{{TagKey: aws.String(aliasTag), TagValue: aws.String(c.o.Alias)}}
	for _, name := range slices.Sorted(maps.Keys(c.o.Tags)) {
		tags = append(tags, types.Tag{TagKey: aws.String(name), TagValue: aws.String(c.o.Tags[name])})
	}
	return tags
}

// tags adds what is missing or otherwise.
func (c *creation) tags(ctx context.Context, key *types.KeyMetadata) error {
	have := map[string]string{}
	pages := kms.NewListResourceTagsPaginator(c.home, &kms.ListResourceTagsInput{KeyId: key.Arn})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return fmt.Errorf("list the tags of %s: %w", aws.ToString(key.Arn), err)
		}
		for _, t := range page.Tags {
			have[aws.ToString(t.TagKey)] = aws.ToString(t.TagValue)
		}
	}
	var missing []types.Tag
	var names []string
	for _, t := range c.tagList() {
		if value, there := have[aws.ToString(t.TagKey)]; !there || value != aws.ToString(t.TagValue) {
			missing, names = append(missing, t), append(names, aws.ToString(t.TagKey))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return c.do("tag it with "+strings.Join(names, ", "), func() error {
		_, err := c.home.TagResource(ctx, &kms.TagResourceInput{KeyId: key.Arn, Tags: missing})
		return err
	})
}

func (c *creation) policy(ctx context.Context, key *types.KeyMetadata) error {
	return c.policyOf(ctx, c.home, key, c.o.Region)
}

// policyOf replaces a policy that is another, on request.
func (c *creation) policyOf(ctx context.Context, client *kms.Client, key *types.KeyMetadata, region string) error {
	out, err := client.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: key.Arn, PolicyName: aws.String("default")})
	if err != nil {
		return fmt.Errorf("read the policy of %s: %w", aws.ToString(key.Arn), err)
	}
	if keypolicy.Same(aws.ToString(out.Policy), c.o.Policy) {
		return nil
	}
	if !c.o.ReplacePolicy {
		c.o.Tell(fmt.Sprintf("the policy of %s is another than the documented one and is left as it is; to replace it, say --replace-policy", aws.ToString(key.Arn)))
		return nil
	}
	return c.do("replace its policy in "+region, func() error {
		_, err := client.PutKeyPolicy(ctx, &kms.PutKeyPolicyInput{KeyId: key.Arn, PolicyName: aws.String("default"), Policy: aws.String(c.o.Policy)})
		return err
	})
}

func (c *creation) rotation(ctx context.Context, key *types.KeyMetadata) error {
	out, err := c.home.GetKeyRotationStatus(ctx, &kms.GetKeyRotationStatusInput{KeyId: key.Arn})
	if err != nil {
		return fmt.Errorf("ask whether %s is rotated: %w", aws.ToString(key.Arn), err)
	}
	if out.KeyRotationEnabled {
		return nil
	}
	return c.do("switch yearly rotation on", func() error {
		_, err := c.home.EnableKeyRotation(ctx, &kms.EnableKeyRotationInput{KeyId: key.Arn})
		return err
	})
}

// replica completes the other region.
func (c *creation) replica(ctx context.Context, key *types.KeyMetadata) error {
	if c.o.ReplicaRegion == "" {
		return nil
	}
	away, arn := c.o.Client(c.o.ReplicaRegion), inRegion(aws.ToString(key.Arn), c.o.ReplicaRegion)
	if !replicated(key, arn) {
		err := c.do("replicate it to "+c.o.ReplicaRegion, func() error {
			_, err := c.home.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: key.Arn, ReplicaRegion: aws.String(c.o.ReplicaRegion),
				Description: aws.String(c.o.Description), Policy: aws.String(c.o.Policy), Tags: c.tagList()})
			var exists *types.AlreadyExistsException
			if errors.As(err, &exists) {
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
		if c.o.DryRun {
			return c.alias(ctx, away, "the replica", c.o.ReplicaRegion, nil)
		}
	}
	there, err := ready(ctx, away, arn)
	if err != nil {
		return err
	}
	c.made.Replica = arn
	named, err := c.aliased(ctx, away)
	switch {
	case err != nil:
		return err
	case named == nil:
		err = c.alias(ctx, away, "the replica", c.o.ReplicaRegion, there)
	case aws.ToString(named.Arn) != arn:
		err = fmt.Errorf("alias/%s in %s is another key, %s. Remove that alias or choose another", c.o.Alias, c.o.ReplicaRegion, aws.ToString(named.Arn))
	}
	if err != nil {
		return err
	}
	return c.policyOf(ctx, away, there, c.o.ReplicaRegion)
}

// inRegion is the ARN of the same multi-Region key elsewhere.
func inRegion(arn, region string) string {
	parts := strings.SplitN(arn, ":", 5)
	parts[3] = region
	return strings.Join(parts, ":")
}

func replicated(key *types.KeyMetadata, arn string) bool {
	return key.MultiRegionConfiguration != nil && slices.ContainsFunc(key.MultiRegionConfiguration.ReplicaKeys,
		func(k types.MultiRegionKey) bool { return aws.ToString(k.Arn) == arn })
}

// ready waits until a key can be used. One that is not found yet is waited for, too:
// KMS is eventually consistent.
func ready(ctx context.Context, client *kms.Client, arn string) (*types.KeyMetadata, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait, fmt.Errorf("%s is not usable after %v; run this again later", arn, readyWait))
	defer cancel()
	for {
		out, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(arn)})
		var absent *types.NotFoundException
		switch {
		case err != nil && !errors.As(err, &absent):
			return nil, fmt.Errorf("look at %s: %w", arn, err)
		case err == nil && out.KeyMetadata.KeyState == types.KeyStateEnabled:
			return out.KeyMetadata, nil
		case err == nil && out.KeyMetadata.KeyState != types.KeyStateCreating && out.KeyMetadata.KeyState != types.KeyStateUpdating:
			return nil, fmt.Errorf("%s is %s; enable it, then run this again", arn, out.KeyMetadata.KeyState)
		}
		select {
		case <-time.After(readyPause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
