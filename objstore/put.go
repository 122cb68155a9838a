package objstore

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/byokd/byokd/internal/seal"
)

const (
	// maxPut is what S3 accepts in one PutObject, UploadPart or CopyObject.
	maxPut = 5 << 30
	// upstreamPart is how much of an object too large for one upstream request goes
	// into each part: 16384 segments, 1 GiB, so that such objects have 6 parts.
	upstreamPart = 16384 * seal.SegmentSize
	// defaultContentType is what S3 assumes.
	defaultContentType = "binary/octet-stream"
)

// attributesOf reads what travels beside the bytes. User metadata is not in it.
func attributesOf(h http.Header) Attributes {
	a := Attributes{
		ContentType:        h.Get("Content-Type"),
		CacheControl:       h.Get("Cache-Control"),
		ContentDisposition: h.Get("Content-Disposition"),
		ContentEncoding:    contentEncoding(h.Get("Content-Encoding")),
		ContentLanguage:    h.Get("Content-Language"),
		Expires:            h.Get("Expires"),
		StorageClass:       h.Get("X-Amz-Storage-Class"),
		SSE:                h.Get("X-Amz-Server-Side-Encryption"),
		SSEKeyID:           h.Get("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id"),
		ACL:                h.Get("X-Amz-Acl"),
		Tagging:            h.Get("X-Amz-Tagging"),
	}
	if a.ContentType == "" {
		a.ContentType = defaultContentType
	}
	return a
}

// contentEncoding takes the framing of the upload out: it is not part of the
// object, though some stores keep it.
func contentEncoding(v string) string {
	var kept []string
	for e := range strings.SplitSeq(v, ",") {
		if e = strings.TrimSpace(e); e != "" && !strings.EqualFold(e, "aws-chunked") {
			kept = append(kept, e)
		}
	}
	return strings.Join(kept, ",")
}

// sealedAttributes is attributesOf with the user metadata sealed, and with it what
// add adds.
func (p *Proxy) sealedAttributes(ctx context.Context, c *call, add func(meta map[string]string)) (Attributes, error) {
	a := attributesOf(c.r.Header)
	meta, err := metadataOf(c.r.Header)
	if err != nil {
		return a, err
	}
	add(meta)
	err = p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		a.Metadata, err = c.bucket.sealMetadata(ctx, c.lane, meta)
		return err
	})
	return a, err
}

// bodySize checks that the length of an upload is known and allowed.
func bodySize(c *call) (int64, error) {
	switch {
	case c.body.size < 0:
		return 0, refuse(http.StatusLengthRequired, "MissingContentLength", "You must provide the Content-Length HTTP header.")
	case c.body.size > maxPut:
		return 0, refuse(http.StatusBadRequest, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size of 5 GiB for one request. Use a multipart upload.")
	}
	return c.body.size, nil
}

// putObject answers PutObject.
func (p *Proxy) putObject(ctx context.Context, c *call) error {
	size, err := bodySize(c)
	if err != nil {
		return err
	}
	src, err := p.bodyToStore(c, size)
	if err != nil {
		return err
	}
	a, err := p.sealedAttributes(ctx, c, c.body.keepChecksums)
	if err != nil {
		releaseSource(src)
		return err
	}
	req := PutRequest{Key: c.key, Attributes: a, Conditions: conditions(c.r.Header, "")}
	stored, err := p.store(ctx, c, req, src, size)
	if err != nil {
		return err
	}
	h := c.w.header()
	c.body.checksums(h)
	describeStored(h, stored)
	return ok(c, http.StatusOK)
}

// maxHeld is how long a body may be that is read to its end before its object is
// begun: as much as a transfer holds in any case.
const maxHeld = batchSegments * seal.SegmentSize

// bodyToStore lends the body of a PutObject. A short one with a checksum in its
// trailer is read and verified first, since the checksum is part of the metadata,
// which goes up before the bytes.
func (p *Proxy) bodyToStore(c *call, size int64) (plainSource, error) {
	if size > maxHeld || !c.body.awaitsChecksum() {
		c.body.lent = true
		return c.body, nil
	}
	h := &heldBody{pool: &p.pool, buf: p.pool.get(size)}
	h.left = h.buf.plain[:size]
	_, err := io.ReadFull(c.body, h.left)
	if err == nil {
		err = c.body.finish()
	}
	if err != nil {
		h.release()
		return nil, err
	}
	return h, nil
}

// heldBody is a verified body in memory, cleared as it is read.
type heldBody struct {
	pool *bufferPool
	buf  *buffers // nil after release
	left []byte
}

// Read implements io.Reader.
func (h *heldBody) Read(p []byte) (int, error) {
	if len(h.left) == 0 {
		return 0, io.EOF
	}
	n := copy(p, h.left)
	clear(h.left[:n])
	h.left = h.left[n:]
	return n, nil
}

func (h *heldBody) finish() error { return nil }

func (h *heldBody) release() {
	if h.buf != nil {
		h.pool.put(h.buf)
		h.buf, h.left = nil, nil
	}
}

// releaseSource gives back what a source holds that is not read any more.
func releaseSource(src plainSource) {
	if in, ok := src.(interface{ release() }); ok {
		in.release()
	}
}

// describeStored sets the headers of the answer to a write.
func describeStored(h http.Header, s Stored) {
	for name, value := range map[string]string{
		"Etag": clientETag(s.ETag), "X-Amz-Version-Id": s.VersionID,
		"X-Amz-Server-Side-Encryption": s.SSE, "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id": s.SSEKeyID,
	} {
		if value != "" {
			h.Set(name, value)
		}
	}
}

// store seals size bytes of src into an object. src is released when it is no
// longer read.
func (p *Proxy) store(ctx context.Context, c *call, req PutRequest, src plainSource, size int64) (Stored, error) {
	req.Metadata = dropPacked(req.Metadata)
	if c.op != OpPutObject && locks(ctx) {
		// S3 demands a checksum of a PutObject that locks, which sealed bytes have only at
		// their end; of an upload in parts it demands none.
		return p.storeLarge(ctx, c, req, src, size)
	}
	if c.bucket.Compress && size > 0 {
		return p.storePacked(ctx, c, req, src, size)
	}
	if seal.SealedObjectSize(size) > p.limits.upstreamPut {
		return p.storeLarge(ctx, c, req, src, size)
	}
	s, err := p.newSealing(ctx, c, src, size, seal.ObjectID{}, 0)
	if err != nil {
		return Stored{}, err
	}
	defer s.release()
	// The upstream's context ends with the request: a client that left, or a
	// failure to read from it, cuts the upload before its last segment.
	stored, err := c.bucket.Upstream.Put(ctx, req, s, s.size())
	return stored, causeOf(ctx, s.outcome(err))
}

// causeOf prefers the reason why a context ended to what that did to a call.
func causeOf(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

// storeLarge is store for an object whose sealed form exceeds what the upstream
// takes at once: it becomes a multipart object, part after part.
func (p *Proxy) storeLarge(ctx context.Context, c *call, req PutRequest, src plainSource, size int64) (Stored, error) {
	up := c.bucket.Upstream
	id, err := up.CreateUpload(ctx, req.Key, req.Attributes)
	if err != nil {
		return Stored{}, err
	}
	var parts []Part
	for left := size; left > 0 || len(parts) == 0; left -= p.limits.upstreamPart {
		n := min(left, p.limits.upstreamPart)
		part, err := p.storePart(ctx, c, req.Key, id, int32(len(parts)+1), &portion{src: src, left: n, last: n == left}, n)
		if err != nil {
			p.abandon(c, req.Key, id)
			return Stored{}, err
		}
		parts = append(parts, part)
	}
	stored, err := up.CompleteUpload(ctx, req.Key, id, parts, req.Conditions)
	if err != nil {
		p.abandon(c, req.Key, id)
	}
	return stored, err
}

// storePart seals n bytes of src into one part of an upload.
func (p *Proxy) storePart(ctx context.Context, c *call, key string, id UploadID, number int32, src plainSource, n int64) (Part, error) {
	s, err := p.newSealing(ctx, c, src, n, seal.UploadObjectID(string(id)), number)
	if err != nil {
		return Part{}, err
	}
	defer s.release()
	etag, err := c.bucket.Upstream.PutPart(ctx, key, id, number, s, s.size())
	if err = causeOf(ctx, s.outcome(err)); err != nil {
		return Part{}, err
	}
	if r, ok := src.(*portion); ok {
		r.keep = !r.last
	}
	return Part{Number: number, ETag: etag, Size: s.size()}, nil
}

// portion is a stretch of a longer source, sealed as a part of its own.
type portion struct {
	src  plainSource
	left int64
	last bool
	keep bool // the source is needed for the next portion
}

// Read implements io.Reader.
func (r *portion) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.src.Read(b[:min(int64(len(b)), r.left)])
	r.left -= int64(n)
	return n, err
}

// finish verifies the whole source after its last portion.
func (r *portion) finish() error {
	if r.last {
		return r.src.finish()
	}
	return nil
}

// release releases the source after the last portion, or the one that failed.
func (r *portion) release() {
	if !r.keep {
		releaseSource(r.src)
	}
}
