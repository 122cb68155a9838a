package seal

import (
	"crypto/cipher"
	"fmt"
)

const (
	// TargetMax is the longest symlink target in bytes that fits a lower symlink
	// of PATH_MAX-1 = 4095 bytes: 3071 bytes before base64. Lower filesystems may
	// hold less: XFS stops at 1024 sealed bytes, which are 740 plain ones.
	TargetMax       = sealedTargetMax/4*3 + sealedTargetMax%4*3/4 - SegmentOverhead
	sealedTargetMax = 4095

	// XattrOverhead is what sealing adds to the value of an extended attribute.
	XattrOverhead = 1 + nonceSize + tagSize

	textVersion = 1
)

// SealTarget seals the target of a symlink as the target of a lower symlink:
// base64url, without '/' or NUL. A symlink has no id of its own and may be
// renamed and linked, so it is bound to its kind and Root only.
// Errors: ErrTooLong above TargetMax, ErrWiped.
func (r *Root) SealTarget(target []byte) ([]byte, error) {
	if len(target) > TargetMax {
		return nil, fmt.Errorf("%w: a symlink target of %d bytes", ErrTooLong, len(target))
	}
	aead, err := once(r, &r.targets, labelTarget, keySize, newGCM)
	if err != nil {
		return nil, err
	}
	return sealedText.AppendEncode(nil, (*aead).Seal(nil, nil, target, []byte(labelTarget))), nil
}

// TargetSize returns the length of the target that a sealed one of this length
// holds, 0 where none can be. It is arithmetic: OpenTarget authenticates.
func TargetSize(sealed int64) int64 {
	return max(0, int64(sealedText.DecodedLen(int(min(max(sealed, 0), sealedTargetMax))))-SegmentOverhead)
}

// OpenTarget opens what SealTarget returned.
func (r *Root) OpenTarget(sealed []byte) ([]byte, error) {
	if len(sealed) > sealedTargetMax {
		return nil, fmt.Errorf("%w: a symlink target of %d bytes", ErrNotSealed, len(sealed))
	}
	raw, err := decodeText(string(sealed))
	if err != nil {
		return nil, err
	}
	if len(raw) < SegmentOverhead {
		return nil, fmt.Errorf("%w: the symlink target is too short", ErrNotSealed)
	}
	aead, err := once(r, &r.targets, labelTarget, keySize, newGCM)
	if err != nil {
		return nil, err
	}
	plain, err := (*aead).Open(nil, nil, raw, []byte(labelTarget))
	if err != nil {
		return nil, ErrTampered
	}
	return plain, nil
}

// SealXattr seals the value of an extended attribute: XattrOverhead bytes more
// than the value. It is bound to the file and the attribute's name. It derives a
// key each time; attributes are not a hot path.
func (r *Root) SealXattr(file FileID, name string, value []byte) ([]byte, error) {
	aead, err := r.xattrCipher(file)
	if err != nil {
		return nil, err
	}
	sealed := make([]byte, 1, XattrOverhead+len(value))
	sealed[0] = textVersion
	return aead.Seal(sealed, nil, value, xattrAD(file, name)), nil
}

// OpenXattr opens what SealXattr returned for the same file and name.
func (r *Root) OpenXattr(file FileID, name string, sealed []byte) ([]byte, error) {
	if len(sealed) < XattrOverhead {
		return nil, fmt.Errorf("%w: an extended attribute of %d bytes", ErrTruncated, len(sealed))
	}
	if sealed[0] != textVersion {
		return nil, fmt.Errorf("%w: extended attribute format %d", ErrUnknownVersion, sealed[0])
	}
	aead, err := r.xattrCipher(file)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nil, sealed[1:], xattrAD(file, name))
	if err != nil {
		return nil, ErrTampered
	}
	return plain, nil
}

func (r *Root) xattrCipher(file FileID) (cipher.AEAD, error) {
	var key [keySize]byte
	defer clear(key[:])
	if err := r.derive(key[:], labelXattr, file[:]); err != nil {
		return nil, err
	}
	return newGCM(key[:])
}

func xattrAD(file FileID, name string) []byte {
	ad := append([]byte{textVersion}, file[:]...)
	return append(ad, name...)
}

// metaMax bounds a sealed metadata entry: S3 allows 2 KB of user metadata in all.
const metaMax = 8192

// metaPrefix is version and key id, in clear before the sealed metadata.
const metaPrefix = 1 + IDSize

// SealMeta seals an object's user metadata as the text of one x-amz-meta entry.
// The text names the key (MetaKey), for it must open without the object's header.
// It is bound to its kind, to the key and to place, which the caller chooses so
// that it survives a copy, such as the bucket's name; place may be empty.
func (r *Root) SealMeta(place string, plain []byte) (string, error) {
	aead, err := once(r, &r.meta, labelMeta, keySize, newGCM)
	if err != nil {
		return "", err
	}
	raw := make([]byte, 0, metaPrefix+SegmentOverhead+len(plain))
	raw = append(raw, textVersion)
	raw = append(raw, r.id[:]...)
	raw = (*aead).Seal(raw, nil, plain, metaAD(raw, place))
	if sealedText.EncodedLen(len(raw)) > metaMax {
		return "", fmt.Errorf("%w: %d bytes of metadata", ErrTooLong, len(plain))
	}
	return sealedText.EncodeToString(raw), nil
}

// OpenMeta opens what SealMeta returned for the same place. ErrWrongKey if
// another key sealed it: see MetaKey.
func (r *Root) OpenMeta(place, text string) ([]byte, error) {
	raw, id, err := parseMeta(text)
	if err != nil {
		return nil, err
	}
	if id != r.id {
		return nil, ErrWrongKey
	}
	aead, err := once(r, &r.meta, labelMeta, keySize, newGCM)
	if err != nil {
		return nil, err
	}
	plain, err := (*aead).Open(nil, nil, raw[metaPrefix:], metaAD(raw, place))
	if err != nil {
		return nil, ErrTampered
	}
	return plain, nil
}

// MetaKey tells which key opens a text of SealMeta. It is not authenticated.
func MetaKey(text string) (KeyID, error) {
	_, id, err := parseMeta(text)
	return id, err
}

func parseMeta(text string) ([]byte, KeyID, error) {
	if len(text) > metaMax {
		return nil, KeyID{}, fmt.Errorf("%w: %d bytes of metadata", ErrNotSealed, len(text))
	}
	raw, err := decodeText(text)
	if err != nil {
		return nil, KeyID{}, err
	}
	if len(raw) < metaPrefix+SegmentOverhead {
		return nil, KeyID{}, fmt.Errorf("%w: sealed metadata", ErrTruncated)
	}
	if raw[0] != textVersion {
		return nil, KeyID{}, fmt.Errorf("%w: metadata format %d", ErrUnknownVersion, raw[0])
	}
	return raw, KeyID(raw[1:metaPrefix]), nil
}

// metaAD copies the prefix of raw, since GCM's output must not overlap it.
func metaAD(raw []byte, place string) []byte {
	ad := append([]byte(labelMeta), raw[:metaPrefix]...)
	return append(ad, place...)
}
