package objstore

import (
	"context"
	"encoding/xml"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

// maxListed is S3's own bound of one page.
const maxListed = 1000

// numberOf reads a query parameter that is a number ≥ 0.
func numberOf(c *call, name string, absent int32) (int32, error) {
	v := c.arg(name)
	if v == "" {
		return absent, nil
	}
	n, err := strconv.ParseInt(v, 10, 32)
	switch {
	case err != nil && name == "part-number-marker":
		return 0, invalidArgument(name, v, "Provided %s not an integer or within integer range", v)
	case err == nil && n < 0 && c.op == OpListObjectVersions:
		return 0, invalidArgument("maxKeys", v, "max-keys cannot be negative")
	case err != nil || n < 0:
		return 0, invalidArgument(name, v, "Argument %s must be an integer between 0 and 2147483647", v)
	}
	return int32(n), nil
}

// limitOf reads the size of a page.
func limitOf(c *call, name string) (int32, error) {
	n, err := numberOf(c, name, maxListed)
	return min(n, maxListed), err
}

// encoder returns how keys are written in a listing.
func encoder(c *call) (func(string) string, error) {
	switch v := c.arg("encoding-type"); v {
	case "":
		return func(s string) string { return s }, nil
	case "url":
		return func(s string) string { return escape(s, true) }, nil
	default:
		return nil, refuse(http.StatusBadRequest, "InvalidArgument", "Invalid Encoding Method specified in Request.")
	}
}

// plainEntrySize is the plain length of a listed object. One that cannot be
// sealed by its length was not written by byokd, and is as long as it is.
func plainEntrySize(e Entry) int64 {
	if e.Compressed {
		return e.PlainSize
	}
	plain, err := seal.PlainObjectSize(e.Size, partsOf(e.ETag))
	if err != nil {
		return e.Size
	}
	return plain
}

type xmlEntry struct {
	Key          string
	LastModified string
	ETag         string
	Size         int64
	Owner        *xmlOwner `xml:",omitempty"`
	StorageClass string    `xml:",omitempty"`
}

// entries translates the visible part of a page.
func entries(page Page, encode func(string) string) (list []xmlEntry, prefixes []xmlPrefix) {
	for _, e := range page.Entries {
		if hidden(e.Key) {
			continue
		}
		list = append(list, xmlEntry{
			Key: encode(e.Key), LastModified: xmlTime(e.LastModified), ETag: clientETag(e.ETag),
			Size: plainEntrySize(e), StorageClass: e.StorageClass, Owner: ownerOf(e.Owner),
		})
	}
	return list, visible(page.Prefixes, encode)
}

func visible(prefixes []string, encode func(string) string) (out []xmlPrefix) {
	for _, p := range prefixes {
		if !hidden(p) {
			out = append(out, xmlPrefix{Prefix: encode(p)})
		}
	}
	return out
}

// lastOf is where a page ended, for upstreams that do not say it themselves.
func lastOf(page Page) string {
	last := ""
	if n := len(page.Entries); n > 0 {
		last = page.Entries[n-1].Key
	}
	if n := len(page.Prefixes); n > 0 {
		last = max(last, page.Prefixes[n-1])
	}
	return last
}

// afterHidden sorts after every key that begins with hiddenPrefix, and before all
// that do not and are greater.
const afterHidden = hiddenPrefix + "\U0010FFFF"

// withoutOwn takes out a common prefix that a delimiter has cut short of byokd's own
// keys, such as ".b" for the delimiter "b", unless a key of a client has it, too.
// first returns the first key with a prefix after another key, or "".
func withoutOwn(prefixes []string, first func(prefix, after string) (string, error)) ([]string, error) {
	for i, prefix := range prefixes {
		if hidden(prefix) || !strings.HasPrefix(hiddenPrefix, prefix) {
			continue
		}
		key, err := first(prefix, "")
		if err == nil && hidden(key) {
			key, err = first(prefix, afterHidden)
		}
		if err != nil {
			return nil, err
		}
		if key == "" { // no other prefix of the page can hold them
			return slices.Delete(prefixes, i, i+1), nil
		}
	}
	return prefixes, nil
}

// firstKey returns the first key of a listing, or "".
func (b *bucket) firstKey(ctx context.Context, q ListQuery) (string, error) {
	page, err := b.Upstream.List(ctx, q)
	if err != nil || len(page.Entries) == 0 {
		return "", err
	}
	return page.Entries[0].Key, nil
}

type xmlListV1 struct {
	XMLName        xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
	Name           string
	Prefix         string
	Marker         string
	NextMarker     string `xml:",omitempty"`
	MaxKeys        int32
	Delimiter      string `xml:",omitempty"`
	EncodingType   string `xml:",omitempty"`
	IsTruncated    bool
	Contents       []xmlEntry
	CommonPrefixes []xmlPrefix
}

// listing runs the query that all listings share.
func listing(ctx context.Context, c *call, q ListQuery) (Page, func(string) string, error) {
	encode, err := encoder(c)
	if err != nil {
		return Page{}, nil, err
	}
	page, err := c.bucket.Upstream.List(ctx, q)
	if err == nil {
		if page.NextMarker == "" && page.Truncated && q.Kind == ListV1 {
			page.NextMarker = lastOf(page)
		}
		page.Prefixes, err = withoutOwn(page.Prefixes, func(prefix, after string) (string, error) {
			return c.bucket.firstKey(ctx, ListQuery{Kind: q.Kind, Prefix: prefix, Marker: after, Limit: 1})
		})
	}
	if err == nil {
		page, err = c.bucket.measure(ctx, page, time.Now())
	}
	return page, encode, err
}

// listObjects answers ListObjects (version 1).
func (p *Proxy) listObjects(ctx context.Context, c *call) error {
	limit, err := limitOf(c, "max-keys")
	if err != nil {
		return err
	}
	q := ListQuery{Kind: ListV1, Prefix: c.arg("prefix"), Delimiter: c.arg("delimiter"), Marker: c.arg("marker"), Limit: limit}
	page, encode, err := listing(ctx, c, q)
	if err != nil {
		return err
	}
	doc := xmlListV1{
		Name: c.bucket.name, Prefix: encode(q.Prefix), Marker: encode(q.Marker), MaxKeys: limit,
		Delimiter: encode(q.Delimiter), EncodingType: c.arg("encoding-type"), IsTruncated: page.Truncated,
	}
	doc.Contents, doc.CommonPrefixes = entries(page, encode)
	if page.Truncated {
		doc.NextMarker = encode(page.NextMarker)
	}
	return writeXML(c.w, http.StatusOK, doc)
}

type xmlListV2 struct {
	XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
	Name                  string
	Prefix                string
	StartAfter            string `xml:",omitempty"`
	ContinuationToken     string `xml:",omitempty"`
	NextContinuationToken string `xml:",omitempty"`
	KeyCount              int
	MaxKeys               int32
	Delimiter             string `xml:",omitempty"`
	EncodingType          string `xml:",omitempty"`
	IsTruncated           bool
	Contents              []xmlEntry
	CommonPrefixes        []xmlPrefix
}

// listObjectsV2 answers ListObjectsV2.
func (p *Proxy) listObjectsV2(ctx context.Context, c *call) error {
	limit, err := limitOf(c, "max-keys")
	if err != nil {
		return err
	}
	if tokens, given := c.query["continuation-token"]; given && len(tokens) == 1 && tokens[0] == "" {
		return refuse(http.StatusBadRequest, "InvalidArgument", "The continuation token provided is incorrect.")
	}
	q := ListQuery{
		Kind: ListV2, Prefix: c.arg("prefix"), Delimiter: c.arg("delimiter"), Marker: c.arg("start-after"),
		SubMarker: c.arg("continuation-token"), Limit: limit, FetchOwner: c.arg("fetch-owner") == "true",
	}
	page, encode, err := listing(ctx, c, q)
	if err != nil {
		return err
	}
	doc := xmlListV2{
		Name: c.bucket.name, Prefix: encode(q.Prefix), StartAfter: encode(q.Marker), ContinuationToken: q.SubMarker,
		NextContinuationToken: page.NextToken, MaxKeys: limit, Delimiter: encode(q.Delimiter),
		EncodingType: c.arg("encoding-type"), IsTruncated: page.Truncated,
	}
	doc.Contents, doc.CommonPrefixes = entries(page, encode)
	doc.KeyCount = len(doc.Contents) + len(doc.CommonPrefixes)
	return writeXML(c.w, http.StatusOK, doc)
}

// xmlVersion is a version or, under another name, a delete marker.
type xmlVersion struct {
	XMLName      xml.Name
	Key          string
	VersionID    string `xml:"VersionId"`
	IsLatest     bool
	LastModified string
	ETag         string `xml:",omitempty"`
	Size         *int64 `xml:",omitempty"`
	Owner        *xmlOwner
	StorageClass string `xml:",omitempty"`
}

type xmlVersions struct {
	XMLName             xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListVersionsResult"`
	Name                string
	Prefix              string
	KeyMarker           string
	VersionIDMarker     string `xml:"VersionIdMarker"`
	NextKeyMarker       string `xml:",omitempty"`
	NextVersionIDMarker string `xml:"NextVersionIdMarker,omitempty"`
	MaxKeys             int32
	Delimiter           string `xml:",omitempty"`
	EncodingType        string `xml:",omitempty"`
	IsTruncated         bool
	Versions            []xmlVersion
	CommonPrefixes      []xmlPrefix
}

// listObjectVersions answers ListObjectVersions.
func (p *Proxy) listObjectVersions(ctx context.Context, c *call) error {
	limit, err := limitOf(c, "max-keys")
	if err != nil {
		return err
	}
	q := ListQuery{
		Kind: ListVersions, Prefix: c.arg("prefix"), Delimiter: c.arg("delimiter"),
		Marker: c.arg("key-marker"), SubMarker: c.arg("version-id-marker"), Limit: limit,
	}
	page, encode, err := listing(ctx, c, q)
	if err != nil {
		return err
	}
	doc := xmlVersions{
		Name: c.bucket.name, Prefix: encode(q.Prefix), KeyMarker: encode(q.Marker), VersionIDMarker: q.SubMarker,
		NextKeyMarker: encode(page.NextMarker), NextVersionIDMarker: page.NextToken, MaxKeys: limit,
		Delimiter: encode(q.Delimiter), EncodingType: c.arg("encoding-type"), IsTruncated: page.Truncated,
		CommonPrefixes: visible(page.Prefixes, encode),
	}
	for _, e := range page.Entries {
		if hidden(e.Key) {
			continue
		}
		v := xmlVersion{XMLName: xml.Name{Local: "DeleteMarker"}, Key: encode(e.Key), VersionID: e.VersionID, IsLatest: e.Latest, LastModified: xmlTime(e.LastModified), Owner: ownerOf(e.Owner)}
		if !e.DeleteMarker {
			size := plainEntrySize(e)
			v.XMLName.Local, v.ETag, v.Size, v.StorageClass = "Version", clientETag(e.ETag), &size, e.StorageClass
		}
		doc.Versions = append(doc.Versions, v)
	}
	return writeXML(c.w, http.StatusOK, doc)
}

type xmlUpload struct {
	Key          string
	UploadID     UploadID `xml:"UploadId"`
	Initiator    *xmlOwner
	Owner        *xmlOwner
	StorageClass string `xml:",omitempty"`
	Initiated    string

	ChecksumAlgorithm string `xml:",omitempty"`
	ChecksumType      string `xml:",omitempty"`
}

type xmlUploads struct {
	XMLName            xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListMultipartUploadsResult"`
	Bucket             string
	KeyMarker          string
	UploadIDMarker     string `xml:"UploadIdMarker"`
	NextKeyMarker      string `xml:",omitempty"`
	NextUploadIDMarker string `xml:"NextUploadIdMarker,omitempty"`
	Prefix             string
	Delimiter          string `xml:",omitempty"`
	EncodingType       string `xml:",omitempty"`
	MaxUploads         int32
	IsTruncated        bool
	Uploads            []xmlUpload `xml:"Upload"`
	CommonPrefixes     []xmlPrefix
}

// listMultipartUploads answers ListMultipartUploads.
func (p *Proxy) listMultipartUploads(ctx context.Context, c *call) error {
	limit, err := limitOf(c, "max-uploads")
	if err != nil {
		return err
	}
	encode, err := encoder(c)
	if err != nil {
		return err
	}
	q := ListQuery{
		Kind: ListMultipart, Prefix: c.arg("prefix"), Delimiter: c.arg("delimiter"),
		Marker: c.arg("key-marker"), SubMarker: c.arg("upload-id-marker"), Limit: limit,
	}
	page, err := c.bucket.Upstream.ListUploads(ctx, q)
	if err == nil {
		page.Prefixes, err = withoutOwn(page.Prefixes, func(prefix, after string) (string, error) {
			found, err := c.bucket.Upstream.ListUploads(ctx, ListQuery{Kind: ListMultipart, Prefix: prefix, Marker: after, Limit: 1})
			if err != nil || len(found.Uploads) == 0 {
				return "", err
			}
			return found.Uploads[0].Key, nil
		})
	}
	if err != nil {
		return err
	}
	doc := xmlUploads{
		Bucket: c.bucket.name, KeyMarker: encode(q.Marker), UploadIDMarker: q.SubMarker, NextKeyMarker: encode(page.NextMarker),
		NextUploadIDMarker: page.NextIDMarker, Prefix: encode(q.Prefix), Delimiter: encode(q.Delimiter),
		EncodingType: c.arg("encoding-type"), MaxUploads: limit, IsTruncated: page.Truncated, CommonPrefixes: visible(page.Prefixes, encode),
	}
	for _, u := range page.Uploads {
		if hidden(u.Key) {
			continue
		}
		begun, _ := c.bucket.uploads.get(u.ID)
		listed := xmlUpload{Key: encode(u.Key), UploadID: u.ID, Initiator: proxyOwner(), Owner: proxyOwner(), StorageClass: u.StorageClass, Initiated: xmlTime(u.Initiated)}
		listed.ChecksumAlgorithm, listed.ChecksumType = begun.spelt()
		doc.Uploads = append(doc.Uploads, listed)
	}
	return writeXML(c.w, http.StatusOK, doc)
}
