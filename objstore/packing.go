package objstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/byokd/byokd/internal/seal"
)

const (
	// packedUnit is how many bytes of packed segments are gathered before they go
	// upstream: an object that packs into less goes in one request, any other in
	// parts of this size. It must exceed the 5 MiB that S3 demands of a part, and is
	// most of the memory that one compressed upload takes (twice: packed, and sealed).
	packedUnit = 6 << 20
	// packedMarker is the object that tells that a bucket has, or had, compressed
	// objects, so that listings know to ask for lengths.
	packedMarker = hiddenPrefix + "zstd"
	// packedEntry is the metadata entry of a compressed object that tells its plain
	// length, which its sealed length does not.
	packedEntry = "byokd-size"
	// markerRecheck is how often a bucket without compressed objects is asked
	// whether another byokd has begun to write some.
	markerRecheck = time.Minute
	// maxListedSizes bounds the lengths remembered for listings, about 200 bytes each.
	maxListedSizes = 1 << 15
)

// The first byte of a packed segment.
const (
	packedStored = 0 // what follows is plain
	packedZstd   = 1 // what follows is one zstd frame
)

// packer compresses and decompresses single segments. Both codecs are made for
// whole segments (EncodeAll, DecodeAll), so that they keep no plain bytes between
// two calls. Safe for concurrent use.
type packer struct {
	encoder *zstd.Encoder
	decoder *zstd.Decoder
	scratch sync.Pool // of *[]byte, MaxPacked long, cleared
}

func newPacker() (*packer, error) {
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(seal.SegmentSize), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, err
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(seal.SegmentSize), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(0))
	return &packer{encoder: encoder, decoder: decoder, scratch: sync.Pool{New: func() any {
		b := make([]byte, 0, seal.MaxPacked+64)
		return &b
	}}}, err
}

// pack appends a length and the packed form of one segment.
func (k *packer) pack(dst, plain []byte) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, packedZstd)
	dst = k.encoder.EncodeAll(plain, dst)
	if len(dst)-start-5 >= len(plain) {
		dst = append(dst[:start+4], packedStored)
		dst = append(dst, plain...)
	}
	binary.BigEndian.PutUint32(dst[start:], uint32(len(dst)-start-4))
	return dst
}

// unpack appends the plain form of a packed segment, which must be n bytes.
func (k *packer) unpack(dst, packed []byte, n int) ([]byte, error) {
	start := len(dst)
	var err error
	switch {
	case len(packed) > 0 && packed[0] == packedStored:
		dst = append(dst, packed[1:]...)
	case len(packed) > 0 && packed[0] == packedZstd:
		var plain []byte // in dst, where there is room; the decoder's bound counts what is before
		if plain, err = k.decoder.DecodeAll(packed[1:], dst[start:start]); err == nil && len(plain) == n {
			dst = append(dst[:start], plain...)
		}
	default:
		err = fmt.Errorf("kind of packing")
	}
	if err == nil && len(dst)-start != n {
		err = fmt.Errorf("%d bytes instead of %d", len(dst)-start, n)
	}
	if err != nil {
		return dst, fmt.Errorf("%w: unpacking: %v", errBroken, err)
	}
	return dst, nil
}

// openPacked opens and unpacks a batch of packed segments, each after its length.
func (k *packer) openPacked(cipher *seal.ObjectCipher, dst, batch []byte, first, plainSize int64) ([]byte, error) {
	count := seal.SegmentCount(plainSize)
	scratch := k.scratch.Get().(*[]byte)
	defer func() {
		clear((*scratch)[:cap(*scratch)])
		k.scratch.Put(scratch)
	}()
	for index := first; len(batch) > 0; index++ {
		n, err := seal.PackedLength(batch)
		if err != nil {
			return nil, &segmentError{index, err}
		}
		packed, err := cipher.OpenPacked((*scratch)[:0], batch[seal.PackedPrefix:][:n], uint64(index), index == count-1)
		if err != nil {
			return nil, &segmentError{index, err}
		}
		size := min(seal.SegmentSize, plainSize-index*seal.SegmentSize)
		if dst, err = k.unpack(dst, packed, int(size)); err != nil {
			return nil, &segmentError{index, err}
		}
		batch = batch[seal.PackedPrefix+n:]
	}
	return dst, nil
}

// readPacked reads up to count packed segments, each after its length, into buf
// and returns them. read fills its argument or fails.
func readPacked(buf []byte, count int64, read func([]byte) error) ([]byte, error) {
	batch := buf[:0]
	for range count {
		at := len(batch)
		batch = batch[:at+seal.PackedPrefix]
		if err := read(batch[at:]); err != nil {
			return nil, err
		}
		n, err := seal.PackedLength(batch[at:])
		if err != nil {
			return nil, err
		}
		batch = batch[:at+seal.PackedPrefix+n]
		if err := read(batch[at+seal.PackedPrefix:]); err != nil {
			return nil, err
		}
	}
	return batch, nil
}

// packedBatch is the longest batch of packed segments.
const packedBatch = batchSegments * (seal.PackedPrefix + seal.MaxPacked + seal.SegmentOverhead)

// unit is some packed segments that become one object or part.
type unit struct {
	packed []byte // length and content of each segment, in clear
	plain  int64
}

// storePacked is store for a bucket that compresses. What packs into one unit is
// put in one request; else the units are the parts of a multipart object.
func (p *Proxy) storePacked(ctx context.Context, c *call, req PutRequest, src plainSource, size int64) (Stored, error) {
	defer releaseSource(src)
	if err := c.bucket.announcePacked(ctx); err != nil {
		return Stored{}, err
	}
	req.Metadata = keepPacked(req.Metadata, map[string]string{packedEntry: strconv.FormatInt(size, 10)})
	if err := checkMetaSize(req.Metadata); err != nil {
		return Stored{}, err
	}
	u := unit{packed: make([]byte, 0, packedUnit+seal.PackedPrefix+seal.MaxPacked+64)}
	defer func() { clear(u.packed[:cap(u.packed)]) }()
	left := size
	if err := p.fillUnit(src, &u, &left); err != nil {
		return Stored{}, causeOf(ctx, err)
	}
	if left > 0 {
		return p.storeUnits(ctx, c, req, src, &u, left)
	}
	sealed, err := p.sealUnit(ctx, c, &u, seal.NewID(), 0)
	if err != nil {
		return Stored{}, err
	}
	stored, err := c.bucket.Upstream.Put(ctx, req, bytes.NewReader(sealed), int64(len(sealed)))
	return stored, causeOf(ctx, err)
}

// storeUnits uploads an object of several units, the first of which is there.
func (p *Proxy) storeUnits(ctx context.Context, c *call, req PutRequest, src plainSource, u *unit, left int64) (stored Stored, err error) {
	up := c.bucket.Upstream
	id, err := up.CreateUpload(ctx, req.Key, req.Attributes)
	if err != nil {
		return Stored{}, err
	}
	defer func() {
		if err != nil {
			p.abandon(c, req.Key, id)
		}
	}()
	var parts []Part
	for {
		number := int32(len(parts) + 1)
		sealed, err := p.sealUnit(ctx, c, u, seal.UploadObjectID(string(id)), number)
		if err != nil {
			return Stored{}, err
		}
		etag, err := up.PutPart(ctx, req.Key, id, number, bytes.NewReader(sealed), int64(len(sealed)))
		if err != nil {
			return Stored{}, causeOf(ctx, err)
		}
		parts = append(parts, Part{Number: number, ETag: etag, Size: int64(len(sealed))})
		if left == 0 {
			break
		}
		if err := p.fillUnit(src, u, &left); err != nil {
			return Stored{}, causeOf(ctx, err)
		}
	}
	return up.CompleteUpload(ctx, req.Key, id, parts, req.Conditions)
}

// fillUnit packs as much of src as goes into a unit. The source is verified before
// its end is handed on.
func (p *Proxy) fillUnit(src plainSource, u *unit, left *int64) error {
	buf := p.pool.get(*left)
	defer p.pool.put(buf)
	u.packed, u.plain = u.packed[:0], 0
	for *left > 0 && len(u.packed) < packedUnit {
		plain := buf.plain[:min(*left, seal.SegmentSize)]
		if _, err := io.ReadFull(src, plain); err != nil {
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				err = errShortBody
			}
			return err
		}
		u.packed = p.packer.pack(u.packed, plain)
		u.plain += int64(len(plain))
		*left -= int64(len(plain))
	}
	if *left == 0 {
		return src.finish()
	}
	return nil
}

// sealUnit seals a unit in one pass, again and again until one saw it through.
func (p *Proxy) sealUnit(ctx context.Context, c *call, u *unit, object seal.ObjectID, part int32) ([]byte, error) {
	var key dataKey
	err := p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		key, err = c.bucket.writing.take(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	count := seal.SegmentCount(u.plain)
	header := seal.ObjectHeader{
		Suite: seal.SuiteZstd, Object: object, Part: uint32(part), PlainSize: uint64(u.plain),
		PackedSize: uint32(int64(len(u.packed)) + count*seal.SegmentOverhead), KeyARN: c.bucket.keyARN, WrappedKey: key.wrapped,
	}
	out := make([]byte, 0, header.SealedSize())
	for {
		_, err := c.bucket.withKey(ctx, c.lane, key, func(root *seal.Root) error {
			h, cipher, err := root.NewObject(header)
			if err != nil {
				return err
			}
			raw, err := h.Marshal()
			if err != nil {
				return err
			}
			out = append(out[:0], raw...)
			rest := u.packed
			for index := range count {
				n := binary.BigEndian.Uint32(rest)
				out = cipher.SealPacked(out, rest[4:4+n], uint64(index), index == count-1)
				rest = rest[4+n:]
			}
			return nil
		})
		if !isFrozen(err) || int64(len(out)) == header.SealedSize() {
			if isFrozen(err) {
				err = nil // sealed bytes may leave also when the epoch ended meanwhile
			}
			return out, err
		}
	}
}

// keepPacked carries the plain length of a compressed object over to metadata that
// replaces it, where the sealed bytes stay.
func keepPacked(meta, old map[string]string) map[string]string {
	size, packed := old[packedEntry]
	if !packed {
		return meta
	}
	meta = maps.Clone(meta)
	if meta == nil {
		meta = map[string]string{}
	}
	meta[packedEntry] = size
	return meta
}

// dropPacked removes it, for bytes that are sealed anew.
func dropPacked(meta map[string]string) map[string]string {
	if _, packed := meta[packedEntry]; packed {
		meta = maps.Clone(meta)
		delete(meta, packedEntry)
	}
	return meta
}

// packedLengths remembers whether a bucket has compressed objects, and how long
// those that were listed are.
type packedLengths struct {
	mu        sync.Mutex
	announced bool             // guarded by mu: there are some
	asked     time.Time        // guarded by mu: when there were none
	sizes     map[string]int64 // guarded by mu: by key, version and ETag; -1 is not compressed
}

// forget makes it unknown what the bucket has.
func (l *packedLengths) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announced, l.asked, l.sizes = false, time.Time{}, nil
}

// announcePacked makes it known, before the first one, that the bucket has
// compressed objects.
func (b *bucket) announcePacked(ctx context.Context) error {
	b.packed.mu.Lock()
	announced := b.packed.announced
	b.packed.mu.Unlock()
	if announced {
		return nil
	}
	_, err := b.Upstream.Put(ctx, PutRequest{Key: packedMarker, Attributes: Attributes{ContentType: "text/plain"}, Conditions: Conditions{IfNoneMatch: "*"}},
		strings.NewReader("This bucket has compressed objects.\n"), 36)
	if err != nil && !conflict(err) {
		return err
	}
	b.packed.mu.Lock()
	defer b.packed.mu.Unlock()
	b.packed.announced = true
	return nil
}

// hasPacked reports whether the bucket has, or had, compressed objects.
func (b *bucket) hasPacked(ctx context.Context, now time.Time) (bool, error) {
	b.packed.mu.Lock()
	announced, fresh := b.packed.announced, !b.packed.asked.IsZero() && now.Sub(b.packed.asked) < markerRecheck
	b.packed.mu.Unlock()
	if announced || fresh && !b.Compress {
		return announced, nil
	}
	_, err := b.Upstream.Head(ctx, GetRequest{Ref: Ref{Key: packedMarker}})
	absent := false
	if up, ok := asUpstream(err); ok && up.Status == http.StatusNotFound {
		absent, err = true, nil
	}
	if err != nil {
		return false, err
	}
	b.packed.mu.Lock()
	defer b.packed.mu.Unlock()
	b.packed.announced, b.packed.asked = b.packed.announced || !absent, now
	return b.packed.announced, nil
}

// measure fills in the plain lengths of the compressed objects of a page. It costs
// one HEAD for each listed object that was not listed before, sixteen at once, in a
// bucket that has compressed objects, and nothing in another.
func (b *bucket) measure(ctx context.Context, page Page, now time.Time) (Page, error) {
	if len(page.Entries) == 0 {
		return page, nil
	}
	has, err := b.hasPacked(ctx, now)
	if err != nil || !has {
		return page, err
	}
	at := make(map[string]*Entry, len(page.Entries))
	list := func(ctx context.Context, visit func(Entry) error) error {
		for i := range page.Entries {
			e := &page.Entries[i]
			if e.DeleteMarker || hidden(e.Key) {
				continue
			}
			at[listedAs(*e)] = e
			if err := visit(*e); err != nil {
				return err
			}
		}
		return nil
	}
	err = inParallel(ctx, scanWorkers, list, func(ctx context.Context, e Entry) error { return b.learnLength(ctx, e) })
	if err != nil {
		return page, err
	}
	b.packed.mu.Lock()
	defer b.packed.mu.Unlock()
	for name, e := range at {
		if n, known := b.packed.sizes[name]; known && n >= 0 {
			e.Compressed, e.PlainSize = true, n
		}
	}
	return page, nil
}

func listedAs(e Entry) string { return e.Key + "\x00" + e.VersionID + "\x00" + e.ETag }

// learnLength asks for the plain length of one listed object.
func (b *bucket) learnLength(ctx context.Context, e Entry) error {
	name := listedAs(e)
	b.packed.mu.Lock()
	_, known := b.packed.sizes[name]
	b.packed.mu.Unlock()
	if known {
		return nil
	}
	info, err := b.Upstream.Head(ctx, GetRequest{Ref: Ref{Key: e.Key, VersionID: e.VersionID}, Conditions: Conditions{IfMatch: e.ETag}})
	if replaced(err) {
		return nil // it is gone, or another one: the listing is of before
	}
	if err != nil {
		return err
	}
	n := int64(-1)
	if v, packed := info.Metadata[packedEntry]; packed {
		if n, err = strconv.ParseInt(v, 10, 64); err != nil || n < 0 {
			n = -1
		}
	}
	b.packed.mu.Lock()
	defer b.packed.mu.Unlock()
	if len(b.packed.sizes) >= maxListedSizes || b.packed.sizes == nil {
		b.packed.sizes = map[string]int64{}
	}
	b.packed.sizes[name] = n
	return nil
}
