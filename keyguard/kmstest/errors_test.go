package kmstest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

// TestEveryRefusalHasAWSsName covers each row: what was prepared, what was
// called, AWS's error name and a part of AWS's text.
func TestEveryRefusalHasAWSsName(t *testing.T) {
	w := newWorld(t, Options{})
	ctx := w.ctx
	rsa := *must(w.admin.CreateKey(ctx, &kms.CreateKeyInput{KeySpec: types.KeySpecRsa2048, KeyUsage: types.KeyUsageTypeSignVerify}))(t).KeyMetadata.Arn
	rsaEncrypt := *must(w.admin.CreateKey(ctx, &kms.CreateKeyInput{KeySpec: types.KeySpecRsa2048}))(t).KeyMetadata.Arn
	external := *must(w.admin.CreateKey(ctx, &kms.CreateKeyInput{Origin: types.OriginTypeExternal}))(t).KeyMetadata.Arn
	other := must(w.CreateKey("", "", "", false))(t)
	disabled, pending, unavailable := must(w.CreateKey("", "", "", false))(t), must(w.CreateKey("", "", "", false))(t), must(w.CreateKey("", "", "", false))(t)
	blobs := map[string][]byte{}
	for _, arn := range []string{w.arn, other, disabled, pending, unavailable} {
		blobs[arn] = w.wrap(arn, map[string]string{"volume": "1"})
	}
	for _, err := range []error{w.Disable(disabled), w.ScheduleDeletion(pending, time.Hour), w.SetState(unavailable, "Unavailable")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	right := map[string]string{"volume": "1"}
	decrypt := func(key, from string, context map[string]string) error {
		_, err := w.unwrap(key, blobs[from], context)
		return err
	}
	fresh := func(c *kms.Client, key string) error {
		_, err := c.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &key, KeySpec: "AES_256"})
		return err
	}
	flip := bytes.Clone(blobs[w.arn])
	flip[len(flip)-1] ^= 1
	absent := keyARN(DefaultRegion, DefaultAccount, "00000000-0000-4000-8000-000000000000")

	rows := []struct {
		name string
		err  error
		code string
		text string
	}{
		{"disabled", decrypt(disabled, disabled, right), "DisabledException", disabled + " is disabled."},
		{"pending deletion", decrypt(pending, pending, right), "KMSInvalidStateException", pending + " is pending deletion."},
		{"unavailable", decrypt(unavailable, unavailable, right), "KMSInvalidStateException", unavailable + " is unavailable."},
		{"pending import", fresh(w.admin, external), "KMSInvalidStateException", external + " is pending import."},
		{"unknown key", decrypt(absent, w.arn, right), "NotFoundException", "Key '" + absent + "' does not exist"},
		{"unknown alias", decrypt("alias/none", w.arn, right), "NotFoundException", "alias/none is not found."},
		{"malformed id", decrypt("nonsense", w.arn, right), "NotFoundException", "Invalid keyId 'nonsense'"},
		{"other region", decrypt(strings.Replace(w.arn, "eu-central-1", "eu-west-1", 1), w.arn, right), "NotFoundException", "Invalid arn eu-west-1"},
		{"other account", decrypt(strings.Replace(w.arn, DefaultAccount, "999988887777", 1), w.arn, right), "NotFoundException", "does not exist"},
		{"no KMS ARN", decrypt("arn:aws:s3:::bucket", w.arn, right), "InvalidArnException", ""},
		{"other key", decrypt(w.arn, other, right), "IncorrectKeyException", "The key ID in the request does not identify a CMK"},
		{"other context", decrypt(w.arn, w.arn, map[string]string{"volume": "2"}), "InvalidCiphertextException", ""},
		{"no context", decrypt(w.arn, w.arn, nil), "InvalidCiphertextException", ""},
		{"more context", decrypt(w.arn, w.arn, map[string]string{"volume": "1", "x": "y"}), "InvalidCiphertextException", ""},
		{"context case", decrypt(w.arn, w.arn, map[string]string{"Volume": "1"}), "InvalidCiphertextException", ""},
		{"changed ciphertext", func() error { _, err := w.unwrap(w.arn, flip, right); return err }(), "InvalidCiphertextException", ""},
		{"garbage", func() error { _, err := w.unwrap("", []byte("garbage"), right); return err }(), "InvalidCiphertextException", ""},
		{"oversize ciphertext", func() error { _, err := w.unwrap(w.arn, make([]byte, 6145), nil); return err }(), "ValidationException", "6144"},
		{"oversize plaintext", func() error {
			_, err := w.tenant.Encrypt(ctx, &kms.EncryptInput{KeyId: &w.arn, Plaintext: make([]byte, 4097)})
			return err
		}(), "ValidationException", "4096"},
		{"wrong usage", fresh(w.admin, rsa), "InvalidKeyUsageException", "SIGN_VERIFY"},
		{"asymmetric", fresh(w.admin, rsaEncrypt), "InvalidKeyUsageException", "RSA_2048"},
		{"size twice", func() error {
			_, err := w.tenant.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &w.arn, KeySpec: "AES_256", NumberOfBytes: aws.Int32(3)})
			return err
		}(), "ValidationException", ""},
		{"size never", func() error {
			_, err := w.tenant.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &w.arn})
			return err
		}(), "ValidationException", ""},
		{"size zero", func() error {
			_, err := w.tenant.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &w.arn, NumberOfBytes: aws.Int32(0)})
			return err
		}(), "ValidationException", ""},
		{"not allowed", func() error {
			_, err := w.tenant.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &w.arn})
			return err
		}(), "AccessDeniedException", "User: arn:aws:sts::111122223333:assumed-role/byokd-tenant/byokd is not authorized to perform: kms:DisableKey on resource: " + w.arn + " because no resource-based policy allows the kms:DisableKey action"},
		{"no identity policy", func() error { _, err := w.tenant.ListKeys(ctx, &kms.ListKeysInput{}); return err }(), "AccessDeniedException",
			"because no identity-based policy allows the kms:ListKeys action"},
		{"tenant creates", func() error { _, err := w.tenant.CreateKey(ctx, &kms.CreateKeyInput{}); return err }(), "AccessDeniedException", "kms:CreateKey"},
		{"alias where a key is wanted", func() error {
			_, err := w.admin.DisableKey(ctx, &kms.DisableKeyInput{KeyId: aws.String("alias/byokd")})
			return err
		}(), "NotFoundException", "Invalid keyId 'alias/byokd'"},
		{"enable while pending", func() error {
			_, err := w.admin.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &pending})
			return err
		}(), "KMSInvalidStateException", "is pending deletion"},
		{"cancel nothing", func() error {
			_, err := w.admin.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &w.arn})
			return err
		}(), "KMSInvalidStateException", "is not pending deletion"},
		{"short window", func() error {
			_, err := w.admin.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: &w.arn, PendingWindowInDays: aws.Int32(6)})
			return err
		}(), "ValidationException", "pendingWindowInDays"},
		{"alias twice", func() error {
			_, err := w.admin.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: aws.String("alias/byokd"), TargetKeyId: &w.arn})
			return err
		}(), "AlreadyExistsException", "already exists"},
		{"alias of AWS", func() error {
			_, err := w.admin.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: aws.String("alias/aws/x"), TargetKeyId: &w.arn})
			return err
		}(), "InvalidAliasNameException", ""},
		{"alias without prefix", func() error {
			_, err := w.admin.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: aws.String("byokd"), TargetKeyId: &w.arn})
			return err
		}(), "ValidationException", "aliasName"},
		{"alias between types", func() error {
			_, err := w.admin.UpdateAlias(ctx, &kms.UpdateAliasInput{AliasName: aws.String("alias/byokd"), TargetKeyId: &rsa})
			return err
		}(), "ValidationException", ""},
		{"replicate single", func() error {
			_, err := w.admin.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: &w.arn, ReplicaRegion: aws.String("eu-west-1")})
			return err
		}(), "UnsupportedOperationException", ""},
		{"rotate asymmetric", func() error {
			_, err := w.admin.EnableKeyRotation(ctx, &kms.EnableKeyRotationInput{KeyId: &rsa})
			return err
		}(), "UnsupportedOperationException", ""},
		{"rotate disabled", func() error {
			_, err := w.admin.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &disabled})
			return err
		}(), "DisabledException", ""},
		{"revoke nothing", func() error {
			_, err := w.admin.RevokeGrant(ctx, &kms.RevokeGrantInput{KeyId: &w.arn, GrantId: aws.String("x")})
			return err
		}(), "NotFoundException", ""},
		{"grant on disabled", func() error {
			_, err := w.tenant.CreateGrant(ctx, &kms.CreateGrantInput{KeyId: &disabled, GranteePrincipal: aws.String(TenantRole), Operations: []types.GrantOperation{"Decrypt"}})
			return err
		}(), "DisabledException", ""},
		{"grant to nobody", func() error {
			_, err := w.tenant.CreateGrant(ctx, &kms.CreateGrantInput{KeyId: &w.arn, GranteePrincipal: aws.String("nobody"), Operations: []types.GrantOperation{"Decrypt"}})
			return err
		}(), "InvalidArnException", ""},
		{"tag twice", func() error {
			tag := types.Tag{TagKey: aws.String("a"), TagValue: aws.String("b")}
			_, err := w.admin.TagResource(ctx, &kms.TagResourceInput{KeyId: &w.arn, Tags: []types.Tag{tag, tag}})
			return err
		}(), "TagException", ""},
		{"other policy name", func() error {
			_, err := w.admin.GetKeyPolicy(ctx, &kms.GetKeyPolicyInput{KeyId: &w.arn, PolicyName: aws.String("other")})
			return err
		}(), "NotFoundException", "No such policy"},
		{"custom key store", func() error {
			_, err := w.admin.CreateKey(ctx, &kms.CreateKeyInput{Origin: types.OriginTypeAwsCloudhsm})
			return err
		}(), "UnsupportedOperationException", ""},
		{"unknown operation", func() error {
			_, err := w.admin.DescribeCustomKeyStores(ctx, &kms.DescribeCustomKeyStoresInput{})
			return err
		}(), "UnknownOperationException", ""},
	}
	for _, row := range rows {
		if got := code(t, row.err); got != row.code || row.err != nil && !strings.Contains(row.err.Error(), row.text) {
			t.Errorf("%s: got %v, want %s %q", row.name, row.err, row.code, row.text)
		}
	}
}

func TestEveryAnswerHasARequestID(t *testing.T) {
	w := newWorld(t, Options{})
	out, err := w.tenant.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &w.arn})
	if err != nil {
		t.Fatal(err)
	}
	id, _ := awsRequestID(out)
	if calls := w.Calls(); id == "" || calls[len(calls)-1].RequestID != id {
		t.Errorf("request id %q is not the one in the log", id)
	}
	_, err = w.tenant.DisableKey(w.ctx, &kms.DisableKeyInput{KeyId: &w.arn})
	var response *awshttp.ResponseError
	if !asError(err, &response) || response.ServiceRequestID() == "" || response.HTTPStatusCode() != http.StatusBadRequest {
		t.Errorf("%v", err)
	}
	if calls := w.Calls(); calls[len(calls)-1].RequestID != response.ServiceRequestID() || calls[len(calls)-1].Error != "AccessDeniedException" {
		t.Errorf("%+v", calls[len(calls)-1])
	}
}

func TestSignatures(t *testing.T) {
	now := time.Now()
	l := start(t, Options{SignatureClock: func() time.Time { return now }})
	must(l.CreateKey("", "alias/byokd", "", false))(t)
	call := func(key, secret string) string {
		_, err := clientIn(t, l, DefaultRegion, key, secret).DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: aws.String("alias/byokd")})
		if err != nil && strings.Contains(err.Error(), "StatusCode: 400") == false {
			t.Errorf("status: %v", err)
		}
		return code(t, err)
	}
	for _, row := range []struct {
		name, key, secret string
		clock             time.Duration
		want              string
	}{
		{"good", "test", "test", 0, ""},
		{"unknown access key", "nobody", "test", 0, "UnrecognizedClientException"},
		{"wrong secret", "test", "wrong", 0, "InvalidSignatureException"},
		{"other's secret", "byokd-tenant", "test", 0, "InvalidSignatureException"},
		{"expired", "test", "test", 6 * time.Minute, "InvalidSignatureException"},
		{"too early", "test", "test", -6 * time.Minute, "InvalidSignatureException"},
		{"within the skew", "test", "test", 4 * time.Minute, ""},
	} {
		now = time.Now().Add(row.clock)
		if got := call(row.key, row.secret); got != row.want {
			t.Errorf("%s: %q, want %q", row.name, got, row.want)
		}
	}
	if calls := l.Calls(); calls[len(calls)-1].AccessKey != "test" {
		t.Errorf("%+v", calls[len(calls)-1])
	}
}

// signedCall captures a request that the SDK signed, so that a test can change it.
func signedCall(t *testing.T, l *Local, region string) *http.Request {
	t.Helper()
	var caught *http.Request
	client := kms.NewFromConfig(sdkConfig(t, region, "test", "test"), func(o *kms.Options) {
		o.BaseEndpoint = aws.String(l.URL())
		o.HTTPClient = doer(func(r *http.Request) (*http.Response, error) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return nil, err
			}
			caught = r.Clone(context.WithoutCancel(r.Context()))
			caught.RequestURI = ""
			caught.Body = io.NopCloser(bytes.NewReader(body))
			return nil, io.ErrUnexpectedEOF
		})
	})
	client.ListKeys(t.Context(), &kms.ListKeysInput{})
	if caught == nil {
		t.Fatal("the SDK sent nothing")
	}
	return caught
}

type doer func(*http.Request) (*http.Response, error)

func (d doer) Do(r *http.Request) (*http.Response, error) { return d(r) }

func TestTamperedRequestsAreRefused(t *testing.T) {
	l := start(t, Options{})
	for _, row := range []struct {
		name   string
		change func(*http.Request)
		want   string
	}{
		{"untouched", func(*http.Request) {}, ""},
		{"unsigned", func(r *http.Request) { r.Header.Del("Authorization") }, "MissingAuthenticationTokenException"},
		{"other scheme", func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }, "IncompleteSignatureException"},
		{"cut header", func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/x") }, "IncompleteSignatureException"},
		{"no date", func(r *http.Request) { r.Header.Del("X-Amz-Date") }, "IncompleteSignatureException"},
		{"other body", func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("{ }")); r.ContentLength = 3 }, "InvalidSignatureException"},
		{"other operation", func(r *http.Request) { r.Header.Set("X-Amz-Target", "TrentService.ListAliases") }, "InvalidSignatureException"},
		{"other region", func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "/eu-central-1/", "/eu-west-1/", 1))
		}, "InvalidSignatureException"},
		{"other service", func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "/kms/", "/s3/", 1))
		}, "InvalidSignatureException"},
		{"other host", func(r *http.Request) { r.Host = "localhost" }, "InvalidSignatureException"},
		{"other path", func(r *http.Request) { r.URL.Path = "/x" }, "UnknownOperationException"},
	} {
		r := signedCall(t, l, DefaultRegion)
		row.change(r)
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatalf("%s: %v", row.name, err)
		}
		raw, _ := io.ReadAll(response.Body)
		response.Body.Close()
		var body struct {
			Type string `json:"__type"`
		}
		if err := json.Unmarshal(raw, &body); err != nil || body.Type != row.want {
			t.Errorf("%s: %s, want %s", row.name, raw, row.want)
		}
		if response.Header.Get("Content-Type") != "application/x-amz-json-1.1" || response.Header.Get("X-Amzn-Requestid") == "" {
			t.Errorf("%s: headers %v", row.name, response.Header)
		}
	}
}

func TestBodiesAreBounded(t *testing.T) {
	l := start(t, Options{})
	r := signedCall(t, l, DefaultRegion)
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(strings.Repeat(" ", bodyLimit+1))), bodyLimit+1
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", response.StatusCode)
	}
}
