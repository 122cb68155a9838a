package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// RootSize is the length of a root key or bucket data key in bytes.
const RootSize = 32

// The labels of key derivation: HKDF's info. One for each purpose, so that no
// key serves two; a label that is followed by more data is a prefix of no other.
const (
	labelFile         = "byokd/v1/file"
	labelName         = "byokd/v1/name"
	labelTarget       = "byokd/v1/symlink"
	labelXattr        = "byokd/v1/xattr"
	labelMeta         = "byokd/v1/meta"
	labelVolume       = "byokd/v1/volume-header"
	labelObject       = "byokd/v1/object/segments"
	labelObjectCommit = "byokd/v1/object/commitment"
	labelObjectHeader = "byokd/v1/object/header"
)

// Root is a volume's root key or a bucket's data key, and everything derived
// from it. It is safe for concurrent use. Except for ID, ForgetFile and Wipe,
// its methods must run inside Do.
type Root struct {
	id    KeyID
	files fileMemo

	mu      sync.RWMutex   // held for reading while a key is derived or a text sealed, for writing by Wipe
	wiped   bool           // by mu
	secret  [RootSize]byte // by mu; cleared by Wipe
	nameKey [subtle.AESSIVKeySize]byte

	names   func() (*subtle.AESSIV, error) // each builds its cipher at first use; by mu, nil once wiped
	targets func() (cipher.AEAD, error)
	meta    func() (cipher.AEAD, error)
}

// NewRoot makes a Root of a 32-byte secret, which it copies; the caller clears
// its own slice. The id takes part in deriving the keys of names, symlink
// targets and metadata, so it must be the same each time: for a volume's root
// key it is the volume's id, for a bucket's data key the id in its headers.
func NewRoot(id KeyID, secret []byte) (*Root, error) {
	if len(secret) != RootSize {
		return nil, fmt.Errorf("seal: a root key has %d bytes, not %d", RootSize, len(secret))
	}
	r := &Root{id: id, secret: [RootSize]byte(secret)}
	r.files.init()
	r.names = sync.OnceValues(r.buildNames)
	r.targets = sync.OnceValues(func() (cipher.AEAD, error) { return r.buildAEAD(r.id, labelTarget) })
	r.meta = sync.OnceValues(func() (cipher.AEAD, error) { return r.buildAEAD(r.id, labelMeta) })
	return r, nil
}

// ID returns the id given to NewRoot.
func (r *Root) ID() KeyID { return r.id }

// Wipe drops every cipher and clears every key that r owns. Whoever still
// derives or seals a text finishes first; later calls return ErrWiped. Cipher
// objects themselves are cleared by the collector, where ErasureGuaranteed.
func (r *Root) Wipe() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wiped = true
	clear(r.secret[:])
	clear(r.nameKey[:])
	r.names, r.targets, r.meta = nil, nil, nil
	r.files.wipe()
}

// hold takes r.mu for reading, unless r was wiped. The caller releases it.
func (r *Root) hold() error {
	r.mu.RLock()
	if r.wiped {
		r.mu.RUnlock()
		return ErrWiped
	}
	return nil
}

// derive returns HKDF-SHA256(secret, salt, label || context). r.mu is held.
func (r *Root) derive(salt []byte, label string, size int) ([]byte, error) {
	return hkdf.Key(sha256.New, r.secret[:], salt, label, size)
}

// buildAEAD derives a key for one kind and salt, and its cipher. r.mu is held.
func (r *Root) buildAEAD(salt ID, label string) (cipher.AEAD, error) {
	key, err := r.derive(salt[:], label, aesKeySize)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return newGCM(key)
}

func (r *Root) buildNames() (*subtle.AESSIV, error) {
	key, err := r.derive(r.id[:], labelName, subtle.AESSIVKeySize)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	copy(r.nameKey[:], key) // AESSIV keeps referring to it
	return subtle.NewAESSIV(r.nameKey[:])
}

const aesKeySize = 32

// newGCM returns AES-256-GCM with random nonces, the construction that FIPS
// 140-3 approves. The caller clears key.
func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
