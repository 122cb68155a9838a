package seal

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// IDSize is the length of an ID in bytes.
const IDSize = 16

// ID names a file, volume, object or key: 16 random bytes. It is no secret.
type ID [IDSize]byte

// The kinds of ID. They are one type, because a volume's id is also the id of
// its root key.
type (
	FileID   = ID
	VolumeID = ID
	ObjectID = ID
	KeyID    = ID
)

// NewID returns a random ID.
func NewID() ID {
	var id ID
	rand.Read(id[:]) // never fails: crypto/rand ends the program instead
	return id
}

// ParseID reads what String wrote: 32 lower-case hexadecimal digits.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*IDSize {
		return ID{}, fmt.Errorf("%w: an id has %d hexadecimal digits", ErrNotSealed, 2*IDSize)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil || id.String() != s {
		return ID{}, fmt.Errorf("%w: an id is lower-case hexadecimal", ErrNotSealed)
	}
	return id, nil
}

// String returns the ID as 32 lower-case hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// IsZero tells whether the ID was never set.
func (id ID) IsZero() bool { return id == ID{} }
