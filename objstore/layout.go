package objstore

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

// layout says where the plain bytes of one version of an object lie in its
// sealed form. It holds nothing secret and does not change once made, but for
// the headers it remembers.
//
// The boundaries of a multipart object are predicted from its first part: all
// but the last are as long, and numbered from 1. A prediction is never trusted:
// the header at the predicted place has to be there, belong to the object and
// announce the predicted number and length; else all headers are read (walk). When all parts but the last are multiples of a segment,
// which CompleteMultipartUpload takes care of, such a header proves that as many
// parts and as many plain bytes precede it as predicted: j parts with s segments
// take 1024·j + 65564·s bytes, and two pairs (j, s) that give the same sum differ
// by a multiple of 16391 parts, more than an object can have.
type layout struct {
	etag   string
	sealed int64
	plain  int64
	object seal.ObjectID
	parts  []partSpan // all of them when walked, else only the first
	count  int
	packed bool  // compressed: segments differ in length, and every part is walked
	unread error // why there are no parts; see archivedLayout

	mu      sync.Mutex
	headers map[int]seal.ObjectHeader // guarded by mu; by part index, bounded
	tag     *Tag                      // guarded by mu; see ownTagOf
	tagSeen bool                      // guarded by mu
}

// partSpan is one part of an object.
type partSpan struct {
	index      int
	plainFrom  int64
	plainSize  int64
	sealedFrom int64
	sealedSize int64
	number     uint32 // as it was uploaded; 0 for a simple object
}

// maxHeaders bounds the headers that a layout remembers, about 0.4 KiB each.
const maxHeaders = 64

// newLayout makes a layout from the upstream's word on an object and its first
// header, which is not authenticated yet: a lie ends in broken segments.
func newLayout(info Info, first seal.ObjectHeader) (*layout, error) {
	l := &layout{
		etag: info.ETag, sealed: info.Size, object: first.Object, count: partsOf(info.ETag),
		headers: map[int]seal.ObjectHeader{0: first},
	}
	if first.PlainSize > seal.MaxObjectSize {
		return nil, fmt.Errorf("%w: length of the first part", errBroken)
	}
	size := int64(first.PlainSize)
	l.parts = []partSpan{{plainSize: size, sealedSize: seal.SealedObjectSize(size), number: first.Part}}
	if first.Suite == seal.SuiteZstd {
		return l, l.beginPacked(info, first)
	}
	if multipart(info.ETag) != (first.Part > 0) {
		return nil, fmt.Errorf("%w: header and ETag differ", errBroken)
	}
	var err error
	switch l.plain, err = seal.PlainObjectSize(l.sealed, l.count); {
	case err != nil && l.count > 1: // parts that are no multiples of a segment may well be as long
		l.plain = unknownLength
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errBroken, err)
	case l.count == 1 && size != l.plain:
		return nil, fmt.Errorf("%w: header and length differ", errBroken)
	}
	return l, nil
}

// unknownLength is the plain length of an object that only its headers tell.
const unknownLength = -1

// archivedLayout is what can be told of an object that has to be restored from an archive
// before its headers can be read: how long it is, and of how many parts. A compressed one
// tells its length in its metadata. unread is the upstream's refusal.
func archivedLayout(info Info, unread error) (*layout, error) {
	l := &layout{etag: info.ETag, sealed: info.Size, count: partsOf(info.ETag), headers: map[int]seal.ObjectHeader{}, unread: unread}
	size, packed := info.Metadata[packedEntry]
	var err error
	if l.packed = packed; packed {
		l.plain, err = strconv.ParseInt(size, 10, 64)
	} else {
		l.plain, err = seal.PlainObjectSize(info.Size, l.count)
	}
	if err != nil || l.plain < 0 {
		return nil, fmt.Errorf("%w: length of an archived object: %w", errBroken, err)
	}
	return l, nil
}

// beginPacked completes the layout of a compressed object, as far as its first
// header tells: one that has more parts has to be walked.
func (l *layout) beginPacked(info Info, first seal.ObjectHeader) error {
	l.packed, l.plain = true, int64(first.PlainSize)
	l.parts[0].sealedSize = first.SealedSize()
	if multipart(info.ETag) != (first.Part > 0) || l.count == 1 && l.parts[0].sealedSize != l.sealed {
		return fmt.Errorf("%w: header and ETag differ", errBroken)
	}
	return nil
}

// predictable reports whether all parts but the last can be as long as the first,
// and numbered without gaps.
func (l *layout) predictable() bool {
	first := l.parts[0]
	before := int64(l.count-1) * first.sealedSize
	return l.walked() || !l.packed && l.plain != unknownLength && first.number == 1 && first.plainSize%seal.SegmentSize == 0 && first.plainSize > 0 &&
		l.sealed >= before+seal.SealedObjectSize(0) && l.sealed <= before+first.sealedSize
}

func (l *layout) walked() bool { return len(l.parts) == l.count }

// part returns part i, which exists.
func (l *layout) part(i int) partSpan {
	if i < len(l.parts) {
		return l.parts[i]
	}
	first := l.parts[0]
	s := partSpan{
		index: i, plainFrom: int64(i) * first.plainSize, plainSize: first.plainSize,
		sealedFrom: int64(i) * first.sealedSize, sealedSize: first.sealedSize, number: uint32(i) + 1,
	}
	if i == l.count-1 {
		s.plainSize, s.sealedSize = l.plain-s.plainFrom, l.sealed-s.sealedFrom
	}
	return s
}

// partAt returns the part that holds plain offset off < plain, or the last part.
func (l *layout) partAt(off int64) partSpan {
	if !l.walked() {
		return l.part(int(min(off/l.parts[0].plainSize, int64(l.count-1))))
	}
	for i := l.count - 1; i > 0; i-- { // 10,000 at most, beside a request to the upstream
		if p := l.parts[i]; p.plainFrom <= off && p.plainSize > 0 {
			return p
		}
	}
	return l.parts[0]
}

// verify checks that a header is the one that part s begins with.
func (l *layout) verify(s partSpan, h seal.ObjectHeader) error {
	switch {
	case h.Object != l.object:
		return fmt.Errorf("%w: part %d belongs to another object", errBroken, s.index+1)
	case h.Part != s.number:
		return fmt.Errorf("%w: part number %d at place %d", errBroken, h.Part, s.index+1)
	case h.PlainSize != uint64(s.plainSize), h.SealedSize() != s.sealedSize:
		return fmt.Errorf("%w: part %d announces %d bytes instead of %d", errBroken, s.index+1, h.PlainSize, s.plainSize)
	}
	return nil
}

// header returns a remembered header.
func (l *layout) header(i int) (seal.ObjectHeader, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, ok := l.headers[i]
	return h, ok
}

// remember keeps a verified header.
func (l *layout) remember(i int, h seal.ObjectHeader) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.headers) >= maxHeaders {
		for old := range l.headers {
			if old != 0 {
				delete(l.headers, old)
				break
			}
		}
	}
	l.headers[i] = h
}

// ownTag returns what setOwnTag was told.
func (l *layout) ownTag() (own *Tag, seen bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tag, l.tagSeen
}

func (l *layout) setOwnTag(own *Tag) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tag, l.tagSeen = own, true
}

// walk returns the layout with every boundary read from the headers, for objects
// whose parts differ in length. It costs one small request per part, once.
func (l *layout) walk(ctx context.Context, up Upstream, ref Ref) (*layout, error) {
	w := &layout{etag: l.etag, sealed: l.sealed, object: l.object, count: l.count, packed: l.packed, headers: map[int]seal.ObjectHeader{}}
	next, number := partSpan{}, uint32(1)
	for i := range l.count {
		if next.sealedFrom+seal.ObjectHeaderSize > l.sealed {
			return nil, fmt.Errorf("%w: %d parts of %d end at %d bytes", errBroken, i, l.count, l.sealed)
		}
		h, known := l.header(i)
		if !known || i > 0 {
			var err error
			if h, _, err = fetchHeader(ctx, up, GetRequest{Ref: ref, Conditions: Conditions{IfMatch: l.etag}, From: next.sealedFrom}); err != nil {
				return nil, err
			}
		}
		if h.Object != l.object || h.Part < number || h.PlainSize > seal.MaxObjectSize || (h.Suite == seal.SuiteZstd) != l.packed {
			return nil, fmt.Errorf("%w: header of part %d", errBroken, i+1)
		}
		next.index, next.plainSize, next.sealedSize = i, int64(h.PlainSize), h.SealedSize()
		next.number, number = h.Part, h.Part+1
		w.parts = append(w.parts, next)
		w.plain += next.plainSize
		next.plainFrom += next.plainSize
		next.sealedFrom += next.sealedSize
		w.remember(i, h)
	}
	if next.sealedFrom != l.sealed {
		return nil, fmt.Errorf("%w: the parts end at %d of %d bytes", errBroken, next.sealedFrom, l.sealed)
	}
	return w, nil
}

// fetchHeader reads the header at req.From.
func fetchHeader(ctx context.Context, up Upstream, req GetRequest) (seal.ObjectHeader, Info, error) {
	req.To = req.From + seal.ObjectHeaderSize
	obj, err := up.Get(ctx, req)
	if err != nil {
		return seal.ObjectHeader{}, Info{}, err
	}
	defer obj.Body.Close()
	h, err := readHeader(obj.Body)
	return h, obj.Info, err
}

func readHeader(r io.Reader) (seal.ObjectHeader, error) {
	var raw [seal.ObjectHeaderSize]byte
	if n, err := io.ReadFull(r, raw[:]); err != nil {
		if n > 0 || err == io.EOF {
			return seal.ObjectHeader{}, fmt.Errorf("%w: %d bytes instead of a header", seal.ErrNotSealed, n)
		}
		return seal.ObjectHeader{}, &UpstreamError{Cause: err}
	}
	return seal.ParseObjectHeader(raw[:])
}

// layoutFor finds the layout of an object under the client's conditions, from
// the cache if the caller will check the ETag itself.
func (b *bucket) layoutFor(ctx context.Context, req GetRequest) (*layout, Info, error) {
	first, info, err := fetchHeader(ctx, b.Upstream, GetRequest{Ref: req.Ref, Conditions: req.Conditions})
	if err != nil {
		return nil, info, foreignRange(err)
	}
	l, err := b.complete(ctx, req.Ref, info, first)
	return l, info, err
}

// foreignRange explains a header that could not be asked for: the object is
// empty, which a sealed one never is.
func foreignRange(err error) error {
	if up, ok := asUpstream(err); ok && up.Status == 416 {
		return errForeign
	}
	return err
}

// complete makes the layout of an object from its first header and caches it.
func (b *bucket) complete(ctx context.Context, ref Ref, info Info, first seal.ObjectHeader) (*layout, error) {
	if l := b.layouts.get(ref); l != nil && l.etag == info.ETag && l.sealed == info.Size && l.object == first.Object {
		return l, nil
	}
	l, err := newLayout(info, first)
	if err != nil {
		return nil, err
	}
	if !l.predictable() {
		if l, err = l.walk(ctx, b.Upstream, ref); err != nil {
			return nil, err
		}
	}
	b.layouts.put(ref, l)
	return l, nil
}

// layoutCache remembers layouts so that ranged reads of the same object need one
// upstream request instead of two. Every use compares ETags.
type layoutCache struct {
	mu     sync.Mutex
	old    map[Ref]*layout // guarded by mu; the generation before
	now    map[Ref]*layout // guarded by mu
	weight int             // guarded by mu; part boundaries held by now
}

// maxWeight bounds each of the two generations to 4096 part boundaries: as many
// objects of predicted parts at about 1 KiB, or less than one walked object of
// 10,000 parts at 0.8 MiB.
const maxWeight = 4096

func newLayoutCache() *layoutCache { return &layoutCache{now: map[Ref]*layout{}} }

func (c *layoutCache) get(ref Ref) *layout {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.now[ref]; l != nil {
		return l
	}
	l := c.old[ref]
	if l != nil {
		delete(c.old, ref)
		c.putLocked(ref, l)
	}
	return l
}

func (c *layoutCache) put(ref Ref, l *layout) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.putLocked(ref, l)
}

func (c *layoutCache) putLocked(ref Ref, l *layout) {
	if c.weight >= maxWeight {
		c.old, c.now, c.weight = c.now, map[Ref]*layout{}, 0
	}
	c.now[ref] = l
	c.weight += len(l.parts)
}

func (c *layoutCache) drop(ref Ref) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.now, ref)
	delete(c.old, ref)
}
