package keypolicy

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"
)

// Kind is one of the documented key policies.
type Kind uint8

// The documented policies.
const (
	// Full is that of the newest documentation.
	Full Kind = iota
	// Minimal is the smaller one of the older documentation: everything but
	// rewrap works under it.
	Minimal
)

const fullPolicy = `{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Sid": "Enable IAM user permissions",
      "Effect": "Allow",
      "Principal": {
        "AWS": "arn:aws:iam::<customer-aws-account>:root"
      },
      "Action": "kms:*",
      "Resource": "*"
    },
    {
      "Sid": "Allow Camunda tenant IAM Role basic key access",
      "Effect": "Allow",
      "Principal": {
        "AWS": "<tenant-role-arn>"
      },
      "Action": [
        "kms:Encrypt",
        "kms:Decrypt",
        "kms:ReEncrypt*",
        "kms:DescribeKey",
        "kms:GenerateDataKey*"
      ],
      "Resource": "*"
    },
    {
      "Sid": "Allow Camunda tenant IAM Role to create grants for provisioning encrypted EBS volumes",
      "Effect": "Allow",
      "Principal": {
        "AWS": "<tenant-role-arn>"
      },
      "Action": ["kms:CreateGrant", "kms:ListGrants", "kms:RevokeGrant"],
      "Resource": "*"
    }
  ]
}`

// minimalPolicy has the statements of the older documentation. The first, for the
// account, is what the console adds there by itself.
const minimalPolicy = `{
  "Version": "2012-10-17",
  "Statement": [
    {
      "Sid": "Enable IAM user permissions",
      "Effect": "Allow",
      "Principal": {
        "AWS": "arn:aws:iam::<customer-aws-account>:root"
      },
      "Action": "kms:*",
      "Resource": "*"
    },
    {
      "Sid": "Allow Camunda Cluster Amazon Role basic key access",
      "Effect": "Allow",
      "Principal": {
        "AWS": "<tenant-role-arn>"
      },
      "Action": [
        "kms:DescribeKey",
        "kms:GenerateDataKey*",
        "kms:Decrypt"
      ],
      "Resource": "*"
    },
    {
      "Sid": "Allow Camunda Cluster Amazon Role to create grants for provisioning encrypted EBS volumes",
      "Effect": "Allow",
      "Principal": {
        "AWS": "<tenant-role-arn>"
      },
      "Action": [
        "kms:CreateGrant"
      ],
      "Resource": "*"
    }
  ]
}`

var (
	accountID = regexp.MustCompile(`^[0-9]{12}$`)
	// A role, with or without a path. Sessions and users are refused: a policy that
	// names a session does not outlive it.
	roleARN = regexp.MustCompile(`^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$`)
)

// ErrNotARole tells that something else than the ARN of an IAM role was given.
var ErrNotARole = errors.New("not the ARN of an IAM role, arn:aws:iam::ACCOUNT:role/NAME (byokd identity prints byokd's)")

// Text returns the documented key policy, letter by letter, for an account and
// the role that byokd runs under.
func Text(kind Kind, account, role string) (string, error) {
	if !accountID.MatchString(account) {
		return "", fmt.Errorf("%q is not the id of an AWS account, 12 digits", account)
	}
	if !roleARN.MatchString(role) {
		return "", fmt.Errorf("%q: %w", role, ErrNotARole)
	}
	text := fullPolicy
	if kind == Minimal {
		text = minimalPolicy
	}
	if partition := strings.SplitN(role, ":", 3)[1]; partition != "aws" {
		text = strings.ReplaceAll(text, "arn:aws:iam", "arn:"+partition+":iam")
	}
	return strings.NewReplacer("<customer-aws-account>", account, "<tenant-role-arn>", role).Replace(text), nil
}

// Same compares two policies as JSON: AWS gives them back as it was given
// them, or spaced otherwise.
func Same(a, b string) bool {
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}
