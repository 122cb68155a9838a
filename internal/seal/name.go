package seal

import (
	"encoding/base64"
	"fmt"
	"strings"
)

const (
	// NameMax is the longest plain name in bytes: with AES-SIV's 16 bytes it is
	// 191, in base64 255, the limit of the lower filesystem.
	NameMax       = 175
	sealedNameMax = 255
	sivSize       = 16
)

// sealedText is unpadded base64url, and refuses bits that decode to nothing.
var sealedText = base64.RawURLEncoding.Strict()

// SealName seals a file name. The same name always gives the same result under
// one Root, in every directory. Errors: ErrNameTooLong, ErrBadName, ErrWiped.
func (r *Root) SealName(name string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	if err := r.hold(); err != nil {
		return "", err
	}
	defer r.mu.RUnlock()
	siv, err := r.names()
	if err != nil {
		return "", err
	}
	sealed, err := siv.EncryptDeterministically([]byte(name), nil)
	if err != nil {
		return "", err
	}
	return sealedText.EncodeToString(sealed), nil
}

// OpenName opens what SealName returned. A name that byokd cannot have written
// is ErrNotSealed; one that does not authenticate, or that no directory entry
// may have, is ErrTampered.
func (r *Root) OpenName(sealed string) (string, error) {
	if len(sealed) > sealedNameMax {
		return "", fmt.Errorf("%w: a name of %d bytes", ErrNotSealed, len(sealed))
	}
	raw, err := decodeText(sealed)
	if err != nil {
		return "", err
	}
	if len(raw) <= sivSize {
		return "", fmt.Errorf("%w: the name is too short", ErrNotSealed)
	}
	if err := r.hold(); err != nil {
		return "", err
	}
	defer r.mu.RUnlock()
	siv, err := r.names()
	if err != nil {
		return "", err
	}
	plain, err := siv.DecryptDeterministically(raw, nil)
	if err != nil {
		return "", ErrTampered
	}
	name := string(plain)
	if checkName(name) != nil {
		return "", fmt.Errorf("%w: not a file name", ErrTampered)
	}
	return name, nil
}

// checkName refuses what no directory entry can be called.
func checkName(name string) error {
	switch {
	case len(name) > NameMax:
		return ErrNameTooLong
	case name == "", name == ".", name == "..", strings.ContainsAny(name, "/\x00"):
		return ErrBadName
	}
	return nil
}

// decodeText decodes canonical unpadded base64url: what decodes also encodes to
// the same text.
func decodeText(text string) ([]byte, error) {
	if strings.ContainsAny(text, "\r\n") { // which encoding/base64 would skip
		return nil, fmt.Errorf("%w: not base64url", ErrNotSealed)
	}
	raw, err := sealedText.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: not base64url", ErrNotSealed)
	}
	return raw, nil
}
