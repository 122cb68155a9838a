package awskms

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go/middleware"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// dataKeySize is the size of every key that byokd asks for, in bytes.
const dataKeySize = 32

// Options of a Client.
type Options struct {
	// Endpoint is the URL to call instead of the one derived from the key's
	// region, e.g. of a VPC endpoint or of devcloud.
	Endpoint string
}

// Client is one KMS key in AWS. It is safe for concurrent use; every call makes
// one attempt, honours ctx, and fails with a *keyguard.KMSError.
type Client struct {
	arn    string
	home   string                   // the key's Region
	pooled *kms.Client              // for what carries no secret
	region func(string) *kms.Client // pooled, for another Region
	direct *kms.Client              // for what carries a plaintext key, inside seal.Do only
	stale  func()                   // tells who gave the credentials that AWS refuses them
	fresh  func()                   // makes later calls of pooled on new connections
}

var (
	_ keyguard.KMS              = (*Client)(nil)
	_ keyguard.SiblingDescriber = (*Client)(nil)
	_ keyguard.Reconnector      = (*Client)(nil)
)

// New makes a client for the key with this ARN (an alias will not do: it can be
// pointed at another key). cfg comes from config.LoadDefaultConfig: credentials
// and the trusted CAs are taken from it, its region and retries are not.
func New(cfg aws.Config, keyARN string, o Options) (*Client, error) {
	parsed, err := parseKeyARN(keyARN)
	if err != nil {
		return nil, err
	}
	stale := func() {}
	if given, able := cfg.Credentials.(interface{ Invalidate() }); able {
		stale = given.Invalidate
	}
	cfg.Credentials = markCredentials(cfg.Credentials)
	pooled, direct := transports(cfg.HTTPClient)
	options := func(client aws.HTTPClient) func(*kms.Options) {
		return func(k *kms.Options) {
			k.Region = parsed.Region
			k.Retryer = aws.NopRetryer{}
			k.HTTPClient = client
			if o.Endpoint != "" {
				k.BaseEndpoint = aws.String(o.Endpoint)
			}
		}
	}
	return &Client{
		arn:  keyARN,
		home: parsed.Region,
		region: func(region string) *kms.Client {
			return kms.NewFromConfig(cfg, options(pooled), func(k *kms.Options) { k.Region = region })
		},
		pooled: kms.NewFromConfig(cfg, options(pooled)),
		direct: kms.NewFromConfig(cfg, options(direct)),
		stale:  stale,
		fresh:  func() { pooled.CloseIdleConnections() },
	}, nil
}

// Reconnect gives up the connections that are kept for later calls.
func (c *Client) Reconnect() { c.fresh() }

// failed classifies the error of a call, and has credentials renewed that AWS refuses.
func (c *Client) failed(op string, err error) *keyguard.KMSError {
	k := classify(op, err)
	if k.Reason == keyguard.ReasonCredentials && k.RequestID != "" {
		c.stale()
	}
	return k
}

// regionPattern is what a Region looks like, which becomes part of a host name.
var regionPattern = regexp.MustCompile(`^[a-z]{2,}(-[a-z0-9]+)+$`)

func parseKeyARN(keyARN string) (arn.ARN, error) {
	parsed, err := arn.Parse(keyARN)
	switch {
	case err != nil || parsed.Service != "kms" || !regionPattern.MatchString(parsed.Region) || parsed.AccountID == "":
		return arn.ARN{}, fmt.Errorf("awskms: %q is not the ARN of a KMS key (arn:aws:kms:REGION:ACCOUNT:key/ID)", keyARN)
	case strings.HasPrefix(parsed.Resource, "alias/"):
		return arn.ARN{}, fmt.Errorf("awskms: %q is an alias, which can be pointed at another key; give the key's own ARN (aws kms describe-key --key-id %s --region %s --query KeyMetadata.Arn)",
			keyARN, parsed.Resource, parsed.Region)
	case !strings.HasPrefix(parsed.Resource, "key/") || len(parsed.Resource) == len("key/"):
		return arn.ARN{}, fmt.Errorf("awskms: %q is not the ARN of a KMS key (arn:aws:kms:REGION:ACCOUNT:key/ID)", keyARN)
	}
	return parsed, nil
}

// ARN names the key.
func (c *Client) ARN() string { return c.arn }

// GenerateProbe makes a probe ciphertext: a data key that nobody has seen in clear.
func (c *Client) GenerateProbe(ctx context.Context, b keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	out, err := c.pooled.GenerateDataKeyWithoutPlaintext(ctx, &kms.GenerateDataKeyWithoutPlaintextInput{
		KeyId:             aws.String(c.arn),
		EncryptionContext: b.Context(),
		NumberOfBytes:     aws.Int32(dataKeySize),
	})
	const op = "GenerateDataKeyWithoutPlaintext"
	if err != nil {
		return nil, keyguard.Receipt{}, c.failed(op, err)
	}
	receipt, err := c.receipt(op, out.KeyId, out.ResultMetadata, len(out.CiphertextBlob) > 0)
	return out.CiphertextBlob, receipt, err
}

// Probe asks KMS to decrypt a probe ciphertext and forgets the answer.
func (c *Client) Probe(ctx context.Context, ciphertext []byte, b keyguard.Binding) (keyguard.Receipt, error) {
	out, err := c.pooled.Decrypt(ctx, c.decryptInput(ciphertext, b))
	const op = "Decrypt"
	if err != nil {
		return keyguard.Receipt{}, c.failed(op, err)
	}
	clear(out.Plaintext)
	return c.receipt(op, out.KeyId, out.ResultMetadata, len(out.Plaintext) > 0)
}

func (c *Client) decryptInput(ciphertext []byte, b keyguard.Binding) *kms.DecryptInput {
	return &kms.DecryptInput{
		CiphertextBlob:    ciphertext,
		KeyId:             aws.String(c.arn),
		EncryptionContext: b.Context(),
	}
}

// GenerateDataKey makes a data key and shows it to use, inside seal.Do.
func (c *Client) GenerateDataKey(ctx context.Context, b keyguard.Binding, use func(plain []byte) error) (wrapped []byte, receipt keyguard.Receipt, err error) {
	seal.Do(func() {
		const op = "GenerateDataKey"
		out, callErr := c.direct.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
			KeyId:             aws.String(c.arn),
			EncryptionContext: b.Context(),
			NumberOfBytes:     aws.Int32(dataKeySize),
		})
		if callErr != nil {
			err = c.failed(op, callErr)
			return
		}
		defer clear(out.Plaintext)
		receipt, err = c.receipt(op, out.KeyId, out.ResultMetadata, len(out.Plaintext) == dataKeySize && len(out.CiphertextBlob) > 0)
		if err != nil {
			return
		}
		if err = use(out.Plaintext); err == nil {
			wrapped = out.CiphertextBlob
		}
	})
	return wrapped, receipt, err
}

// Unwrap decrypts a wrapped data key and shows it to use, inside seal.Do.
func (c *Client) Unwrap(ctx context.Context, wrapped []byte, b keyguard.Binding, use func(plain []byte) error) (receipt keyguard.Receipt, err error) {
	seal.Do(func() {
		const op = "Decrypt"
		out, callErr := c.direct.Decrypt(ctx, c.decryptInput(wrapped, b))
		if callErr != nil {
			err = c.failed(op, callErr)
			return
		}
		defer clear(out.Plaintext)
		receipt, err = c.receipt(op, out.KeyId, out.ResultMetadata, len(out.Plaintext) > 0)
		if err == nil {
			err = use(out.Plaintext)
		}
	})
	return receipt, err
}

// receipt checks that an answer is complete and came from our key: an endpoint
// that says 200 and nothing else must not pass for a granted call.
func (c *Client) receipt(op string, keyID *string, metadata middleware.Metadata, complete bool) (keyguard.Receipt, error) {
	id, _ := awsmiddleware.GetRequestIDMetadata(metadata)
	r := keyguard.Receipt{RequestID: id, KeyARN: aws.ToString(keyID)}
	switch {
	case !complete:
		return r, &keyguard.KMSError{Op: op, State: keyguard.Unreachable, Reason: keyguard.ReasonUnknownFault,
			RequestID: id, Err: fmt.Errorf("incomplete answer")}
	case r.KeyARN != c.arn:
		return r, &keyguard.KMSError{Op: op, State: keyguard.Misconfigured, Reason: keyguard.ReasonWrongKey,
			RequestID: id, Err: fmt.Errorf("answered for key %q", r.KeyARN)}
	}
	return r, nil
}

// Describe explains the state of the key and checks its kind.
func (c *Client) Describe(ctx context.Context) (keyguard.Description, error) {
	out, err := c.pooled.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(c.arn)})
	if err != nil {
		return keyguard.Description{}, c.failed("DescribeKey", err)
	}
	id, _ := awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
	if out.KeyMetadata == nil {
		return keyguard.Description{}, &keyguard.KMSError{Op: "DescribeKey", State: keyguard.Unreachable,
			Reason: keyguard.ReasonUnknownFault, RequestID: id, Err: fmt.Errorf("incomplete answer")}
	}
	return c.describe(out.KeyMetadata, id), nil
}

// DescribeSibling explains the state of another key of the same multi-Region set,
// by a call to that key's Region (or to Options.Endpoint, if that is set).
func (c *Client) DescribeSibling(ctx context.Context, keyARN string) (keyguard.Description, error) {
	const op = "DescribeKey"
	parsed, err := parseKeyARN(keyARN)
	if err != nil {
		return keyguard.Description{}, &keyguard.KMSError{Op: op, State: keyguard.Misconfigured, Reason: keyguard.ReasonBadRequest, Err: err}
	}
	out, err := c.region(parsed.Region).DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(keyARN)})
	if err != nil {
		return keyguard.Description{}, c.failed(op, err)
	}
	id, _ := awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
	if out.KeyMetadata == nil || aws.ToString(out.KeyMetadata.Arn) != keyARN {
		return keyguard.Description{}, &keyguard.KMSError{Op: op, State: keyguard.Unreachable,
			Reason: keyguard.ReasonUnknownFault, RequestID: id, Err: fmt.Errorf("incomplete answer")}
	}
	state, reason := describedState(out.KeyMetadata.KeyState)
	return keyguard.Description{State: state, Reason: reason, Raw: string(out.KeyMetadata.KeyState), RequestID: id}, nil
}

func (c *Client) describe(m *types.KeyMetadata, requestID string) keyguard.Description {
	d := keyguard.Description{
		Raw:           printable(string(m.KeyState)),
		DeletionDate:  sane(m.DeletionDate),
		ValidTo:       sane(m.ValidTo),
		MultiRegion:   aws.ToBool(m.MultiRegion),
		Origin:        printable(string(m.Origin)),
		KeyMaterialID: printable(aws.ToString(m.CurrentKeyMaterialId)),
		RequestID:     requestID,
	}
	if set := m.MultiRegionConfiguration; set != nil {
		d.Replicas = siblings(set, c.arn)
	}
	d.State, d.Reason = describedState(m.KeyState)
	switch {
	case aws.ToString(m.Arn) != c.arn:
		d.State, d.Reason = keyguard.Misconfigured, keyguard.ReasonWrongKey
		d.Problem = printable(fmt.Sprintf("AWS answers for %s", aws.ToString(m.Arn)))
	case m.KeySpec != types.KeySpecSymmetricDefault || m.KeyUsage != types.KeyUsageTypeEncryptDecrypt:
		d.State, d.Reason = keyguard.Misconfigured, keyguard.ReasonWrongKind
		d.Problem = printable(fmt.Sprintf("its spec is %s and its usage %s", m.KeySpec, m.KeyUsage))
	}
	return d
}

// describedState maps KMS's key states; one that is not known is not usable.
func describedState(s types.KeyState) (keyguard.KeyState, keyguard.Reason) {
	switch s {
	case types.KeyStateEnabled, types.KeyStateUpdating: // Updating: the primary Region is changing, the key works
		return keyguard.Enabled, keyguard.ReasonNone
	case types.KeyStateDisabled:
		return keyguard.Disabled, keyguard.ReasonKeyDisabled
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		return keyguard.PendingDeletion, keyguard.ReasonPendingDeletion
	case types.KeyStatePendingImport:
		return keyguard.Unavailable, keyguard.ReasonPendingImport
	case types.KeyStateUnavailable:
		return keyguard.Unavailable, keyguard.ReasonKeyStoreDown
	case types.KeyStateCreating:
		return keyguard.Unavailable, keyguard.ReasonKeyCreating
	default:
		return keyguard.Unavailable, keyguard.ReasonInvalidState
	}
}

// sane drops dates that no key has and that JSON cannot write.
func sane(t *time.Time) time.Time {
	if at := aws.ToTime(t); at.Year() > 1970 && at.Year() < 9999 {
		return at
	}
	return time.Time{}
}

// maxSiblings bounds the keys of a multi-Region set that are told and asked about: there
// is at most one in each of AWS's Regions.
const maxSiblings = 64

// siblings lists the other keys of a multi-Region set, which have its id and account:
// what is named otherwise would have us call wherever its Region leads.
func siblings(set *types.MultiRegionConfiguration, self string) []string {
	var list []string
	keys := set.ReplicaKeys
	if set.PrimaryKey != nil {
		keys = append([]types.MultiRegionKey{*set.PrimaryKey}, keys...)
	}
	for _, k := range keys {
		if other := aws.ToString(k.Arn); other != self && keyguard.SameKey(other, self) && len(list) < maxSiblings {
			if _, err := parseKeyARN(other); err != nil {
				continue
			}
			list = append(list, other)
		}
	}
	return list
}
