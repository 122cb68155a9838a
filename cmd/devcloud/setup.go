package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	kmstypes "github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	s3types "github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard/kmstest"
)

const setupAlias = "alias/byokd"

// setupBuckets are the upstream buckets of documents and backups.
func setupBuckets() []string { return []string{"acme-documents", "acme-backups"} }

func (a *app) setupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "setup",
		Short: "Make the key alias/byokd with the documented policy and the buckets, where missing",
		Long: `Makes, where missing, what byokd's example configuration needs:
  the key alias/byokd in eu-central-1, whose policy is the documented one for
  account 111122223333 and the role byokd-tenant, and
  the buckets acme-documents and acme-backups.
What exists is left as it is, whatever its state. It uses the AWS interface
with the administrator's credentials, as you would on AWS.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.setup(cmd.Context(), a.endpoint, true) },
	}
}

// setup is idempotent.
func (a *app) setup(ctx context.Context, endpoint string, tell bool) error {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(kmstest.DefaultRegion), config.WithBaseEndpoint(endpoint),
		config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(kmstest.AdminAccessKey, kmstest.AdminSecret, "")))
	if err != nil {
		return err
	}
	arn, state, err := setupKey(ctx, kms.NewFromConfig(cfg))
	if err != nil {
		return fmt.Errorf("set up %s: %w", setupAlias, err)
	}
	if tell {
		fmt.Fprintf(a.stdout, "key     %s  %s  %s\n", arn, setupAlias, state)
	}
	store := s3.NewFromConfig(cfg, func(o *s3.Options) { o.UsePathStyle = true })
	for _, bucket := range setupBuckets() {
		if err := setupBucket(ctx, store, bucket); err != nil {
			return fmt.Errorf("set up bucket %s: %w", bucket, err)
		}
		if tell {
			fmt.Fprintf(a.stdout, "bucket  %s\n", bucket)
		}
	}
	return nil
}

func setupKey(ctx context.Context, client *kms.Client) (arn string, state kmstypes.KeyState, err error) {
	described, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(setupAlias)})
	if err == nil {
		return *described.KeyMetadata.Arn, described.KeyMetadata.KeyState, nil
	}
	var absent *kmstypes.NotFoundException
	if !errors.As(err, &absent) {
		return "", "", err
	}
	arn, err = unnamedKey(ctx, client)
	if err != nil {
		return "", "", err
	}
	_, err = client.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: aws.String(setupAlias), TargetKeyId: aws.String(arn)})
	return arn, kmstypes.KeyStateEnabled, err
}

const setupTag = "devcloud:setup"

// unnamedKey returns a key that an interrupted setup made without giving it its
// alias, else a new one.
func unnamedKey(ctx context.Context, client *kms.Client) (string, error) {
	pages := kms.NewListKeysPaginator(client, &kms.ListKeysInput{})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return "", err
		}
		for _, k := range page.Keys {
			if left, err := leftOver(ctx, client, *k.KeyArn); err != nil || left {
				return *k.KeyArn, err
			}
		}
	}
	made, err := client.CreateKey(ctx, &kms.CreateKeyInput{
		Description: aws.String("KMS key for byokd, made by devcloud setup"),
		Policy:      aws.String(kmstest.DocumentedPolicy(kmstest.DefaultAccount, kmstest.TenantRole)),
		Tags:        []kmstypes.Tag{{TagKey: aws.String(setupTag), TagValue: aws.String(setupAlias)}},
	})
	if err != nil {
		return "", err
	}
	return *made.KeyMetadata.Arn, nil
}

// leftOver tells whether a key is enabled, tagged by setup and has no alias.
func leftOver(ctx context.Context, client *kms.Client, arn string) (bool, error) {
	described, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(arn)})
	if err != nil || described.KeyMetadata.KeyState != kmstypes.KeyStateEnabled {
		return false, ignoreDenied(err)
	}
	tags, err := client.ListResourceTags(ctx, &kms.ListResourceTagsInput{KeyId: aws.String(arn)})
	if err != nil {
		return false, ignoreDenied(err)
	}
	if !slices.ContainsFunc(tags.Tags, func(t kmstypes.Tag) bool { return *t.TagKey == setupTag }) {
		return false, nil
	}
	aliases, err := client.ListAliases(ctx, &kms.ListAliasesInput{KeyId: aws.String(arn)})
	if err != nil {
		return false, ignoreDenied(err)
	}
	return len(aliases.Aliases) == 0, nil
}

// ignoreDenied drops a refusal: a key whose policy keeps the administrator out is not ours.
func ignoreDenied(err error) error {
	var api interface{ ErrorCode() string }
	if errors.As(err, &api) && api.ErrorCode() == "AccessDeniedException" {
		return nil
	}
	return err
}

func setupBucket(ctx context.Context, client *s3.Client, bucket string) error {
	_, err := client.CreateBucket(ctx, &s3.CreateBucketInput{
		Bucket: aws.String(bucket),
		CreateBucketConfiguration: &s3types.CreateBucketConfiguration{
			LocationConstraint: s3types.BucketLocationConstraint(kmstest.DefaultRegion)},
	})
	var owned *s3types.BucketAlreadyOwnedByYou
	var exists *s3types.BucketAlreadyExists
	if errors.As(err, &owned) || errors.As(err, &exists) {
		return nil
	}
	return err
}
