package kmstest

import (
	"encoding/json"

	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// policyOf builds a document from statements.
func policyOf(statements ...string) string {
	return `{"Version":"2012-10-17","Statement":[` + strings.Join(statements, ",") + `]}`
}

const (
	rootStatement = `{"Sid":"root","Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:root"},"Action":"kms:*","Resource":"*"}`
	roleARN       = `"AWS":"arn:aws:iam::111122223333:role/byokd-tenant"`
)

// roleMay is an Allow statement for the tenant role with more members.
func roleMay(action, more string) string {
	return `{"Effect":"Allow","Principal":{` + roleARN + `},"Action":"` + action + `","Resource":"*"` + more + `}`
}

func TestPolicyVerdicts(t *testing.T) {
	tenantRole, administrator := Credential{Principal: TenantRole}.caller(), Credential{Principal: AdminUser, Admin: true}.caller()
	plainUser := Credential{Principal: "arn:aws:iam::111122223333:user/ops/ann"}.caller()
	stranger := Credential{Principal: "arn:aws:iam::999988887777:role/byokd-tenant"}.caller()
	arn := keyARN(DefaultRegion, DefaultAccount, "k")
	deny := `{"Effect":"Deny","Principal":"*","Action":"kms:Decrypt","Resource":"*"}`
	denyAccount := `{"Effect":"Deny","Principal":{"AWS":"111122223333"},"Action":"kms:Decrypt","Resource":"*"}`
	for _, row := range []struct {
		name   string
		policy string
		who    caller
		action string
		facts  facts
		want   verdict
	}{
		{"root delegates to IAM: administrator", policyOf(rootStatement), administrator, "Decrypt", nil, allowed},
		{"root delegates to IAM: role without IAM policy", policyOf(rootStatement), tenantRole, "Decrypt", nil, silent},
		{"role by ARN", policyOf(roleMay("kms:Decrypt", "")), tenantRole, "Decrypt", nil, allowed},
		{"same role name in another account", policyOf(roleMay("kms:Decrypt", "")), stranger, "Decrypt", nil, silent},
		{"other action", policyOf(roleMay("kms:Decrypt", "")), tenantRole, "Encrypt", nil, silent},
		{"action case", policyOf(roleMay("KMS:decrypt", "")), tenantRole, "Decrypt", nil, allowed},
		{"wildcard", policyOf(roleMay("kms:GenerateDataKey*", "")), tenantRole, "GenerateDataKeyWithoutPlaintext", nil, allowed},
		{"wildcard in the middle", policyOf(roleMay("kms:Re*To", "")), tenantRole, "ReEncryptTo", nil, allowed},
		{"question mark", policyOf(roleMay("kms:?ecrypt", "")), tenantRole, "Decrypt", nil, allowed},
		{"star", policyOf(roleMay("*", "")), tenantRole, "Decrypt", nil, allowed},
		{"session ARN", policyOf(`{"Effect":"Allow","Principal":{"AWS":"arn:aws:sts::111122223333:assumed-role/byokd-tenant/byokd"},"Action":"kms:*","Resource":"*"}`), tenantRole, "Decrypt", nil, allowed},
		{"user with a path", policyOf(`{"Effect":"Allow","Principal":{"AWS":["arn:aws:iam::111122223333:user/ops/ann"]},"Action":["kms:Decrypt"],"Resource":["*"]}`), plainUser, "Decrypt", nil, allowed},
		{"everybody", policyOf(`{"Effect":"Allow","Principal":"*","Action":"kms:Decrypt","Resource":"*"}`), stranger, "Decrypt", nil, allowed},
		{"account allows only with IAM", policyOf(`{"Effect":"Allow","Principal":{"AWS":"111122223333"},"Action":"kms:Decrypt","Resource":"*"}`), plainUser, "Decrypt", nil, silent},
		{"deny wins, listed first", policyOf(deny, roleMay("kms:*", "")), tenantRole, "Decrypt", nil, denied},
		{"deny wins, listed last", policyOf(roleMay("kms:*", ""), deny), tenantRole, "Decrypt", nil, denied},
		{"deny of the account means everybody in it", policyOf(roleMay("kms:*", ""), denyAccount), tenantRole, "Decrypt", nil, denied},
		{"deny leaves other actions", policyOf(roleMay("kms:*", ""), deny), tenantRole, "Encrypt", nil, allowed},
		{"NotAction", policyOf(`{"Effect":"Allow","Principal":{` + roleARN + `},"NotAction":"kms:Decrypt","Resource":"*"}`), tenantRole, "Encrypt", nil, allowed},
		{"NotAction hits", policyOf(`{"Effect":"Allow","Principal":{` + roleARN + `},"NotAction":"kms:Decrypt","Resource":"*"}`), tenantRole, "Decrypt", nil, silent},
		{"resource is this key", policyOf(strings.Replace(roleMay("kms:*", ""), `"*"`, `"`+arn+`"`, 1)), tenantRole, "Decrypt", nil, allowed},
		{"resource is another key", policyOf(strings.Replace(roleMay("kms:*", ""), `"*"`, `"`+arn+`2"`, 1)), tenantRole, "Decrypt", nil, silent},
		{"one statement, not a list", `{"Version":"2012-10-17","Statement":` + roleMay("kms:Decrypt", "") + `}`, tenantRole, "Decrypt", nil, allowed},
		{"context equals", policyOf(roleMay("kms:*", `,"Condition":{"StringEquals":{"kms:EncryptionContext:byokd:cluster":"acme"}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontext:byokd:cluster": {"acme"}}, allowed},
		{"context differs", policyOf(roleMay("kms:*", `,"Condition":{"StringEquals":{"kms:EncryptionContext:byokd:cluster":"acme"}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontext:byokd:cluster": {"other"}}, silent},
		{"context absent", policyOf(roleMay("kms:*", `,"Condition":{"StringEquals":{"kms:EncryptionContext:byokd:cluster":"acme"}}`)), tenantRole, "Decrypt", nil, silent},
		{"context absent, IfExists", policyOf(roleMay("kms:*", `,"Condition":{"StringEqualsIfExists":{"kms:EncryptionContext:byokd:cluster":"acme"}}`)), tenantRole, "Decrypt", nil, allowed},
		{"one of several values", policyOf(roleMay("kms:*", `,"Condition":{"StringLike":{"kms:EncryptionContext:c":["x","ac*"]}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontext:c": {"acme"}}, allowed},
		{"not equals absent", policyOf(roleMay("kms:*", `,"Condition":{"StringNotEquals":{"kms:EncryptionContext:c":"x"}}`)), tenantRole, "Decrypt", nil, allowed},
		{"not equals hits", policyOf(roleMay("kms:*", `,"Condition":{"StringNotEquals":{"kms:EncryptionContext:c":"x"}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontext:c": {"x"}}, silent},
		{"all keys allowed", policyOf(roleMay("kms:*", `,"Condition":{"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["a","b"]}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontextkeys": {"a", "b"}}, allowed},
		{"a key too many", policyOf(roleMay("kms:*", `,"Condition":{"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["a"]}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontextkeys": {"a", "b"}}, silent},
		{"any key", policyOf(roleMay("kms:*", `,"Condition":{"ForAnyValue:StringEquals":{"kms:EncryptionContextKeys":["a"]}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontextkeys": {"a", "b"}}, allowed},
		{"null", policyOf(roleMay("kms:*", `,"Condition":{"Null":{"kms:EncryptionContext:c":"true"}}`)), tenantRole, "Decrypt", nil, allowed},
		{"null hits", policyOf(roleMay("kms:*", `,"Condition":{"Null":{"kms:EncryptionContext:c":true}}`)), tenantRole, "Decrypt", facts{"kms:encryptioncontext:c": {"x"}}, silent},
		{"bool", policyOf(roleMay("kms:*", `,"Condition":{"Bool":{"kms:GrantIsForAWSResource":"true"}}`)), tenantRole, "CreateGrant", facts{"kms:grantisforawsresource": {"false"}}, silent},
		{"via service never", policyOf(roleMay("kms:*", `,"Condition":{"StringEquals":{"kms:ViaService":"s3.eu-central-1.amazonaws.com"}}`)), tenantRole, "Decrypt", nil, silent},
	} {
		p, aerr := parsePolicy(row.policy)
		if aerr != nil {
			t.Errorf("%s: %v", row.name, aerr)
			continue
		}
		if got := p.judge(row.who, row.action, arn, row.facts); got != row.want {
			t.Errorf("%s: verdict %d, want %d", row.name, got, row.want)
		}
	}
}

func TestMalformedPoliciesAreRefused(t *testing.T) {
	w := newWorld(t, Options{})
	before := must(w.Policy(w.arn))(t)
	good := roleMay("kms:Decrypt", "")
	for name, text := range map[string]string{
		"no JSON":              "x",
		"empty":                "",
		"two documents":        policyOf(rootStatement) + policyOf(rootStatement),
		"no version":           `{"Statement":[` + rootStatement + `]}`,
		"unknown version":      `{"Version":"2020-01-01","Statement":[` + rootStatement + `]}`,
		"no statement":         policyOf(),
		"unknown member":       policyOf(rootStatement, `{"Effekt":"Deny","Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}`),
		"effect":               policyOf(rootStatement, strings.Replace(good, "Allow", "Permit", 1)),
		"no action":            policyOf(rootStatement, `{"Effect":"Allow","Principal":"*","Resource":"*"}`),
		"no resource":          policyOf(rootStatement, `{"Effect":"Allow","Principal":"*","Action":"kms:*"}`),
		"other service":        policyOf(rootStatement, roleMay("s3:GetObject", "")),
		"principal":            policyOf(rootStatement, `{"Effect":"Allow","Principal":{"AWS":"byokd-tenant"},"Action":"kms:*","Resource":"*"}`),
		"NotPrincipal":         policyOf(rootStatement, `{"Effect":"Deny","NotPrincipal":{"AWS":"*"},"Action":"kms:*","Resource":"*"}`),
		"unsupported operator": policyOf(rootStatement, roleMay("kms:*", `,"Condition":{"DateLessThan":{"aws:CurrentTime":"2030-01-01"}}`)),
		"unsupported key":      policyOf(rootStatement, roleMay("kms:*", `,"Condition":{"StringEquals":{"aws:PrincipalOrgID":"o-1"}}`)),
		"lockout":              policyOf(good),
	} {
		_, err := w.admin.PutKeyPolicy(w.ctx, &kms.PutKeyPolicyInput{KeyId: &w.arn, Policy: aws.String(text)})
		if got := code(t, err); got != "MalformedPolicyDocumentException" {
			t.Errorf("%s: %v", name, err)
		}
	}
	big := policyOf(rootStatement, roleMay("kms:"+strings.Repeat("x", policyLimit), ""))
	if _, err := w.admin.PutKeyPolicy(w.ctx, &kms.PutKeyPolicyInput{KeyId: &w.arn, Policy: &big}); code(t, err) != "LimitExceededException" {
		t.Errorf("oversize: %v", err)
	}
	if after := must(w.Policy(w.arn))(t); after != before {
		t.Error("a refused policy was stored")
	}
}

func TestPolicyLockoutCanBeBypassed(t *testing.T) {
	w := newWorld(t, Options{})
	closed := policyOf(roleMay("kms:Decrypt", ""))
	must(w.admin.PutKeyPolicy(w.ctx, &kms.PutKeyPolicyInput{KeyId: &w.arn, Policy: &closed, BypassPolicyLockoutSafetyCheck: true}))(t)
	if _, err := w.admin.GetKeyPolicy(w.ctx, &kms.GetKeyPolicyInput{KeyId: &w.arn}); code(t, err) != "AccessDeniedException" {
		t.Errorf("the administrator is locked out on AWS too: %v", err)
	}
}

func TestPutKeyPolicyTakesAccessAwayAndGivesItBack(t *testing.T) {
	w := newWorld(t, Options{})
	blob := w.wrap(w.arn, map[string]string{"byokd:cluster": "acme"})
	open := func() string {
		_, err := w.unwrap(w.arn, blob, map[string]string{"byokd:cluster": "acme"})
		return code(t, err)
	}
	put := func(text string) {
		t.Helper()
		must(w.admin.PutKeyPolicy(w.ctx, &kms.PutKeyPolicyInput{KeyId: &w.arn, Policy: &text}))(t)
		if got := *must(w.admin.GetKeyPolicy(w.ctx, &kms.GetKeyPolicyInput{KeyId: &w.arn}))(t).Policy; got != text {
			t.Errorf("stored %s", got)
		}
	}
	documented := DocumentedPolicy(DefaultAccount, TenantRole)
	for _, row := range []struct{ policy, want string }{
		{policyOf(rootStatement), "AccessDeniedException"},
		{documented, ""},
		{policyOf(rootStatement, roleMay("kms:Decrypt", `,"Condition":{"StringEquals":{"kms:EncryptionContext:byokd:cluster":"acme"}}`)), ""},
		{policyOf(rootStatement, roleMay("kms:Decrypt", `,"Condition":{"StringEquals":{"kms:EncryptionContext:byokd:cluster":"other"}}`)), "AccessDeniedException"},
		{documented, ""},
	} {
		put(row.policy)
		if got := open(); got != row.want {
			t.Errorf("under %s: %q, want %q", row.policy, got, row.want)
		}
	}
	if names := must(w.admin.ListKeyPolicies(w.ctx, &kms.ListKeyPoliciesInput{KeyId: &w.arn}))(t).PolicyNames; len(names) != 1 || names[0] != "default" {
		t.Error(names)
	}
}

// TestDocumentedPolicyAllowsWhatItSays tries every action as the tenant.
func TestDocumentedPolicyAllowsWhatItSays(t *testing.T) {
	p, aerr := parsePolicy(DocumentedPolicy(DefaultAccount, TenantRole))
	if aerr != nil {
		t.Fatal(aerr)
	}
	may := map[string]bool{"Encrypt": true, "Decrypt": true, "ReEncryptFrom": true, "ReEncryptTo": true, "DescribeKey": true, "GenerateDataKey": true,
		"GenerateDataKeyWithoutPlaintext": true, "CreateGrant": true, "ListGrants": true, "RevokeGrant": true}
	who, boss := Credential{Principal: TenantRole}.caller(), Credential{Principal: AdminUser, Admin: true}.caller()
	for action := range operations() {
		if got := p.judge(who, action, "*", nil) == allowed; action != "ReEncrypt" && got != may[action] {
			t.Errorf("tenant %s: %v", action, got)
		}
		if p.judge(boss, action, "*", nil) != allowed {
			t.Errorf("administrator must be allowed %s", action)
		}
	}
}

func TestDenyAndAllowChangeTheRealPolicy(t *testing.T) {
	w := newWorld(t, Options{})
	blob := w.wrap(w.arn, nil)
	open := func() error { _, err := w.unwrap(w.arn, blob, nil); return err }
	check := func(step string, err error, want string) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", step, err)
		}
		if got := code(t, open()); got != want {
			t.Errorf("%s: %q, want %q", step, got, want)
		}
	}
	before := must(w.Policy(w.arn))(t)
	check("deny", w.Deny("alias/byokd", "Decrypt", ""), "AccessDeniedException")
	if err := open(); !strings.Contains(err.Error(), "with an explicit deny in a resource-based policy") {
		t.Error(err)
	}
	must(w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn}))(t)
	policy := *must(w.admin.GetKeyPolicy(w.ctx, &kms.GetKeyPolicyInput{KeyId: &w.arn}))(t).Policy
	if !strings.Contains(policy, `"DevcloudDenyDecryptbyokdtenant"`) || !strings.Contains(policy, "Allow Camunda tenant IAM Role basic key access") {
		t.Error(policy)
	}
	if info := must(w.Keys())(t)[0]; len(info.Denied) != 1 || info.Denied[0] != "kms:Decrypt for "+TenantRole {
		t.Errorf("%+v", info)
	}
	check("deny twice", w.Deny(w.arn, "kms:Decrypt", TenantRole), "AccessDeniedException")
	check("allow", w.Allow(w.arn, "Decrypt", ""), "")
	if after := must(w.Policy(w.arn))(t); !sameJSON(t, before, after) {
		t.Errorf("not the policy from before: %s", after)
	}
	check("deny everything", w.Deny(w.arn, "*", ""), "AccessDeniedException")
	check("allow everything", w.Allow(w.arn, "*", ""), "")
	check("deny everybody", w.Deny(w.arn, "Decrypt", "*"), "AccessDeniedException")
	if _, err := w.admin.Decrypt(w.ctx, &kms.DecryptInput{CiphertextBlob: blob}); code(t, err) != "AccessDeniedException" {
		t.Errorf("everybody is the administrator too: %v", err)
	}
	check("allow everybody", w.Allow(w.arn, "*", "*"), "")
	check("repair with PutKeyPolicy", w.Deny(w.arn, "Decrypt", ""), "AccessDeniedException")
	must(w.admin.PutKeyPolicy(w.ctx, &kms.PutKeyPolicyInput{KeyId: &w.arn, Policy: &before}))(t)
	check("repaired", nil, "")
	check("no permission at all", w.PutPolicy(w.arn, policyOf(rootStatement)), "AccessDeniedException")
	check("allow adds what is missing", w.Allow(w.arn, "Decrypt", ""), "")
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if err := json.Unmarshal([]byte(a), &x); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(b), &y); err != nil {
		t.Fatal(err)
	}
	ax, _ := json.Marshal(x)
	by, _ := json.Marshal(y)
	return string(ax) == string(by)
}

func TestWildcard(t *testing.T) {
	for _, row := range []struct {
		pattern, s string
		want       bool
	}{
		{"*", "", true}, {"", "", true}, {"", "x", false}, {"a*", "a", true}, {"a*c", "abbc", true}, {"a*c", "abb", false},
		{"*b*", "abc", true}, {"a?c", "abc", true}, {"a?c", "ac", false}, {"**", "x", true}, {"a*b*c", "axbxbxc", true}, {"abc", "abcd", false},
	} {
		if got := wildcard(row.pattern, row.s); got != row.want {
			t.Errorf("%q on %q: %v", row.pattern, row.s, got)
		}
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add(DocumentedPolicy(DefaultAccount, TenantRole))
	f.Add(policyOf(roleMay("kms:*", `,"Condition":{"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["a"]}}`)))
	f.Fuzz(func(t *testing.T, text string) {
		p, aerr := parsePolicy(text)
		if aerr != nil {
			return
		}
		p.judge(Credential{Principal: TenantRole}.caller(), "Decrypt", "*", facts{}) // must not panic
		doc, err := readDocument(text)
		if err != nil {
			t.Fatalf("accepted, but cannot be edited: %v", err)
		}
		if len(doc.Statement) != len(p.Statement) {
			t.Fatalf("%d statements, edited as %d", len(p.Statement), len(doc.Statement))
		}
	})
}

func FuzzCiphertext(f *testing.F) {
	fam := &family{Materials: []material{newMaterial(testTime)}}
	f.Add(fam.encrypt("mrk-1", []byte("x"), nil))
	f.Add([]byte{1, 255})
	f.Fuzz(func(t *testing.T, blob []byte) {
		if c, ok := parseCiphertext(blob); ok {
			if _, _, opened := fam.decrypt(c, map[string]string{"not": "sealed with this"}); opened {
				t.Fatal("opened under a context it was not sealed with")
			}
		}
	})
}

// TestContextEncodingIsUnambiguous holds that no two contexts read the same.
func TestContextEncodingIsUnambiguous(t *testing.T) {
	seen := map[string]int{}
	for i, c := range []map[string]string{nil, {"": ""}, {"a": "b"}, {"ab": ""}, {"": "ab"}, {"a": "b", "c": "d"}, {"a": "bc", "": "d"}, {"ac": "bd"}, {"a": "bcd"}} {
		s := string(contextData([]byte("h"), c))
		if j, ok := seen[s]; ok {
			t.Errorf("context %d reads like %d", i, j)
		}
		seen[s] = i
	}
}
