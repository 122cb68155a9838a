package objstore

import (
	"context"
	"encoding/xml"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/seal"
)

const (
	// maxCompleteXML bounds the body of CompleteMultipartUpload: 10,000 parts with
	// an ETag and several checksums are about 5 MB.
	maxCompleteXML = 8 << 20
	// abandonTimeout bounds the clean-up after a failed upload, which happens while
	// the client waits for its error.
	abandonTimeout = 10 * time.Second
)

type xmlInitiate struct {
	XMLName  xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ InitiateMultipartUploadResult"`
	Bucket   string
	Key      string
	UploadID UploadID `xml:"UploadId"`
}

// createMultipartUpload answers CreateMultipartUpload.
func (p *Proxy) createMultipartUpload(ctx context.Context, c *call) error {
	algorithm, kind, err := uploadChecksum(c.r.Header)
	if err != nil {
		return err
	}
	a, err := p.sealedAttributes(ctx, c, func(map[string]string) {})
	if err != nil {
		return err
	}
	id, err := c.bucket.Upstream.CreateUpload(ctx, c.key, a)
	if err != nil {
		return err
	}
	c.bucket.uploads.put(id, begunUpload{strings.ToLower(algorithm), kind, lockOf(c.r.Header)})
	h := c.w.header()
	if algorithm != "" {
		h.Set("X-Amz-Checksum-Algorithm", algorithm)
		h.Set("X-Amz-Checksum-Type", kind)
	}
	return writeXML(c.w, http.StatusOK, xmlInitiate{Bucket: c.bucket.name, Key: c.key, UploadID: id})
}

// partNumber reads the number of the part that a request is about.
func partNumber(c *call) (int32, error) {
	n, err := strconv.ParseInt(c.arg("partNumber"), 10, 32)
	if err != nil || n < 1 || n > seal.MaxParts {
		return 0, invalidArgument("partNumber", c.arg("partNumber"), "Part number must be an integer between 1 and 10000, inclusive.")
	}
	return int32(n), nil
}

// uploadPart answers UploadPart.
func (p *Proxy) uploadPart(ctx context.Context, c *call) error {
	number, err := partNumber(c)
	if err != nil {
		return err
	}
	size, err := bodySize(c)
	if err != nil {
		return err
	}
	if err := partFits(size); err != nil {
		return err
	}
	id := UploadID(c.arg("uploadId"))
	begun, _ := c.bucket.uploads.get(id)
	if err := begun.sumPart(c.body, c.r.Header); err != nil {
		return err
	}
	c.body.lent = true
	part, err := p.storePart(ctx, c, c.key, id, number, c.body, size)
	if err != nil {
		return err
	}
	h := c.w.header()
	c.body.checksums(h)
	h.Del("X-Amz-Checksum-Type")
	sum := c.body.partSum()
	c.bucket.rememberPart(partName{id, number, part.ETag}, sum)
	h.Set("Etag", partETag(part.ETag, sum))
	return ok(c, http.StatusOK)
}

// partFits refuses parts whose sealed form would be too large upstream.
func partFits(size int64) error {
	if seal.SealedObjectSize(size) > maxPut {
		return refuse(http.StatusBadRequest, "EntityTooLarge", "A part of this size exceeds 5 GiB once sealed. Use parts of at most 5 GiB less 3 MiB.")
	}
	return nil
}

type xmlComplete struct {
	XMLName xml.Name `xml:"CompleteMultipartUpload"`
	Parts   []struct {
		PartNumber *int32
		ETag       string
		xmlChecksum
	} `xml:"Part"`
}

type xmlCompleted struct {
	XMLName  xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CompleteMultipartUploadResult"`
	Location string
	Bucket   string
	Key      string
	ETag     string
	xmlChecksum
}

// completeMultipartUpload answers CompleteMultipartUpload.
func (p *Proxy) completeMultipartUpload(ctx context.Context, c *call) error {
	var doc xmlComplete
	if err := c.body.readXML(maxCompleteXML, &doc); err != nil {
		return err
	}
	id := UploadID(c.arg("uploadId"))
	begun, _ := c.bucket.uploads.get(id)
	named, err := namedWhole(c.r.Header)
	if err == nil {
		named, err = begun.agree(named)
	}
	if err != nil {
		return err
	}
	wanted, sums, err := partsWanted(&doc, named.kind)
	if err != nil {
		return err
	}
	return p.slowly(c, func() (any, func(http.Header), error) {
		stored, whole, err := p.complete(ctx, c, id, wanted, sums, named)
		doc := xmlCompleted{Location: location(c), Bucket: c.bucket.name, Key: c.key, ETag: clientETag(stored.ETag)}
		if whole.algorithm != "" {
			doc.xmlChecksum = *checksumElements(whole.sums())
		}
		stored.ETag = ""
		return doc, func(h http.Header) { describeStored(h, stored) }, err
	})
}

// location is the address of the object, as the client would spell it.
func location(c *call) string {
	scheme := "http"
	if c.r.TLS != nil {
		scheme = "https"
	}
	return scheme + "://" + c.r.Host + escape(c.r.URL.Path, true)
}

// complete completes an upload, and seals it anew when its parts do not add up to
// a length that can be told from the sealed one. It returns the checksum of the whole
// where that follows from those of the parts, and refuses another one.
func (p *Proxy) complete(ctx context.Context, c *call, id UploadID, wanted []Part, sums []partSum, named wholeSum) (Stored, wholeSum, error) {
	aligned, lengths, err := p.aligned(ctx, c, id, wanted)
	if err != nil {
		return Stored{}, wholeSum{}, err
	}
	whole, err := named.resolve(sums, lengths)
	if err != nil {
		return Stored{}, wholeSum{}, err
	}
	var lock lockSource
	if !aligned {
		if lock, err = p.lockSourceOf(ctx, c, id); err != nil {
			return Stored{}, wholeSum{}, err
		}
	}
	stored, err := c.bucket.Upstream.CompleteUpload(ctx, c.key, id, wanted, conditions(c.r.Header, ""))
	switch {
	case err == nil && aligned:
		p.keepSum(ctx, c, stored, whole)
	case err == nil:
		first := stored
		stored, err = p.realign(ctx, c, stored, whole, lock)
		if lock.lockable {
			p.log.Warn("an upload in parts that are no multiples of 64 KiB was sealed anew, in a bucket with object lock: its first form stays below it as a version of its own, and is paid for, until the lock that it was begun with ends (a part size that is a multiple of 64 KiB avoids that)",
				zap.String("bucket", c.bucket.name), zap.String("key", c.key), zap.String("first_version", first.VersionID), zap.String("version", stored.VersionID), zap.Error(err))
		}
	}
	return stored, whole, err
}

// partsWanted reads the client's list of parts, and what their ETags say of their
// checksums. kind is that of the whole object's, if known.
func partsWanted(doc *xmlComplete, kind string) ([]Part, []partSum, error) {
	if len(doc.Parts) == 0 || len(doc.Parts) > seal.MaxParts {
		return nil, nil, malformedXML().hint("A complete request names between 1 and 10000 parts.")
	}
	parts, sums := make([]Part, len(doc.Parts)), make([]partSum, len(doc.Parts))
	for i, part := range doc.Parts {
		if part.ETag == "" || part.PartNumber == nil {
			return nil, nil, malformedXML()
		}
		if number := *part.PartNumber; number < 1 {
			return nil, nil, invalidArgument("PartNumber", strconv.Itoa(int(number)), "PartNumber must be >= 1")
		}
		if i > 0 && *part.PartNumber <= *doc.Parts[i-1].PartNumber {
			return nil, nil, refuse(http.StatusBadRequest, "InvalidPartOrder", "The list of parts was not in ascending order. Parts must be ordered by part number.")
		}
		etag, sum := splitPartETag(part.ETag)
		if err := checkPart(*part.PartNumber, &part.xmlChecksum, sum, kind); err != nil {
			return nil, nil, err
		}
		parts[i], sums[i] = Part{Number: *part.PartNumber, ETag: upstreamETag(etag)}, sum
	}
	return parts, sums, nil
}

// aligned reports whether every part but the last is a multiple of a segment, so
// that the plain length of the object follows from its sealed length, and returns the
// plain length of each of several parts, if there are all of them. It refuses an upload that is not as long as
// the client says.
func (p *Proxy) aligned(ctx context.Context, c *call, id UploadID, wanted []Part) (bool, []int64, error) {
	promised := c.r.Header.Get("X-Amz-Mp-Object-Size")
	if n, err := strconv.ParseInt(promised, 10, 64); promised != "" && (err != nil || n < 0) {
		if err == nil {
			return false, nil, refuse(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-mp-object-size header is less than zero: '%d'", n)
		}
		return false, nil, refuse(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-mp-object-size header is invalid.")
	}
	if len(wanted) == 1 && promised == "" {
		return true, nil, nil
	}
	total, aligned, lengths, found := int64(0), true, make([]int64, len(wanted)), 0
	err := p.eachPart(ctx, c, id, func(part Part) error {
		i, is := slices.BinarySearchFunc(wanted, part.Number, func(w Part, n int32) int { return int(w.Number - n) })
		if !is {
			return nil
		}
		found++
		plain, err := seal.PlainObjectSize(part.Size, 1)
		if err != nil {
			return fmt.Errorf("%w: size of part %d", errBroken, part.Number)
		}
		if plain == 0 && i < len(wanted)-1 { // S3 wants 5 MiB; and what is only completed can be any object's end
			return refuse(http.StatusBadRequest, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size").
				with("PartNumber", strconv.Itoa(int(part.Number))).with("ETag", strings.Trim(partETag(part.ETag, partSum{}), `"`)).with("ProposedSize", "0").
				hint("Every part of an upload but the last must hold at least 5 MiB, on services other than S3 at least a byte.")
		}
		total, lengths[i] = total+plain, plain
		if i < len(wanted)-1 && plain%seal.SegmentSize != 0 {
			aligned = false
		}
		return nil
	})
	if err == nil && promised != "" && promised != strconv.FormatInt(total, 10) {
		err = refuse(http.StatusBadRequest, "InvalidRequest", "The provided 'x-amz-mp-object-size' header value %s does not match what was computed: %d", promised, total)
	}
	if found < len(wanted) { // which the upstream will refuse in its own words
		lengths = nil
	}
	return aligned, lengths, err
}

// eachPart visits the parts uploaded so far.
func (p *Proxy) eachPart(ctx context.Context, c *call, id UploadID, visit func(Part) error) error {
	for after := int32(0); ; {
		page, err := c.bucket.Upstream.ListParts(ctx, c.key, id, after, maxListed)
		if err != nil {
			return err
		}
		for _, part := range page.Parts {
			if err := visit(part); err != nil {
				return err
			}
		}
		if !page.Truncated || page.NextAfter <= after {
			return nil
		}
		after = page.NextAfter
	}
}

// realign seals a completed object anew. Until it is done the object reads right
// where its boundaries are walked, a first download breaks off where they seemed
// predictable, and List announces up to 28 bytes per part too much; so the client is told of success only afterwards. When somebody replaced
// the object meanwhile, there is nothing left to do. The checksum of the whole has its place in the new metadata.
// Lock and ACL go over to the new object; the former one stays below it as a version where there are versions, as
// long as its lock does.
func (p *Proxy) realign(ctx context.Context, c *call, completed Stored, whole wholeSum, lock lockSource) (Stored, error) {
	src := &copySource{bucket: c.bucket, ref: Ref{Key: c.key, VersionID: completed.VersionID}, Conditions: Conditions{IfMatch: completed.ETag}}
	info, rules, err := p.headWithRules(ctx, c.bucket, GetRequest{Ref: src.ref, Conditions: src.Conditions}, lock)
	if err != nil {
		return Stored{}, err
	}
	lay, _, err := c.bucket.layoutFor(ctx, GetRequest{Ref: src.ref, Conditions: src.Conditions})
	if err == nil && !lay.walked() { // sizes may happen to fit a prediction, which is known to be wrong
		if lay, err = lay.walk(ctx, c.bucket.Upstream, src.ref); err == nil {
			c.bucket.layouts.put(src.ref, lay)
		}
	}
	if err != nil {
		return Stored{}, err
	}
	req := PutRequest{Key: c.key, Attributes: info.Attributes, Conditions: Conditions{IfMatch: completed.ETag}}
	if req.Metadata, err = p.withSums(ctx, c, info.Metadata, whole.sums()); err != nil {
		return Stored{}, err
	}
	if req.Tagging, err = src.tagging(ctx, info); err != nil {
		return Stored{}, err
	}
	o, err := p.openSource(ctx, c, src, completed.ETag)
	if err != nil {
		return Stored{}, err
	}
	stored, err := p.store(withRules(ctx, rules), c, req, &plainReader{ctx: ctx, o: o}, lay.plain)
	if up, ok := asUpstream(err); ok && up.Status == http.StatusPreconditionFailed {
		return completed, nil
	}
	return stored, err
}

// abortMultipartUpload answers AbortMultipartUpload.
func (p *Proxy) abortMultipartUpload(ctx context.Context, c *call) error {
	if err := c.bucket.Upstream.AbortUpload(ctx, c.key, UploadID(c.arg("uploadId"))); err != nil {
		return err
	}
	return ok(c, http.StatusNoContent)
}

// abandon aborts an upload of byokd's own after a failure, also when the client
// has left. What it cannot abort, the bucket's lifecycle rule has to.
func (p *Proxy) abandon(c *call, key string, id UploadID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.r.Context()), abandonTimeout)
	defer cancel()
	if err := c.bucket.Upstream.AbortUpload(ctx, key, id); err != nil {
		p.log.Warn("an upload could not be aborted; its parts stay until the bucket's lifecycle rule removes them",
			zap.String("bucket", c.bucket.name), zap.String("upload", string(id)), zap.Error(err))
	}
}

type xmlPart struct {
	PartNumber   int32
	LastModified string
	ETag         string
	Size         int64
	xmlChecksum
}

type xmlParts struct {
	XMLName              xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListPartsResult"`
	Bucket               string
	Key                  string
	UploadID             string `xml:"UploadId"`
	Initiator            *xmlOwner
	Owner                *xmlOwner
	StorageClass         string
	PartNumberMarker     int32
	NextPartNumberMarker int32
	MaxParts             int32
	IsTruncated          bool
	ChecksumAlgorithm    string    `xml:",omitempty"`
	ChecksumType         string    `xml:",omitempty"`
	Parts                []xmlPart `xml:"Part"`
}

// listParts answers ListParts.
func (p *Proxy) listParts(ctx context.Context, c *call) error {
	limit, err := limitOf(c, "max-parts")
	if err != nil {
		return err
	}
	after, err := numberOf(c, "part-number-marker", 0)
	if err != nil {
		return err
	}
	page, err := c.bucket.Upstream.ListParts(ctx, c.key, UploadID(c.arg("uploadId")), after, limit)
	if err != nil {
		return err
	}
	doc := xmlParts{
		Bucket: c.bucket.name, Key: c.key, UploadID: c.arg("uploadId"), Initiator: proxyOwner(), Owner: proxyOwner(),
		StorageClass: page.StorageClass, PartNumberMarker: after, NextPartNumberMarker: page.NextAfter, MaxParts: limit, IsTruncated: page.Truncated,
	}
	begun, _ := c.bucket.uploads.get(UploadID(c.arg("uploadId")))
	doc.ChecksumAlgorithm, doc.ChecksumType = begun.spelt()
	for _, part := range page.Parts {
		plain, err := seal.PlainObjectSize(part.Size, 1)
		if err != nil {
			plain = part.Size // not ours; Complete will refuse it
		}
		sum, _ := c.bucket.sums.get(partName{UploadID(c.arg("uploadId")), part.Number, part.ETag})
		doc.Parts = append(doc.Parts, xmlPart{PartNumber: part.Number, LastModified: xmlTime(part.LastModified), ETag: partETag(part.ETag, sum), Size: plain, xmlChecksum: sum.elements()})
	}
	return writeXML(c.w, http.StatusOK, doc)
}
