package objstore

import (
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

// batchSegments is how many segments are sealed or opened in one pass. Eight are
// half a MiB and about 0.2 ms of work, beside which a pass and asking for the
// object's cipher are nothing; and two batches are all the memory that one transfer
// holds.
const batchSegments = 8

const sealedSegment = seal.SegmentSize + seal.SegmentOverhead

// buffers hold one batch, plain and sealed. A pair has one owner at a time.
type buffers struct {
	plain  []byte // batchSegments or one segment long
	sealed []byte // the same sealed, with room for a header
}

// bufferPool lends buffers; small transfers get small ones.
type bufferPool struct{ small, large sync.Pool }

// get returns buffers for a transfer of n plain bytes.
func (bp *bufferPool) get(n int64) *buffers {
	pool, segments := &bp.large, batchSegments
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
	if len(b.plain) == seal.SegmentSize {
		bp.small.Put(b)
		return
	}
	bp.large.Put(b)
}
