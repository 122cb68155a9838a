package seal

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"
)

// RootSize is the length of a root key or bucket data key in bytes.
const RootSize = 32

// The labels of key derivation. One for each purpose, so that no key serves
// two; none is a prefix of another, since ids, salts and selectors follow.
const (
	labelBlock        = "byokd/v1/block"
	labelAttributes   = "byokd/v1/attributes"
	labelName         = "byokd/v1/name"
	labelTarget       = "byokd/v1/symlink"
	labelXattr        = "byokd/v1/xattr"
	labelMeta         = "byokd/v1/meta"
	labelVolume       = "byokd/v1/volume-header"
	labelMark         = "byokd/v1/volume-mark"
	labelObject       = "byokd/v1/object/segments"
	labelObjectCommit = "byokd/v1/object/commitment"
	labelUpload       = "byokd/v1/upload\x00" // of a hash, not of a key
	labelObjectHeader = "byokd/v1/object/header"
	labelKeyring      = "byokd/v1/keyring/mac"
	labelKeyringCheck = "byokd/v1/keyring/check"
)

const (
	keySize    = 32          // of every derived key but the name key
	derivedMax = 2 * keySize // of the name key
)

// Root is a volume's root key or a bucket's data key, and everything derived
// from it. It is safe for concurrent use. Except for ID and Wipe, its methods
// must run inside Do.
type Root struct {
	id     KeyID
	blocks atomic.Pointer[blockKeys] // nil after Wipe
	inodes atomic.Pointer[blockKeys] // of attributes; built at first use, nil after Wipe

	// Ciphers for texts, built at first use; nil after Wipe. That of names holds the
	// names remembered.
	names   atomic.Pointer[nameCipher]
	targets atomic.Pointer[cipher.AEAD]
	meta    atomic.Pointer[cipher.AEAD]

	objects objectMemo // empty after Wipe

	mu  sync.Mutex // guards what follows, and storing into the above
	prk []byte     // HKDF's extract of the root key; nil after Wipe
}

// NewRoot makes a Root of a 32-byte secret, which it copies; the caller clears
// its own slice. The id is the salt of all derivation, so it must be the same
// each time: for a volume's root key it is the volume's id, for a bucket's data
// key the id in its headers.
func NewRoot(id KeyID, secret []byte) (*Root, error) {
	if len(secret) != RootSize {
		return nil, fmt.Errorf("seal: a root key has %d bytes, not %d", RootSize, len(secret))
	}
	prk, err := hkdf.Extract(sha256.New, secret, id[:])
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	r := &Root{id: id, prk: prk}
	r.blocks.Store(&blockKeys{root: r, label: labelBlock})
	return r, nil
}

// ID returns the id given to NewRoot.
func (r *Root) ID() KeyID { return r.id }

// Wipe drops every key, cipher and name that r refers to; where ErasureGuaranteed,
// the collector clears them. A call that is under way finishes with the right keys;
// later ones return ErrWiped, and SealBlock panics if it needs a new key.
func (r *Root) Wipe() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.prk)
	r.prk = nil
	r.names.Store(nil)
	r.targets.Store(nil)
	r.meta.Store(nil)
	r.objects.forget()
	r.blocks.Store(nil)
	r.inodes.Store(nil)
}

// derive fills key, of at most derivedMax bytes, with HKDF-Expand(extract, label
// || context).
func (r *Root) derive(key []byte, label string, context ...[]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deriveLocked(key, label, context...)
}

// deriveLocked is derive for callers that hold r.mu.
func (r *Root) deriveLocked(key []byte, label string, context ...[]byte) error {
	if r.prk == nil {
		return ErrWiped
	}
	info := label + string(bytes.Join(context, nil))
	derived, err := hkdf.Expand(sha256.New, r.prk, info, len(key))
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	copy(key, derived)
	clear(derived)
	return nil
}

// once returns the cipher in slot, building it at first use.
func once[T any](r *Root, slot *atomic.Pointer[T], label string, size int, build func(key []byte) (T, error)) (*T, error) {
	if c := slot.Load(); c != nil {
		return c, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := slot.Load(); c != nil {
		return c, nil
	}
	var key [derivedMax]byte
	defer clear(key[:])
	if err := r.deriveLocked(key[:size], label); err != nil {
		return nil, err
	}
	c, err := build(key[:size])
	if err != nil {
		return nil, err
	}
	slot.Store(&c)
	return &c, nil
}
