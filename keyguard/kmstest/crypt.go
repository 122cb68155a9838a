package kmstest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"
)

// A ciphertext is
//
//	version 1 | length of key id 1 | key id | material id 32 | nonce 12 | sealed | tag 16
//
// and everything before the nonce, followed by the encryption context, is
// authenticated with it. The region is not part of it: a ciphertext of a
// multi-Region primary opens under every replica.
const (
	ciphertextVersion = 0x01
	materialIDSize    = 32
	dataKeyLimit      = 1024
	plaintextLimit    = 4096
	ciphertextLimit   = 6144
)

func newMaterial(now time.Time) material {
	id, secret := make([]byte, materialIDSize), make([]byte, 32)
	rand.Read(id)
	rand.Read(secret)
	return material{ID: hex.EncodeToString(id), Secret: secret, Made: now}
}

// ciphertext is a parsed, not yet opened blob.
type ciphertext struct {
	keyID, materialID string
	head, sealed      []byte
}

func parseCiphertext(blob []byte) (ciphertext, bool) {
	if len(blob) < 2 || blob[0] != ciphertextVersion {
		return ciphertext{}, false
	}
	n := 2 + int(blob[1]) + materialIDSize
	if len(blob) < n+12+16 {
		return ciphertext{}, false
	}
	idEnd := 2 + int(blob[1])
	return ciphertext{
		keyID:      string(blob[2:idEnd]),
		materialID: hex.EncodeToString(blob[idEnd:n]),
		head:       blob[:n],
		sealed:     blob[n:],
	}, true
}

// encrypt seals plain under the current material of the key's family.
func (f *family) encrypt(keyID string, plain []byte, context map[string]string) []byte {
	m := f.current()
	id, err := hex.DecodeString(m.ID)
	if err != nil || len(id) != materialIDSize {
		panic("kmstest: malformed material id in the state")
	}
	blob := append([]byte{ciphertextVersion, byte(len(keyID))}, keyID...)
	blob = append(blob, id...)
	head := slices.Clone(blob)
	return newAEAD(m.Secret).Seal(blob, nil, plain, contextData(head, context))
}

// decrypt opens a parsed ciphertext; false when it is not of this family, was
// changed, or belongs to another encryption context.
func (f *family) decrypt(c ciphertext, context map[string]string) ([]byte, material, bool) {
	for _, m := range f.Materials {
		if m.ID != c.materialID {
			continue
		}
		plain, err := newAEAD(m.Secret).Open(nil, nil, c.sealed, contextData(c.head, context))
		return plain, m, err == nil
	}
	return nil, material{}, false
}

func newAEAD(secret []byte) cipher.AEAD {
	block, err := aes.NewCipher(secret)
	if err != nil {
		panic("kmstest: malformed key material in the state")
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// contextData is an unambiguous encoding of head and encryption context:
// entries sorted, every string with its length.
func contextData(head []byte, context map[string]string) []byte {
	out := slices.Clone(head)
	for _, name := range slices.Sorted(maps.Keys(context)) {
		for _, s := range []string{name, context[name]} {
			out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
			out = append(out, s...)
		}
	}
	return out
}

// newKeyID returns a random UUID, or mrk- and 32 hexadecimal digits.
func newKeyID(multiRegion bool) string {
	var raw [16]byte
	rand.Read(raw[:])
	if multiRegion {
		return "mrk-" + hex.EncodeToString(raw[:])
	}
	return formatUUID(raw)
}

func newRequestID() string {
	var raw [16]byte
	rand.Read(raw[:])
	return formatUUID(raw)
}

func formatUUID(raw [16]byte) string {
	raw[6] = raw[6]&0x0f | 0x40
	raw[8] = raw[8]&0x3f | 0x80
	h := hex.EncodeToString(raw[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// uniqueID is a stable id of a principal, as IAM gives them.
func uniqueID(prefix, arn string) string {
	sum := sha256.Sum256([]byte(arn))
	return prefix + strings.ToUpper(hex.EncodeToString(sum[:]))[:17]
}
