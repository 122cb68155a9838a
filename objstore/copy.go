package objstore

import (
	"context"
	"encoding/base64"
	"encoding/xml"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const copySourceHeader = "X-Amz-Copy-Source-"

// copySource is the object that a copy reads.
type copySource struct {
	bucket *bucket
	ref    Ref
	Conditions
}

// sourceOf reads the source of a copy and waits for its key.
func (p *Proxy) sourceOf(ctx context.Context, c *call) (*copySource, error) {
	path, query, _ := strings.Cut(c.r.Header.Get("X-Amz-Copy-Source"), "?")
	given := c.r.Header.Get("X-Amz-Copy-Source")
	path, err := url.QueryUnescape(path)
	if err != nil {
		return nil, invalidArgument("x-amz-copy-source", given, "Invalid copy source encoding")
	}
	name, key, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	args, err := url.ParseQuery(query)
	switch {
	case !validBucketName(name):
		return nil, invalidArgument("x-amz-copy-source", given, "Invalid copy source bucket name")
	case err != nil, key == "", climbs(key):
		return nil, invalidArgument("x-amz-copy-source", given, "Invalid copy source object key")
	}
	b := p.buckets[name]
	if b == nil {
		return nil, noSuchBucket()
	}
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if b != c.bucket {
		other := &call{bucket: b, lane: c.lane}
		err = p.admit(ctx, other)
		c.held += other.held
	}
	return &copySource{bucket: b, ref: Ref{Key: key, VersionID: args.Get("versionId")}, Conditions: conditions(c.r.Header, copySourceHeader)}, err
}

// head asks for the source under the copy's conditions.
func (s *copySource) head(ctx context.Context) (Info, error) {
	info, err := s.bucket.Upstream.Head(ofSource(ctx), GetRequest{Ref: s.ref, Conditions: s.Conditions})
	if up, ok := asUpstream(err); ok && up.Status == http.StatusNotModified {
		err = refuse(http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
	}
	return info, versionError(err, s.ref)
}

// versionError names what the answer to a HEAD about a version could not.
func versionError(err error, ref Ref) error {
	if up, ok := asUpstream(err); ok && ref.VersionID != "" {
		switch up.Status {
		case http.StatusNotFound:
			return refuse(http.StatusNotFound, "NoSuchVersion", "The specified version does not exist.").with("Key", ref.Key).with("VersionId", ref.VersionID)
		case http.StatusBadRequest:
			return invalidArgument("versionId", ref.VersionID, "Invalid version id specified")
		}
	}
	return err
}

type xmlCopied struct {
	XMLName      xml.Name
	LastModified string
	ETag         string
	xmlChecksum
}

// copyObject answers CopyObject. Inside a bucket the upstream duplicates the
// sealed bytes; a multipart object, which upstream would forget the part count of,
// and one that changes its bucket, and so its key, is opened and sealed anew.
func (p *Proxy) copyObject(ctx context.Context, c *call) error {
	if err := checkDirectives(c); err != nil {
		return err
	}
	given, err := metadataOf(c.r.Header)
	if err == nil {
		err = checkMetaSize(given) // also where the source's is kept
	}
	if err != nil {
		return err
	}
	algorithm := strings.ToLower(c.r.Header.Get("X-Amz-Checksum-Algorithm"))
	if algorithm != "" && newDigest(algorithm) == nil {
		return errChecksumAlgorithm
	}
	src, err := p.sourceOf(ctx, c)
	if err != nil {
		return err
	}
	if err := refuseSelfCopy(c, src); err != nil {
		return err
	}
	info, err := src.head(ctx)
	if err != nil {
		return err
	}
	lay, err := p.layoutOf(ofSource(ctx), src.bucket, src.ref, info)
	if err != nil {
		return err
	}
	return p.slowly(c, func() (any, func(http.Header), error) {
		a, sums, err := p.copiedAttributes(ctx, c, src, info, lay, algorithm)
		if err != nil {
			return nil, nil, err
		}
		stored, err := p.duplicate(ctx, c, src, info, lay, a)
		return p.copied("CopyObjectResult", src, info, xmlCopied{ETag: clientETag(stored.ETag), xmlChecksum: *checksumElements(sums)}, stored, err)
	})
}

// duplicate makes the copy.
func (p *Proxy) duplicate(ctx context.Context, c *call, src *copySource, info Info, lay *layout, a Attributes) (Stored, error) {
	keepTags := !strings.EqualFold(c.r.Header.Get("X-Amz-Tagging-Directive"), "REPLACE")
	conds := conditions(c.r.Header, "")
	if src.bucket == c.bucket && !multipart(info.ETag) {
		a.Metadata = keepPacked(a.Metadata, info.Metadata)
		return c.bucket.Upstream.Copy(ctx, CopyRequest{
			Source: src.ref, SourceETag: info.ETag, Key: c.key, Attributes: a, Conditions: conds, KeepTags: keepTags,
		})
	}
	if keepTags {
		var err error
		if a.Tagging, err = src.tagging(ctx, info); err != nil {
			return Stored{}, err
		}
	}
	return p.reseal(ctx, c, src, lay, PutRequest{Key: c.key, Attributes: a, Conditions: conds})
}

// copied is the answer to a copy.
func (p *Proxy) copied(name string, src *copySource, info Info, doc xmlCopied, stored Stored, err error) (any, func(http.Header), error) {
	if stored.LastModified.IsZero() {
		stored.LastModified = p.opts.Now()
	}
	doc.XMLName, doc.LastModified = xml.Name{Space: s3Namespace, Local: name}, xmlTime(stored.LastModified.Truncate(time.Second))
	stored.ETag = ""
	return doc, func(h http.Header) {
		describeStored(h, stored)
		if info.VersionID != "" {
			h.Set("X-Amz-Copy-Source-Version-Id", info.VersionID)
		}
	}, err
}

// checkDirectives refuses directives that S3 does not know.
func checkDirectives(c *call) error {
	for _, what := range []string{"metadata", "tagging"} {
		name := "x-amz-" + what + "-directive"
		switch value := c.r.Header.Get(name); strings.ToUpper(value) {
		case "", "COPY", "REPLACE":
		default:
			return invalidArgument(name, value, "Unknown %s directive.", what)
		}
	}
	return nil
}

// replaces reports whether a copy brings its own metadata.
func replaces(c *call) bool {
	return strings.EqualFold(c.r.Header.Get("X-Amz-Metadata-Directive"), "REPLACE")
}

func refuseSelfCopy(c *call, src *copySource) error {
	changes := replaces(c) || src.ref.VersionID != "" || slices.ContainsFunc([]string{"X-Amz-Checksum-Algorithm", "X-Amz-Storage-Class",
		"X-Amz-Server-Side-Encryption", "X-Amz-Website-Redirect-Location"}, func(name string) bool { return c.r.Header.Get(name) != "" })
	if src.bucket == c.bucket && src.ref.Key == c.key && !changes {
		return refuse(http.StatusBadRequest, "InvalidRequest", "This copy request is illegal because it is trying to copy an object to itself without changing the object's metadata, storage class, website redirect location or encryption attributes.")
	}
	return nil
}

// copiedAttributes are those of the request or of the source, as the directive
// says; storage class, encryption and ACL are always the request's. The checksums
// stay, since the bytes do, unless one of another algorithm is asked for, and are
// returned by algorithm.
func (p *Proxy) copiedAttributes(ctx context.Context, c *call, src *copySource, info Info, lay *layout, algorithm string) (a Attributes, sums map[string]string, err error) {
	var old map[string]string
	err = p.within(ctx, src.bucket, func(ctx context.Context) (err error) {
		old, err = src.bucket.openMetadata(ctx, c.lane, info.Metadata)
		return err
	})
	if err != nil {
		return a, nil, err
	}
	sums = takeChecksums(old)
	inTag := len(sums) == 0 && multipart(info.ETag)
	if inTag {
		sums = fullOnly(p.keptSums(ctx, c, src.bucket, lay, src.bucket.ownTagOf(ofSource(ctx), src.ref, info, lay)))
	}
	another := algorithm != "" && sums[algorithm] == ""
	if another {
		value, err := p.sumOfSource(ctx, c, src, info.ETag, algorithm)
		if err != nil {
			return a, nil, err
		}
		sums = map[string]string{algorithm: value}
	}
	if replaces(c) {
		a, err = p.sealedAttributes(ctx, c, func(meta map[string]string) { putChecksums(meta, sums) })
		return a, sums, err
	}
	a = attributesOf(c.r.Header)
	a.ContentType, a.CacheControl, a.ContentDisposition = info.ContentType, info.CacheControl, info.ContentDisposition
	a.ContentEncoding, a.ContentLanguage, a.Expires = info.ContentEncoding, info.ContentLanguage, info.Expires
	a.Metadata = info.Metadata
	if src.bucket == c.bucket && !another && (!inTag || len(sums) == 0) {
		return a, sums, nil
	}
	putChecksums(old, sums)
	err = p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		a.Metadata, err = c.bucket.sealMetadata(ctx, c.lane, old)
		return err
	})
	return a, sums, err
}

// sumOfSource reads the source to its end for a checksum that it does not have yet.
func (p *Proxy) sumOfSource(ctx context.Context, c *call, src *copySource, etag, algorithm string) (string, error) {
	o, err := p.openSource(ctx, c, src, etag)
	if err != nil {
		return "", err
	}
	plain, state := &plainReader{ctx: ofSource(ctx), o: o}, newDigest(algorithm)
	defer plain.release()
	if _, err := io.Copy(state, plain); err != nil {
		return "", err
	}
	if err := plain.finish(); err != nil && err != io.EOF {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(state.Sum(nil)), nil
}

// tagging reads the tags of the source in the form of x-amz-tagging.
func (s *copySource) tagging(ctx context.Context, info Info) (string, error) {
	if info.TagCount == 0 {
		return "", nil
	}
	tags, _, err := s.bucket.Upstream.GetTags(ofSource(ctx), s.ref)
	if err != nil {
		return "", err
	}
	set := url.Values{}
	tags, _ = splitOwnTag(tags) // which is of the source alone
	for _, t := range tags {
		set.Set(t.Key, t.Value)
	}
	return set.Encode(), nil
}

// reseal stores the plain bytes of a source under the destination's key.
func (p *Proxy) reseal(ctx context.Context, c *call, src *copySource, lay *layout, req PutRequest) (Stored, error) {
	if lay.plain > maxPut {
		return Stored{}, refuse(http.StatusBadRequest, "InvalidRequest", "The specified copy source is larger than the maximum allowable size for a copy source: 5368709120. Copy it in parts (UploadPartCopy).")
	}
	o, err := p.openSource(ctx, c, src, lay.etag)
	if err != nil {
		return Stored{}, err
	}
	return p.store(ctx, c, req, &plainReader{ctx: ofSource(ctx), o: o}, lay.plain)
}

// openSource opens the whole source, in the version that was looked at.
func (p *Proxy) openSource(ctx context.Context, c *call, src *copySource, etag string) (*opening, error) {
	obj, err := src.bucket.Upstream.Get(ofSource(ctx), GetRequest{Ref: src.ref, Conditions: Conditions{IfMatch: etag}})
	if err != nil {
		return nil, err
	}
	o, err := p.openWhole(ctx, &call{bucket: src.bucket, lane: c.lane}, src.ref, obj)
	if err != nil {
		obj.Body.Close()
	}
	return o, err
}

// uploadPartCopy answers UploadPartCopy.
func (p *Proxy) uploadPartCopy(ctx context.Context, c *call) error {
	number, err := partNumber(c)
	if err != nil {
		return err
	}
	src, err := p.sourceOf(ctx, c)
	if err != nil {
		return err
	}
	info, err := src.head(ctx)
	if err != nil {
		return err
	}
	lay, _, err := src.bucket.layoutFor(ofSource(ctx), GetRequest{Ref: src.ref, Conditions: Conditions{IfMatch: info.ETag}})
	if err != nil {
		return err
	}
	got := &plainRange{n: lay.plain}
	if v := c.r.Header.Get("X-Amz-Copy-Source-Range"); v != "" {
		want := parseRange(v)
		if want == nil || want.from < 0 || want.to < 0 {
			return invalidArgument("x-amz-copy-source-range", v, "The x-amz-copy-source-range value must be of the form bytes=first-last where first and last are the zero-based offsets of the first and last bytes to copy")
		}
		if want.to >= lay.plain {
			return invalidArgument("x-amz-copy-source-range", v, "Range specified is not valid for source object of size: %d", lay.plain)
		}
		if got, err = want.resolve(lay); err != nil {
			return err
		}
	}
	if err := partFits(got.n); err != nil {
		return err
	}
	return p.slowly(c, func() (any, func(http.Header), error) {
		o, err := p.openRange(ctx, src.bucket, c.lane, src.ref, lay, got.off, got.n)
		if err != nil {
			return nil, nil, err
		}
		id := UploadID(c.arg("uploadId"))
		begun, _ := c.bucket.uploads.get(id)
		plain, told := begun.summed(&plainReader{ctx: ofSource(ctx), o: o})
		part, err := p.storePart(ctx, c, c.key, id, number, plain, got.n)
		if err != nil {
			return nil, nil, err
		}
		c.bucket.rememberPart(partName{id, number, part.ETag}, told())
		return p.copied("CopyPartResult", src, info, xmlCopied{ETag: partETag(part.ETag, told()), xmlChecksum: told().elements()}, Stored{}, nil)
	})
}
