// Not part of byokd. bench puts this file into the place of internal/seal/cipher.go
// (go build -overlay) to make a byokd that copies where it would seal and open: the
// limit of what faster cryptography could bring. What it writes can be read by
// nobody else, and it says so when it starts.

package seal

import (
	"bytes"
	"crypto/cipher"
	"errors"
	"os"
)

func init() {
	os.Stderr.WriteString("byokd: built by bench without cryptography: it copies and seals nothing\n")
}

// copying has the sizes of AES-GCM with random nonces: 12 bytes before, 16 behind.
type copying struct{}

const (
	before = 12
	behind = 16
)

var errShort = errors.New("not copied by this byokd")

func (copying) NonceSize() int { return 0 }
func (copying) Overhead() int  { return before + behind }

func (copying) Seal(dst, _, plain, _ []byte) []byte {
	start := len(dst)
	dst = grown(dst, before+len(plain)+behind)
	out := dst[start:]
	copy(out[before:], plain) // first: it may overlap
	for i := range before {
		out[i] = 0xff
	}
	clear(out[before+len(plain):])
	return dst
}

func (copying) Open(dst, _, sealed, _ []byte) ([]byte, error) {
	if len(sealed) < before+behind {
		return nil, errShort
	}
	start, plain := len(dst), sealed[before:len(sealed)-behind]
	dst = grown(dst, len(plain))
	copy(dst[start:], plain)
	return dst, nil
}

// grown is dst with n more bytes, in place where there is room.
func grown(dst []byte, n int) []byte {
	if need := len(dst) + n; need <= cap(dst) {
		return dst[:need]
	}
	return append(dst, make([]byte, n)...)
}

func newGCM([]byte) (cipher.AEAD, error) { return copying{}, nil }

const nameKeyLen = 64

type deterministic interface {
	EncryptDeterministically(plain, associated []byte) ([]byte, error)
	DecryptDeterministically(sealed, associated []byte) ([]byte, error)
}

type prefixing struct{}

func (prefixing) EncryptDeterministically(plain, _ []byte) ([]byte, error) {
	return append(bytes.Repeat([]byte{0xff}, sivSize), plain...), nil
}

func (prefixing) DecryptDeterministically(sealed, _ []byte) ([]byte, error) {
	return bytes.Clone(sealed[sivSize:]), nil
}

func newSIV([]byte) (deterministic, error) { return prefixing{}, nil }
