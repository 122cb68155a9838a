package awskey

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/awskms"
)

// checkCall bounds one call of a check, the SDK's retries included: AWS answers in some 10 ms, and a call that a
// network drops would not end by itself.
const checkCall = 10 * time.Second

// Result is the outcome of one check.
type Result string

// The results.
const (
	Pass Result = "pass"
	Warn Result = "warn" // works, but something will be missed
	Fail Result = "fail"
	Skip Result = "skip" // could not be tried, because of another failure
)

// Check is one line of a preflight.
type Check struct {
	Name     string `json:"name"`
	Result   Result `json:"result"`
	Detail   string `json:"detail,omitempty"`
	NextStep string `json:"nextStep,omitempty"` // for what did not pass
}

// Key is a KMS key to be checked with the credentials at hand.
type Key struct {
	ARN     string
	Region  string            // where it must be; "" for anywhere
	Context map[string]string // encryption context of the calls, for CloudTrail
	Role    string            // whom the policy must name, for the next steps; may be ""

	Endpoint string         // address of KMS if not AWS' own, for the next steps
	KMS      *awskms.Client // classifies and explains
	Client   *kms.Client    // tries permissions; same region, endpoint and credentials
}

// CheckKey looks at the key's state, kind and region and tries each permission of
// the documented policy. It changes nothing: calls have DryRun set or only read; one
// makes a ciphertext of nothing, so that Decrypt has something to be tried on.
func CheckKey(ctx context.Context, k Key) []Check {
	checks := []Check{k.region()}
	state, described := k.describe(ctx)
	checks = append(checks, described...)
	return append(checks, k.permissions(ctx, state)...)
}

func (k Key) region() Check {
	c := Check{Name: "region", Result: Pass, Detail: regionOf(k.ARN)}
	if k.Region != "" && k.Region != c.Detail {
		c.Result, c.Detail = Fail, fmt.Sprintf("the key is in %s, the cluster in %s", c.Detail, k.Region)
		c.NextStep = "Make a key in " + k.Region + " (byokd key create), or a replica there of a multi-Region key"
	}
	return c
}

func regionOf(arn string) string {
	parts := strings.SplitN(arn, ":", 5)
	if len(parts) < 5 {
		return ""
	}
	return parts[3]
}

// describe checks what DescribeKey tells. The state is Unknown when it tells nothing.
func (k Key) describe(ctx context.Context) (keyguard.KeyState, []Check) {
	ctx, cancel := context.WithTimeout(ctx, checkCall)
	defer cancel()
	d, err := k.KMS.Describe(ctx)
	if keyguard.StateOf(err) == keyguard.AccessDenied {
		return keyguard.Unknown, []Check{k.refused("kms:DescribeKey", Warn, "refusals cannot be explained without it", err)}
	}
	s := keyguard.Status{KeyARN: k.ARN, Endpoint: k.Endpoint, Gate: keyguard.Starting, Key: d.State, Reason: d.Reason, Detail: d.Problem, DeletionDate: d.DeletionDate}
	if err != nil {
		s.Key, s.Reason, s.Detail = keyguard.StateOf(err), keyguard.ReasonOf(err), err.Error()
		if s.Key == keyguard.Deleted { // never seen by this check: mistyped rather than deleted
			s.Key, s.Reason = keyguard.Misconfigured, keyguard.ReasonKeyNotFound
		}
		return s.Key, []Check{{Name: "kms:DescribeKey", Result: Fail, Detail: s.Cause(), NextStep: s.NextStep()}}
	}
	checks := []Check{{Name: "kms:DescribeKey", Result: Pass, Detail: "allowed"}}
	kind := Check{Name: "kind", Result: Pass, Detail: "symmetric, for encryption and decryption"}
	if d.State == keyguard.Misconfigured {
		kind.Result, kind.Detail, kind.NextStep = Fail, s.Cause(), s.NextStep()
		return d.State, append(checks, kind)
	}
	enabled := Check{Name: "state", Result: Pass, Detail: "Enabled"}
	if d.State != keyguard.Enabled {
		enabled.Result, enabled.Detail, enabled.NextStep = Fail, s.Cause(), s.NextStep()
	} else if !d.ValidTo.IsZero() {
		enabled.Result = Warn
		enabled.Detail = "Enabled; its imported key material expires on " + d.ValidTo.UTC().Format(time.RFC3339)
	}
	if d.MultiRegion {
		kind.Detail += fmt.Sprintf("; multi-Region, with %d other keys of its set", len(d.Replicas))
	}
	return d.State, append(checks, kind, enabled)
}

// need says what a permission is for.
type need struct {
	result Result // when it is missing
	why    string
}

func required() need { return need{Fail, "byokd cannot work without it"} }
func forRewrap() need {
	return need{Warn, "only `byokd key rewrap` needs it"}
}
func forVolumes() need {
	return need{Warn, "only the provisioning of encrypted EBS volumes needs it, not byokd"}
}

// permissions tries each permission of the documented policy.
func (k Key) permissions(ctx context.Context, state keyguard.KeyState) []Check {
	id, encryption := aws.String(k.ARN), k.Context
	var ciphertext []byte
	withCiphertext := func(f func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			if ciphertext == nil {
				return errNotTried
			}
			return f(ctx)
		}
	}
	tries := []struct {
		action string
		need   need
		try    func(context.Context) error
	}{
		{"kms:GenerateDataKeyWithoutPlaintext", required(), func(ctx context.Context) error {
			out, err := k.Client.GenerateDataKeyWithoutPlaintext(ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: id, EncryptionContext: encryption, NumberOfBytes: aws.Int32(32)})
			if err == nil {
				ciphertext = out.CiphertextBlob
			}
			return err
		}},
		{"kms:GenerateDataKey", required(), func(ctx context.Context) error {
			_, err := k.Client.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: id, EncryptionContext: encryption, NumberOfBytes: aws.Int32(32), DryRun: aws.Bool(true)})
			return err
		}},
		{"kms:Decrypt", required(), withCiphertext(func(ctx context.Context) error {
			_, err := k.Client.Decrypt(ctx, &kms.DecryptInput{KeyId: id, EncryptionContext: encryption, CiphertextBlob: ciphertext, DryRun: aws.Bool(true)})
			return err
		})},
		{"kms:Encrypt", forRewrap(), func(ctx context.Context) error {
			_, err := k.Client.Encrypt(ctx, &kms.EncryptInput{KeyId: id, EncryptionContext: encryption, Plaintext: []byte("dry run"), DryRun: aws.Bool(true)})
			return err
		}},
		{"kms:ReEncrypt*", forRewrap(), withCiphertext(func(ctx context.Context) error {
			_, err := k.Client.ReEncrypt(ctx, &kms.ReEncryptInput{SourceKeyId: id, SourceEncryptionContext: encryption, CiphertextBlob: ciphertext,
				DestinationKeyId: id, DestinationEncryptionContext: encryption, DryRun: aws.Bool(true)})
			return err
		})},
		{"kms:CreateGrant", forVolumes(), func(ctx context.Context) error {
			_, err := k.Client.CreateGrant(ctx, &kms.CreateGrantInput{KeyId: id, GranteePrincipal: aws.String(k.grantee()),
				Operations: []types.GrantOperation{types.GrantOperationDecrypt}, DryRun: aws.Bool(true)})
			return err
		}},
		{"kms:ListGrants", forVolumes(), func(ctx context.Context) error {
			_, err := k.Client.ListGrants(ctx, &kms.ListGrantsInput{KeyId: id, Limit: aws.Int32(1)})
			return err
		}},
		{"kms:RevokeGrant", forVolumes(), func(ctx context.Context) error {
			_, err := k.Client.RevokeGrant(ctx, &kms.RevokeGrantInput{KeyId: id, GrantId: aws.String(strings.Repeat("0", 64)), DryRun: aws.Bool(true)})
			return err
		}},
	}
	var checks []Check
	for _, t := range tries {
		if state == keyguard.Unreachable { // each call would only wait as long as the first one did
			checks = append(checks, Check{Name: t.action, Result: Skip, Detail: notTold(state)})
			continue
		}
		limited, cancel := context.WithTimeout(ctx, checkCall)
		err := t.try(limited)
		cancel()
		checks = append(checks, k.judge(t.action, t.need, state, err))
	}
	return checks
}

func notTold(state keyguard.KeyState) string {
	return fmt.Sprintf("cannot be told while the key is %s", state)
}

// errNotTried stands for a call that has nothing to be tried on.
var errNotTried = errors.New("not tried")

// grantee is any principal: nothing is granted.
func (k Key) grantee() string {
	if k.Role != "" {
		return k.Role
	}
	account := strings.SplitN(k.ARN, ":", 6)[4]
	return "arn:aws:iam::" + account + ":root"
}

// judge turns the answer to a try into a check. KMS decides on permission before it
// looks at the key's state, so that a disabled key says nothing against it; that the
// grant to be revoked does not exist is only told to who may revoke.
func (k Key) judge(action string, n need, state keyguard.KeyState, err error) Check {
	var api smithy.APIError
	code := ""
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	c := Check{Name: action, Result: Pass, Detail: "allowed"}
	switch {
	case err == nil, code == "DryRunOperationException", code == "NotFoundException" && action == "kms:RevokeGrant" && (state == keyguard.Enabled || state == keyguard.Unknown):
	case code == "AccessDeniedException":
		return k.refused(action, n.result, n.why, err)
	case errors.Is(err, errNotTried):
		c.Result, c.Detail = Skip, "needs a ciphertext, which could not be made"
	case state != keyguard.Enabled && state != keyguard.Unknown:
		c.Result, c.Detail = Skip, notTold(state)
	default:
		c.Result, c.Detail = Fail, err.Error()
		c.NextStep = "See what AWS says about the key: " + k.aws() + " describe-key --key-id " + k.ARN + " --region " + regionOf(k.ARN)
	}
	return c
}

func (k Key) refused(action string, result Result, why string, err error) Check {
	var api smithy.APIError
	detail := err.Error()
	if errors.As(err, &api) {
		detail = api.ErrorMessage()
	}
	role := k.Role
	if role == "" {
		role = "byokd's role"
	}
	return Check{Name: action, Result: result, Detail: fmt.Sprintf("not allowed (%s): %s", why, strings.Join(strings.Fields(detail), " ")),
		NextStep: fmt.Sprintf("Allow %s to %s in the key policy: byokd key policy --account %s --role %s > policy.json, then %s put-key-policy --key-id %s --region %s --policy-name default --policy file://policy.json",
			action, role, strings.SplitN(k.ARN, ":", 6)[4], role, k.aws(), k.ARN, regionOf(k.ARN))}
}

// aws begins a command about the key.
func (k Key) aws() string {
	if k.Endpoint == "" {
		return "aws kms"
	}
	return "aws --endpoint-url " + k.Endpoint + " kms"
}
