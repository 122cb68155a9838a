package seal

import (
	"fmt"
	"math"
)

// Sizes of sealed files, in bytes.
const (
	BlockSize      = 4096                                                    // a sealed block
	FileHeaderSize = 32                                                      // clear header at the start of block 0
	blockOverhead  = selectorSize + nonceSize + lengthSize + tagSize         // what sealing adds to a block
	BlockPayload   = BlockSize - blockOverhead                               // plain bytes in block 1, 2, …
	FirstPayload   = BlockPayload - FileHeaderSize                           // plain bytes in block 0
	MaxFileSize    = (math.MaxInt64/BlockSize-1)*BlockPayload + FirstPayload // largest plain size whose sealed size fits an int64
	maxSealedFile  = math.MaxInt64 / BlockSize * BlockSize                   // sealed size of MaxFileSize
	selectorSize   = 2
	nonceSize      = 12
	lengthSize     = 2
	tagSize        = 16
)

// BlockAt returns the block that holds the plain offset off ≥ 0 and the
// offset inside that block's payload.
func BlockAt(off int64) (index int64, skip int) {
	if off < FirstPayload {
		return 0, int(off)
	}
	off -= FirstPayload
	return 1 + off/BlockPayload, int(off % BlockPayload)
}

// BlockStart returns the plain offset of the first byte of block index ≥ 0.
func BlockStart(index int64) int64 {
	if index == 0 {
		return 0
	}
	return FirstPayload + (index-1)*BlockPayload
}

// PayloadOf returns how many plain bytes block index can hold.
func PayloadOf(index int64) int {
	if index == 0 {
		return FirstPayload
	}
	return BlockPayload
}

// SealedFileSize returns the lower size of a file of plain size ≥ 0: a multiple
// of BlockSize, and 0 for 0. Sizes above MaxFileSize give the largest multiple
// that an int64 holds, which every lower filesystem refuses with EFBIG.
func SealedFileSize(plain int64) int64 {
	switch {
	case plain <= 0:
		return 0
	case plain > MaxFileSize:
		return maxSealedFile
	}
	last, _ := BlockAt(plain - 1)
	return (last + 1) * BlockSize
}

// Sizes of sealed objects, in bytes.
const (
	ObjectHeaderSize = 1024                          // at the start of an object or of each part
	SegmentSize      = 65536                         // plain bytes in every segment but the last
	SegmentOverhead  = nonceSize + tagSize           // what sealing adds to a segment
	sealedSegment    = SegmentSize + SegmentOverhead // a full sealed segment
	maxSegments      = 1 << 31                       // of one object or part: half of what random nonces allow under one key
	MaxParts         = 10000                         // S3's limit
	MaxObjectSize    = maxSegments * SegmentSize     // 128 TiB, more than S3 takes; within it no sum overflows
)

// SegmentCount returns the number of segments of one object or part of plain
// size ≥ 0. An empty one has one, empty segment.
func SegmentCount(plain int64) int64 {
	if plain <= 0 {
		return 1
	}
	return (plain-1)/SegmentSize + 1
}

// SealedObjectSize returns the sealed size, header included, of one object or
// part of plain size 0 ≤ plain ≤ MaxObjectSize.
func SealedObjectSize(plain int64) int64 {
	return ObjectHeaderSize + plain + SegmentCount(plain)*SegmentOverhead
}

// PlainObjectSize returns the plain size of an object from its sealed size and
// its number of parts: 1 for a simple object, N where the ETag ends in -N. It
// relies on every part but the last being a non-empty multiple of SegmentSize.
// Sizes that sealing cannot give are ErrImpossibleSize.
func PlainObjectSize(sealed int64, parts int) (int64, error) {
	impossible := func() (int64, error) {
		return 0, fmt.Errorf("%w: %d sealed bytes in %d parts", ErrImpossibleSize, sealed, parts)
	}
	if parts < 1 || parts > MaxParts || sealed < 0 || sealed > SealedObjectSize(MaxObjectSize) {
		return impossible()
	}
	body := sealed - int64(parts)*ObjectHeaderSize
	if body < int64(parts)*SegmentOverhead {
		return impossible()
	}
	full, rest := body/sealedSegment, body%sealedSegment
	segments := full
	switch {
	case rest == 0: // every segment is full
	case rest < SegmentOverhead:
		return impossible()
	case rest == SegmentOverhead: // an empty segment stands alone in the last part
		if full != 0 && parts == 1 {
			return impossible()
		}
		segments++
	default:
		segments++
	}
	if segments < int64(parts) {
		return impossible()
	}
	return body - segments*SegmentOverhead, nil
}

// SegmentSpan returns what to read of one sealed object or part of plain size
// plain to get the n plain bytes at off: the first and last segment, the sealed
// bytes [sealedFrom, sealedTo) that hold them, and how many plain bytes of the
// first segment precede off. The range is cut at the end of the object. An
// empty range gives last < first and sealedFrom = sealedTo; but an empty object
// gives its one segment, so that it can be authenticated.
func SegmentSpan(off, n, plain int64) (first, last int64, sealedFrom, sealedTo int64, skip int) {
	if plain > 0 && (off < 0 || n <= 0 || off >= plain) {
		return 0, -1, ObjectHeaderSize, ObjectHeaderSize, 0
	}
	if plain <= 0 {
		return 0, 0, ObjectHeaderSize, ObjectHeaderSize + SegmentOverhead, 0
	}
	n = min(n, plain-off)
	first = off / SegmentSize
	last = (off + n - 1) / SegmentSize
	sealedFrom = ObjectHeaderSize + first*sealedSegment
	sealedTo = min(ObjectHeaderSize+(last+1)*sealedSegment, SealedObjectSize(plain))
	return first, last, sealedFrom, sealedTo, int(off % SegmentSize)
}
