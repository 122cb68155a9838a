package objstore

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// Error is an answer that is no success, in the words of S3.
type Error struct {
	Status  int
	Code    string
	Message string // in the words of S3 where it has some; no keys, no plain bytes
	Hint    string // what to do about it; may be empty
	Details []Detail
	Cause   error
}

// Detail is a further element of an error document.
type Detail struct{ Name, Value string }

func (e *Error) Error() string {
	text := e.Code + ": " + e.Message
	if e.Hint != "" {
		text += " " + e.Hint
	}
	if e.Cause != nil {
		text += fmt.Sprintf(" (%v)", e.Cause)
	}
	return text
}

// hint adds what to do, and with a detail, to an error that nobody else holds yet.
func (e *Error) hint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

func (e *Error) with(name, value string) *Error {
	e.Details = append(e.Details, Detail{name, value})
	return e
}

// invalidArgument says which argument of a request is wrong.
func invalidArgument(name, value, format string, args ...any) *Error {
	return refuse(http.StatusBadRequest, "InvalidArgument", format, args...).with("ArgumentName", name).with("ArgumentValue", value)
}

// malformedXML says that a document of a request is none.
func malformedXML() *Error {
	return refuse(http.StatusBadRequest, "MalformedXML", "The XML you provided was not well-formed or did not validate against our published schema.")
}

// noSuchBucket says that a bucket is not configured.
func noSuchBucket() *Error {
	return refuse(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist.").hint("It is not one that byokd serves: add it under objects.buckets.")
}

func (e *Error) Unwrap() error { return e.Cause }

// refuse makes an Error.
func refuse(status int, code, format string, args ...any) *Error {
	return &Error{Status: status, Code: code, Message: fmt.Sprintf(format, args...)}
}

// Sentinels of this package.
var (
	// errHeld: a request waited Options.HoldFor for a frozen key.
	errHeld = errors.New("the key stayed frozen for as long as a request may wait")
	// errBroken: sealed bytes do not fit together although each is authentic.
	errBroken = errors.New("sealed object is not what its header and ETag announce")
	// errForeign: the object was not written through byokd.
	errForeign = errors.New("object was not sealed by byokd")
	// errOtherKMS: nothing at hand is wrapped by the bucket's KMS key.
	errOtherKMS = errors.New("sealed under another KMS key than the configured one")
	// errKeyring: the bucket's keyring is damaged, foreign or an old one.
	errKeyring = errors.New("the bucket's keyring (" + KeyringObject + ") cannot be used")
	// errKeyringFull: no room for another data key.
	errKeyringFull = errors.New("the bucket's keyring is full")
	// errChanged: the object was replaced while it was read.
	errChanged = errors.New("object changed while it was read")
)

// errorRow is one row of the table from causes to answers.
type errorRow struct {
	cause   error
	status  int
	code    string
	message string
}

// errorRows is the only table from causes to S3 answers; the first match wins.
// Damage is answered with a status that clients do not try again (422): the same
// bytes would fail the same way.
func errorRows() []errorRow {
	return []errorRow{
		{errHeld, http.StatusServiceUnavailable, "SlowDown", "External encryption key is not ready. The request may be tried again; byokd status names the cause."},
		{keyguard.ErrStopped, http.StatusServiceUnavailable, "ServiceUnavailable", "byokd is stopping. Try again in a moment."},
		{keyguard.ErrFrozen, http.StatusServiceUnavailable, "SlowDown", "External encryption key is not ready. The request may be tried again; byokd status names the cause."},
		{errOtherKMS, http.StatusUnprocessableEntity, "SealedUnderOtherKey", "The object, or the bucket's keyring, was sealed under another KMS key than the configured one. Move the bucket with byokd key rewrap, or name the former key again under objects.buckets.*.key."},
		{errKeyring, http.StatusInternalServerError, "KeyringBroken", "The bucket's list of data keys (" + KeyringObject + ") is damaged, foreign or was put back to an older one. Restore its newest version; docs/OPERATIONS.md says how to rebuild it."},
		{errForeign, http.StatusUnprocessableEntity, "NotSealed", "The object was not written through byokd and is not served. Read it from the upstream bucket directly, and write it again through byokd."},
		{seal.ErrTampered, http.StatusUnprocessableEntity, "SealBroken", "The object failed authentication: it was damaged or changed upstream. Restore it from a backup or an older version."},
		{seal.ErrNotSealed, http.StatusUnprocessableEntity, "NotSealed", "The object was not written through byokd and is not served. Read it from the upstream bucket directly, and write it again through byokd."},
		{seal.ErrUnknownVersion, http.StatusUnprocessableEntity, "SealUnknownVersion", "The object was sealed by a newer byokd. Upgrade byokd to read it."},
		{seal.ErrWrongKey, http.StatusUnprocessableEntity, "SealBroken", "The object's key does not fit its header: it was damaged or replaced upstream. Restore it from a backup or an older version."},
		{seal.ErrTruncated, http.StatusUnprocessableEntity, "SealBroken", "The object is shorter than its header says: it was cut upstream. Restore it from a backup or an older version."},
		{errBroken, http.StatusUnprocessableEntity, "SealBroken", "The object's parts do not fit together: it was changed upstream. Restore it from a backup or an older version."},
		{errChanged, http.StatusPreconditionFailed, "PreconditionFailed", "The object was replaced while it was read. Start the read again."},
		{errClientLeft, 499, "ClientLeft", "The client closed the connection."},
		{context.Canceled, 499, "ClientLeft", "The client closed the connection."},
		{context.DeadlineExceeded, http.StatusServiceUnavailable, "SlowDown", "The upstream did not answer in time. Try again."},
	}
}

// errorOf translates any error of this package into an answer.
func errorOf(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var up *UpstreamError
	if errors.As(err, &up) {
		return errorOfUpstream(up)
	}
	for _, row := range errorRows() {
		if errors.Is(err, row.cause) {
			return &Error{Status: row.status, Code: row.code, Message: row.message, Cause: err}
		}
	}
	return &Error{Status: http.StatusInternalServerError, Code: "InternalError", Message: "byokd could not answer; its log has the cause under this request id.", Cause: err}
}

// errorOfUpstream hands the upstream's answer on where it is about the object,
// and explains it where it is about byokd's own rights.
func errorOfUpstream(up *UpstreamError) *Error {
	switch {
	case up.Status == 0:
		return &Error{Status: http.StatusServiceUnavailable, Code: "ServiceUnavailable", Message: "The S3 service below byokd could not be reached. Check objects.buckets.*.upstream and the network; the request may be tried again.", Cause: up}
	case up.Status == http.StatusUnauthorized, up.Code == "InvalidAccessKeyId", up.Code == "SignatureDoesNotMatch", up.Code == "ExpiredToken", up.Code == "InvalidToken":
		return &Error{Status: http.StatusForbidden, Code: "AccessDenied", Message: "The S3 service below byokd refused byokd's own credentials (" + up.Code + "). Check the role or keys byokd runs under.", Cause: up}
	case up.Status == http.StatusForbidden && (up.Code == "" || up.Code == "Forbidden"): // the answer to a HEAD cannot name its code
		return &Error{Status: http.StatusForbidden, Code: "AccessDenied", Message: "Access Denied.", Hint: "The S3 service below byokd refused this operation to byokd's own role.", Cause: up}
	case up.Code == "AccessDenied":
		return &Error{Status: http.StatusForbidden, Code: "AccessDenied", Message: up.Message, Hint: "The S3 service below byokd refused this operation to byokd's own role.", Cause: up}
	case up.Status == http.StatusNotFound && (up.Code == "" || up.Code == "NotFound"):
		return &Error{Status: http.StatusNotFound, Code: "NoSuchKey", Message: "The specified key does not exist.", Cause: up}
	case up.Code == "NoSuchBucket":
		return &Error{Status: http.StatusNotFound, Code: "NoSuchBucket", Message: up.Message, Hint: "The bucket configured under objects.buckets.*.upstream does not exist. Create it, or correct the name.", Cause: up}
	case up.Status == http.StatusBadRequest && up.Code == "RequestTimeout", up.Code == "IncompleteBody":
		return &Error{Status: http.StatusServiceUnavailable, Code: "SlowDown", Message: "The upload paused for longer than the S3 service below byokd waits. Try again.", Cause: up}
	case up.Code == "InvalidRequest" && strings.Contains(up.Message, "x-amz-checksum-"): // S3 has no code of its own for it
		return &Error{Status: up.Status, Code: up.Code, Message: up.Message, Hint: "The upstream bucket demands checksums: set objects.buckets.*.upstream.checksums to send (its endpoint has to be https).", Cause: up}
	case up.Code == "":
		return &Error{Status: up.Status, Code: http.StatusText(up.Status), Message: up.Message, Cause: up}
	}
	return &Error{Status: up.Status, Code: up.Code, Message: up.Message, Cause: up}
}

// refusesByokd reports whether the upstream refused byokd itself, by its configuration or its rights, and not what the
// client asked for.
func refusesByokd(err error) bool {
	up, ok := asUpstream(err)
	if !ok {
		return false
	}
	switch up.Code {
	case "NoSuchBucket", "ExpiredToken", "InvalidToken":
		return true
	case "InvalidObjectState": // archived: about the object
		return false
	}
	return up.Status == http.StatusUnauthorized || up.Status == http.StatusForbidden
}

// upstreamUnusable reports whether a request failed because the upstream bucket cannot be used at all, or not for what
// every client does. Access that is denied to anything else says little: an object under retention is not deleted either,
// and clients ask for settings that byokd's role need not read.
func upstreamUnusable(op Op, err error) bool {
	up, ok := asUpstream(err)
	switch {
	case !ok || errorOf(err).Cause != up: // what became of the request on its way up: a body that is refused, a key that is away
		return false
	case up.Status == 0:
		return !errors.Is(err, keyguard.ErrFrozen) && !errors.Is(err, keyguard.ErrStopped)
	case up.Status >= http.StatusInternalServerError:
		return up.Status != http.StatusNotImplemented && up.Code != "SlowDown"
	case up.Status == http.StatusForbidden && (up.Code == "" || up.Code == "Forbidden" || up.Code == "AccessDenied"):
		return slices.Contains(everyday, op)
	}
	return refusesByokd(err)
}

// everyday is what a store is for: byokd's role has to be allowed what these need.
var everyday = []Op{OpListObjects, OpListObjectsV2, OpGetObject, OpHeadObject, OpPutObject, OpCopyObject,
	OpCreateMultipartUpload, OpUploadPart, OpUploadPartCopy, OpCompleteMultipartUpload}

// errorIsTampering reports whether err says that sealed bytes were damaged.
func errorIsTampering(err error) bool {
	return errors.Is(err, seal.ErrTampered) || errors.Is(err, seal.ErrTruncated) ||
		errors.Is(err, seal.ErrWrongKey) || errors.Is(err, errBroken)
}

// xmlError is the error document.
type xmlError struct {
	XMLName    xml.Name `xml:"Error"`
	Code       string
	Message    string
	BucketName string `xml:",omitempty"`
	Key        string `xml:",omitempty"`
	Resource   string
	Details    []xmlDetail
	Hint       string `xml:",omitempty"`
	RequestID  string `xml:"RequestId"`
	HostID     string `xml:"HostId"`
}

type xmlDetail struct {
	XMLName xml.Name
	Value   string `xml:",chardata"`
}

// writeError answers a request that has not been answered yet.
func (p *Proxy) writeError(c *call, err error) {
	e := errorOf(err)
	h := c.w.header()
	for name := range h { // what describes an object that is not sent, plain metadata among it
		if name != "X-Amz-Request-Id" && name != "Server" {
			delete(h, name)
		}
	}
	if e.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", strconv.Itoa(retryAfterSeconds))
	}
	if e.Status == http.StatusNotModified || c.r.Method == http.MethodHead {
		// Neither has a body. The code of a HEAD travels in no other place.
		c.w.begin(e.Status)
		return
	}
	doc := xmlError{Code: e.Code, Message: e.Message, Hint: e.Hint, Key: c.key, Resource: c.r.URL.Path, RequestID: c.id, HostID: "byokd"}
	if _, is := asUpstream(err); is && len(e.Details) == 0 && c.w.passing != nil {
		e.Details = c.w.passing.errorDetails()
	}
	for _, d := range e.Details {
		doc.Details = append(doc.Details, xmlDetail{xml.Name{Local: d.Name}, d.Value})
	}
	if c.bucket != nil {
		doc.BucketName = c.bucket.name
		if errors.Is(err, errHeld) {
			s := c.bucket.Guard.Status()
			doc.Message = s.Headline() + ". " + s.Cause() + " " + s.NextStep()
		}
	}
	writeXML(c.w, e.Status, doc)
}

// errShortBody: a source ended before its announced length.
var errShortBody = refuse(http.StatusBadRequest, "IncompleteBody", "You did not provide the number of bytes specified by the Content-Length HTTP header")
