package seal

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
)

const (
	objectMagic   = "byokdobj"
	objectVersion = 1

	// Offsets in the 1 KiB header. The ARN and the wrapped key follow one another
	// from objectStrings; zeros fill up to the tag.
	objectStrings = 128
	objectTag     = ObjectHeaderSize - macSize

	// SaltSize is the length of an object's salt in bytes.
	SaltSize = 32
	// CommitmentSize is the length of an object's key commitment in bytes.
	CommitmentSize = 32
	// MaxWrappedKey is how many bytes an object header has for the key ARN and
	// the wrapped data key together.
	MaxWrappedKey = objectTag - objectStrings
)

const (
	// PackedPrefix is the length of what precedes a packed segment, in bytes.
	PackedPrefix = 4
	// MaxPacked is the longest content of a packed segment: a whole segment that
	// does not get shorter, and one byte that says so.
	MaxPacked = SegmentSize + 1
)

// PlainSizeUnknown stands in ObjectHeader.PlainSize where the length was not
// known before sealing; the last segment then tells the end.
const PlainSizeUnknown = ^uint64(0)

// Suite says how segments are sealed.
type Suite uint8

const (
	// SuiteAES256GCM is AES-256-GCM over segments of 64 KiB.
	SuiteAES256GCM Suite = 1
	// SuiteZstd is the same over segments that were packed one by one: see
	// SealPacked. This package does not compress; it only knows the framing.
	SuiteZstd Suite = 2
)

// ObjectHeader stands in clear before the segments of an object, or of each part
// of a multipart object. It names the key that opens them; Tag authenticates it.
type ObjectHeader struct {
	Suite      Suite                // 0 stands for SuiteAES256GCM
	Object     ObjectID             // a multipart upload has one for all of its parts
	Part       uint32               // 0 for a simple object, else 1 to MaxParts
	PlainSize  uint64               // of this object or part, or PlainSizeUnknown
	PackedSize uint32               // SuiteZstd only: length of what follows the header
	Key        KeyID                // the data key; NewObject sets it
	KeyARN     string               // the KMS key that wraps it
	WrappedKey []byte               // the data key as KMS returned it
	Salt       [SaltSize]byte       // fresh for every attempt; set by NewObject
	Commitment [CommitmentSize]byte // to the data key; set by NewObject
	Tag        [macSize]byte        // over all of the above; set by NewObject
}

// UploadObjectID returns the object id that every part of a multipart upload carries.
// Upload ids are unique upstream, so parts of two uploads never fit together.
func UploadObjectID(uploadID string) ObjectID {
	sum := sha256.Sum256([]byte(labelUpload + uploadID))
	return ObjectID(sum[:IDSize])
}

// ObjectCipher seals or opens the segments of one object or part. It is safe for
// concurrent use, belongs to the Root it came from, and must run inside Do.
type ObjectCipher struct {
	aead   cipher.AEAD
	object ObjectID
	part   uint32
	suite  Suite
}

// NewObject starts an object or part: it returns h with key id, salt, commitment
// and tag filled in, and the cipher for its segments. Call it anew for every
// attempt, so that a retry never reuses a key. Errors: ErrTooLong, ErrWiped.
func (r *Root) NewObject(h ObjectHeader) (ObjectHeader, *ObjectCipher, error) {
	if h.Suite == 0 {
		h.Suite = SuiteAES256GCM
	}
	h.Key = r.id
	rand.Read(h.Salt[:])
	if err := h.check(); err != nil {
		return ObjectHeader{}, nil, err
	}
	keys, err := r.objectKeys(&h)
	if err != nil {
		return ObjectHeader{}, nil, err
	}
	defer keys.clear()
	h.Commitment = keys.commitment
	h.Tag = h.tagUnder(&keys.header)
	return h, keys.cipher, nil
}

// OpenObject returns the cipher for the segments of a parsed header. It returns
// ErrWrongKey when r is not the key the header commits to, and ErrTampered when
// it is but another field was changed.
func (r *Root) OpenObject(h ObjectHeader) (*ObjectCipher, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	if h.Key != r.id {
		return nil, fmt.Errorf("%w: object %s needs key %s", ErrWrongKey, h.Object, h.Key)
	}
	if c := r.remembered(&h); c != nil {
		return c, nil
	}
	keys, err := r.objectKeys(&h)
	if err != nil {
		return nil, err
	}
	defer keys.clear()
	if !hmac.Equal(keys.commitment[:], h.Commitment[:]) {
		return nil, fmt.Errorf("%w: object %s", ErrWrongKey, h.Object)
	}
	tag := h.tagUnder(&keys.header)
	if !hmac.Equal(tag[:], h.Tag[:]) {
		return nil, fmt.Errorf("%w: header of object %s", ErrTampered, h.Object)
	}
	r.remember(&h, keys.cipher)
	return keys.cipher, nil
}

// saltKeys is what one salt gives.
type saltKeys struct {
	commitment [CommitmentSize]byte
	header     [keySize]byte
	cipher     *ObjectCipher
}

func (k *saltKeys) clear() { clear(k.header[:]) }

// objectKeys derives a key for each purpose. Object id and part are bound by the
// associated data of each segment.
func (r *Root) objectKeys(h *ObjectHeader) (keys saltKeys, err error) {
	var key [keySize]byte
	defer clear(key[:])
	if err := r.derive(keys.commitment[:], labelObjectCommit, h.Salt[:]); err != nil {
		return keys, err
	}
	if err := r.derive(keys.header[:], labelObjectHeader, h.Salt[:]); err != nil {
		return keys, err
	}
	if err := r.derive(key[:], labelObject, h.Salt[:]); err != nil {
		return keys, err
	}
	aead, err := newGCM(key[:])
	if err != nil {
		return keys, err
	}
	keys.cipher = &ObjectCipher{aead: aead, object: h.Object, part: h.Part, suite: h.Suite}
	return keys, nil
}

// tagUnder returns the HMAC of the header up to its tag.
func (h *ObjectHeader) tagUnder(key *[keySize]byte) (tag [macSize]byte) {
	var raw [ObjectHeaderSize]byte
	h.put(&raw)
	mac := hmac.New(sha256.New, key[:])
	mac.Write(raw[:objectTag])
	mac.Sum(tag[:0])
	return tag
}

func (h *ObjectHeader) check() error {
	switch {
	case h.Suite != SuiteAES256GCM && h.Suite != SuiteZstd:
		return fmt.Errorf("%w: object suite %d", ErrUnknownVersion, h.Suite)
	case (h.Suite == SuiteZstd) != (h.PackedSize > 0) || h.Suite == SuiteZstd && (h.PlainSize == 0 || h.PlainSize == PlainSizeUnknown):
		return fmt.Errorf("%w: length of the packed content", ErrTampered)
	case h.Part > MaxParts:
		return fmt.Errorf("%w: part %d", ErrTampered, h.Part)
	case h.PlainSize > MaxObjectSize && h.PlainSize != PlainSizeUnknown:
		return fmt.Errorf("%w: %d bytes in one object", ErrImpossibleSize, h.PlainSize)
	case len(h.KeyARN) > maxARN || len(h.KeyARN)+len(h.WrappedKey) > MaxWrappedKey:
		return fmt.Errorf("%w: object header", ErrTooLong)
	}
	return nil
}

// put writes all fields. The header is valid.
func (h *ObjectHeader) put(raw *[ObjectHeaderSize]byte) {
	copy(raw[0:], objectMagic)
	binary.BigEndian.PutUint16(raw[8:], objectVersion)
	raw[10] = byte(h.Suite)
	binary.BigEndian.PutUint32(raw[12:], h.Part)
	binary.BigEndian.PutUint64(raw[16:], h.PlainSize)
	copy(raw[24:], h.Object[:])
	copy(raw[40:], h.Key[:])
	copy(raw[56:], h.Salt[:])
	copy(raw[88:], h.Commitment[:])
	binary.BigEndian.PutUint16(raw[120:], uint16(len(h.KeyARN)))
	binary.BigEndian.PutUint16(raw[122:], uint16(len(h.WrappedKey)))
	binary.BigEndian.PutUint32(raw[124:], h.PackedSize)
	n := copy(raw[objectStrings:], h.KeyARN)
	copy(raw[objectStrings+n:], h.WrappedKey)
	copy(raw[objectTag:], h.Tag[:])
}

// Marshal returns the ObjectHeaderSize bytes of a header from NewObject.
func (h ObjectHeader) Marshal() ([]byte, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	var raw [ObjectHeaderSize]byte
	h.put(&raw)
	return raw[:], nil
}

// ParseObjectHeader reads what Marshal wrote from the first ObjectHeaderSize
// bytes of raw. The content is not authenticated before OpenObject.
func ParseObjectHeader(raw []byte) (ObjectHeader, error) {
	if len(raw) < ObjectHeaderSize {
		return ObjectHeader{}, fmt.Errorf("%w: an object header of %d bytes", ErrTruncated, len(raw))
	}
	raw = raw[:ObjectHeaderSize]
	if string(raw[:8]) != objectMagic {
		return ObjectHeader{}, fmt.Errorf("%w: no object header", ErrNotSealed)
	}
	if v := binary.BigEndian.Uint16(raw[8:]); v != objectVersion {
		return ObjectHeader{}, fmt.Errorf("%w: object format %d", ErrUnknownVersion, v)
	}
	arn, wrapped := int(binary.BigEndian.Uint16(raw[120:])), int(binary.BigEndian.Uint16(raw[122:]))
	if arn > maxARN || arn+wrapped > MaxWrappedKey {
		return ObjectHeader{}, fmt.Errorf("%w: lengths in the object header", ErrTampered)
	}
	if raw[11] != 0 || !IsHole(raw[objectStrings+arn+wrapped:objectTag]) {
		return ObjectHeader{}, fmt.Errorf("%w: reserved bytes of the object header", ErrTampered)
	}
	h := ObjectHeader{
		Suite:      Suite(raw[10]),
		Part:       binary.BigEndian.Uint32(raw[12:]),
		PlainSize:  binary.BigEndian.Uint64(raw[16:]),
		PackedSize: binary.BigEndian.Uint32(raw[124:]),
		Object:     ObjectID(raw[24:40]),
		Key:        KeyID(raw[40:56]),
		Salt:       [SaltSize]byte(raw[56:88]),
		Commitment: [CommitmentSize]byte(raw[88:120]),
		KeyARN:     string(raw[objectStrings : objectStrings+arn]),
		WrappedKey: append([]byte(nil), raw[objectStrings+arn:objectStrings+arn+wrapped]...),
		Tag:        [macSize]byte(raw[objectTag:]),
	}
	if err := h.check(); err != nil {
		return ObjectHeader{}, err
	}
	return h, nil
}

const segmentADSize = 2 + 1 + IDSize + 4 + 8 + 1

var segmentADs = sync.Pool{New: func() any { return new([segmentADSize]byte) }}

// bind writes the associated data of a segment: version, suite, object id, part,
// index, last flag.
func (c *ObjectCipher) bind(ad *[segmentADSize]byte, index uint64, last bool) []byte {
	binary.BigEndian.PutUint16(ad[0:], objectVersion)
	ad[2] = byte(c.suite)
	copy(ad[3:], c.object[:])
	binary.BigEndian.PutUint32(ad[19:], c.part)
	binary.BigEndian.PutUint64(ad[23:], index)
	ad[31] = 0
	if last {
		ad[31] = 1
	}
	return ad[:]
}

// SealSegment appends the sealed plain to dst, SegmentOverhead bytes more than
// plain, and returns the extended slice; give dst that capacity to avoid an
// allocation. dst and plain must not overlap. Every segment but the last is
// SegmentSize long, the last is not empty unless it is the only one; other
// lengths panic.
func (c *ObjectCipher) SealSegment(dst, plain []byte, index uint64, last bool) []byte {
	if !segmentFits(len(plain), index, last) {
		panic(fmt.Sprintf("seal: segment %d of %d bytes, last %t", index, len(plain), last))
	}
	ad := segmentADs.Get().(*[segmentADSize]byte)
	out := c.aead.Seal(dst, nil, plain, c.bind(ad, index, last))
	segmentADs.Put(ad)
	return out
}

// OpenSegment appends the plain content of a sealed segment to dst and returns
// the extended slice. dst and sealed must not overlap. Errors: ErrTruncated,
// ErrTampered; dst then holds nothing of the segment.
func (c *ObjectCipher) OpenSegment(dst, sealed []byte, index uint64, last bool) ([]byte, error) {
	if len(sealed) < SegmentOverhead {
		return dst, fmt.Errorf("%w: a segment of %d bytes", ErrTruncated, len(sealed))
	}
	if !segmentFits(len(sealed)-SegmentOverhead, index, last) {
		return dst, fmt.Errorf("%w: segment %d of %d bytes, last %t", ErrTampered, index, len(sealed), last)
	}
	ad := segmentADs.Get().(*[segmentADSize]byte)
	out, err := c.aead.Open(dst, nil, sealed, c.bind(ad, index, last))
	segmentADs.Put(ad)
	if err != nil {
		return dst, fmt.Errorf("%w: segment %d", ErrTampered, index)
	}
	return out, nil
}

// SealedSize is the length of the object or part with its header. PlainSize is
// known.
func (h *ObjectHeader) SealedSize() int64 {
	if h.Suite == SuiteZstd {
		return ObjectHeaderSize + int64(h.PackedSize)
	}
	return SealedObjectSize(int64(h.PlainSize))
}

// SealPacked is SealSegment for SuiteZstd: content stands for a whole segment of
// plain bytes, in at most MaxPacked bytes of the caller's own making, and is not
// empty. PackedPrefix bytes before the sealed content tell its length.
func (c *ObjectCipher) SealPacked(dst, content []byte, index uint64, last bool) []byte {
	if len(content) == 0 || len(content) > MaxPacked || index >= maxSegments {
		panic(fmt.Sprintf("seal: packed segment %d of %d bytes", index, len(content)))
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(content)+SegmentOverhead))
	ad := segmentADs.Get().(*[segmentADSize]byte)
	out := c.aead.Seal(dst, nil, content, c.bind(ad, index, last))
	segmentADs.Put(ad)
	return out
}

// PackedLength reads the prefix of a packed segment: how many bytes follow it. It
// is not authenticated, but within bounds.
func PackedLength(prefix []byte) (int, error) {
	if len(prefix) < PackedPrefix {
		return 0, fmt.Errorf("%w: the length of a packed segment", ErrTruncated)
	}
	n := binary.BigEndian.Uint32(prefix)
	if n <= SegmentOverhead || n > MaxPacked+SegmentOverhead {
		return 0, fmt.Errorf("%w: a packed segment of %d bytes", ErrTampered, n)
	}
	return int(n), nil
}

// OpenPacked opens what SealPacked sealed, without its prefix.
func (c *ObjectCipher) OpenPacked(dst, sealed []byte, index uint64, last bool) ([]byte, error) {
	if len(sealed) <= SegmentOverhead || len(sealed) > MaxPacked+SegmentOverhead || index >= maxSegments {
		return dst, fmt.Errorf("%w: packed segment %d of %d bytes", ErrTampered, index, len(sealed))
	}
	ad := segmentADs.Get().(*[segmentADSize]byte)
	out, err := c.aead.Open(dst, nil, sealed, c.bind(ad, index, last))
	segmentADs.Put(ad)
	if err != nil {
		return dst, fmt.Errorf("%w: segment %d", ErrTampered, index)
	}
	return out, nil
}

// segmentFits tells whether segment index can hold n plain bytes.
func segmentFits(n int, index uint64, last bool) bool {
	switch {
	case index >= maxSegments:
		return false
	case last:
		return n <= SegmentSize && (n > 0 || index == 0)
	}
	return n == SegmentSize
}
