package keyguard

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Binding names what a key protects. It is KMS's encryption context:
// authenticated with every wrapped key and visible in CloudTrail. It must not
// hold secrets. The zero fields are left out.
type Binding struct {
	Cluster  string // cluster id
	Resource string // volume id or bucket
	Tenant   string // optional
}

// Context gives the KMS encryption context: byokd:cluster, byokd:resource and
// byokd:tenant, without the empty ones.
func (b Binding) Context() map[string]string {
	m := make(map[string]string, 3)
	for name, value := range map[string]string{
		"byokd:cluster": b.Cluster, "byokd:resource": b.Resource, "byokd:tenant": b.Tenant} {
		if value != "" {
			m[name] = value
		}
	}
	return m
}

// BindingOf reads a binding back from an encryption context.
func BindingOf(context map[string]string) Binding {
	return Binding{Cluster: context["byokd:cluster"], Resource: context["byokd:resource"], Tenant: context["byokd:tenant"]}
}

// Receipt identifies one answered KMS call, so that our audit line joins CloudTrail's.
type Receipt struct {
	RequestID string
	KeyARN    string // the key that KMS says it used
}

// Description is what DescribeKey tells. It explains; it never opens the gate.
type Description struct {
	State         KeyState
	Reason        Reason
	Raw           string    // KMS's own word, e.g. PendingReplicaDeletion
	Problem       string    // for Misconfigured: what is wrong with the key
	DeletionDate  time.Time // PendingDeletion only
	ValidTo       time.Time // imported material that expires
	MultiRegion   bool
	Replicas      []string // ARNs of the other keys of a multi-Region set
	Origin        string
	KeyMaterialID string
	RequestID     string
}

// KMS is one KMS key. Implementations are safe for concurrent use, do not
// retry, honour ctx, and return errors on which StateOf, ReasonOf and
// RequestIDOf work (normally *KMSError). Plaintext handed to use is valid only
// during the call, which runs inside seal.Do, and is cleared afterwards.
type KMS interface {
	// ARN names the key; constant.
	ARN() string
	// GenerateProbe makes a probe ciphertext without ever seeing a plaintext.
	GenerateProbe(ctx context.Context, b Binding) (ciphertext []byte, _ Receipt, _ error)
	// Probe asks KMS to decrypt a probe ciphertext: the question "may I use this key now?".
	Probe(ctx context.Context, ciphertext []byte, b Binding) (Receipt, error)
	// GenerateDataKey makes a 32-byte data key. An error of use is returned as it is.
	GenerateDataKey(ctx context.Context, b Binding, use func(plain []byte) error) (wrapped []byte, _ Receipt, _ error)
	// Unwrap decrypts a wrapped data key. An error of use is returned as it is.
	Unwrap(ctx context.Context, wrapped []byte, b Binding, use func(plain []byte) error) (Receipt, error)
	// Describe explains the key's state.
	Describe(ctx context.Context) (Description, error)
}

// SiblingDescriber is what a KMS may do besides: tell the state of another key of
// the same multi-Region set. Calls go to that key's Region.
type SiblingDescriber interface {
	DescribeSibling(ctx context.Context, keyARN string) (Description, error)
}

// Reconnector is what a KMS may do besides: give up the connections that it keeps for
// later calls. A firewall that has forgotten one has forgotten the others too, and each
// would swallow a call.
type Reconnector interface {
	Reconnect()
}

// SameKey reports whether two ARNs name keys that decrypt each other's
// ciphertexts: the same key, or the primary and a replica of one multi-Region key,
// which share their material and the id mrk-… in one account.
func SameKey(a, b string) bool {
	if a == b {
		return true
	}
	x, y := strings.SplitN(a, ":", 6), strings.SplitN(b, ":", 6) // arn:partition:kms:region:account:key/id
	return len(x) == 6 && len(y) == 6 && x[1] == y[1] && x[2] == "kms" && y[2] == "kms" && x[4] == y[4] &&
		x[5] == y[5] && strings.HasPrefix(x[5], "key/mrk-")
}

// Reason is a short stable word for why a key is in its state: a metric label
// and audit field, from a bounded list.
type Reason string

// The reasons.
const (
	ReasonNone              Reason = ""
	ReasonKeyDisabled       Reason = "key_disabled"
	ReasonPendingDeletion   Reason = "pending_deletion"
	ReasonKeyDeleted        Reason = "key_deleted"
	ReasonKeyNotFound       Reason = "key_not_found" // at first contact: wrong ARN, or deleted before
	ReasonAccessDenied      Reason = "access_denied"
	ReasonInvalidState      Reason = "invalid_state" // KMSInvalidStateException, not explained yet
	ReasonPendingImport     Reason = "pending_import"
	ReasonKeyStoreDown      Reason = "custom_key_store"
	ReasonKeyCreating       Reason = "key_creating"
	ReasonWrongKey          Reason = "wrong_key"          // IncorrectKey: ciphertext of another key
	ReasonInvalidCiphertext Reason = "invalid_ciphertext" // damaged, or another encryption context
	ReasonWrongKind         Reason = "wrong_key_kind"     // not symmetric ENCRYPT_DECRYPT
	ReasonWrongRegion       Reason = "wrong_region"
	ReasonBadRequest        Reason = "bad_request" // malformed ARN, unsupported operation
	ReasonThrottled         Reason = "throttled"
	ReasonServiceFault      Reason = "kms_fault" // 5xx, KMSInternal, DependencyTimeout, KeyUnavailable
	ReasonTimeout           Reason = "timeout"
	ReasonDNS               Reason = "dns"
	ReasonTLS               Reason = "tls"
	ReasonConnection        Reason = "connection" // refused, reset, cut, no route
	ReasonCredentials       Reason = "credentials"
	ReasonClockSkew         Reason = "clock_skew"
	ReasonSlow              Reason = "slow" // answers, but slower than a probe interval
	ReasonUnknownFault      Reason = "unknown_fault"
	ReasonStopped           Reason = "stopped"
	ReasonOperator          Reason = "operator" // frozen or thawed on request; says nothing about the key
)

// Reasons lists every reason, for label sets and documentation.
func Reasons() []Reason {
	return []Reason{ReasonNone, ReasonKeyDisabled, ReasonPendingDeletion, ReasonKeyDeleted,
		ReasonKeyNotFound, ReasonAccessDenied, ReasonInvalidState, ReasonPendingImport,
		ReasonKeyStoreDown, ReasonKeyCreating, ReasonWrongKey, ReasonInvalidCiphertext,
		ReasonWrongKind, ReasonWrongRegion, ReasonBadRequest, ReasonThrottled, ReasonServiceFault,
		ReasonTimeout, ReasonDNS, ReasonTLS, ReasonConnection, ReasonCredentials, ReasonClockSkew,
		ReasonSlow, ReasonUnknownFault, ReasonStopped, ReasonOperator}
}

// KMSError is a failed KMS call, classified. Text never holds key material.
type KMSError struct {
	Op        string   // e.g. Decrypt
	State     KeyState // what the failure says about the key; never Enabled
	Reason    Reason
	Ambiguous bool   // State is a guess until Describe confirms it (KMSInvalidStateException)
	RequestID string // empty if KMS was never reached
	Action    string // AccessDenied: missing action, e.g. kms:Decrypt, if KMS said so
	Principal string // AccessDenied: ARN of the role that lacks it, if KMS said so
	Err       error  // the cause
}

// Error gives operation, reason and cause.
func (e *KMSError) Error() string {
	if e.RequestID != "" {
		return fmt.Sprintf("kms %s: %s (request %s): %v", e.Op, e.Reason, e.RequestID, e.Err)
	}
	return fmt.Sprintf("kms %s: %s: %v", e.Op, e.Reason, e.Err)
}

// Unwrap gives the cause.
func (e *KMSError) Unwrap() error { return e.Err }

// StateOf tells what err says about the key: Enabled for nil, the classified
// state of a KMSError, and Unreachable for everything else, for an unknown
// fault is never fine.
func StateOf(err error) KeyState {
	if err == nil {
		return Enabled
	}
	var k *KMSError
	if errors.As(err, &k) && k.State != Unknown && k.State != Enabled {
		return k.State
	}
	return Unreachable
}

// ReasonOf gives the reason of a KMSError, "" for nil, unknown_fault otherwise.
func ReasonOf(err error) Reason {
	var k *KMSError
	switch {
	case err == nil:
		return ReasonNone
	case errors.As(err, &k) && k.Reason != ReasonNone:
		return k.Reason
	default:
		return ReasonUnknownFault
	}
}

// operationOf gives the KMS operation behind err, or "".
func operationOf(err error) string {
	var k *KMSError
	if errors.As(err, &k) {
		return k.Op
	}
	return ""
}

// RequestIDOf gives the KMS request id behind err, or "".
func RequestIDOf(err error) string {
	var k *KMSError
	if errors.As(err, &k) {
		return k.RequestID
	}
	return ""
}

// The guard's own errors.
var (
	// ErrFrozen: the epoch of the pass has ended; drop the result and enter again.
	ErrFrozen = errors.New("keyguard: the key may not be used: frozen")
	// ErrStopped: the guard's Run has ended.
	ErrStopped = errors.New("keyguard: stopped")
	// ErrMisconfigured: Run refuses to start, or a wrapped key does not belong
	// to this key and binding; waiting would not help.
	ErrMisconfigured = errors.New("keyguard: misconfigured")
)
