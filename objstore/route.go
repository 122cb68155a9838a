package objstore

import (
	"context"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Op is one operation, by the name AWS gives it. The set is bounded.
type Op string

// The operations that the proxy answers; every other one is OpUnknown and is
// refused without touching the upstream.
const (
	OpUnknown                 Op = "Unknown"
	OpListBuckets             Op = "ListBuckets"
	OpHeadBucket              Op = "HeadBucket"
	OpCreateBucket            Op = "CreateBucket"
	OpGetBucketLocation       Op = "GetBucketLocation"
	OpGetBucketVersioning     Op = "GetBucketVersioning"
	OpListObjects             Op = "ListObjects"
	OpListObjectsV2           Op = "ListObjectsV2"
	OpListObjectVersions      Op = "ListObjectVersions"
	OpListMultipartUploads    Op = "ListMultipartUploads"
	OpDeleteObjects           Op = "DeleteObjects"
	OpGetObject               Op = "GetObject"
	OpHeadObject              Op = "HeadObject"
	OpPutObject               Op = "PutObject"
	OpCopyObject              Op = "CopyObject"
	OpDeleteObject            Op = "DeleteObject"
	OpGetObjectAttributes     Op = "GetObjectAttributes"
	OpGetObjectTagging        Op = "GetObjectTagging"
	OpPutObjectTagging        Op = "PutObjectTagging"
	OpDeleteObjectTagging     Op = "DeleteObjectTagging"
	OpCreateMultipartUpload   Op = "CreateMultipartUpload"
	OpUploadPart              Op = "UploadPart"
	OpUploadPartCopy          Op = "UploadPartCopy"
	OpCompleteMultipartUpload Op = "CompleteMultipartUpload"
	OpAbortMultipartUpload    Op = "AbortMultipartUpload"
	OpListParts               Op = "ListParts"
)

// handler answers one operation. An error returned before anything was sent
// becomes an error document, later it breaks the connection.
type handler func(p *Proxy, ctx context.Context, c *call) error

// handlers is read only.
var handlers = withSettings(map[Op]handler{
	OpListBuckets:             (*Proxy).listBuckets,
	OpHeadBucket:              (*Proxy).headBucket,
	OpCreateBucket:            (*Proxy).createBucket,
	OpGetBucketLocation:       (*Proxy).getBucketLocation,
	OpGetBucketVersioning:     (*Proxy).getBucketVersioning,
	OpListObjects:             (*Proxy).listObjects,
	OpListObjectsV2:           (*Proxy).listObjectsV2,
	OpListObjectVersions:      (*Proxy).listObjectVersions,
	OpListMultipartUploads:    (*Proxy).listMultipartUploads,
	OpDeleteObjects:           (*Proxy).deleteObjects,
	OpGetObject:               (*Proxy).getObject,
	OpHeadObject:              (*Proxy).headObject,
	OpPutObject:               (*Proxy).putObject,
	OpCopyObject:              (*Proxy).copyObject,
	OpDeleteObject:            (*Proxy).deleteObject,
	OpGetObjectAttributes:     (*Proxy).getObjectAttributes,
	OpGetObjectTagging:        (*Proxy).getObjectTagging,
	OpPutObjectTagging:        (*Proxy).putObjectTagging,
	OpDeleteObjectTagging:     (*Proxy).deleteObjectTagging,
	OpCreateMultipartUpload:   (*Proxy).createMultipartUpload,
	OpUploadPart:              (*Proxy).uploadPart,
	OpUploadPartCopy:          (*Proxy).uploadPartCopy,
	OpCompleteMultipartUpload: (*Proxy).completeMultipartUpload,
	OpAbortMultipartUpload:    (*Proxy).abortMultipartUpload,
	OpListParts:               (*Proxy).listParts,
})

// routes maps method and subresource to an operation, for buckets and objects.
// The subresource "" is the bucket or object itself.
var (
	bucketRoutes = withRoutes(map[string]Op{
		"HEAD ":          OpHeadBucket,
		"PUT ":           OpCreateBucket,
		"GET ":           OpListObjects,
		"GET list-type":  OpListObjectsV2,
		"GET versions":   OpListObjectVersions,
		"GET uploads":    OpListMultipartUploads,
		"GET location":   OpGetBucketLocation,
		"GET versioning": OpGetBucketVersioning,
		"POST delete":    OpDeleteObjects,
	}, bucketSettings)
	objectRoutes = withRoutes(map[string]Op{
		"GET ":            OpGetObject,
		"HEAD ":           OpHeadObject,
		"PUT ":            OpPutObject,
		"DELETE ":         OpDeleteObject,
		"GET attributes":  OpGetObjectAttributes,
		"GET tagging":     OpGetObjectTagging,
		"PUT tagging":     OpPutObjectTagging,
		"DELETE tagging":  OpDeleteObjectTagging,
		"POST uploads":    OpCreateMultipartUpload,
		"PUT uploadId":    OpUploadPart,
		"POST uploadId":   OpCompleteMultipartUpload,
		"DELETE uploadId": OpAbortMultipartUpload,
		"GET uploadId":    OpListParts,
	}, objectSettings)
)

// plainArgs are the query parameters that select no operation. Others are
// ignored when they carry a value (clients add such: x-purpose), but refused when
// they are bare, since a bare word is how S3 spells a subresource that may be new.
var plainArgs = []string{
	"continuation-token", "delimiter", "encoding-type", "fetch-owner", "key-marker", "marker",
	"max-keys", "max-parts", "max-uploads", "part-number-marker", "partNumber", "prefix",
	"response-cache-control", "response-content-disposition", "response-content-encoding",
	"response-content-language", "response-content-type", "response-expires", "start-after",
	"upload-id-marker", "version-id-marker", "versionId", "x-id", "allow-unordered",
	"X-Amz-Security-Token",
}

// subresources are all words by which S3 and its relatives select another
// operation than the plain one, with or without a value.
var subresources = []string{
	"acl", "accelerate", "abac", "analytics", "annotation", "append", "attributes", "cors", "delete", "encryption",
	"encryptionSettings", "intelligent-tiering", "inventory", "legal-hold", "lifecycle", "list-type", "location",
	"logging", "metadataConfiguration", "metadataInventoryTable", "metadataJournalTable", "metadataTable", "metrics",
	"notification", "object-lock", "ownershipControls", "policy", "policyStatus", "position", "publicAccessBlock",
	"renameObject", "replication", "requestPayment", "restore", "retention", "select", "select-type", "session",
	"tagging", "torrent", "uploadId", "uploads", "versioning", "versions", "website",
}

// route finds bucket, key and operation of a request.
func (p *Proxy) route(c *call) error {
	c.op = OpUnknown
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return refuse(http.StatusBadRequest, "InvalidURI", "The query string could not be parsed.")
	}
	c.query = query
	name, key, err := p.splitTarget(c.r)
	if err != nil {
		return err
	}
	c.key = key
	if name == "" {
		if c.r.Method != http.MethodGet || c.r.URL.Path != "/" {
			return notImplemented(c)
		}
		c.op = OpListBuckets
		return nil
	}
	c.bucket = p.buckets[name] // nil is refused after the signature was checked
	sub, err := subresourceOf(query)
	if err != nil {
		return err
	}
	routes := bucketRoutes
	if key != "" {
		routes = objectRoutes
	}
	op, known := routes[c.r.Method+" "+sub]
	if !known || sub == "list-type" && c.arg("list-type") != "2" {
		return notImplemented(c)
	}
	c.op = op
	return nil
}

// signingArgs are the query parameters of a presigned request itself.
var signingArgs = []string{
	"x-amz-algorithm", "x-amz-credential", "x-amz-date", "x-amz-expires", "x-amz-signedheaders",
	"x-amz-signature", "x-amz-security-token", "x-amz-content-sha256",
}

// adoptArgs makes headers of the query parameters that stand for such: clients
// move x-amz- headers into the links they presign. The signature covers both.
func adoptArgs(c *call) error {
	for name, values := range c.query {
		lower := strings.ToLower(name)
		if !strings.HasPrefix(lower, "x-amz-") || slices.Contains(signingArgs, lower) || c.r.Header.Get(name) != "" {
			continue
		}
		if !headerName.MatchString(name) || strings.ContainsFunc(values[0], noHeaderText) {
			return invalidArgument(lower, values[0], "This parameter stands for a header, and cannot be one.")
		}
		c.r.Header.Set(name, values[0])
	}
	c.op = refineCopy(c.op, c.r)
	return nil
}

// headerName is the name of a header, and noHeaderText what its value cannot hold: net/http
// makes sure of both for what clients send as headers, and sends nothing else up.
var headerName = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")

func noHeaderText(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }

// refineCopy tells the copying forms of an upload by their header.
func refineCopy(op Op, r *http.Request) Op {
	if r.Header.Get("X-Amz-Copy-Source") == "" {
		return op
	}
	switch op {
	case OpPutObject:
		return OpCopyObject
	case OpUploadPart:
		return OpUploadPartCopy
	}
	return op
}

func notImplemented(c *call) error {
	return refuse(http.StatusNotImplemented, "NotImplemented", "A header you provided implies functionality that is not implemented.").hint("byokd does not know this operation (%s with this query) and so cannot tell whether it would store or return unencrypted bytes. Use the upstream bucket directly if it carries no object data.", c.r.Method)
}

// subresourceOf returns the one query parameter that selects an operation.
func subresourceOf(query url.Values) (string, error) {
	found := ""
	for name, values := range query {
		bare := len(values) == 0 || len(values) == 1 && values[0] == ""
		known := slices.Contains(subresources, name)
		if !known && (!bare || slices.Contains(plainArgs, name)) {
			continue
		}
		if !known || found != "" {
			return "", refuse(http.StatusNotImplemented, "NotImplemented", "A header you provided implies functionality that is not implemented.").
				hint("byokd does not know the subresource %q, or not together with another one.", name)
		}
		found = name
	}
	return found, nil
}

// splitTarget finds bucket and key in host and path.
func (p *Proxy) splitTarget(r *http.Request) (name, key string, err error) {
	name = p.bucketOfHost(r.Host)
	key = strings.TrimPrefix(r.URL.Path, "/")
	if name == "" {
		name, key, _ = strings.Cut(key, "/")
	}
	switch {
	case len(key) > maxKeyBytes:
		return "", "", refuse(http.StatusBadRequest, "KeyTooLongError", "Your key is too long.").with("Size", strconv.Itoa(len(key))).with("MaxSizeAllowed", strconv.Itoa(maxKeyBytes))
	case strings.ContainsRune(key, 0):
		return "", "", refuse(http.StatusBadRequest, "InvalidURI", "A key cannot hold a NUL byte.")
	}
	return name, key, nil
}

// bucketOfHost returns the bucket that a virtual-host style name holds, or "".
func (p *Proxy) bucketOfHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	for _, domain := range p.opts.BaseDomains {
		if name, found := strings.CutSuffix(strings.ToLower(host), "."+strings.ToLower(domain)); found {
			return name
		}
	}
	return ""
}

// resolveBucket refuses buckets that are not configured and keys that are ours.
func (p *Proxy) resolveBucket(c *call) error {
	if c.op == OpListBuckets {
		return nil
	}
	if c.bucket == nil {
		if name, _, err := p.splitTarget(c.r); err == nil && !validBucketName(name) {
			return refuse(http.StatusBadRequest, "InvalidBucketName", "The specified bucket is not valid.")
		}
		if c.op == OpCreateBucket { // clients print the message, not the hint
			return refuse(http.StatusForbidden, "AccessDenied", "byokd serves the buckets of its configuration: add this one under objects.buckets, and it can be created where it is missing upstream.")
		}
		return noSuchBucket()
	}
	return checkKey(c.key)
}

// checkKey refuses keys that are byokd's own, and those that climb out of their bucket,
// as S3 does.
func checkKey(key string) error {
	switch {
	case hidden(key):
		return refuse(http.StatusForbidden, "AccessDenied", "Keys that begin with %s are byokd's own.", hiddenPrefix)
	case climbs(key):
		return refuse(http.StatusBadRequest, "400", "Bad Request").hint("The key leads out of its bucket.")
	}
	return nil
}

// bucketNamePattern is what S3 allows, but for names that look like addresses.
var bucketNamePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)

func validBucketName(name string) bool {
	_, err := netip.ParseAddr(name)
	return err != nil && bucketNamePattern.MatchString(name) && !strings.Contains(name, "..")
}

// hiddenPrefix begins the keys that byokd keeps for itself in each bucket.
const hiddenPrefix = ".byokd/"

// hidden reports whether a key begins so, or would for an upstream that resolves dots
// and double slashes as in a path: S3 does not, but stores on a filesystem do.
func hidden(key string) bool {
	at := strings.Index(key, hiddenPrefix)
	return at == 0 || at > 0 && strings.HasPrefix(path.Clean("/"+key)+"/", "/"+hiddenPrefix)
}

// climbs reports whether a key, taken for a path, leads out of the directory it
// begins in, or back to it.
func climbs(key string) bool {
	depth, dots := 0, false
	for name := range strings.SplitSeq(key, "/") {
		switch name {
		case "":
		case ".":
			dots = true
		case "..":
			depth, dots = depth-1, true
		default:
			depth++
		}
		if depth < 0 {
			return true
		}
	}
	return dots && depth == 0
}

// refusedHeaders carry promises that byokd would break by ignoring them.
var refusedHeaders = []string{
	"X-Amz-Write-Offset-Bytes", "X-Amz-Rename-Source", "X-Amz-If-Match-Size", "X-Amz-If-Match-Last-Modified-Time",
	"X-Amz-Server-Side-Encryption-Context",
}

// refuseHeaders refuses what cannot be kept.
func refuseHeaders(c *call) error {
	if tags, err := url.ParseQuery(c.r.Header.Get("X-Amz-Tagging")); err == nil { // else the upstream says so
		if err := refuseOwnTag(slices.Collect(maps.Keys(tags))); err != nil {
			return err
		}
	}
	for name := range c.r.Header {
		if strings.Contains(name, "Server-Side-Encryption-Customer-") {
			return refuse(http.StatusNotImplemented, "NotImplemented", "SSE-C is refused: byokd encrypts with the bucket's own key, and would store the object under another key than the one you sent. Remove the customer key from the client's configuration.")
		}
		if slices.Contains(refusedHeaders, name) {
			return refuse(http.StatusNotImplemented, "NotImplemented", "byokd does not support the header %s.", name)
		}
	}
	return nil
}
