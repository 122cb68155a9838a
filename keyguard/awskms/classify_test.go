package awskms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/byokd/byokd/keyguard"
)

// fromSDK wraps an error as the SDK returns it.
func fromSDK(status int, err error) error {
	return &smithy.OperationError{ServiceID: "KMS", OperationName: "Decrypt", Err: &awshttp.ResponseError{
		RequestID: "request-1",
		ResponseError: &smithyhttp.ResponseError{
			Response: &smithyhttp.Response{Response: &http.Response{StatusCode: status, Header: http.Header{}}},
			Err:      err,
		},
	}}
}

func text(s string) *string { return aws.String(s) }

func TestClassifyAnswers(t *testing.T) {
	const role = "arn:aws:iam::111122223333:role/byokd-tenant"
	denied := "User: arn:aws:sts::111122223333:assumed-role/byokd-tenant/i-0abc is not authorized to perform: kms:Decrypt on resource: arn:aws:kms:eu-central-1:111122223333:key/x because no resource-based policy allows the kms:Decrypt action"
	code := func(c, message string) error { return &smithy.GenericAPIError{Code: c, Message: message} }
	tests := []struct {
		name   string
		status int
		err    error
		state  keyguard.KeyState
		reason keyguard.Reason
		vague  bool
	}{
		{"disabled", 400, &types.DisabledException{Message: text("is disabled")}, keyguard.Disabled, keyguard.ReasonKeyDisabled, false},
		{"pending deletion", 400, &types.KMSInvalidStateException{Message: text("arn:… is pending deletion.")}, keyguard.PendingDeletion, keyguard.ReasonPendingDeletion, false},
		{"pending replica deletion", 400, &types.KMSInvalidStateException{Message: text("arn:… is pending replica deletion.")}, keyguard.PendingDeletion, keyguard.ReasonPendingDeletion, false},
		{"pending import", 400, &types.KMSInvalidStateException{Message: text("arn:… is pending import.")}, keyguard.Unavailable, keyguard.ReasonPendingImport, false},
		{"unavailable", 400, &types.KMSInvalidStateException{Message: text("arn:… is unavailable.")}, keyguard.Unavailable, keyguard.ReasonInvalidState, true},
		{"invalid state without a word", 400, &types.KMSInvalidStateException{}, keyguard.Unavailable, keyguard.ReasonInvalidState, true},
		{"not found", 400, &types.NotFoundException{Message: text("Key 'arn:…' does not exist")}, keyguard.Deleted, keyguard.ReasonKeyDeleted, false},
		{"denied", 400, code("AccessDeniedException", denied), keyguard.AccessDenied, keyguard.ReasonAccessDenied, false},
		{"another key's ciphertext", 400, &types.IncorrectKeyException{}, keyguard.Misconfigured, keyguard.ReasonWrongKey, false},
		{"damaged ciphertext", 400, &types.InvalidCiphertextException{}, keyguard.Misconfigured, keyguard.ReasonInvalidCiphertext, false},
		{"wrong usage", 400, &types.InvalidKeyUsageException{}, keyguard.Misconfigured, keyguard.ReasonWrongKind, false},
		{"bad ARN", 400, &types.InvalidArnException{}, keyguard.Misconfigured, keyguard.ReasonBadRequest, false},
		{"unsupported", 400, &types.UnsupportedOperationException{}, keyguard.Misconfigured, keyguard.ReasonBadRequest, false},
		{"validation", 400, code("ValidationException", ""), keyguard.Misconfigured, keyguard.ReasonBadRequest, false},
		{"dependency timeout", 503, &types.DependencyTimeoutException{}, keyguard.Unreachable, keyguard.ReasonServiceFault, false},
		{"key unavailable", 500, &types.KeyUnavailableException{}, keyguard.Unreachable, keyguard.ReasonServiceFault, false},
		{"internal", 500, &types.KMSInternalException{}, keyguard.Unreachable, keyguard.ReasonServiceFault, false},
		{"custom key store", 400, &types.CustomKeyStoreInvalidStateException{}, keyguard.Unreachable, keyguard.ReasonKeyStoreDown, false},
		{"HSM cluster", 400, &types.CloudHsmClusterNotActiveException{}, keyguard.Unreachable, keyguard.ReasonKeyStoreDown, false},
		{"limit exceeded", 400, &types.LimitExceededException{}, keyguard.Unreachable, keyguard.ReasonThrottled, false},
		{"throttling", 400, code("ThrottlingException", "Rate exceeded"), keyguard.Unreachable, keyguard.ReasonThrottled, false},
		{"429 without a code", 429, code("UnknownError", ""), keyguard.Unreachable, keyguard.ReasonThrottled, false},
		{"5xx without a code", 502, code("UnknownError", ""), keyguard.Unreachable, keyguard.ReasonServiceFault, false},
		{"expired token", 400, code("ExpiredTokenException", ""), keyguard.Unreachable, keyguard.ReasonCredentials, false},
		{"unknown token", 400, code("UnrecognizedClientException", ""), keyguard.Unreachable, keyguard.ReasonCredentials, false},
		{"bad signature", 400, code("InvalidSignatureException", "The request signature we calculated does not match"), keyguard.Unreachable, keyguard.ReasonCredentials, false},
		{"clock behind", 400, code("InvalidSignatureException", "Signature expired: 20250101T000000Z is now earlier than"), keyguard.Unreachable, keyguard.ReasonClockSkew, false},
		{"clock ahead", 400, code("InvalidSignatureException", "Signature not yet current: 20990101T000000Z"), keyguard.Unreachable, keyguard.ReasonClockSkew, false},
		{"dry run", 400, &types.DryRunOperationException{}, keyguard.Unreachable, keyguard.ReasonUnknownFault, false},
		{"a code of the future", 400, code("QuantumException", ""), keyguard.Unreachable, keyguard.ReasonUnknownFault, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			k := classify("Decrypt", fromSDK(test.status, test.err))
			if k.State != test.state || k.Reason != test.reason || k.Ambiguous != test.vague {
				t.Errorf("%v %v ambiguous %v, want %v %v %v", k.State, k.Reason, k.Ambiguous, test.state, test.reason, test.vague)
			}
			if k.RequestID != "request-1" {
				t.Errorf("request id %q", k.RequestID)
			}
			if keyguard.StateOf(k) == keyguard.Enabled {
				t.Error("an error means enabled")
			}
			if test.state == keyguard.AccessDenied && (k.Action != "kms:Decrypt" || k.Principal != role) {
				t.Errorf("missing %q for %q", k.Action, k.Principal)
			}
			if !errors.Is(k, test.err) {
				t.Error("the cause is lost")
			}
		})
	}
}

func TestClassifyUnanswered(t *testing.T) {
	send := func(err error) error {
		return &smithy.OperationError{ServiceID: "KMS", OperationName: "Decrypt",
			Err: &smithyhttp.RequestSendError{Err: &url.Error{Op: "Post", URL: "https://kms", Err: err}}}
	}
	netOp := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	stsDenied := &smithy.OperationError{ServiceID: "STS", OperationName: "AssumeRoleWithWebIdentity",
		Err: &smithy.GenericAPIError{Code: "AccessDenied", Message: "Not authorized to perform sts:AssumeRoleWithWebIdentity"}}
	tests := []struct {
		name   string
		err    error
		reason keyguard.Reason
	}{
		{"DNS", send(netOp(&net.DNSError{Err: "no such host", Name: "kms", IsNotFound: true})), keyguard.ReasonDNS},
		{"DNS timeout", send(netOp(&net.DNSError{Err: "i/o timeout", Name: "kms", IsTimeout: true})), keyguard.ReasonDNS},
		{"refused", send(netOp(os.NewSyscallError("connect", syscall.ECONNREFUSED))), keyguard.ReasonConnection},
		{"reset", send(netOp(os.NewSyscallError("read", syscall.ECONNRESET))), keyguard.ReasonConnection},
		{"no route", send(netOp(os.NewSyscallError("connect", syscall.EHOSTUNREACH))), keyguard.ReasonConnection},
		{"cut", send(io.EOF), keyguard.ReasonConnection},
		{"cut in the answer", send(io.ErrUnexpectedEOF), keyguard.ReasonConnection},
		{"timeout", send(netOp(os.ErrDeadlineExceeded)), keyguard.ReasonTimeout},
		{"our deadline", &smithy.CanceledError{Err: context.DeadlineExceeded}, keyguard.ReasonTimeout},
		{"cancelled", &smithy.CanceledError{Err: context.Canceled}, keyguard.ReasonStopped},
		{"unknown CA", send(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}), keyguard.ReasonTLS},
		{"not TLS", send(tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}), keyguard.ReasonTLS},
		{"no TLS", send(http.ErrSchemeMismatch), keyguard.ReasonTLS},
		{"wrong host", send(x509.HostnameError{Certificate: &x509.Certificate{}, Host: "kms"}), keyguard.ReasonTLS},
		{"slow handshake", send(errors.New("net/http: TLS handshake timeout")), keyguard.ReasonTLS},
		{"no credentials", fmt.Errorf("get identity: %w", &credentialsError{errors.New("no EC2 IMDS role found")}), keyguard.ReasonCredentials},
		{"STS denies the role", fmt.Errorf("get identity: %w", &credentialsError{stsDenied}), keyguard.ReasonCredentials},
		{"unknown fault", send(errors.New("the moon is full")), keyguard.ReasonUnknownFault},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			k := classify("Decrypt", test.err)
			if k.State != keyguard.Unreachable || k.Reason != test.reason {
				t.Errorf("%v %v, want Unreachable %v", k.State, k.Reason, test.reason)
			}
		})
	}
}

func TestDenialNamesRoleAndAction(t *testing.T) {
	tests := []struct{ text, principal, action string }{
		{"User: arn:aws:sts::1:assumed-role/tenant/session is not authorized to perform: kms:GenerateDataKeyWithoutPlaintext on resource: x",
			"arn:aws:iam::1:role/tenant", "kms:GenerateDataKeyWithoutPlaintext"},
		{"User: arn:aws-cn:iam::1:user/path/bob is not authorized to perform: kms:Decrypt on this resource",
			"arn:aws-cn:iam::1:user/path/bob", "kms:Decrypt"},
		{"The ciphertext refers to a customer master key that does not exist", "", ""},
		{"", "", ""},
	}
	for _, test := range tests {
		if principal, action := denial(test.text); principal != test.principal || action != test.action {
			t.Errorf("%q: %q lacks %q, want %q lacks %q", test.text, principal, action, test.principal, test.action)
		}
	}
}
