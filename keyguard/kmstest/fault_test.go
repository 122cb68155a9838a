package kmstest

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
)

// outcome is an AWS error name, "" for success, or "no answer".
func outcome(t *testing.T, err error) string {
	t.Helper()
	var api smithy.APIError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &api):
		return api.ErrorCode()
	}
	var response *awshttp.ResponseError
	if errors.As(err, &response) && response.HTTPResponse() != nil && response.HTTPStatusCode() != 0 {
		t.Errorf("an answer without an AWS error: %v", err)
	}
	return "no answer"
}

func TestFaults(t *testing.T) {
	w := newWorld(t, Options{})
	blob := w.wrap(w.arn, nil)
	decrypt := func() string { _, err := w.unwrap(w.arn, blob, nil); return outcome(t, err) }
	describe := func(c *kms.Client) string {
		_, err := c.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
		return outcome(t, err)
	}
	for _, row := range []struct {
		name                                     string
		fault                                    Fault
		decrypt, tenantDescribes, adminDescribes string
	}{
		{"throttle", Fault{Kind: FaultThrottle}, "ThrottlingException", "ThrottlingException", "ThrottlingException"},
		{"one operation", Fault{Kind: FaultThrottle, Operations: []string{"Decrypt"}}, "ThrottlingException", "", ""},
		{"a pattern", Fault{Kind: FaultError, Operations: []string{"desc*"}}, "", "KMSInternalException", "KMSInternalException"},
		{"one caller", Fault{Kind: FaultError, AccessKey: TenantAccessKey}, "KMSInternalException", "KMSInternalException", ""},
		{"one region", Fault{Kind: FaultError, Region: "eu-west-1"}, "", "", ""},
		{"one key", Fault{Kind: FaultError, Key: w.arn}, "KMSInternalException", "KMSInternalException", "KMSInternalException"},
		{"another key", Fault{Kind: FaultError, Key: w.arn + "2"}, "", "", ""},
		{"another service", Fault{Kind: FaultError, Service: "s3"}, "", "", ""},
		{"named error", Fault{Kind: FaultError, Status: 503, Code: "DependencyTimeoutException"}, "DependencyTimeoutException", "DependencyTimeoutException", "DependencyTimeoutException"},
		{"cut", Fault{Kind: FaultCut}, "no answer", "no answer", "no answer"},
		{"once", Fault{Kind: FaultCut, Count: 1}, "no answer", "", ""},
		{"a short delay", Fault{Kind: FaultLatency, DelayMillis: 1}, "", "", ""},
	} {
		if _, err := w.Inject(row.fault); err != nil {
			t.Fatalf("%s: %v", row.name, err)
		}
		if a, b, c := decrypt(), describe(w.tenant), describe(w.admin); a != row.decrypt || b != row.tenantDescribes || c != row.adminDescribes {
			t.Errorf("%s: decrypt %q, tenant %q, admin %q", row.name, a, b, c)
		}
		w.Clear()
		if got := decrypt(); got != "" {
			t.Errorf("%s: still %q after clearing", row.name, got)
		}
	}
}

func TestServerErrorsAreHTTP500(t *testing.T) {
	w := newWorld(t, Options{})
	w.ServerError("DescribeKey")
	_, err := w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
	var response *awshttp.ResponseError
	if !errors.As(err, &response) || response.HTTPStatusCode() != http.StatusInternalServerError || response.ServiceRequestID() == "" {
		t.Error(err)
	}
}

func TestHangingCallsGoOnWhenCleared(t *testing.T) {
	w := newWorld(t, Options{})
	blob := w.wrap(w.arn, nil)
	w.Hang("Decrypt")
	results := make(chan error, 2)
	for range 2 {
		go func() { _, err := w.unwrap(w.arn, blob, nil); results <- err }()
	}
	if err := w.Disable(w.arn); err != nil { // happens while they hang, and counts for them
		t.Fatal(err)
	}
	w.awaitTaken(2)
	select {
	case err := <-results:
		t.Fatalf("answered: %v", err)
	default:
	}
	w.Clear()
	for range 2 {
		if err := <-results; code(t, err) != "DisabledException" {
			t.Error(err)
		}
	}
}

// awaitTaken waits until so many calls are held by faults.
func (w *world) awaitTaken(n int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
	defer cancel()
	if err := w.AwaitHeld(ctx, n); err != nil {
		w.t.Fatal(err)
	}
}

func TestALeavingCallerEndsItsHang(t *testing.T) {
	w := newWorld(t, Options{})
	w.Hang()
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() {
		_, err := w.tenant.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
		done <- err
	}()
	w.awaitTaken(1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	limit, stop := context.WithTimeout(w.ctx, 10*time.Second)
	defer stop()
	call, err := w.WaitCall(limit, 0, func(c Call) bool { return c.Operation == "DescribeKey" })
	if err != nil || call.Status != 0 || call.Error != "ConnectionCut" || call.Fault != "hang" {
		t.Errorf("%+v %v", call, err)
	}
}

func TestCloseEndsHangs(t *testing.T) {
	w := newWorld(t, Options{})
	w.Hang()
	done := make(chan error, 1)
	go func() {
		_, err := w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
		done <- err
	}()
	w.awaitTaken(1)
	w.Close()
	if got := outcome(t, <-done); got != "no answer" {
		t.Error(got)
	}
}

func TestLatencyDelays(t *testing.T) {
	w := newWorld(t, Options{})
	w.Latency(maxDelay)
	done := make(chan error, 1)
	go func() {
		_, err := w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
		done <- err
	}()
	w.awaitTaken(1)
	if !w.ClearFault(w.Faults()[0].ID) {
		t.Fatal("no fault")
	}
	if err := <-done; err != nil {
		t.Errorf("a delayed call whose delay is cleared goes on: %v", err)
	}
}

func TestDownAndUpKeepTheAddress(t *testing.T) {
	w := newWorld(t, Options{})
	url := w.URL()
	w.Down()
	if _, err := w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn}); outcome(t, err) != "no answer" {
		t.Error(err)
	}
	if err := w.Up(); err != nil {
		t.Fatal(err)
	}
	if w.URL() != url {
		t.Errorf("%s became %s", url, w.URL())
	}
	w.describe(w.arn)
}

func TestSTSFaults(t *testing.T) {
	l := start(t, Options{})
	must(l.Inject(Fault{Kind: FaultError, Service: "sts"}))(t)
	client := sts.NewFromConfig(sdkConfig(t, DefaultRegion, "test", "test"), func(o *sts.Options) { o.BaseEndpoint = aws.String(l.URL()) })
	if _, err := client.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{}); outcome(t, err) != "KMSInternalException" {
		t.Error(err)
	}
	l.Clear()
	must(client.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{}))(t)
}

func TestImpossibleFaultsAreRefused(t *testing.T) {
	l := start(t, Options{})
	for name, f := range map[string]Fault{
		"kind": {Kind: "explode"}, "no delay": {Kind: FaultLatency}, "long delay": {Kind: FaultLatency, DelayMillis: maxDelay.Milliseconds() + 1},
		"service": {Kind: FaultCut, Service: "ec2"}, "status": {Kind: FaultError, Status: 200}, "count": {Kind: FaultCut, Count: -1},
	} {
		if _, err := l.Inject(f); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if len(l.Faults()) != 0 || l.ClearFault(7) {
		t.Error("there are faults")
	}
}

func TestCallsAreLogged(t *testing.T) {
	w := newWorld(t, Options{CallLimit: 4})
	mark := w.LastCall()
	context := map[string]string{"byokd:cluster": "acme"}
	w.wrap("alias/byokd", context)
	c := w.CallsSince(mark)[0]
	if c.Operation != "Encrypt" || c.Service != "kms" || c.Principal != "arn:aws:sts::111122223333:assumed-role/byokd-tenant/byokd" || c.AccessKey != TenantAccessKey ||
		c.Region != DefaultRegion || c.Key != w.arn || c.EncryptionContext["byokd:cluster"] != "acme" || c.Status != 200 || c.Error != "" || c.RequestID == "" || c.Time.IsZero() {
		t.Errorf("%+v", c)
	}
	for range 20 {
		w.describe(w.arn)
	}
	calls := w.Calls()
	if len(calls) != 4 || calls[3].Seq != w.LastCall() || calls[0].Seq != w.LastCall()-3 {
		t.Errorf("kept %d calls up to %d", len(calls), w.LastCall())
	}
	for back := range uint64(6) {
		if got := w.CallsSince(w.LastCall() - back); len(got) != int(min(back, 4)) {
			t.Errorf("%d calls after the last %d", len(got), back)
		}
	}
	if err := w.AwaitCalls(w.ctx, mark, "DescribeKey", 3); err != nil {
		t.Error(err)
	}
}

func TestCallLogHoldsNoSecret(t *testing.T) {
	dir := t.TempDir()
	w := newWorld(t, Options{Dir: dir})
	canary := []byte("a plaintext that nobody else writes")
	data := must(w.tenant.GenerateDataKey(w.ctx, &kms.GenerateDataKeyInput{KeyId: &w.arn, KeySpec: "AES_256"}))(t)
	sealed := must(w.tenant.Encrypt(w.ctx, &kms.EncryptInput{KeyId: &w.arn, Plaintext: canary}))(t).CiphertextBlob
	must(w.unwrap(w.arn, sealed, nil))(t)
	log := must(os.ReadFile(filepath.Join(dir, callsFile)))(t)
	if n := bytes.Count(log, []byte("\n")); n != 3 {
		t.Fatalf("%d calls in the file", n)
	}
	for name, secret := range map[string][]byte{"data key": data.Plaintext, "plaintext": canary, "ciphertext": sealed} {
		if bytes.Contains(log, secret) || bytes.Contains(log, []byte(base64.StdEncoding.EncodeToString(secret))) {
			t.Errorf("the %s is in the log", name)
		}
	}
}
