package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// The ciphers of the format. All keys come from elsewhere, and nothing else of the
// package names a cipher: `bench -parts limits` measures a byokd with another file in
// the place of this one.

// newGCM returns AES-256-GCM with random nonces, the construction that FIPS
// 140-3 approves. The caller clears key.
func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// nameKeyLen is the length of a key of names.
const nameKeyLen = subtle.AESSIVKeySize

// deterministic seals names: the same to the same.
type deterministic interface {
	EncryptDeterministically(plain, associated []byte) ([]byte, error)
	DecryptDeterministically(sealed, associated []byte) ([]byte, error)
}

// newSIV returns AES-SIV. The caller clears key.
func newSIV(key []byte) (deterministic, error) {
	return subtle.NewAESSIV(bytes.Clone(key)) // it keeps the slice that it is given
}
