package awskms

import (
	"context"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// Rewrap wraps under one key what another has wrapped, in the same encryption
// context. ReEncrypt does that within KMS; where the keys are in two regions, or
// ReEncrypt is not allowed to us, the plain key comes here (Decrypt) and goes back
// (Encrypt), within seal.Do. When neither is allowed the error is that of
// ReEncrypt, which is the smaller permission. op names the operation that the
// receipt is of.
func Rewrap(ctx context.Context, from, to *Client, wrapped []byte, b keyguard.Binding) (again []byte, op string, receipt keyguard.Receipt, err error) {
	if from.home == to.home {
		again, receipt, err = to.reEncrypt(ctx, from.arn, wrapped, b)
		if keyguard.StateOf(err) != keyguard.AccessDenied {
			return again, opReEncrypt, receipt, err
		}
	}
	denied := err
	again, receipt, err = to.wrapPlain(ctx, from, wrapped, b)
	if denied != nil && keyguard.StateOf(err) == keyguard.AccessDenied {
		err = denied
	}
	return again, opEncrypt, receipt, err
}

const (
	opReEncrypt = "ReEncrypt"
	opEncrypt   = "Encrypt"
)

// reEncrypt asks KMS to do all of it.
func (c *Client) reEncrypt(ctx context.Context, fromARN string, wrapped []byte, b keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	out, err := c.pooled.ReEncrypt(ctx, &kms.ReEncryptInput{
		CiphertextBlob:               wrapped,
		SourceKeyId:                  aws.String(fromARN),
		SourceEncryptionContext:      b.Context(),
		DestinationKeyId:             aws.String(c.arn),
		DestinationEncryptionContext: b.Context(),
	})
	if err != nil {
		return nil, keyguard.Receipt{}, c.failed(opReEncrypt, err)
	}
	receipt, err := c.receipt(opReEncrypt, out.KeyId, out.ResultMetadata, len(out.CiphertextBlob) > 0)
	return out.CiphertextBlob, receipt, err
}

// wrapPlain unwraps with one key and wraps with c.
func (c *Client) wrapPlain(ctx context.Context, from *Client, wrapped []byte, b keyguard.Binding) (again []byte, receipt keyguard.Receipt, err error) {
	_, err = from.Unwrap(ctx, wrapped, b, func(plain []byte) error {
		again, receipt, err = c.encrypt(ctx, plain, b)
		return err
	})
	return again, receipt, err
}

// encrypt wraps a plain key, inside seal.Do.
func (c *Client) encrypt(ctx context.Context, plain []byte, b keyguard.Binding) (wrapped []byte, receipt keyguard.Receipt, err error) {
	seal.Do(func() {
		out, callErr := c.direct.Encrypt(ctx, &kms.EncryptInput{
			KeyId:             aws.String(c.arn),
			Plaintext:         plain,
			EncryptionContext: b.Context(),
		})
		if callErr != nil {
			err = c.failed(opEncrypt, callErr)
			return
		}
		wrapped = out.CiphertextBlob
		receipt, err = c.receipt(opEncrypt, out.KeyId, out.ResultMetadata, len(wrapped) > 0)
	})
	return wrapped, receipt, err
}
