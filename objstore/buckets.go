package objstore

import (
	"context"
	"encoding/xml"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

type xmlBucket struct {
	Name         string
	CreationDate string
}

type xmlBuckets struct {
	XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListAllMyBucketsResult"`
	Owner   *xmlOwner
	Buckets struct{ Bucket []xmlBucket }
	Prefix  string `xml:",omitempty"`

	ContinuationToken string `xml:",omitempty"`
}

// maxListedBuckets is S3's own bound of one page of buckets.
const maxListedBuckets = 10000

// listBuckets answers ListBuckets with the configured ones. They have no date of
// their own; clients only want one that parses.
func (p *Proxy) listBuckets(_ context.Context, c *call) error {
	limit := maxListedBuckets
	if v := c.arg("max-buckets"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > maxListedBuckets {
			return invalidArgument("max-buckets", v, "Argument max-buckets must be an integer between 1 and %d.", maxListedBuckets)
		}
		limit = n
	}
	doc := xmlBuckets{Owner: proxyOwner(), Prefix: c.arg("prefix")}
	for _, name := range slices.Sorted(maps.Keys(p.buckets)) {
		if !strings.HasPrefix(name, doc.Prefix) || name <= c.arg("continuation-token") {
			continue
		}
		if n := len(doc.Buckets.Bucket); n == limit {
			doc.ContinuationToken = doc.Buckets.Bucket[n-1].Name
			break
		}
		doc.Buckets.Bucket = append(doc.Buckets.Bucket, xmlBucket{Name: name, CreationDate: xmlTime(time.Unix(0, 0))})
	}
	return writeXML(c.w, http.StatusOK, doc)
}

// headBucket answers HeadBucket with the upstream's word.
func (p *Proxy) headBucket(ctx context.Context, c *call) error {
	if err := c.bucket.Upstream.Check(ctx); err != nil {
		return bucketError(err)
	}
	if c.bucket.Region != "" {
		c.w.header().Set("X-Amz-Bucket-Region", c.bucket.Region)
	}
	return ok(c, http.StatusOK)
}

// bucketError names the bucket where the upstream's answer to a HEAD could not.
func bucketError(err error) error {
	if up, isUpstream := asUpstream(err); isUpstream && up.Status == http.StatusNotFound {
		return &Error{Status: http.StatusNotFound, Code: "NoSuchBucket", Message: "The bucket configured under objects.buckets.*.upstream does not exist. Create it, or correct the name.", Cause: err}
	}
	return err
}

// getBucketLocation answers GetBucketLocation; us-east-1 is spelt as nothing.
func (p *Proxy) getBucketLocation(_ context.Context, c *call) error {
	region := c.bucket.Region
	if region == "us-east-1" {
		region = ""
	}
	return writeXML(c.w, http.StatusOK, struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ LocationConstraint"`
		Region  string   `xml:",chardata"`
	}{Region: region})
}

// getBucketVersioning answers GetBucketVersioning with the upstream's word.
func (p *Proxy) getBucketVersioning(ctx context.Context, c *call) error {
	status, err := c.bucket.Upstream.Versioning(ctx)
	if err != nil {
		return err
	}
	return writeXML(c.w, http.StatusOK, struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ VersioningConfiguration"`
		Status  string   `xml:",omitempty"`
	}{Status: status})
}

// maxTagXML bounds the body of PutObjectTagging: ten tags of 128 and 256
// characters.
const maxTagXML = 64 << 10

type xmlTags struct {
	XMLName xml.Name
	TagSet  struct {
		Tag []Tag
	}
}

// getObjectTagging answers GetObjectTagging.
func (p *Proxy) getObjectTagging(ctx context.Context, c *call) error {
	tags, version, err := c.bucket.Upstream.GetTags(ctx, c.ref())
	if err != nil {
		return err
	}
	setVersion(c, version)
	doc := xmlTags{XMLName: xml.Name{Space: s3Namespace, Local: "Tagging"}}
	doc.TagSet.Tag, _ = splitOwnTag(tags)
	return writeXML(c.w, http.StatusOK, doc)
}

// putObjectTagging answers PutObjectTagging.
func (p *Proxy) putObjectTagging(ctx context.Context, c *call) error {
	var doc xmlTags
	if err := c.body.readXML(maxTagXML, &doc); err != nil {
		return err
	}
	if doc.XMLName.Local != "Tagging" {
		return malformedXML()
	}
	tags, keys := doc.TagSet.Tag, []string{}
	for _, t := range tags {
		keys = append(keys, t.Key)
	}
	if err := refuseOwnTag(keys); err != nil {
		return err
	}
	own, err := c.bucket.presentOwnTag(ctx, c.ref())
	if err != nil {
		return err
	}
	if own != nil && len(tags) < maxTags {
		tags = append(tags, *own)
	}
	version, err := c.bucket.Upstream.PutTags(ctx, c.ref(), tags)
	if err != nil {
		return err
	}
	setVersion(c, version)
	return ok(c, http.StatusOK)
}

// deleteObjectTagging answers DeleteObjectTagging.
func (p *Proxy) deleteObjectTagging(ctx context.Context, c *call) error {
	own, err := c.bucket.presentOwnTag(ctx, c.ref())
	if err != nil {
		return err
	}
	var version string
	if own != nil {
		version, err = c.bucket.Upstream.PutTags(ctx, c.ref(), []Tag{*own})
	} else {
		version, err = c.bucket.Upstream.DeleteTags(ctx, c.ref())
	}
	if err != nil {
		return err
	}
	setVersion(c, version)
	return ok(c, http.StatusNoContent)
}

func setVersion(c *call, version string) {
	if version != "" {
		c.w.header().Set("X-Amz-Version-Id", version)
	}
}

type xmlAttributes struct {
	XMLName      xml.Name       `xml:"http://s3.amazonaws.com/doc/2006-03-01/ GetObjectAttributesResponse"`
	ETag         string         `xml:",omitempty"`
	Checksum     *xmlChecksum   `xml:",omitempty"`
	ObjectParts  *xmlPartsCount `xml:",omitempty"`
	StorageClass string         `xml:",omitempty"`
	ObjectSize   *int64         `xml:",omitempty"`
}

type xmlPartsCount struct {
	TotalPartsCount int `xml:"PartsCount"`
}

type xmlChecksum struct {
	ChecksumCRC32     string `xml:",omitempty"`
	ChecksumCRC32C    string `xml:",omitempty"`
	ChecksumCRC64NVME string `xml:",omitempty"`
	ChecksumSHA1      string `xml:",omitempty"`
	ChecksumSHA256    string `xml:",omitempty"`
	ChecksumSHA512    string `xml:",omitempty"`
	ChecksumMD5       string `xml:",omitempty"`
	ChecksumXXHASH64  string `xml:",omitempty"`
	ChecksumXXHASH3   string `xml:",omitempty"`
	ChecksumXXHASH128 string `xml:",omitempty"`
	ChecksumType      string `xml:",omitempty"`
}

// checksumElements are the checksums of a whole object, by algorithm.
func checksumElements(sums map[string]string) *xmlChecksum {
	if len(sums) == 0 {
		return &xmlChecksum{}
	}
	return &xmlChecksum{sums["crc32"], sums["crc32c"], sums["crc64nvme"], sums["sha1"], sums["sha256"], sums["sha512"], sums["md5"],
		sums["xxhash64"], sums["xxhash3"], sums["xxhash128"], kindOf(sums)}
}

// getObjectAttributes answers GetObjectAttributes. Its checksums are those the
// client sent; those the upstream has are of sealed bytes.
func (p *Proxy) getObjectAttributes(ctx context.Context, c *call) error {
	names, err := attributeNames(c)
	if err != nil {
		return err
	}
	info, err := c.bucket.Upstream.Head(ctx, GetRequest{Ref: c.ref(), Conditions: conditions(c.r.Header, "")})
	if err != nil {
		return versionError(err, c.ref())
	}
	lay, err := p.layoutOf(ctx, c.bucket, c.ref(), info)
	if err != nil {
		return err
	}
	var meta map[string]string
	err = p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		meta, err = c.bucket.openMetadata(ctx, c.lane, info.Metadata)
		return err
	})
	if err != nil {
		return err
	}
	sums := takeChecksums(meta)
	if len(sums) == 0 && slices.Contains(names, "Checksum") {
		sums = p.keptSums(ctx, c, c.bucket, lay, c.bucket.ownTagOf(ctx, c.ref(), info, lay))
	}
	doc := attributesDocument(names, info, lay, sums)
	h := c.w.header()
	setVersion(c, info.VersionID)
	if !info.LastModified.IsZero() {
		h.Set("Last-Modified", info.LastModified.UTC().Format(http.TimeFormat))
	}
	return writeXML(c.w, http.StatusOK, doc)
}

// attributeNames are the attributes that were asked for.
func attributeNames(c *call) ([]string, error) {
	var names []string
	for name := range strings.SplitSeq(strings.Join(c.r.Header.Values("X-Amz-Object-Attributes"), ","), ",") {
		switch name = strings.TrimSpace(name); name {
		case "ETag", "ObjectSize", "StorageClass", "ObjectParts", "Checksum":
			names = append(names, name)
		case "":
			return nil, refuse(http.StatusBadRequest, "InvalidRequest", "The x-amz-object-attributes header specifying the attributes to be retrieved is either missing or empty")
		default:
			return nil, invalidArgument("attributes", name, "Invalid attribute name specified.")
		}
	}
	return names, nil
}

// attributesDocument holds the attributes that were asked for.
func attributesDocument(names []string, info Info, lay *layout, sums map[string]string) *xmlAttributes {
	doc := &xmlAttributes{}
	for _, name := range names {
		switch name {
		case "ETag":
			doc.ETag = strings.Trim(clientETag(info.ETag), `"`)
		case "ObjectSize":
			doc.ObjectSize = &lay.plain
		case "StorageClass":
			if doc.StorageClass = info.StorageClass; doc.StorageClass == "" {
				doc.StorageClass = "STANDARD"
			}
		case "ObjectParts":
			if multipart(info.ETag) {
				doc.ObjectParts = &xmlPartsCount{TotalPartsCount: lay.count}
			}
		case "Checksum":
			if len(sums) > 0 {
				doc.Checksum = checksumElements(sums)
			}
		}
	}
	return doc
}
