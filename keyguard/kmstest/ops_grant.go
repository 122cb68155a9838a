package kmstest

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"time"
)

const grantLimit = 50000 // KMS's quota of grants per key

type grant struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	Grantee     string            `json:"grantee"`
	Retiring    string            `json:"retiring,omitempty"`
	Issuer      string            `json:"issuer"`
	Operations  []string          `json:"operations"`
	Constraints *grantConstraints `json:"constraints,omitempty"`
	Created     time.Time         `json:"created"`
}

type grantConstraints struct {
	EncryptionContextSubset map[string]string `json:",omitempty"`
	EncryptionContextEquals map[string]string `json:",omitempty"`
}

func (g *grant) token() string {
	sum := sha256.Sum256([]byte("grant token " + g.ID))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// grantOperations are the operations a grant can give.
func grantOperations() []string {
	return []string{"Decrypt", "Encrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "ReEncryptFrom", "ReEncryptTo",
		"CreateGrant", "RetireGrant", "DescribeKey", "Sign", "Verify", "GetPublicKey", "GenerateDataKeyPair",
		"GenerateDataKeyPairWithoutPlaintext", "GenerateMac", "VerifyMac", "DeriveSharedSecret"}
}

// allows tells whether the grant gives a caller an operation in a context. The
// constraints bind cryptographic operations only.
func (g *grant) allows(who caller, action string, context map[string]string) bool {
	if !who.named(g.Grantee, true) || !slices.Contains(g.Operations, action) {
		return false
	}
	if g.Constraints == nil || slices.Contains([]string{"CreateGrant", "RetireGrant", "DescribeKey", "GetPublicKey"}, action) {
		return true
	}
	return g.Constraints.hold(context)
}

func (gc *grantConstraints) hold(context map[string]string) bool {
	if gc.EncryptionContextEquals != nil {
		return len(context) == len(gc.EncryptionContextEquals) && subset(gc.EncryptionContextEquals, context)
	}
	return subset(gc.EncryptionContextSubset, context)
}

func subset(small, large map[string]string) bool {
	for k, v := range small {
		if got, ok := large[k]; !ok || got != v {
			return false
		}
	}
	return true
}

type grantInput struct {
	KeyId, GranteePrincipal, RetiringPrincipal, Name string
	Operations                                       []string
	Constraints                                      *grantConstraints
	GrantTokens                                      []string
	DryRun                                           bool
}

type grantOutput struct{ GrantId, GrantToken string }

func (in *grantInput) check() *apiError {
	for _, p := range []string{in.GranteePrincipal, in.RetiringPrincipal} {
		if p == "" && p == in.RetiringPrincipal {
			continue
		}
		if p == "*" || !principalPattern.MatchString(p) {
			return errInvalidArn("%.200s is not a valid principal", p)
		}
	}
	if in.GranteePrincipal == "" {
		return errMissing("granteePrincipal")
	}
	if len(in.Operations) == 0 {
		return errMissing("operations")
	}
	for _, op := range in.Operations {
		if !slices.Contains(grantOperations(), op) {
			return errConstraint(limitString(op, 64), "operations", "Member must satisfy enum value set")
		}
	}
	if in.Constraints != nil && in.Constraints.EncryptionContextEquals != nil && in.Constraints.EncryptionContextSubset != nil {
		return errValidation("Only one of EncryptionContextEquals and EncryptionContextSubset can be given.")
	}
	return nil
}

func createGrant(c *call, in *grantInput) (*grantOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "CreateGrant", nil, in.GrantTokens...)
	if aerr != nil {
		return nil, aerr
	}
	if aerr := in.check(); aerr != nil {
		return nil, aerr
	}
	if aerr := usable(k); aerr != nil {
		return nil, aerr
	}
	if len(k.Grants) >= grantLimit {
		return nil, errLimit("%s has reached the limit of %d grants.", k.ARN, grantLimit)
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	if in.Name != "" { // a repeated request is answered with the grant it made
		for _, g := range k.Grants {
			if g.Name == in.Name && g.Grantee == in.GranteePrincipal && slices.Equal(g.Operations, in.Operations) {
				return &grantOutput{GrantId: g.ID, GrantToken: g.token()}, nil
			}
		}
	}
	raw := make([]byte, 32)
	rand.Read(raw)
	g := &grant{ID: hex.EncodeToString(raw), Name: in.Name, Grantee: in.GranteePrincipal, Retiring: in.RetiringPrincipal,
		Issuer: c.who.arn, Operations: in.Operations, Constraints: in.Constraints, Created: c.now}
	k.Grants = append(k.Grants, g)
	return &grantOutput{GrantId: g.ID, GrantToken: g.token()}, nil
}

type listedGrant struct {
	KeyId, GrantId, Name string
	CreationDate         *epoch
	GranteePrincipal     string
	RetiringPrincipal    string `json:",omitempty"`
	IssuingAccount       string
	Operations           []string
	Constraints          *grantConstraints `json:",omitempty"`
}

type listGrantsOutput struct {
	Grants     []listedGrant
	NextMarker string `json:",omitempty"`
	Truncated  bool
}

func listGrants(c *call, in *listInput) (*listGrantsOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "ListGrants", nil)
	if aerr != nil {
		return nil, aerr
	}
	grants := filter(k.Grants, func(g *grant) bool {
		return (in.GrantId == "" || g.ID == in.GrantId) && (in.GranteePrincipal == "" || g.Grantee == in.GranteePrincipal)
	})
	grants, next, aerr := page(grants, func(g *grant) string { return g.ID }, in.Limit, in.Marker, 100)
	if aerr != nil {
		return nil, aerr
	}
	out := &listGrantsOutput{Grants: []listedGrant{}, NextMarker: next, Truncated: next != ""}
	for _, g := range grants {
		out.Grants = append(out.Grants, listedGrant{KeyId: k.ARN, GrantId: g.ID, Name: g.Name, CreationDate: epochPtr(g.Created),
			GranteePrincipal: g.Grantee, RetiringPrincipal: g.Retiring, IssuingAccount: "arn:aws:iam::" + c.s.account + ":root",
			Operations: g.Operations, Constraints: g.Constraints})
	}
	return out, nil
}

type endGrantInput struct {
	KeyId, GrantId, GrantToken string
	DryRun                     bool
}

func revokeGrant(c *call, in *endGrantInput) (*nothing, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "RevokeGrant", nil)
	if aerr != nil {
		return nil, aerr
	}
	i := slices.IndexFunc(k.Grants, func(g *grant) bool { return g.ID == in.GrantId })
	if i < 0 {
		return nil, errNotFound("Grant ID %.64s does not exist on %s", in.GrantId, k.ARN)
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	k.Grants = slices.Delete(k.Grants, i, i+1)
	return nil, nil
}

// retireGrant is for the retiring principal, for a grantee that was given
// RetireGrant, and for the account's administrator.
func retireGrant(c *call, in *endGrantInput) (*nothing, *apiError) {
	for _, k := range c.st.sortedKeys(c.region) {
		i := slices.IndexFunc(k.Grants, func(g *grant) bool {
			if in.GrantToken != "" {
				return g.token() == in.GrantToken
			}
			return g.ID == in.GrantId && (k.ID == in.KeyId || k.ARN == in.KeyId)
		})
		if i < 0 {
			continue
		}
		c.event.Key = k.ARN
		g := k.Grants[i]
		if !c.who.admin && !(g.Retiring != "" && c.who.named(g.Retiring, true)) && !g.allows(c.who, "RetireGrant", nil) {
			return nil, errAccessDenied(c.who.arn, "kms:RetireGrant", k.ARN, noResourcePolicy)
		}
		if in.DryRun {
			return nil, errDryRun()
		}
		k.Grants = slices.Delete(k.Grants, i, i+1)
		return nil, nil
	}
	if in.GrantToken != "" {
		return nil, clientError("InvalidGrantTokenException", "The grant token is not valid.")
	}
	return nil, errNotFound("Grant ID %.64s does not exist", in.GrantId)
}
