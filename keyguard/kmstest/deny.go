package kmstest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/byokd/byokd/internal/keypolicy"
)

// denySid begins the Sid of statements that Deny adds, so that Allow finds them
// again and a reader of the policy knows where they come from.
const denySid = "DevcloudDeny"

// allowSid begins the Sid of statements that Allow adds.
const allowSid = "DevcloudAllow"

// Deny adds a statement to the key's policy that explicitly denies an action
// ("kms:Decrypt", "Decrypt", "*") to a principal ("" means the tenant role, "*"
// everybody). It is a change of the real policy: GetKeyPolicy shows it and
// PutKeyPolicy can repair it.
func (s *Server) Deny(ref, action, principal string) error {
	action, principal = fullAction(action), fullPrincipal(principal)
	return s.control("Deny "+action, ref, func(_ *state, k *key) error {
		doc, err := readDocument(k.Policy)
		if err != nil {
			return err
		}
		doc.drop(denySid, action, principal)
		doc.add("Deny", denySid, action, principal)
		return doc.store(k)
	})
}

// Allow takes back what Deny did for an action and a principal ("*" as the
// action means every denial for it). If the policy still does not allow the
// action it adds a statement that does, unless the action is "*".
func (s *Server) Allow(ref, action, principal string) error {
	action, principal = fullAction(action), fullPrincipal(principal)
	return s.control("Allow "+action, ref, func(_ *state, k *key) error {
		doc, err := readDocument(k.Policy)
		if err != nil {
			return err
		}
		doc.drop(denySid, action, principal)
		if len(doc.Statement) == 0 {
			doc.add("Allow", allowSid, "kms:*", "arn:aws:iam::"+s.account+":root")
		}
		if err := doc.store(k); err != nil {
			return err
		}
		if action == "kms:*" || principal == "*" {
			return nil
		}
		p, aerr := parsePolicy(k.Policy)
		if aerr != nil {
			return aerr
		}
		who := Credential{Principal: principal}.caller()
		if p.judge(who, strings.TrimPrefix(action, "kms:"), k.ARN, facts{}) == silent {
			doc.add("Allow", allowSid, action, principal)
		}
		return doc.store(k)
	})
}

func fullAction(action string) string {
	if action == "" {
		action = "*"
	}
	if !strings.HasPrefix(action, "kms:") {
		action = "kms:" + action
	}
	return action
}

func fullPrincipal(principal string) string {
	if principal == "" {
		return TenantRole
	}
	return principal
}

// document is a policy whose statements are kept as they were written.
type document struct {
	Version   string            `json:"Version"`
	ID        string            `json:"Id,omitempty"`
	Statement []json.RawMessage `json:"Statement"`
}

func readDocument(text string) (*document, error) {
	var raw struct {
		Version   string
		ID        string `json:"Id"`
		Statement json.RawMessage
	}
	if err := json.Unmarshal([]byte(text), &raw); err != nil {
		return nil, fmt.Errorf("key policy: %w", err)
	}
	doc := &document{Version: raw.Version, ID: raw.ID}
	if bytes.HasPrefix(bytes.TrimSpace(raw.Statement), []byte("{")) {
		doc.Statement = []json.RawMessage{raw.Statement}
		return doc, nil
	}
	if err := json.Unmarshal(raw.Statement, &doc.Statement); err != nil {
		return nil, fmt.Errorf("key policy: %w", err)
	}
	return doc, nil
}

// store writes the document into a key's policy after checking it.
func (d *document) store(k *key) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(d); err != nil {
		return err
	}
	if _, aerr := parsePolicy(text.String()); aerr != nil {
		return aerr
	}
	k.Policy = strings.TrimSpace(text.String())
	return nil
}

// controlStatement is what this file adds to a policy.
type controlStatement struct {
	Sid       string
	Effect    string
	Principal map[string]string
	Action    string
	Resource  string
}

func (d *document) add(effect, sid, action, principal string) {
	letters := func(s string) string {
		return strings.Map(func(r rune) rune {
			if r == '*' {
				return 'X'
			}
			if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
				return r
			}
			return -1
		}, s)
	}
	st := controlStatement{Sid: sid + letters(strings.TrimPrefix(action, "kms:")) + letters(principal[strings.LastIndexByte(principal, '/')+1:]),
		Effect: effect, Principal: map[string]string{"AWS": principal}, Action: action, Resource: "*"}
	raw, _ := json.Marshal(st) // strings only
	d.Statement = append(d.Statement, raw)
}

// drop removes added statements for a principal and an action; kms:* drops all of the principal.
func (d *document) drop(sid, action, principal string) {
	d.Statement = slices.DeleteFunc(d.Statement, func(raw json.RawMessage) bool {
		st, ok := readControl(raw, sid)
		return ok && (action == "kms:*" || st.Action == action) && (principal == "*" || st.Principal["AWS"] == principal)
	})
}

func readControl(raw json.RawMessage, sid string) (controlStatement, bool) {
	var st controlStatement
	if json.Unmarshal(raw, &st) != nil || !strings.HasPrefix(st.Sid, sid) {
		return st, false
	}
	return st, true
}

// deniedByControl lists what Deny forbids in a policy.
func deniedByControl(policy string) []string {
	out := []string{}
	doc, err := readDocument(policy)
	if err != nil {
		return out
	}
	for _, raw := range doc.Statement {
		if st, ok := readControl(raw, denySid); ok {
			out = append(out, st.Action+" for "+st.Principal["AWS"])
		}
	}
	return out
}

// DocumentedPolicy is the key policy that the customer's documentation gives,
// for an account and a tenant role ARN.
func DocumentedPolicy(account, role string) string {
	text, err := keypolicy.Text(keypolicy.Full, account, role)
	if err != nil {
		panic(err) // a fault of the caller
	}
	return text
}
