package kmstest

import (
	"fmt"
	"net/http"
)

// apiError is an error as AWS puts it on the wire. It is immutable.
type apiError struct {
	Code    string // e.g. "DisabledException"
	Message string
	Status  int // HTTP status; 400 for every fault of the caller, as KMS answers
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func clientError(code, format string, args ...any) *apiError {
	return &apiError{Code: code, Message: fmt.Sprintf(format, args...), Status: http.StatusBadRequest}
}

func errNotFound(format string, args ...any) *apiError {
	return clientError("NotFoundException", format, args...)
}

func errKeyNotFound(arn string) *apiError {
	return errNotFound("Key '%s' does not exist", arn)
}

func errAliasNotFound(arn string) *apiError {
	return errNotFound("Alias %s is not found.", arn)
}

func errDisabled(arn string) *apiError {
	return clientError("DisabledException", "%s is disabled.", arn)
}

func errInvalidState(arn, what string) *apiError {
	return clientError("KMSInvalidStateException", "%s %s.", arn, what)
}

func errInvalidArn(format string, args ...any) *apiError {
	return clientError("InvalidArnException", format, args...)
}

func errValidation(format string, args ...any) *apiError {
	return clientError("ValidationException", format, args...)
}

// errConstraint words a violated constraint of the service model the way AWS does.
func errConstraint(value, member, constraint string) *apiError {
	return errValidation("1 validation error detected: Value '%s' at '%s' failed to satisfy constraint: %s",
		value, member, constraint)
}

func errMissing(member string) *apiError {
	return errValidation("1 validation error detected: Value null at '%s' failed to satisfy constraint: Member must not be null", member)
}

func errMalformedPolicy(format string, args ...any) *apiError {
	return clientError("MalformedPolicyDocumentException", format, args...)
}

func errUnsupported(format string, args ...any) *apiError {
	return clientError("UnsupportedOperationException", format, args...)
}

func errInvalidCiphertext() *apiError {
	return clientError("InvalidCiphertextException", "")
}

func errIncorrectKey() *apiError {
	return clientError("IncorrectKeyException",
		"The key ID in the request does not identify a CMK that can perform this operation.")
}

func errLimit(format string, args ...any) *apiError {
	return clientError("LimitExceededException", format, args...)
}

// errDryRun is the success of a dry run.
func errDryRun() *apiError {
	return clientError("DryRunOperationException",
		"The request would have succeeded, but the DryRun option is set.")
}

func errInternal(err error) *apiError {
	return &apiError{Code: "KMSInternalException", Message: err.Error(), Status: http.StatusInternalServerError}
}

// denial says which kind of policy stood in the way; AWS tells the caller.
type denial uint8

const (
	noResourcePolicy denial = iota // no statement of the key policy and no grant allows it
	noIdentityPolicy               // nothing names a key: only the caller's own IAM policy could allow it
	explicitDeny                   // a Deny statement of the key policy matched
)

func errAccessDenied(principal, action, resource string, why denial) *apiError {
	reason := fmt.Sprintf("because no resource-based policy allows the %s action", action)
	switch why {
	case noIdentityPolicy:
		reason = fmt.Sprintf("because no identity-based policy allows the %s action", action)
	case explicitDeny:
		reason = "with an explicit deny in a resource-based policy"
	}
	return clientError("AccessDeniedException", "User: %s is not authorized to perform: %s on resource: %s %s",
		principal, action, resource, reason)
}
