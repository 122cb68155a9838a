package kmstest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// policyLimit is KMS's limit for a key policy in bytes.
const policyLimit = 32768

// policy is a key policy. Members that are not listed are refused, so that
// nothing a policy says is silently ignored.
type policy struct {
	Version   string     `json:"Version"`
	ID        string     `json:"Id"`
	Statement statements `json:"Statement"`
}

type statement struct {
	Sid       string                      `json:"Sid"`
	Effect    string                      `json:"Effect"`
	Principal principals                  `json:"Principal"`
	Action    words                       `json:"Action"`
	NotAction words                       `json:"NotAction"`
	Resource  words                       `json:"Resource"`
	Condition map[string]map[string]words `json:"Condition"`
}

// words is a JSON string or a list of strings; a bool counts as its word.
type words []string

func (w *words) UnmarshalJSON(raw []byte) error {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		*w = words{one}
		return nil
	}
	var truth bool
	if json.Unmarshal(raw, &truth) == nil {
		*w = words{fmt.Sprint(truth)}
		return nil
	}
	return json.Unmarshal(raw, (*[]string)(w))
}

// statements is one statement or a list of them.
type statements []statement

func (s *statements) UnmarshalJSON(raw []byte) error {
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("{")) {
		raw = slices.Concat([]byte("["), raw, []byte("]"))
	}
	return strictJSON(raw, (*[]statement)(s))
}

// principals is "*" or a map of kinds; only AWS principals ever match, since
// nobody calls this server as an AWS service.
type principals struct{ AWS words }

func (p *principals) UnmarshalJSON(raw []byte) error {
	var star string
	if json.Unmarshal(raw, &star) == nil {
		if star != "*" {
			return fmt.Errorf("principal %q", star)
		}
		p.AWS = words{"*"}
		return nil
	}
	var kinds struct{ AWS, Service, Federated words }
	if err := strictJSON(raw, &kinds); err != nil {
		return err
	}
	p.AWS = kinds.AWS
	if len(kinds.AWS)+len(kinds.Service)+len(kinds.Federated) == 0 {
		return fmt.Errorf("no principal")
	}
	return nil
}

func strictJSON(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return fmt.Errorf("text after the document")
	}
	return nil
}

// parsePolicy reads and checks a policy document.
func parsePolicy(text string) (*policy, *apiError) {
	if len(text) > policyLimit {
		return nil, errLimit("The key policy is larger than %d bytes.", policyLimit)
	}
	p := new(policy)
	if err := strictJSON([]byte(text), p); err != nil {
		return nil, errMalformedPolicy("The policy cannot be read: %s", err)
	}
	if p.Version != "2012-10-17" && p.Version != "2008-10-17" {
		return nil, errMalformedPolicy("The policy must contain a valid version string.")
	}
	if len(p.Statement) == 0 {
		return nil, errMalformedPolicy("The policy has no statement.")
	}
	for i, s := range p.Statement {
		if why := s.fault(); why != "" {
			return nil, errMalformedPolicy("Statement %d (%s): %s", i+1, s.Sid, why)
		}
	}
	return p, nil
}

// principalPattern is an account id or an ARN of IAM or STS.
var principalPattern = regexp.MustCompile(`^(\*|\d{12}|arn:aws:(iam|sts)::\d{12}:(root|(user|role|assumed-role)/[\w+=,.@/-]+))$`)

// fault says what is wrong with a statement, or "".
func (s *statement) fault() string {
	switch {
	case s.Effect != "Allow" && s.Effect != "Deny":
		return "Effect must be Allow or Deny."
	case len(s.Action) == 0 && len(s.NotAction) == 0:
		return "A statement needs an Action."
	case len(s.Action) > 0 && len(s.NotAction) > 0:
		return "Action and NotAction exclude each other."
	case len(s.Resource) == 0:
		return "A statement needs a Resource; in a key policy \"*\" means this key."
	}
	for _, p := range s.Principal.AWS {
		if !principalPattern.MatchString(p) {
			return fmt.Sprintf("Policy contains a statement with one or more invalid principals: %.100s", p)
		}
	}
	for _, a := range slices.Concat(s.Action, s.NotAction) {
		if a != "*" && !strings.HasPrefix(strings.ToLower(a), "kms:") {
			return fmt.Sprintf("Action %.60q is not one of KMS.", a)
		}
	}
	for operator, keys := range s.Condition {
		if why := conditionFault(operator, keys); why != "" {
			return why
		}
	}
	return ""
}

// matches tells whether a statement speaks about this caller doing this.
func (s *statement) matches(who caller, action, resource string, facts facts) bool {
	if !slices.ContainsFunc(s.Principal.AWS, func(p string) bool { return who.named(p, s.Effect == "Deny") }) {
		return false
	}
	is := func(pattern string) bool { return wildcard(strings.ToLower(pattern), strings.ToLower("kms:"+action)) }
	if len(s.Action) > 0 && !slices.ContainsFunc(s.Action, is) || slices.ContainsFunc(s.NotAction, is) {
		return false
	}
	if !slices.ContainsFunc(s.Resource, func(r string) bool { return wildcard(r, resource) }) {
		return false
	}
	for operator, keys := range s.Condition {
		if !facts.satisfy(operator, keys) {
			return false
		}
	}
	return true
}

// named tells whether a Principal entry means this caller. An account (its id or
// its root) denies everybody in it, but only allows what IAM allows besides.
func (who caller) named(principal string, deny bool) bool {
	switch {
	case principal == "*", principal == who.arn, who.role != "" && principal == who.role:
		return true
	case principal == who.account, principal == "arn:aws:iam::"+who.account+":root":
		return deny || who.admin
	}
	return false
}

// wildcard matches a pattern of *, ? and literal bytes.
func wildcard(pattern, s string) bool {
	p, i, star, mark := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// verdict is the outcome of a key policy for one caller and action.
type verdict uint8

const (
	silent  verdict = iota // no statement speaks about it
	allowed                // an Allow statement matched
	denied                 // a Deny statement matched: nothing overrides it
)

func (p *policy) judge(who caller, action, resource string, facts facts) verdict {
	out := silent
	for i := range p.Statement {
		s := &p.Statement[i]
		if !s.matches(who, action, resource, facts) {
			continue
		}
		if s.Effect == "Deny" {
			return denied
		}
		out = allowed
	}
	return out
}

// authorize asks the key policy and then the grants.
func (c *call) authorize(k *key, action string, context map[string]string, tokens []string) *apiError {
	p, aerr := parsePolicy(k.Policy)
	if aerr != nil {
		return aerr
	}
	switch p.judge(c.who, action, k.ARN, c.facts(k, context)) {
	case allowed:
		return nil
	case denied:
		return errAccessDenied(c.who.arn, "kms:"+action, k.ARN, explicitDeny)
	}
	for _, g := range k.Grants {
		if g.allows(c.who, action, context) {
			return nil
		}
	}
	return errAccessDenied(c.who.arn, "kms:"+action, k.ARN, noResourcePolicy)
}

// checkPolicy parses a new policy and, unless told not to, makes sure that the
// caller can still change it afterwards.
func (c *call) checkPolicy(text string, bypassLockout bool) *apiError {
	p, aerr := parsePolicy(text)
	if aerr != nil {
		return aerr
	}
	if bypassLockout || p.judge(c.who, "PutKeyPolicy", "*", facts{}) == allowed || p.judge(c.who, "PutKeyPolicy", c.event.Key, facts{}) == allowed {
		return nil
	}
	return errMalformedPolicy("The new key policy will not allow you to update the key policy in the future.")
}

// defaultPolicy is what KMS gives a key that was created without one.
func defaultPolicy(account string) string {
	return `{
  "Version": "2012-10-17",
  "Id": "key-default-1",
  "Statement": [
    {
      "Sid": "Enable IAM User Permissions",
      "Effect": "Allow",
      "Principal": {
        "AWS": "arn:aws:iam::` + account + `:root"
      },
      "Action": "kms:*",
      "Resource": "*"
    }
  ]
}`
}
