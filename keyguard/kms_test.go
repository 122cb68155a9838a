package keyguard

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"slices"
	"strings"
	"testing"
)

// Label sets are made from Reasons: it must not fall behind the constants.
func TestReasonsAreComplete(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "kms.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	constants := 0
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && strings.HasPrefix(spec.Names[0].Name, "Reason") {
			constants++
		}
		return true
	})
	all := Reasons()
	if constants == 0 || len(all) != constants {
		t.Errorf("Reasons lists %d, kms.go declares %d", len(all), constants)
	}
	slices.Sort(all)
	if len(slices.Compact(all)) != constants {
		t.Error("Reasons lists one twice")
	}
}

func TestErrorsAreClassifiedThroughWraps(t *testing.T) {
	disabled := fmt.Errorf("loading: %w", refusal(Disabled))
	if StateOf(disabled) != Disabled || ReasonOf(disabled) != ReasonKeyDisabled || RequestIDOf(disabled) != "req-Disabled" {
		t.Errorf("%v %v %q", StateOf(disabled), ReasonOf(disabled), RequestIDOf(disabled))
	}
	if StateOf(nil) != Enabled || ReasonOf(nil) != ReasonNone || RequestIDOf(nil) != "" {
		t.Error("no error is not enabled")
	}
	// Whatever is not known, or claims to be fine, is not usable.
	for _, err := range []error{errors.New("?"), &KMSError{}, &KMSError{State: Enabled}} {
		if StateOf(err) != Unreachable || ReasonOf(err) != ReasonUnknownFault {
			t.Errorf("%#v: %v %v", err, StateOf(err), ReasonOf(err))
		}
	}
}

func TestBindingIsTheEncryptionContext(t *testing.T) {
	got := Binding{Cluster: "acme", Resource: "documents", Tenant: "t1"}.Context()
	want := map[string]string{"byokd:cluster": "acme", "byokd:resource": "documents", "byokd:tenant": "t1"}
	if !maps.Equal(got, want) {
		t.Errorf("%v", got)
	}
	if got := (Binding{Cluster: "acme"}).Context(); !maps.Equal(got, map[string]string{"byokd:cluster": "acme"}) {
		t.Errorf("%v", got)
	}
}

func TestSameKey(t *testing.T) {
	const primary = "arn:aws:kms:eu-central-1:111122223333:key/mrk-1234"
	tests := map[string]bool{
		primary: true,
		"arn:aws:kms:eu-west-1:111122223333:key/mrk-1234":     true,
		"arn:aws:kms:eu-west-1:111122223333:key/mrk-9999":     false,
		"arn:aws:kms:eu-west-1:999922223333:key/mrk-1234":     false, // multi-Region sets stay in one account
		"arn:aws-cn:kms:cn-north-1:111122223333:key/mrk-1234": false,
		"arn:aws:s3:eu-west-1:111122223333:key/mrk-1234":      false,
		"mrk-1234": false, "": false,
	}
	for other, want := range tests {
		if SameKey(primary, other) != want || SameKey(other, primary) != want {
			t.Errorf("SameKey(%q, %q) is not %v", primary, other, want)
		}
	}
	single := "arn:aws:kms:eu-central-1:111122223333:key/1234"
	if !SameKey(single, single) || SameKey(single, "arn:aws:kms:eu-west-1:111122223333:key/1234") {
		t.Error("a key that is in one Region only has no other ARN")
	}
}
