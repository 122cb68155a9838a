package kmstest

import (
	"regexp"
	"strings"
)

var (
	aliasPattern  = regexp.MustCompile(`^alias/[a-zA-Z0-9/_-]{1,250}$`)
	regionPattern = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]$`)
)

type aliasInput struct{ AliasName, TargetKeyId string }

func checkAliasName(name string) *apiError {
	if !aliasPattern.MatchString(name) {
		return errConstraint(limitString(name, 256), "aliasName", "Member must satisfy regular expression pattern: ^alias/[a-zA-Z0-9/_-]+$")
	}
	if strings.HasPrefix(name, "alias/aws/") {
		return clientError("InvalidAliasNameException", "Alias names cannot begin with alias/aws/")
	}
	return nil
}

// target is the key an alias shall point to; the caller needs the permission
// on the key, and on the alias through its own IAM policy.
func (c *call) target(in *aliasInput, action string) (*key, *apiError) {
	if aerr := checkAliasName(in.AliasName); aerr != nil {
		return nil, aerr
	}
	if strings.HasPrefix(in.TargetKeyId, "alias/") {
		return nil, errInvalidArn("Aliases must refer to keys. Not aliases")
	}
	k, aerr := c.key(in.TargetKeyId, keyOnly, action, nil)
	if aerr != nil {
		return nil, aerr
	}
	if aerr := c.aliasPermission(in.AliasName, action); aerr != nil {
		return nil, aerr
	}
	if k.State == statePendingDeletion || k.State == statePendingReplicaDeletion || k.State == stateCreating {
		return nil, badState(k)
	}
	return k, nil
}

func (c *call) aliasPermission(name, action string) *apiError {
	if c.who.admin {
		return nil
	}
	return errAccessDenied(c.who.arn, "kms:"+action, aliasARN(c.region, c.s.account, name), noIdentityPolicy)
}

func createAlias(c *call, in *aliasInput) (*nothing, *apiError) {
	k, aerr := c.target(in, "CreateAlias")
	if aerr != nil {
		return nil, aerr
	}
	arn := aliasARN(c.region, c.s.account, in.AliasName)
	if _, ok := c.st.Aliases[arn]; ok {
		return nil, clientError("AlreadyExistsException", "An alias with the name %s already exists", arn)
	}
	c.st.Aliases[arn] = &keyAlias{Name: in.AliasName, Region: c.region, KeyARN: k.ARN, Created: c.now, Updated: c.now}
	return nil, nil
}

func updateAlias(c *call, in *aliasInput) (*nothing, *apiError) {
	k, aerr := c.target(in, "UpdateAlias")
	if aerr != nil {
		return nil, aerr
	}
	arn := aliasARN(c.region, c.s.account, in.AliasName)
	a, ok := c.st.Aliases[arn]
	if !ok {
		return nil, errAliasNotFound(arn)
	}
	old := c.st.Keys[a.KeyARN]
	if aerr := c.authorize(old, "UpdateAlias", nil, nil); aerr != nil {
		return nil, aerr
	}
	if old.Spec != k.Spec || old.Usage != k.Usage {
		return nil, errValidation("The current and the new key of %s must have the same type and key usage.", arn)
	}
	a.KeyARN, a.Updated = k.ARN, c.now
	return nil, nil
}

func deleteAlias(c *call, in *aliasInput) (*nothing, *apiError) {
	if aerr := checkAliasName(in.AliasName); aerr != nil {
		return nil, aerr
	}
	arn := aliasARN(c.region, c.s.account, in.AliasName)
	a, ok := c.st.Aliases[arn]
	if !ok {
		return nil, errAliasNotFound(arn)
	}
	c.event.Key = a.KeyARN
	if aerr := c.authorize(c.st.Keys[a.KeyARN], "DeleteAlias", nil, nil); aerr != nil {
		return nil, aerr
	}
	if aerr := c.aliasPermission(in.AliasName, "DeleteAlias"); aerr != nil {
		return nil, aerr
	}
	delete(c.st.Aliases, arn)
	return nil, nil
}

type listedAlias struct {
	AliasName, AliasArn, TargetKeyId string
	CreationDate, LastUpdatedDate    *epoch
}

type listAliasesOutput struct {
	Aliases    []listedAlias
	NextMarker string `json:",omitempty"`
	Truncated  bool
}

func listAliases(c *call, in *listInput) (*listAliasesOutput, *apiError) {
	if aerr := c.account("ListAliases"); aerr != nil {
		return nil, aerr
	}
	aliases := c.st.sortedAliases(c.region)
	if in.KeyId != "" {
		k, aerr := c.s.resolve(c.st, c.region, in.KeyId, keyOnly)
		if aerr != nil {
			return nil, aerr
		}
		c.event.Key = k.ARN
		aliases = filter(aliases, func(a *keyAlias) bool { return a.KeyARN == k.ARN })
	}
	aliases, next, aerr := page(aliases, func(a *keyAlias) string { return a.Name }, in.Limit, in.Marker, 100)
	if aerr != nil {
		return nil, aerr
	}
	out := &listAliasesOutput{Aliases: []listedAlias{}, NextMarker: next, Truncated: next != ""}
	for _, a := range aliases {
		out.Aliases = append(out.Aliases, listedAlias{
			AliasName: a.Name, AliasArn: aliasARN(a.Region, c.s.account, a.Name), TargetKeyId: c.st.Keys[a.KeyARN].ID,
			CreationDate: epochPtr(a.Created), LastUpdatedDate: epochPtr(a.Updated),
		})
	}
	return out, nil
}

func filter[T any](items []T, keep func(T) bool) []T {
	var out []T
	for _, item := range items {
		if keep(item) {
			out = append(out, item)
		}
	}
	return out
}
