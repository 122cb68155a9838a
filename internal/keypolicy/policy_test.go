package keypolicy

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	account = "111122223333"
	role    = "arn:aws:iam::444455556666:role/tenants/eu/byokd"
)

// The policies are those of the documentation, whose text stands in testdata.
func TestTextIsTheDocumentation(t *testing.T) {
	for name, kind := range map[string]Kind{"newest": Full, "minimal": Minimal} {
		document, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		want := strings.NewReplacer("<customer-aws-account>", account, "<tenant-role-arn>", role).Replace(strings.TrimSpace(string(document)))
		if got, err := Text(kind, account, role); err != nil || got != want {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
}

func TestTextOfAnotherPartition(t *testing.T) {
	got, err := Text(Full, account, "arn:aws-cn:iam::444455556666:role/byokd")
	if err != nil || !strings.Contains(got, `"arn:aws-cn:iam::111122223333:root"`) || strings.Contains(got, "arn:aws:") {
		t.Errorf("%v\n%s", err, got)
	}
}

func TestTextRefuses(t *testing.T) {
	for _, bad := range []string{"", "1111", "11112222333x", "111122223333 "} {
		if _, err := Text(Full, bad, role); err == nil {
			t.Errorf("account %q accepted", bad)
		}
	}
	for _, bad := range []string{"", "byokd", "arn:aws:iam::111122223333:user/x", "arn:aws:sts::111122223333:assumed-role/x/y", "*",
		`arn:aws:iam::111122223333:role/x"}, "Action": "kms:*`, "arn:aws:iam::111122223333:root"} {
		if _, err := Text(Full, account, bad); !errors.Is(err, ErrNotARole) {
			t.Errorf("role %q: %v", bad, err)
		}
	}
}

func TestSame(t *testing.T) {
	full, err := Text(Full, account, role)
	if err != nil {
		t.Fatal(err)
	}
	small, err := Text(Minimal, account, role)
	if err != nil {
		t.Fatal(err)
	}
	if !Same(full, strings.ReplaceAll(full, "\n", " ")) || Same(full, small) || Same(full, "") || Same("", "") {
		t.Error("policies are compared wrongly")
	}
}
