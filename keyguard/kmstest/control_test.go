package kmstest

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

func TestControlOverHTTP(t *testing.T) {
	w := newWorld(t, Options{})
	control := Control{Endpoint: w.URL()}
	blob := w.wrap(w.arn, nil)
	open := func() string { _, err := w.unwrap(w.arn, blob, nil); return outcome(t, err) }
	for _, row := range []struct {
		cmd  KeyCommand
		want string
	}{
		{KeyCommand{Do: "disable"}, "DisabledException"},
		{KeyCommand{Do: "enable"}, ""},
		{KeyCommand{Do: "schedule-deletion"}, "KMSInvalidStateException"},
		{KeyCommand{Do: "cancel-deletion"}, "DisabledException"},
		{KeyCommand{Do: "enable"}, ""},
		{KeyCommand{Do: "rotate"}, ""},
		{KeyCommand{Do: "deny", Action: "Decrypt"}, "AccessDeniedException"},
		{KeyCommand{Do: "allow", Action: "Decrypt"}, ""},
		{KeyCommand{Do: "set-state", State: "Unavailable"}, "KMSInvalidStateException"},
		{KeyCommand{Do: "set-state", State: "Enabled"}, ""},
		{KeyCommand{Do: "put-policy", Policy: policyOf(rootStatement)}, "AccessDeniedException"},
		{KeyCommand{Do: "put-policy", Policy: DocumentedPolicy(DefaultAccount, TenantRole)}, ""},
		{KeyCommand{Do: "delete"}, "NotFoundException"},
	} {
		row.cmd.Key = "alias/byokd"
		if _, err := control.Key(t.Context(), row.cmd); err != nil {
			t.Fatalf("%s: %v", row.cmd.Do, err)
		}
		if got := open(); got != row.want {
			t.Errorf("%s: %q, want %q", row.cmd.Do, got, row.want)
		}
	}
	for _, cmd := range []KeyCommand{{Do: "enable", Key: "alias/byokd"}, {Do: "explode", Key: w.arn}, {Do: "disable"}} {
		if _, err := control.Key(t.Context(), cmd); err == nil {
			t.Errorf("%+v was accepted", cmd)
		}
	}
}

func TestControlShowsKeysFaultsAndCalls(t *testing.T) {
	w := newWorld(t, Options{})
	control := Control{Endpoint: w.URL() + "/"}
	f := must(control.Inject(t.Context(), Fault{Kind: FaultThrottle, Operations: []string{"Encrypt"}}))(t)
	status := must(control.Status(t.Context()))(t)
	if len(status.Keys) != 1 || status.Keys[0].ARN != w.arn || status.Keys[0].Aliases[0] != "alias/byokd" || len(status.Faults) != 1 || status.Faults[0].ID != f.ID {
		t.Errorf("%+v", status)
	}
	if n := must(control.Clear(t.Context(), f.ID))(t); n != 1 {
		t.Errorf("cleared %d", n)
	}
	if _, err := control.Clear(t.Context(), f.ID); err == nil {
		t.Error("cleared twice")
	}
	if text := must(control.Policy(t.Context(), w.arn))(t); text != DocumentedPolicy(DefaultAccount, TenantRole) {
		t.Error(text)
	}
	page := must(control.Calls(t.Context(), 0, 1, 0))(t)
	if len(page.Calls) != 1 || page.Last != w.LastCall() {
		t.Errorf("%+v", page)
	}
	waited := make(chan *CallPage, 1)
	go func() {
		page, _ := control.Calls(context.WithoutCancel(t.Context()), page.Last, 0, 20*time.Second)
		waited <- page
	}()
	w.describe(w.arn)
	if got := <-waited; got == nil || len(got.Calls) == 0 || got.Calls[0].Operation != "DescribeKey" {
		t.Errorf("%+v", got)
	}
}

func TestControlReachesEveryRegion(t *testing.T) {
	w := newWorld(t, Options{})
	west := must(w.CreateKey("eu-west-1", "alias/backup", "", false))(t)
	if err := w.Disable("alias/backup"); err != nil {
		t.Fatal(err)
	}
	for _, k := range must(w.Keys())(t) {
		if (k.State == "Disabled") != (k.ARN == west) {
			t.Errorf("%+v", k)
		}
	}
	client := clientIn(t, w.Local, "eu-west-1", "test", "test")
	if m := must(client.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/backup")}))(t).KeyMetadata; m.KeyState != "Disabled" {
		t.Error(m.KeyState)
	}
}

// TestOtherWebSitesCannotDriveTheControls sends what browsers send for pages of
// other origins.
func TestOtherWebSitesCannotDriveTheControls(t *testing.T) {
	w := newWorld(t, Options{})
	send := func(method, path, body string, change func(*http.Request)) int {
		t.Helper()
		r := must(http.NewRequest(method, w.URL()+ControlPath+path, strings.NewReader(body)))(t)
		r.Header.Set("Content-Type", "application/json")
		change(r)
		response := must(http.DefaultClient.Do(r))(t)
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		return response.StatusCode
	}
	header := func(pairs ...string) func(*http.Request) {
		return func(r *http.Request) {
			for i := 0; i < len(pairs); i += 2 {
				r.Header.Set(pairs[i], pairs[i+1])
			}
		}
	}
	disable := `{"do":"disable","key":"alias/byokd"}`
	for _, row := range []struct {
		name, method, path, body string
		change                   func(*http.Request)
		want                     int
	}{
		{"foreign origin", "POST", "key", disable, header("Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site"), 403},
		{"foreign origin, old browser", "POST", "key", disable, header("Origin", "https://evil.example"), 403},
		{"another port is another origin", "POST", "key", disable, header("Origin", "http://127.0.0.1:8080", "Sec-Fetch-Site", "same-site"), 403},
		{"sandboxed frame", "POST", "key", disable, header("Origin", "null"), 403},
		{"plain form", "POST", "key", disable, header("Content-Type", "text/plain"), 403},
		{"rebound name", "POST", "key", disable, func(r *http.Request) { r.Host = "evil.example:4566" }, 403},
		{"rebound name reads", "GET", "status", "", func(r *http.Request) { r.Host = "evil.example:4566" }, 403},
		{"rebound name, own origin", "DELETE", "faults", "", func(r *http.Request) { r.Host = "evil.example"; r.Header.Set("Origin", "http://evil.example") }, 403},
		{"foreign delete", "DELETE", "faults", "", header("Origin", "https://evil.example"), 403},
		{"preflight", "OPTIONS", "key", "", header("Origin", "https://evil.example", "Access-Control-Request-Method", "POST"), 404},
		{"unknown member", "POST", "key", `{"do":"disable","key":"alias/byokd","x":1}`, header(), 400},
		{"oversize", "POST", "key", `{"do":"` + strings.Repeat("x", bodyLimit) + `"}`, header(), 400},
		{"own page", "POST", "key", `{"do":"enable","key":"alias/byokd"}`, func(r *http.Request) {
			r.Header.Set("Origin", "http://"+r.URL.Host)
			r.Header.Set("Sec-Fetch-Site", "same-origin")
		}, 200},
		{"localhost", "GET", "status", "", func(r *http.Request) { r.Host = "localhost:4566" }, 200},
		{"IPv6", "GET", "status", "", func(r *http.Request) { r.Host = "[::1]:4566" }, 200},
	} {
		if got := send(row.method, row.path, row.body, row.change); got != row.want {
			t.Errorf("%s: %d, want %d", row.name, got, row.want)
		}
	}
	if k := must(w.Keys())(t)[0]; k.State != "Enabled" {
		t.Errorf("somebody changed the key: %s", k.State)
	}
}
