package kmstest

import "strings"

// The fixed identities of devcloud.
const (
	DefaultAccount = "111122223333"
	DefaultRegion  = "eu-central-1"

	// AdminAccessKey and AdminSecret belong to the account's administrator.
	AdminAccessKey = "test"
	AdminSecret    = "test"
	// TenantAccessKey and TenantSecret belong to the role byokd runs under.
	TenantAccessKey = "byokd-tenant"
	TenantSecret    = "byokd-tenant-secret"
	// TenantRole is the role named by the documented key policy.
	TenantRole = "arn:aws:iam::" + DefaultAccount + ":role/byokd-tenant"
	// AdminUser is the administrator's own ARN.
	AdminUser = "arn:aws:iam::" + DefaultAccount + ":user/administrator"
)

// Credential is an access key and whom it belongs to. Immutable after New.
type Credential struct {
	AccessKey string
	Secret    string
	// Principal is the ARN of an IAM user (arn:aws:iam::ACCOUNT:user/NAME), of a
	// role (…:role/NAME; calls are then made by an assumed-role session of it)
	// or of the account root (…:root).
	Principal string
	// Admin says that the principal's own IAM policy allows kms:* on everything.
	// A key still needs a policy statement for the account root to honour that.
	Admin bool
}

// DefaultCredentials are the administrator test/test and the tenant role
// byokd-tenant/byokd-tenant-secret.
func DefaultCredentials() []Credential {
	return []Credential{
		{AccessKey: AdminAccessKey, Secret: AdminSecret, Principal: AdminUser, Admin: true},
		{AccessKey: TenantAccessKey, Secret: TenantSecret, Principal: TenantRole},
	}
}

// caller is the authenticated principal of one call.
type caller struct {
	accessKey string
	account   string
	arn       string // what AWS shows: user ARN, assumed-role session ARN or root
	role      string // the role behind a session, else ""
	id        string // unique id as GetCallerIdentity shows it
	admin     bool
}

// sessionName is the session under which a role's credential calls.
const sessionName = "byokd"

func (c Credential) caller() caller {
	out := caller{accessKey: c.AccessKey, account: arnAccount(c.Principal), arn: c.Principal, admin: c.Admin}
	out.id = uniqueID("AIDA", c.Principal)
	if name, ok := cutRole(c.Principal); ok {
		out.role = c.Principal
		out.arn = "arn:aws:sts::" + out.account + ":assumed-role/" + name + "/" + sessionName
		out.id = uniqueID("AROA", c.Principal) + ":" + sessionName
	}
	if strings.HasSuffix(c.Principal, ":root") {
		out.id = out.account
	}
	return out
}

// cutRole returns a role's name without its path.
func cutRole(arn string) (string, bool) {
	_, name, ok := strings.Cut(arn, ":role/")
	if !ok {
		return "", false
	}
	return name[strings.LastIndexByte(name, '/')+1:], true
}

// arnAccount returns the account field of an ARN, or "".
func arnAccount(arn string) string {
	parts := strings.SplitN(arn, ":", 6)
	if len(parts) < 6 {
		return ""
	}
	return parts[4]
}
