package kmstest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// facts are the condition keys of one call and their values, names in lower
// case. A key that is absent has no entry.
type facts map[string][]string

const contextPrefix = "kms:encryptioncontext:"

func (c *call) facts(k *key, context map[string]string) facts {
	f := facts{
		"kms:calleraccount":         {c.who.account},
		"kms:keyspec":               {k.Spec},
		"kms:keyusage":              {k.Usage},
		"kms:keyorigin":             {k.Origin},
		"kms:multiregion":           {fmt.Sprint(k.MultiRegion)},
		"kms:grantisforawsresource": {"false"},
		"aws:principalaccount":      {c.who.account},
		"aws:principalarn":          {c.who.arn},
		"aws:principaltype":         {"User"},
		"aws:requestedregion":       {c.region},
		"aws:securetransport":       {"false"},
		"aws:viaawsservice":         {"false"},
	}
	if c.who.role != "" {
		f["aws:principalarn"] = []string{c.who.role} // AWS shows the role, not the session
		f["aws:principaltype"] = []string{"AssumedRole"}
	}
	for name, value := range context {
		f[contextPrefix+strings.ToLower(name)] = []string{value}
	}
	if len(context) > 0 {
		f["kms:encryptioncontextkeys"] = slices.Sorted(maps.Keys(context))
	}
	return f
}

// knownCondition tells whether facts would know the key. kms:ViaService and
// aws:SourceArn are known and always absent: nobody calls through a service.
func knownCondition(name string) bool {
	name = strings.ToLower(name)
	if rest, ok := strings.CutPrefix(name, contextPrefix); ok {
		return rest != ""
	}
	switch name {
	case "kms:viaservice", "kms:encryptioncontextkeys", "aws:sourcearn", "aws:sourceaccount":
		return true
	}
	_, ok := (&call{}).facts(new(key), nil)[name]
	return ok
}

// operator takes a condition operator apart.
type operator struct {
	set      string // "", ForAnyValue or ForAllValues
	name     string
	ifExists bool
}

func parseOperator(s string) operator {
	var o operator
	if set, name, ok := strings.Cut(s, ":"); ok {
		o.set, s = set, name
	}
	o.name, o.ifExists = strings.CutSuffix(s, "IfExists")
	return o
}

// conditionFault says what is not supported in one entry of a Condition, or "".
func conditionFault(text string, keys map[string]words) string {
	o := parseOperator(text)
	if o.set != "" && o.set != "ForAnyValue" && o.set != "ForAllValues" {
		return fmt.Sprintf("Condition operator %.60q is not supported by this server.", text)
	}
	switch o.name {
	case "StringEquals", "StringNotEquals", "StringEqualsIgnoreCase", "StringNotEqualsIgnoreCase",
		"StringLike", "StringNotLike", "ArnEquals", "ArnLike", "ArnNotEquals", "ArnNotLike", "Bool", "Null":
	default:
		return fmt.Sprintf("Condition operator %.60q is not supported by this server.", text)
	}
	for key := range keys {
		if !knownCondition(key) {
			return fmt.Sprintf("Condition key %.60q is not supported by this server.", key)
		}
	}
	return ""
}

// satisfy tells whether every key of one operator's block holds.
func (f facts) satisfy(text string, keys map[string]words) bool {
	o := parseOperator(text)
	for key, wanted := range keys {
		values, present := f[strings.ToLower(key)]
		if o.name == "Null" {
			if len(wanted) != 1 || (wanted[0] == "true") == present {
				return false
			}
			continue
		}
		if !present {
			if o.ifExists || o.set == "ForAllValues" || strings.Contains(o.name, "Not") {
				continue
			}
			return false
		}
		holds := func(v string) bool { return o.holds(v, wanted) }
		if o.set == "ForAllValues" {
			if slices.ContainsFunc(values, func(v string) bool { return !holds(v) }) {
				return false
			}
		} else if !slices.ContainsFunc(values, holds) {
			return false
		}
	}
	return true
}

// holds compares one value with the list of a condition.
func (o operator) holds(value string, wanted []string) bool {
	name := strings.Replace(o.name, "Not", "", 1)
	hit := slices.ContainsFunc(wanted, func(w string) bool {
		switch name {
		case "StringEqualsIgnoreCase", "Bool":
			return strings.EqualFold(w, value)
		case "StringLike", "ArnLike", "ArnEquals":
			return wildcard(w, value)
		}
		return w == value
	})
	return hit != strings.Contains(o.name, "Not")
}
