package awskms

import (
	"context"
	"errors"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/byokd/byokd/keyguard"
)

// Options of a Client.
type Options struct {
	Endpoint string // overrides the endpoint derived from the key's region; for trying and testing
}

// Client is one KMS key in AWS. Safe for concurrent use.
type Client struct{ arn string }

var _ keyguard.KMS = (*Client)(nil)

// New makes a client for the key with this ARN (not an alias).
func New(cfg aws.Config, keyARN string, o Options) (*Client, error) {
	return &Client{arn: keyARN}, nil
}

var errTODO = errors.New("not yet")

func (c *Client) ARN() string { return c.arn }
func (c *Client) GenerateProbe(ctx context.Context, b keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	return nil, keyguard.Receipt{}, errTODO
}
func (c *Client) Probe(ctx context.Context, ciphertext []byte, b keyguard.Binding) (keyguard.Receipt, error) {
	return keyguard.Receipt{}, errTODO
}
func (c *Client) GenerateDataKey(ctx context.Context, b keyguard.Binding, use func(plain []byte) error) ([]byte, keyguard.Receipt, error) {
	return nil, keyguard.Receipt{}, errTODO
}
func (c *Client) Unwrap(ctx context.Context, wrapped []byte, b keyguard.Binding, use func(plain []byte) error) (keyguard.Receipt, error) {
	return keyguard.Receipt{}, errTODO
}
func (c *Client) Describe(ctx context.Context) (keyguard.Description, error) {
	return keyguard.Description{}, errTODO
}
