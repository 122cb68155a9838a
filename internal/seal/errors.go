package seal

import "errors"

// The vocabulary of this package. Errors are wrapped with detail that never
// contains a key or plaintext; compare with errors.Is.
var (
	// ErrTampered: authentication failed, or an authenticated or strict field
	// holds what byokd never writes. The bytes were changed or belong elsewhere.
	ErrTampered = errors.New("seal: authentication failed")
	// ErrTruncated: fewer bytes than the format needs.
	ErrTruncated = errors.New("seal: truncated")
	// ErrUnknownVersion: byokd's magic with a version or suite of the future.
	ErrUnknownVersion = errors.New("seal: unknown format version")
	// ErrNotSealed: these bytes or this name were not written by byokd.
	ErrNotSealed = errors.New("seal: not a sealed format")
	// ErrWrongKey: sealed by byokd, but under another key than the given one.
	ErrWrongKey = errors.New("seal: sealed under another key")
	// ErrNameTooLong: a plain name of more than NameMax bytes.
	ErrNameTooLong = errors.New("seal: name too long")
	// ErrBadName: a plain name that no directory entry can have.
	ErrBadName = errors.New("seal: not a file name")
	// ErrTooLong: a value or field larger than its format can hold.
	ErrTooLong = errors.New("seal: too long for the format")
	// ErrImpossibleSize: no plain content seals to this size.
	ErrImpossibleSize = errors.New("seal: impossible size")
	// ErrWiped: the Root was wiped; its epoch is over.
	ErrWiped = errors.New("seal: key was wiped")
)
