package seal

import (
	"crypto/aes"
	"crypto/cipher"
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

// nameKeyLen is the length of a key of names: CMAC's, and the counter mode's.
const nameKeyLen = 64

// deterministic seals names: the same to the same. It is no interface, so that what
// it is given may lie on the stack.
type deterministic = *siv

// newSIV returns AES-SIV. The caller clears key.
func newSIV(key []byte) (deterministic, error) {
	mac, err := aes.NewCipher(key[:nameKeyLen/2])
	if err != nil {
		return nil, err
	}
	ctr, err := aes.NewCipher(key[nameKeyLen/2:])
	if err != nil {
		return nil, err
	}
	return newAESSIV(mac, ctr), nil
}
