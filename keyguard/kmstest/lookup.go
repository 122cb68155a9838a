package kmstest

import (
	"regexp"
	"strings"
)

// addressing says whether an operation takes aliases. KMS's management
// operations do not.
type addressing bool

const (
	aliasAllowed addressing = true
	keyOnly      addressing = false
)

func keyARN(region, account, id string) string {
	return "arn:aws:kms:" + region + ":" + account + ":key/" + id
}

func aliasARN(region, account, name string) string {
	return "arn:aws:kms:" + region + ":" + account + ":" + name
}

// keyIDPattern is a UUID or a multi-Region key id.
var keyIDPattern = regexp.MustCompile(`^([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|mrk-[0-9a-f]{32})$`)

// resolve finds the key that a KeyId parameter names in a region.
func (s *Server) resolve(st *state, region, ref string, how addressing) (*key, *apiError) {
	if ref == "" {
		return nil, errMissing("keyId")
	}
	if len(ref) > 2048 {
		return nil, errConstraint(ref[:64]+"…", "keyId", "Member must have length less than or equal to 2048")
	}
	account, name := s.account, ref
	if strings.HasPrefix(ref, "arn:") {
		parts := strings.SplitN(ref, ":", 6)
		if len(parts) != 6 || parts[1] != "aws" || parts[2] != "kms" || len(parts[4]) != 12 {
			return nil, errInvalidArn("%s is not a valid KMS ARN", ref)
		}
		if parts[3] != region {
			return nil, errNotFound("Invalid arn %s", parts[3])
		}
		account = parts[4]
		if strings.HasPrefix(parts[5], "alias/") {
			name = parts[5]
		} else if id, ok := strings.CutPrefix(parts[5], "key/"); ok {
			name = id
		} else {
			return nil, errInvalidArn("%s is not a valid KMS ARN", ref)
		}
	}
	if strings.HasPrefix(name, "alias/") {
		return resolveAlias(st, aliasARN(region, account, name), ref, how)
	}
	if !keyIDPattern.MatchString(name) {
		return nil, errNotFound("Invalid keyId '%s'", ref)
	}
	arn := keyARN(region, account, name)
	if k, ok := st.Keys[arn]; ok {
		return k, nil
	}
	return nil, errKeyNotFound(arn)
}

func resolveAlias(st *state, arn, ref string, how addressing) (*key, *apiError) {
	if how == keyOnly {
		return nil, errNotFound("Invalid keyId '%s'", ref)
	}
	a, ok := st.Aliases[arn]
	if !ok {
		return nil, errAliasNotFound(arn)
	}
	return st.Keys[a.KeyARN], nil
}

// key resolves ref and requires permission for action on the key. The
// encryption context takes part in policy conditions and grant constraints.
func (c *call) key(ref string, how addressing, action string, context map[string]string, tokens ...string) (*key, *apiError) {
	k, aerr := c.s.resolve(c.st, c.region, ref, how)
	if aerr != nil {
		return nil, aerr
	}
	c.event.Key = k.ARN
	return k, c.authorize(k, action, context, tokens)
}

// account requires permission for an action that is about no existing key.
func (c *call) account(action string) *apiError {
	if c.who.admin {
		return nil
	}
	return errAccessDenied(c.who.arn, "kms:"+action, "*", noIdentityPolicy)
}

// usable is the state check of every cryptographic operation. A key of which the
// primary Region is changing works on.
func usable(k *key) *apiError {
	switch k.State {
	case stateEnabled, stateUpdating:
		return nil
	case stateDisabled:
		return errDisabled(k.ARN)
	}
	return badState(k)
}

// badState words why a key in this state cannot do what was asked.
func badState(k *key) *apiError {
	switch k.State {
	case statePendingDeletion:
		return errInvalidState(k.ARN, "is pending deletion")
	case statePendingReplicaDeletion:
		return errInvalidState(k.ARN, "is pending replica deletion")
	case statePendingImport:
		return errInvalidState(k.ARN, "is pending import")
	case stateUnavailable:
		return errInvalidState(k.ARN, "is unavailable")
	case stateCreating:
		return errInvalidState(k.ARN, "is creating")
	case stateUpdating:
		return errInvalidState(k.ARN, "is updating")
	}
	return errInvalidState(k.ARN, "is "+strings.ToLower(k.State))
}
