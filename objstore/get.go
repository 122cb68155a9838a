package objstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

// asUpstream finds the upstream's answer in an error.
func asUpstream(err error) (*UpstreamError, bool) {
	var up *UpstreamError
	ok := errors.As(err, &up)
	return up, ok
}

// conditions reads the preconditions of a request; prefix is that of a copy's
// source, or "". Dates that cannot be parsed are ignored, as RFC 9110 says.
func conditions(h http.Header, prefix string) Conditions {
	at := func(name string) time.Time {
		t, _ := http.ParseTime(h.Get(prefix + name))
		return t
	}
	return Conditions{
		IfMatch:           upstreamETag(h.Get(prefix + "If-Match")),
		IfNoneMatch:       upstreamETag(h.Get(prefix + "If-None-Match")),
		IfModifiedSince:   at("If-Modified-Since"),
		IfUnmodifiedSince: at("If-Unmodified-Since"),
	}
}

// getObject answers GetObject, whole, by range or by part.
func (p *Proxy) getObject(ctx context.Context, c *call) error {
	want, err := wantedRange(c)
	if err != nil {
		return err
	}
	req := GetRequest{Ref: c.ref(), Conditions: conditions(c.r.Header, "")}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if want == nil {
		return p.getWhole(ctx, cancel, c, req)
	}
	return p.getRange(ctx, cancel, c, req, want)
}

// getWhole answers a GetObject that wants all of the object.
func (p *Proxy) getWhole(ctx context.Context, cancel context.CancelCauseFunc, c *call, req GetRequest) error {
	obj, err := c.bucket.Upstream.Get(ctx, req)
	if err != nil {
		return err
	}
	o, err := p.openWhole(ctx, c, req.Ref, obj)
	if err != nil {
		obj.Body.Close()
		return err
	}
	defer o.close()
	return p.send(ctx, cancel, c, obj.Info, o, nil)
}

// getRange answers a GetObject that wants a part of the object.
func (p *Proxy) getRange(ctx context.Context, cancel context.CancelCauseFunc, c *call, req GetRequest, want *rangeWant) error {
	// An object that is replaced between the request for its header and that for
	// its bytes is looked at once more, under the client's own conditions.
	for attempt := 0; ; attempt++ {
		o, info, got, err := p.rangeOnce(ctx, c, req, want)
		if errors.Is(err, errChanged) && attempt == 0 {
			c.bucket.layouts.drop(req.Ref)
			continue
		}
		if want.part == 0 && info.ETag != "" && !isSame(c.r.Header.Get("If-Range"), info) {
			if err == nil {
				o.close()
			}
			return p.getWhole(ctx, cancel, c, req)
		}
		if err != nil {
			return err
		}
		defer o.close()
		return p.send(ctx, cancel, c, info, o, got)
	}
}

// isSame reports whether an object is the one that a client, by the validator in If-Range, has a part of already.
func isSame(validator string, info Info) bool {
	if validator == "" {
		return true
	}
	if date, err := http.ParseTime(validator); err == nil {
		return info.LastModified.Unix() == date.Unix()
	}
	return upstreamETag(validator) == info.ETag
}

func (p *Proxy) rangeOnce(ctx context.Context, c *call, req GetRequest, want *rangeWant) (*opening, Info, *plainRange, error) {
	if lay := c.bucket.layouts.get(req.Ref); lay != nil {
		o, info, got, err := p.rangeCached(ctx, c, req, want, lay)
		if !errors.Is(err, errChanged) {
			return o, info, got, err
		}
		c.bucket.layouts.drop(req.Ref)
	}
	lay, info, err := c.bucket.layoutFor(ctx, req)
	if err != nil {
		return nil, info, nil, err
	}
	got, err := want.resolve(lay)
	if err != nil {
		return nil, info, nil, err
	}
	o, err := p.openRange(ctx, c.bucket, c.lane, req.Ref, lay, got.off, got.n)
	if err == nil && got.n > 0 {
		err = o.reopen(ctx)
	}
	return o, info, got, err
}

// rangeCached reads a range of an object whose layout is known in one request,
// or returns errChanged when the object is another one now.
func (p *Proxy) rangeCached(ctx context.Context, c *call, req GetRequest, want *rangeWant, lay *layout) (*opening, Info, *plainRange, error) {
	got, err := want.resolve(lay)
	if err != nil || got.n == 0 {
		return nil, Info{}, nil, errChanged // let the upstream say so about the present object
	}
	o, err := p.openRange(ctx, c.bucket, c.lane, req.Ref, lay, got.off, got.n)
	if err != nil {
		return nil, Info{}, nil, errChanged
	}
	req.From, req.To = o.pos, o.to
	obj, err := c.bucket.Upstream.Get(ctx, req)
	if up, ok := asUpstream(err); ok && up.Status == http.StatusRequestedRangeNotSatisfiable {
		return nil, Info{}, nil, errChanged
	}
	if err != nil {
		return nil, Info{}, nil, err
	}
	if obj.ETag != lay.etag || obj.Size != lay.sealed {
		obj.Body.Close()
		return nil, Info{}, nil, errChanged
	}
	o.body = obj.Body
	return o, obj.Info, got, nil
}

// send answers with what o reads, which has the upstream's part of it under ctx.
func (p *Proxy) send(ctx context.Context, cancel context.CancelCauseFunc, c *call, info Info, o *opening, got *plainRange) error {
	if err := p.describe(ctx, c, info, o.lay, got); err != nil {
		return err
	}
	status := http.StatusOK
	if got != nil && got.n > 0 {
		status = http.StatusPartialContent
	}
	return p.download(ctx, cancel, c, o, status)
}

// describe sets the headers of an object's answer.
func (p *Proxy) describe(ctx context.Context, c *call, info Info, lay *layout, got *plainRange) error {
	var meta map[string]string
	err := p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		meta, err = c.bucket.openMetadata(ctx, c.lane, info.Metadata)
		return err
	})
	if err != nil {
		return err
	}
	h := c.w.header()
	own := c.bucket.ownTagOf(ctx, c.ref(), info, lay)
	if own != nil {
		info.TagCount--
	}
	whole := got == nil || got.byPart && !multipart(info.ETag)
	if sums := takeChecksums(meta); whole && strings.EqualFold(c.r.Header.Get("X-Amz-Checksum-Mode"), "ENABLED") {
		if len(sums) == 0 {
			sums = p.keptSums(ctx, c, c.bucket, lay, own)
		}
		describeChecksums(h, sums)
	}
	describeInfo(h, info, meta)
	overrideHeaders(h, c)
	if got == nil {
		h.Set("Content-Length", strconv.FormatInt(lay.plain, 10))
		return nil
	}
	h.Set("Content-Length", strconv.FormatInt(got.n, 10))
	if got.byPart && multipart(info.ETag) {
		h.Set("X-Amz-Mp-Parts-Count", strconv.Itoa(lay.count))
	}
	if got.n > 0 {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", got.off, got.off+got.n-1, lay.plain))
	}
	return nil
}

// describeInfo sets what the upstream says beside the bytes.
func describeInfo(h http.Header, info Info, meta map[string]string) {
	set := func(name, value string) {
		if value != "" {
			h.Set(name, value)
		}
	}
	set("Etag", clientETag(info.ETag))
	if !info.LastModified.IsZero() {
		set("Last-Modified", info.LastModified.UTC().Format(http.TimeFormat))
	}
	set("Accept-Ranges", "bytes")
	set("Content-Type", info.ContentType)
	set("Cache-Control", info.CacheControl)
	set("Content-Disposition", info.ContentDisposition)
	set("Content-Encoding", info.ContentEncoding)
	set("Content-Language", info.ContentLanguage)
	set("Expires", info.Expires)
	set("X-Amz-Version-Id", info.VersionID)
	set("X-Amz-Storage-Class", info.StorageClass)
	set("X-Amz-Restore", info.Restore)
	set("X-Amz-Archive-Status", info.ArchiveState)
	set("X-Amz-Server-Side-Encryption", info.SSE)
	set("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id", info.SSEKeyID)
	if info.TagCount > 0 {
		set("X-Amz-Tagging-Count", strconv.Itoa(int(info.TagCount)))
	}
	for name, value := range meta {
		// In lower case on the wire: boto3 shows names as they are spelt there.
		h["x-amz-meta-"+name] = []string{value}
	}
}

// overrideHeaders applies the response- parameters of a (signed) request.
func overrideHeaders(h http.Header, c *call) {
	for _, name := range []string{"Content-Type", "Content-Language", "Expires", "Cache-Control", "Content-Disposition", "Content-Encoding"} {
		if v := c.arg("response-" + strings.ToLower(name)); v != "" {
			h.Set(name, v)
		}
	}
}

// headObject answers HeadObject.
func (p *Proxy) headObject(ctx context.Context, c *call) error {
	want, err := wantedRange(c)
	if err != nil {
		return err
	}
	req := GetRequest{Ref: c.ref(), Conditions: conditions(c.r.Header, "")}
	info, err := c.bucket.Upstream.Head(ctx, req)
	if err != nil {
		return err
	}
	lay, err := p.layoutOf(ctx, c.bucket, req.Ref, info)
	if err != nil {
		return err
	}
	var got *plainRange
	status := http.StatusOK
	if want != nil {
		if got, err = want.resolve(lay); lay.unread != nil && err == lay.unread {
			got, err = p.archivedPart(ctx, c, req, lay, want.part)
		}
		if err != nil {
			return err
		}
		if got.n > 0 {
			status = http.StatusPartialContent
		}
	}
	if err := p.describe(ctx, c, info, lay, got); err != nil {
		return err
	}
	c.w.begin(status)
	return nil
}

// archivedPart places a part of an archived object, of which the upstream tells where it
// lies: all parts but the last are whole segments. How long a compressed part is stands in
// its header only, which cannot be read.
func (p *Proxy) archivedPart(ctx context.Context, c *call, req GetRequest, lay *layout, part int) (*plainRange, error) {
	if lay.packed {
		return nil, lay.unread
	}
	info, err := c.bucket.Upstream.Head(ctx, GetRequest{Ref: req.Ref, Conditions: Conditions{IfMatch: lay.etag}, Part: part})
	if err != nil {
		return nil, err
	}
	from, size, ok := sealedPart(info.Range)
	if !ok {
		return nil, lay.unread
	}
	got := &plainRange{byPart: true}
	if got.n, err = seal.PlainObjectSize(size, 1); err == nil && part > 1 {
		got.off, err = seal.PlainObjectSize(from, part-1)
	}
	if err == nil && got.off+got.n > lay.plain {
		err = errors.New("a part beyond the end")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: part %d of an archived object: %w", errBroken, part, err)
	}
	return got, nil
}

// sealedPart reads "bytes a-b/n".
func sealedPart(text string) (from, size int64, ok bool) {
	span, _, found := strings.Cut(text, "/")
	r := parseRange(strings.Replace(span, "bytes ", "bytes=", 1))
	if !found || r == nil || r.from < 0 || r.to < 0 || r.to == 1<<63-1 {
		return 0, 0, false
	}
	return r.from, r.to - r.from + 1, true
}

// layoutOf finds the layout behind a Head. The length of a simple object that
// byokd's metadata entry vouches for is arithmetic; others are looked into.
func (p *Proxy) layoutOf(ctx context.Context, b *bucket, ref Ref, info Info) (*layout, error) {
	if lay := b.layouts.get(ref); lay != nil && lay.etag == info.ETag && lay.sealed == info.Size {
		return lay, nil
	}
	_, ours := info.Metadata[metaEntry]
	if _, packed := info.Metadata[packedEntry]; ours && !packed && !multipart(info.ETag) {
		plain, err := seal.PlainObjectSize(info.Size, 1)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errBroken, err)
		}
		return &layout{etag: info.ETag, sealed: info.Size, plain: plain, count: 1}, nil
	}
	lay, _, err := b.layoutFor(ctx, GetRequest{Ref: ref, Conditions: Conditions{IfMatch: info.ETag}})
	if up, refused := asUpstream(err); refused && up.Code == "InvalidObjectState" && ours {
		return archivedLayout(info, err)
	}
	return lay, err
}
