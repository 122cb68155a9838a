package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/byokd/byokd/internal/seal"
)

// maxReopens bounds how often a read that makes no progress asks the upstream
// again. An upstream closes reads that pause long (S3 after a minute or so), so
// the first attempt after a thaw is expected to fail.
const maxReopens = 3

// opening reads a plain range of an object: sealed bytes come from one upstream
// request, batch by batch, and each batch is opened in one pass. One goroutine at a
// time uses it; batches that it filled may be used by others.
type opening struct {
	bucket *bucket
	pool   *bufferPool
	packer *packer
	lane   uint32
	ref    Ref
	lay    *layout
	left   int64 // plain bytes still to come

	body   io.ReadCloser // upstream, at sealed offset pos
	pos    int64
	to     int64 // end of the sealed range asked for
	failed int   // reopens since the last progress

	part     partSpan
	header   seal.ObjectHeader
	hasHead  bool  // header is that of part; else it comes next in body
	segment  int64 // next one of part
	skip     int   // plain bytes before the range in the next batch
	passOver int64 // segments of a compressed part to be passed over first
}

// openWhole wraps an upstream read of a whole object.
func (p *Proxy) openWhole(ctx context.Context, c *call, ref Ref, obj *Object) (*opening, error) {
	if obj.Size < seal.SealedObjectSize(0) {
		return nil, errForeign
	}
	h, err := readHeader(obj.Body)
	if err != nil {
		return nil, err
	}
	lay, err := c.bucket.complete(ctx, ref, obj.Info, h)
	if err != nil {
		return nil, err
	}
	return &opening{
		bucket: c.bucket, pool: &p.pool, packer: p.packer, lane: c.lane, ref: ref, lay: lay, left: lay.plain,
		body: obj.Body, pos: seal.ObjectHeaderSize, to: obj.Size,
		part: lay.part(0), header: h, hasHead: true,
	}, nil
}

// openRange prepares the read of n plain bytes at off, which lie inside the object. It reads the header of the part that the range begins in, if unknown.
func (p *Proxy) openRange(ctx context.Context, b *bucket, lane uint32, ref Ref, lay *layout, off, n int64) (*opening, error) {
	if n == 0 { // an empty part; an empty object still has a segment to authenticate
		h, _ := lay.header(0)
		return &opening{bucket: b, pool: &p.pool, packer: p.packer, lane: lane, ref: ref, lay: lay, part: lay.part(0), header: h, hasHead: true, pos: seal.ObjectHeaderSize, to: lay.sealed}, nil
	}
	for {
		o := &opening{bucket: b, pool: &p.pool, packer: p.packer, lane: lane, ref: ref, lay: lay, left: n, part: lay.partAt(off)}
		inner := off - o.part.plainFrom
		first, _, from, _, skip := seal.SegmentSpan(inner, n, o.part.plainSize)
		o.segment, o.skip = first, skip
		o.header, o.hasHead = lay.header(o.part.index)
		if lay.packed {
			o.beginPacked(off + n)
			return o, nil
		}
		o.pos = o.part.sealedFrom + from
		if !o.hasHead && first == 0 && lay.walked() {
			o.pos = o.part.sealedFrom // the header comes along
		} else if !o.hasHead {
			err := o.fetchPartHeader(ctx)
			if errors.Is(err, errMispredicted) {
				if lay, err = lay.walk(ctx, b.Upstream, ref); err == nil {
					b.layouts.put(ref, lay)
					continue
				}
			}
			if err != nil {
				return nil, err
			}
		}
		o.to = lay.sealedEnd(off + n)
		return o, nil
	}
}

// sealedEnd is the sealed offset up to which plain bytes up to end > 0 need.
func (l *layout) sealedEnd(end int64) int64 {
	p := l.partAt(end - 1)
	if l.packed {
		return p.sealedFrom + p.sealedSize
	}
	_, _, _, to, _ := seal.SegmentSpan(0, end-p.plainFrom, p.plainSize)
	return p.sealedFrom + to
}

// errMispredicted: the object's parts are not as long as the first one.
var errMispredicted = errors.New("parts differ in length")

// fetchPartHeader reads and verifies the header of o.part.
func (o *opening) fetchPartHeader(ctx context.Context) error {
	h, _, err := fetchHeader(ctx, o.bucket.Upstream, GetRequest{Ref: o.ref, Conditions: Conditions{IfMatch: o.lay.etag}, From: o.part.sealedFrom})
	if err == nil {
		err = o.lay.verify(o.part, h)
	}
	if err == nil {
		o.header, o.hasHead = h, true
		o.lay.remember(o.part.index, h)
		return nil
	}
	if _, isUpstream := asUpstream(err); !isUpstream && !o.lay.walked() {
		return errMispredicted
	}
	return err
}

// next reads and opens the next batch into b, which is then not empty unless the
// object is. It returns io.EOF after the last one.
func (o *opening) next(ctx context.Context, b *batch) error {
	if o.left == 0 && (o.lay.plain > 0 || o.segment > 0) {
		return io.EOF
	}
	if err := o.enterPart(ctx, b.buf.sealed[:seal.ObjectHeaderSize]); err != nil {
		return err
	}
	b.part, b.header, b.first = o.part, o.header, o.segment
	if err := o.readBatch(ctx, b); err != nil {
		return fmt.Errorf("part %d, segments from %d: %w", o.part.index+1, o.segment, err)
	}
	o.segment += int64(b.count)
	n, err := b.open(ctx)
	if err != nil {
		return err
	}
	b.lead = min(o.skip, n)
	b.left = int(min(int64(n-b.lead), o.left))
	o.left -= int64(b.left)
	o.skip = 0
	return nil
}

// readBatch reads the sealed bytes of the next batch.
func (o *opening) readBatch(ctx context.Context, b *batch) (err error) {
	n := o.plan(b)
	if !o.lay.packed {
		b.sealed = b.buf.sealed[:n]
		return o.readFull(ctx, b.sealed)
	}
	read := func(p []byte) error { return o.readFull(ctx, p) }
	for ; o.passOver > 0; o.passOver-- { // segments before the range, whose lengths have to be read
		if _, err := readPacked(b.buf.sealed, 1, read); err != nil {
			return err
		}
	}
	b.sealed, err = readPacked(b.buf.sealed, int64(b.count), read)
	return err
}

// beginPacked prepares a range of a compressed object up to plain offset end: where
// its segments lie is only found by reading those before, from the header on.
func (o *opening) beginPacked(end int64) {
	o.pos = o.part.sealedFrom
	if o.hasHead {
		o.pos += seal.ObjectHeaderSize
	}
	o.passOver = o.segment
	last := o.lay.partAt(end - 1)
	o.to = last.sealedFrom + last.sealedSize
}

// enterPart moves to the next part when the present one is through, and reads
// its header, into raw, when that comes next.
func (o *opening) enterPart(ctx context.Context, raw []byte) error {
	for o.hasHead && o.segment == seal.SegmentCount(o.part.plainSize) {
		if o.part.index+1 == o.lay.count {
			return fmt.Errorf("%w: the parts end before the object", errBroken)
		}
		o.part = o.lay.part(o.part.index + 1)
		o.segment, o.hasHead = 0, false
		if o.pos != o.part.sealedFrom {
			return fmt.Errorf("%w: part %d does not begin where the one before ended", errBroken, o.part.index+1)
		}
	}
	if o.hasHead {
		return nil
	}
	if err := o.readFull(ctx, raw); err != nil {
		return err
	}
	h, err := seal.ParseObjectHeader(raw)
	if err != nil {
		return err
	}
	if err = o.lay.verify(o.part, h); err != nil && h.Object == o.lay.object && !o.lay.walked() {
		if err := o.relayout(ctx); err != nil {
			return err
		}
		err = o.lay.verify(o.part, h)
	}
	if err != nil {
		return err
	}
	o.header, o.hasHead = h, true
	o.lay.remember(o.part.index, h)
	return nil
}

// relayout replaces a layout whose prediction turned out wrong. The present part
// is known to begin here, because everything before it was read in order.
func (o *opening) relayout(ctx context.Context) error {
	lay, err := o.lay.walk(ctx, o.bucket.Upstream, o.ref)
	if err != nil {
		return err
	}
	if lay.plain != o.lay.plain || lay.part(o.part.index).sealedFrom != o.part.sealedFrom {
		return fmt.Errorf("%w: the parts do not add up", errBroken)
	}
	o.bucket.layouts.put(o.ref, lay)
	o.lay, o.part = lay, lay.part(o.part.index)
	end := o.part.plainFrom + o.left
	if o.to = lay.sealedEnd(end); o.body != nil {
		o.body.Close()
		o.body = nil
	}
	return nil
}

// plan sets the segments of the next batch and returns their sealed length.
func (o *opening) plan(b *batch) int {
	all := seal.SegmentCount(o.part.plainSize)
	wanted := seal.SegmentCount(int64(o.skip) + min(o.left, o.part.plainSize))
	room := int64(len(b.buf.plain) / seal.SegmentSize)
	count := min(room, wanted, all-o.segment)
	b.count = int(count)
	n := count * sealedSegment
	if o.segment+count == all {
		n -= all*seal.SegmentSize - o.part.plainSize
	}
	return int(n)
}

// readFull fills b from the upstream, asking it again where it broke off.
func (o *opening) readFull(ctx context.Context, b []byte) error {
	for len(b) > 0 {
		if o.body == nil {
			if err := o.reopen(ctx); err != nil {
				return err
			}
		}
		n, err := io.ReadFull(o.body, b)
		b = b[n:]
		o.pos += int64(n)
		if n > 0 {
			o.failed = 0
		}
		if err == nil {
			break
		}
		o.body.Close()
		o.body = nil
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if o.failed++; o.failed > maxReopens {
			return &UpstreamError{Cause: err}
		}
	}
	return nil
}

// reopen asks for the rest of the range, of the same version of the object.
func (o *opening) reopen(ctx context.Context) error {
	if o.pos >= o.to {
		return fmt.Errorf("%w: %d bytes end at %d", seal.ErrTruncated, o.to, o.pos)
	}
	obj, err := o.bucket.Upstream.Get(ctx, GetRequest{Ref: o.ref, Conditions: Conditions{IfMatch: o.lay.etag}, From: o.pos, To: o.to})
	if up, ok := asUpstream(err); ok && up.Status == 412 {
		return errChanged
	}
	if err != nil {
		return err
	}
	o.body = obj.Body
	return nil
}

// close ends the reading.
func (o *opening) close() {
	if o.body != nil {
		o.body.Close()
		o.body = nil
	}
}

// plainReader makes an opening the source of a copy.
type plainReader struct {
	ctx context.Context
	o   *opening
	b   *batch // nil before the first
}

// Read implements io.Reader.
func (r *plainReader) Read(p []byte) (int, error) {
	for r.b == nil || r.b.left == 0 {
		if r.o.left == 0 {
			return 0, io.EOF
		}
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	piece, err := r.b.take(r.ctx, len(p))
	if err != nil {
		return 0, err
	}
	n := copy(p, piece)
	clear(piece)
	return n, nil
}

func (r *plainReader) next() error {
	if r.b == nil {
		r.b = r.o.newBatch()
	}
	return r.o.next(r.ctx, r.b)
}

// finish authenticates the one segment of an empty object.
func (r *plainReader) finish() error {
	if r.o.lay.plain > 0 {
		return nil
	}
	return r.next()
}

// release implements the end of a sealing.
func (r *plainReader) release() {
	if r.b != nil {
		r.b.release()
		r.b = nil
	}
	r.o.close()
}
