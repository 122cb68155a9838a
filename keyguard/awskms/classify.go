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
	"os"
	"regexp"
	"strings"
	"syscall"
	"unicode"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/byokd/byokd/keyguard"
)

// meaning is one row of the table.
type meaning struct {
	state  keyguard.KeyState
	reason keyguard.Reason
}

// meanings maps AWS's error codes. A code that is not here is an unknown fault:
// an outage, never fine. KMSInvalidStateException is explained by invalidState.
func meanings() map[string]meaning {
	return map[string]meaning{
		// The owner has taken the key away.
		"DisabledException":     {keyguard.Disabled, keyguard.ReasonKeyDisabled},
		"NotFoundException":     {keyguard.Deleted, keyguard.ReasonKeyDeleted}, // the guard tells never seen from deleted
		"AccessDeniedException": {keyguard.AccessDenied, keyguard.ReasonAccessDenied},
		"AccessDenied":          {keyguard.AccessDenied, keyguard.ReasonAccessDenied},

		// Waiting would not help.
		"IncorrectKeyException":         {keyguard.Misconfigured, keyguard.ReasonWrongKey},
		"InvalidCiphertextException":    {keyguard.Misconfigured, keyguard.ReasonInvalidCiphertext},
		"InvalidKeyUsageException":      {keyguard.Misconfigured, keyguard.ReasonWrongKind},
		"UnsupportedOperationException": {keyguard.Misconfigured, keyguard.ReasonBadRequest},
		"InvalidArnException":           {keyguard.Misconfigured, keyguard.ReasonBadRequest},
		"ValidationException":           {keyguard.Misconfigured, keyguard.ReasonBadRequest},

		// KMS itself, or what stands behind it.
		"DependencyTimeoutException":          {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"DependencyTimeout":                   {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"KeyUnavailableException":             {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"KMSInternalException":                {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"InternalFailure":                     {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"InternalServerError":                 {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"InternalServiceException":            {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"ServiceUnavailable":                  {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"ServiceUnavailableException":         {keyguard.Unreachable, keyguard.ReasonServiceFault},
		"CustomKeyStoreInvalidStateException": {keyguard.Unreachable, keyguard.ReasonKeyStoreDown},
		"CustomKeyStoreNotFoundException":     {keyguard.Unreachable, keyguard.ReasonKeyStoreDown},
		"CloudHsmClusterNotActiveException":   {keyguard.Unreachable, keyguard.ReasonKeyStoreDown},
		"XksProxyUriUnreachableException":     {keyguard.Unreachable, keyguard.ReasonKeyStoreDown},
		"XksProxyInvalidResponseException":    {keyguard.Unreachable, keyguard.ReasonKeyStoreDown},

		// Our own standing with AWS.
		"ExpiredToken":                   {keyguard.Unreachable, keyguard.ReasonCredentials},
		"ExpiredTokenException":          {keyguard.Unreachable, keyguard.ReasonCredentials},
		"InvalidClientTokenId":           {keyguard.Unreachable, keyguard.ReasonCredentials},
		"InvalidAccessKeyId":             {keyguard.Unreachable, keyguard.ReasonCredentials},
		"UnrecognizedClientException":    {keyguard.Unreachable, keyguard.ReasonCredentials},
		"MissingAuthenticationToken":     {keyguard.Unreachable, keyguard.ReasonCredentials},
		"MissingAuthenticationException": {keyguard.Unreachable, keyguard.ReasonCredentials},
		"IncompleteSignature":            {keyguard.Unreachable, keyguard.ReasonCredentials},
		"IncompleteSignatureException":   {keyguard.Unreachable, keyguard.ReasonCredentials},
		"InvalidSignatureException":      {keyguard.Unreachable, keyguard.ReasonCredentials},
		"SignatureDoesNotMatch":          {keyguard.Unreachable, keyguard.ReasonCredentials},
		"OptInRequired":                  {keyguard.Unreachable, keyguard.ReasonCredentials},
		"NotAuthorized":                  {keyguard.Unreachable, keyguard.ReasonCredentials},
		"RequestExpired":                 {keyguard.Unreachable, keyguard.ReasonClockSkew},
		"RequestTimeTooSkewed":           {keyguard.Unreachable, keyguard.ReasonClockSkew},
		"RequestInTheFuture":             {keyguard.Unreachable, keyguard.ReasonClockSkew},
	}
}

// classify turns an error of the SDK into what it says about the key.
func classify(op string, err error) *keyguard.KMSError {
	k := &keyguard.KMSError{Op: op, State: keyguard.Unreachable, Reason: keyguard.ReasonUnknownFault, Err: trim(err)}
	var answered *awshttp.ResponseError
	var api smithy.APIError
	var noCredentials *credentialsError
	switch {
	case errors.As(err, &noCredentials):
		// First: the chain below may hold an AccessDenied of STS, which is about
		// our credentials and says nothing about the key.
		k.Reason = keyguard.ReasonCredentials
		return k
	case errors.As(err, &answered):
		k.RequestID = answered.ServiceRequestID()
	}
	if errors.As(err, &api) {
		fromAPI(k, api)
	}
	if k.Reason == keyguard.ReasonUnknownFault && (answered == nil || answered.HTTPStatusCode() == 0) { // an answer is whole, or there is none
		k.Reason = unanswered(err)
	}
	if k.Reason == keyguard.ReasonUnknownFault && answered != nil {
		fromStatus(k, answered.Response)
	}
	return k
}

// fromStatus reads what an answer without a known code may still say.
func fromStatus(k *keyguard.KMSError, answer *smithyhttp.Response) {
	if answer == nil || answer.Response == nil {
		return
	}
	status := answer.StatusCode
	switch {
	case status == http.StatusTooManyRequests:
		k.Reason = keyguard.ReasonThrottled
	case status >= http.StatusInternalServerError:
		k.Reason = keyguard.ReasonServiceFault
	case status >= http.StatusMultipleChoices && status < http.StatusBadRequest:
		// KMS sends nobody elsewhere: a proxy or a portal answers in its place.
		k.Err = trimmed{text: printable(fmt.Sprintf("HTTP %d to %q, which is no answer of KMS", status, answer.Header.Get("Location"))), err: k.Err}
	}
}

// fromAPI looks up what KMS answered.
func fromAPI(k *keyguard.KMSError, api smithy.APIError) {
	code, text := api.ErrorCode(), printable(api.ErrorMessage())
	if _, throttled := retry.DefaultThrottleErrorCodes[code]; throttled {
		k.Reason = keyguard.ReasonThrottled
		return
	}
	if code == "KMSInvalidStateException" {
		invalidState(k, text)
		return
	}
	row, known := meanings()[code]
	if !known {
		return
	}
	k.State, k.Reason = row.state, row.reason
	if row.state == keyguard.AccessDenied {
		k.Principal, k.Action = denial(text)
	}
	if code == "InvalidSignatureException" && (strings.Contains(text, "expired") || strings.Contains(text, "not yet current")) {
		k.Reason = keyguard.ReasonClockSkew
	}
}

// invalidState reads from the text which state it is. Only the states that an
// owner sets are taken from it; with anything else (a custom key store reports its
// failures so) DescribeKey must confirm.
func invalidState(k *keyguard.KMSError, text string) {
	text = strings.ToLower(text)
	switch {
	case strings.Contains(text, "pending deletion"), strings.Contains(text, "pending replica deletion"):
		k.State, k.Reason = keyguard.PendingDeletion, keyguard.ReasonPendingDeletion
	case strings.Contains(text, "pending import"):
		k.State, k.Reason = keyguard.Unavailable, keyguard.ReasonPendingImport
	case strings.Contains(text, "is disabled"):
		k.State, k.Reason = keyguard.Disabled, keyguard.ReasonKeyDisabled
	default:
		k.State, k.Reason, k.Ambiguous = keyguard.Unavailable, keyguard.ReasonInvalidState, true
	}
}

// unanswered names what kept a call from being answered.
func unanswered(err error) keyguard.Reason {
	var dns *net.DNSError
	var network net.Error
	switch {
	case errors.As(err, &dns):
		return keyguard.ReasonDNS
	case isTLS(err):
		return keyguard.ReasonTLS
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &network) && network.Timeout():
		return keyguard.ReasonTimeout
	case errors.Is(err, context.Canceled):
		return keyguard.ReasonStopped
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		isConnectionErrno(err):
		return keyguard.ReasonConnection
	default:
		var op *net.OpError
		if errors.As(err, &op) {
			return keyguard.ReasonConnection
		}
		return keyguard.ReasonUnknownFault
	}
}

func isTLS(err error) bool {
	var (
		verification *tls.CertificateVerificationError
		header       tls.RecordHeaderError
		alert        tls.AlertError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		invalid      x509.CertificateInvalidError
		roots        x509.SystemRootsError
	)
	return errors.As(err, &verification) || errors.As(err, &header) || errors.As(err, &alert) ||
		errors.Is(err, http.ErrSchemeMismatch) || // what answers does not speak TLS
		errors.As(err, &authority) || errors.As(err, &hostname) || errors.As(err, &invalid) || errors.As(err, &roots) ||
		strings.Contains(err.Error(), "TLS handshake timeout") // net/http keeps the type of this one to itself
}

func isConnectionErrno(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN, syscall.EADDRNOTAVAIL:
		return true
	default:
		return false
	}
}

// denial reads who lacks what from the text of an AccessDenied, as
// "User: arn:aws:sts::1:assumed-role/ROLE/SESSION is not authorized to perform: kms:Decrypt on resource: …".
func denial(text string) (principal, action string) {
	found := regexp.MustCompile(`User: (\S+) is not authorized to perform: ([A-Za-z0-9]+:[A-Za-z0-9*]+)`).FindStringSubmatch(text)
	if found == nil {
		return "", ""
	}
	return RoleARN(found[1]), found[2]
}

// RoleARN turns the ARN of a session into that of its role, which is what a key
// policy names. AWS leaves a role's path out of session ARNs: it cannot be restored.
func RoleARN(principal string) string {
	parsed, err := arn.Parse(principal)
	if err != nil || parsed.Service != "sts" {
		return principal
	}
	parts := strings.Split(parsed.Resource, "/")
	if len(parts) != 3 || parts[0] != "assumed-role" {
		return principal
	}
	parsed.Service, parsed.Resource = "iam", "role/"+parts[1]
	return parsed.String()
}

// trim drops the SDK's envelope (operation, attempt count, status, request id)
// from what people read; KMSError carries these by itself.
func trim(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) {
		return trimmed{text: printable(api.ErrorCode() + ": " + api.ErrorMessage()), err: err}
	}
	return err
}

// maxText bounds what is quoted of an answer, in bytes: KMS's longest messages, which
// name a role, a key and why, have some 400.
const maxText = 1000

// printable makes text from the network one that logs and terminals can show.
func printable(text string) string {
	if len(text) > maxText {
		text = text[:maxText] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(text, "�"))
}

type trimmed struct {
	text string
	err  error
}

func (t trimmed) Error() string { return t.text }
func (t trimmed) Unwrap() error { return t.err }

// credentialsError marks that no credentials could be had.
type credentialsError struct{ err error }

func (e *credentialsError) Error() string { return "AWS credentials: " + e.err.Error() }
func (e *credentialsError) Unwrap() error { return e.err }

// markedCredentials marks the errors of a provider.
type markedCredentials struct{ aws.CredentialsProvider }

func (m markedCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	c, err := m.CredentialsProvider.Retrieve(ctx)
	if err == nil && !c.HasKeys() {
		err = errors.New("the provider gave none")
	}
	if err != nil {
		return c, &credentialsError{err}
	}
	return c, nil
}

func markCredentials(p aws.CredentialsProvider) aws.CredentialsProvider {
	if p == nil {
		p = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{}, errors.New("none configured")
		})
	}
	return markedCredentials{p}
}
