package kmstest

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

// TestContract holds what the keyguard relies on, against this server and, when
// BYOKD_KMS_KEY_ARN names an enabled symmetric key of a real account and the
// standard chain has credentials for it, against AWS: so the stand-in cannot
// drift unnoticed. It changes nothing in the account and costs some ten requests.
func TestContract(t *testing.T) {
	t.Run("stand-in", func(t *testing.T) {
		w := newWorld(t, Options{})
		contract(t, w.tenant, w.arn)
	})
	t.Run("aws", func(t *testing.T) {
		arn := os.Getenv("BYOKD_KMS_KEY_ARN")
		if arn == "" {
			t.Skip("BYOKD_KMS_KEY_ARN names no key")
		}
		cfg, err := config.LoadDefaultConfig(t.Context(), config.WithRegion(strings.Split(arn, ":")[3]))
		if err != nil {
			t.Fatal(err)
		}
		contract(t, kms.NewFromConfig(cfg), arn)
	})
}

func contract(t *testing.T, c *kms.Client, arn string) {
	ctx, context := t.Context(), map[string]string{"byokd:cluster": "contract", "byokd:resource": "test"}
	data := must(c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &arn, KeySpec: types.DataKeySpecAes256, EncryptionContext: context}))(t)
	if len(data.Plaintext) != 32 || *data.KeyId != arn {
		t.Errorf("data key of %d bytes under %s", len(data.Plaintext), *data.KeyId)
	}
	sealed := must(c.GenerateDataKeyWithoutPlaintext(ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &arn, KeySpec: types.DataKeySpecAes256, EncryptionContext: context}))(t)
	decrypt := func(key string, blob []byte, context map[string]string, dry bool) (*kms.DecryptOutput, error) {
		return c.Decrypt(ctx, &kms.DecryptInput{KeyId: &key, CiphertextBlob: blob, EncryptionContext: context, DryRun: aws.Bool(dry)})
	}
	if out := must(decrypt(arn, data.CiphertextBlob, context, false))(t); !bytes.Equal(out.Plaintext, data.Plaintext) || *out.KeyId != arn {
		t.Errorf("opened under %s", *out.KeyId)
	}
	must(decrypt(arn, sealed.CiphertextBlob, context, false))(t)

	changed := bytes.Clone(data.CiphertextBlob)
	changed[len(changed)-1] ^= 1
	absent := arn[:strings.LastIndexByte(arn, '/')+1] + "00000000-0000-4000-8000-000000000000"
	elsewhere := strings.Replace(arn, ":kms:"+strings.Split(arn, ":")[3]+":", ":kms:af-south-1:", 1)
	for _, row := range []struct {
		name string
		err  error
		want string
	}{
		{"dry run", fail(decrypt(arn, data.CiphertextBlob, context, true)), "DryRunOperationException"},
		{"other context", fail(decrypt(arn, data.CiphertextBlob, map[string]string{"byokd:cluster": "other"}, false)), "InvalidCiphertextException"},
		{"changed", fail(decrypt(arn, changed, context, false)), "InvalidCiphertextException"},
		{"absent key", fail(decrypt(absent, data.CiphertextBlob, context, false)), "NotFoundException AccessDeniedException"},
		{"key of another region", fail(decrypt(elsewhere, data.CiphertextBlob, context, false)), "NotFoundException"},
	} {
		if got := code(t, row.err); got == "" || !strings.Contains(row.want, got) {
			t.Errorf("%s: %v, want %s", row.name, row.err, row.want)
		}
	}
	m := must(c.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &arn}))(t).KeyMetadata
	if *m.Arn != arn || m.KeyState != types.KeyStateEnabled || !m.Enabled || m.KeySpec != types.KeySpecSymmetricDefault ||
		m.KeyUsage != types.KeyUsageTypeEncryptDecrypt || m.CurrentKeyMaterialId == nil || m.DeletionDate != nil {
		t.Errorf("%+v", m)
	}
	var dry *types.DryRunOperationException
	if err := fail(decrypt(arn, data.CiphertextBlob, context, true)); !errors.As(err, &dry) {
		t.Errorf("the SDK does not know the dry run's success: %v", err)
	}
}

func fail(_ *kms.DecryptOutput, err error) error { return err }
