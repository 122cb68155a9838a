package kmstest

import (
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// BenchmarkDecrypt is what one probe costs end to end: what the stand-in adds
// to a measured freeze.
func BenchmarkDecrypt(b *testing.B) {
	l, err := Start(Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	arn, err := l.CreateKey("", "", "", false)
	if err != nil {
		b.Fatal(err)
	}
	cfg, err := config.LoadDefaultConfig(b.Context(), config.WithRegion(DefaultRegion),
		config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(TenantAccessKey, TenantSecret, "")))
	if err != nil {
		b.Fatal(err)
	}
	client := kms.NewFromConfig(cfg, func(o *kms.Options) { o.BaseEndpoint = aws.String(l.URL()) })
	made, err := client.GenerateDataKeyWithoutPlaintext(b.Context(), &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &arn, KeySpec: "AES_256"})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := client.Decrypt(b.Context(), &kms.DecryptInput{KeyId: &arn, CiphertextBlob: made.CiphertextBlob}); err != nil {
			b.Fatal(err)
		}
	}
}
