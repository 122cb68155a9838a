package objstore

import (
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

// batchSegments is how many segments are sealed or opened in one pass. Eight are
// half a MiB and about 0.2 ms of work, beside which a pass and asking for the
// object's cipher are nothing; and a batch, plain and sealed, is all the memory that
// an upload holds.
const batchSegments = 8

const sealedSegment = seal.SegmentSize + seal.SegmentOverhead

// readSegments is the same for a batch that is read, of which a download has
// aheadBatches in memory: 1.5 MiB, which stay in a processor's own cache on their way
// from one socket to the other.
const readSegments = 4

// buffers hold one batch, plain and sealed. A pair has one owner at a time.
type buffers struct {
	plain  []byte // batchSegments, readSegments or one segment long
	sealed []byte // the same sealed, with room for a header
}

// bufferPool lends buffers; small transfers get small ones.
type bufferPool struct{ small, reading, large sync.Pool }

// get returns buffers to seal n plain bytes.
func (bp *bufferPool) get(n int64) *buffers { return bp.sized(n, &bp.large, batchSegments) }

// forReading returns buffers to open n plain bytes.
func (bp *bufferPool) forReading(n int64) *buffers { return bp.sized(n, &bp.reading, readSegments) }

func (bp *bufferPool) sized(n int64, pool *sync.Pool, segments int) *buffers {
	if n <= seal.SegmentSize {
		pool, segments = &bp.small, 1
	}
	if b, ok := pool.Get().(*buffers); ok {
		return b
	}
	return &buffers{
		plain:  make([]byte, segments*seal.SegmentSize),
		sealed: make([]byte, seal.ObjectHeaderSize+segments*sealedSegment),
	}
}

// put takes buffers back, without what they held.
func (bp *bufferPool) put(b *buffers) {
	clear(b.plain)
	switch len(b.plain) {
	case seal.SegmentSize:
		bp.small.Put(b)
	case readSegments * seal.SegmentSize:
		bp.reading.Put(b)
	default:
		bp.large.Put(b)
	}
}
