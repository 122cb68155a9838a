package kmstest

import (
	"context"
	"errors"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
)

// start makes a server that ends with the test.
func start(t *testing.T, o Options) *Local {
	t.Helper()
	l, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// sdkConfig is what a user of the SDK would have, without retries.
func sdkConfig(t *testing.T, region, accessKey, secret string) aws.Config {
	t.Helper()
	cfg, err := config.LoadDefaultConfig(context.Background(),
		config.WithRegion(region),
		config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(accessKey, secret, "")),
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func clientIn(t *testing.T, l *Local, region, accessKey, secret string) *kms.Client {
	t.Helper()
	return kms.NewFromConfig(sdkConfig(t, region, accessKey, secret), func(o *kms.Options) { o.BaseEndpoint = aws.String(l.URL()) })
}

func admin(t *testing.T, l *Local) *kms.Client {
	return clientIn(t, l, DefaultRegion, AdminAccessKey, AdminSecret)
}

func tenant(t *testing.T, l *Local) *kms.Client {
	return clientIn(t, l, DefaultRegion, TenantAccessKey, TenantSecret)
}

// code returns the AWS name of an error, "" for nil.
func code(t *testing.T, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var api smithy.APIError
	if !errors.As(err, &api) {
		t.Fatalf("not an AWS error: %v", err)
	}
	return api.ErrorCode()
}

func TestDisableStopsDecryptAndEnableBringsItBack(t *testing.T) {
	l := start(t, Options{})
	arn, err := l.CreateKey("", "alias/byokd", "", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, c := context.Background(), tenant(t, l)
	context := map[string]string{"byokd:cluster": "acme"}
	data, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: aws.String("alias/byokd"), KeySpec: "AES_256", EncryptionContext: context})
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*kms.DecryptOutput, error) {
		return c.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: data.CiphertextBlob, KeyId: aws.String(arn), EncryptionContext: context})
	}
	out, err := open()
	if err != nil || string(out.Plaintext) != string(data.Plaintext) {
		t.Fatalf("decrypt: %v", err)
	}
	if err := l.Disable(arn); err != nil {
		t.Fatal(err)
	}
	if _, err = open(); code(t, err) != "DisabledException" {
		t.Fatalf("disabled key: %v", err)
	}
	if err := l.Enable(arn); err != nil {
		t.Fatal(err)
	}
	if _, err = open(); err != nil {
		t.Fatal(err)
	}
}

func asError[T error](err error, target *T) bool { return errors.As(err, target) }

// awsRequestID is the request id in an SDK answer's metadata.
func awsRequestID(out *kms.DescribeKeyOutput) (string, bool) {
	return middleware.GetRequestIDMetadata(out.ResultMetadata)
}
