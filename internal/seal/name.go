package seal

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"sync"
)

const (
	// NameMax is the longest plain name in bytes: with AES-SIV's 16 bytes it is
	// 191, in base64 255, the limit of the lower filesystem.
	NameMax       = 175
	sealedNameMax = 255
)

// sealedText is unpadded base64url, and refuses bits that decode to nothing.
var sealedText = base64.RawURLEncoding.Strict()

var nameScratches = sync.Pool{New: func() any { return new(nameScratch) }}

func putNameScratch(s *nameScratch) {
	*s = nameScratch{}
	nameScratches.Put(s)
}

func (r *Root) nameCipher() (*nameCipher, error) {
	return once(r, &r.names, labelName, nameKeyLen, newNameCipher)
}

// SealName seals a file name. The same name always gives the same result under
// one Root, in every directory. Errors: ErrNameTooLong, ErrBadName, ErrWiped.
func (r *Root) SealName(name string) (string, error) {
	var buf [sealedNameMax]byte
	sealed, err := r.AppendSealName(buf[:0], name)
	return string(sealed), err
}

// AppendSealName is SealName that appends the sealed name, at most 255 bytes, to
// dst. It does not allocate when dst has the room.
func (r *Root) AppendSealName(dst []byte, name string) ([]byte, error) {
	if len(name) > NameMax {
		return dst, ErrNameTooLong
	}
	c, err := r.nameCipher()
	if err != nil {
		return dst, err
	}
	s := nameScratches.Get().(*nameScratch)
	defer putNameScratch(s)
	n := copy(s.raw[sivSize:], name)
	if !isName(s.raw[sivSize : sivSize+n]) {
		return dst, ErrBadName
	}
	raw := c.seal(s, n)
	sealedText.Encode(s.text[:], raw)
	return append(dst, s.text[:sealedText.EncodedLen(len(raw))]...), nil
}

// OpenName opens what SealName returned. A name that byokd cannot have written
// is ErrNotSealed; one that does not authenticate, or that no directory entry
// may have, is ErrTampered.
func (r *Root) OpenName(sealed string) (string, error) {
	var buf [NameMax]byte
	name, err := r.AppendOpenName(buf[:0], sealed)
	return string(name), err
}

// AppendOpenName is OpenName that appends the plain name, at most NameMax bytes,
// to dst. It does not allocate when dst has the room and nothing is wrong.
func (r *Root) AppendOpenName(dst []byte, sealed string) ([]byte, error) {
	if len(sealed) > sealedNameMax {
		return dst, fmt.Errorf("%w: a name of %d bytes", ErrNotSealed, len(sealed))
	}
	c, err := r.nameCipher()
	if err != nil {
		return dst, err
	}
	s := nameScratches.Get().(*nameScratch)
	defer putNameScratch(s)
	n, err := decodeText(s.raw[:], s.text[:copy(s.text[:], sealed)])
	if err != nil {
		return dst, err
	}
	if n <= sivSize {
		return dst, fmt.Errorf("%w: the name is too short", ErrNotSealed)
	}
	name, ok := c.open(s, n)
	if !ok {
		return dst, ErrTampered
	}
	if !isName(name) {
		return dst, fmt.Errorf("%w: not a file name", ErrTampered)
	}
	return append(dst, name...), nil
}

// isName refuses what no directory entry can be called, so that no sealed name,
// whoever made it, leads out of its directory.
func isName(name []byte) bool {
	switch {
	case len(name) == 0, len(name) == 1 && name[0] == '.', string(name) == "..":
		return false
	}
	return bytes.IndexByte(name, '/') < 0 && bytes.IndexByte(name, 0) < 0
}

// decodeText decodes canonical unpadded base64url into dst, which has the room:
// what decodes also encodes to the same text.
func decodeText(dst, text []byte) (int, error) {
	// encoding/base64 would skip line ends.
	if bytes.IndexByte(text, '\n') < 0 && bytes.IndexByte(text, '\r') < 0 {
		if n, err := sealedText.Decode(dst, text); err == nil {
			return n, nil
		}
	}
	return 0, fmt.Errorf("%w: not base64url", ErrNotSealed)
}
