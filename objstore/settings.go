package objstore

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Settings hands requests on that concern a bucket or the rules of an object, and
// never its bytes.
type Settings interface {
	// Forward sends one request. An answer that is no success is an *UpstreamError.
	Forward(ctx context.Context, req ForwardRequest) (*Forwarded, error)
}

// ForwardRequest is a request as the client meant it. Its body is a document of
// settings.
type ForwardRequest struct {
	Method string
	Key    string // empty for the bucket itself
	Query  url.Values
	Header http.Header
	Body   []byte
}

// Forwarded is a successful answer.
type Forwarded struct {
	Status int
	Header http.Header
	Body   []byte
}

const (
	// maxSettings bounds a document of settings: policies have 20 KB, CORS and
	// lifecycle rules 64 KB, at most a thousand rules.
	maxSettings = 1 << 20
	// optionsMethod asks what a browser may do; such a request is never signed.
	optionsMethod = http.MethodOptions
)

// settingRoutes are the operations that are handed on as they are. Each was looked
// at: neither its request nor its answer holds bytes of an object. Whatever is not
// here stays unknown.
var (
	bucketSettings = map[string]Op{
		"DELETE ":                   "DeleteBucket",
		"GET accelerate":            "GetBucketAccelerateConfiguration",
		"GET acl":                   "GetBucketAcl",
		"PUT acl":                   "PutBucketAcl",
		"GET cors":                  "GetBucketCors",
		"PUT cors":                  "PutBucketCors",
		"DELETE cors":               "DeleteBucketCors",
		"GET encryption":            "GetBucketEncryption",
		"GET lifecycle":             "GetBucketLifecycleConfiguration",
		"PUT lifecycle":             "PutBucketLifecycleConfiguration",
		"DELETE lifecycle":          "DeleteBucketLifecycle",
		"GET logging":               "GetBucketLogging",
		"GET notification":          "GetBucketNotificationConfiguration",
		"GET object-lock":           "GetObjectLockConfiguration",
		"PUT object-lock":           "PutObjectLockConfiguration",
		"GET ownershipControls":     "GetBucketOwnershipControls",
		"PUT ownershipControls":     "PutBucketOwnershipControls",
		"DELETE ownershipControls":  "DeleteBucketOwnershipControls",
		"GET policy":                "GetBucketPolicy",
		"PUT policy":                "PutBucketPolicy",
		"DELETE policy":             "DeleteBucketPolicy",
		"GET policyStatus":          "GetBucketPolicyStatus",
		"GET publicAccessBlock":     "GetPublicAccessBlock",
		"PUT publicAccessBlock":     "PutPublicAccessBlock",
		"DELETE publicAccessBlock":  "DeletePublicAccessBlock",
		"GET replication":           "GetBucketReplication",
		"GET requestPayment":        "GetBucketRequestPayment",
		"GET tagging":               "GetBucketTagging",
		"PUT tagging":               "PutBucketTagging",
		"DELETE tagging":            "DeleteBucketTagging",
		"PUT versioning":            "PutBucketVersioning",
		"GET website":               "GetBucketWebsite",
		"PUT website":               "PutBucketWebsite",
		"DELETE website":            "DeleteBucketWebsite",
		optionsMethod + " ":         opPreflight,
		optionsMethod + " acl":      opPreflight,
		optionsMethod + " delete":   opPreflight,
		optionsMethod + " tagging":  opPreflight,
		optionsMethod + " uploads":  opPreflight,
		optionsMethod + " versions": opPreflight,
	}
	objectSettings = map[string]Op{
		"GET acl":                   "GetObjectAcl",
		"PUT acl":                   "PutObjectAcl",
		"GET legal-hold":            "GetObjectLegalHold",
		"PUT legal-hold":            "PutObjectLegalHold",
		"GET retention":             "GetObjectRetention",
		"PUT retention":             "PutObjectRetention",
		"POST restore":              opRestoreObject,
		optionsMethod + " ":         opPreflight,
		optionsMethod + " acl":      opPreflight,
		optionsMethod + " tagging":  opPreflight,
		optionsMethod + " uploads":  opPreflight,
		optionsMethod + " uploadId": opPreflight,
	}
)

// opPreflight is what a browser asks before it sends a request from another site.
const opPreflight Op = "Preflight"

// forwardedHeaders go up with a request of settings, forwardedBack come back.
var (
	forwardedHeaders = []string{
		"Content-Type", "X-Amz-Acl", "X-Amz-Grant-Read", "X-Amz-Grant-Write", "X-Amz-Grant-Full-Control",
		"X-Amz-Grant-Read-Acp", "X-Amz-Grant-Write-Acp", "X-Amz-Bucket-Object-Lock-Enabled", "X-Amz-Bucket-Object-Lock-Token",
		"X-Amz-Object-Ownership", "X-Amz-Bypass-Governance-Retention", "X-Amz-Confirm-Remove-Self-Bucket-Access",
		"X-Amz-Skip-Destination-Validation", "X-Amz-Transition-Default-Minimum-Object-Size", "X-Amz-Mfa",
		"Access-Control-Request-Method", "Access-Control-Request-Headers",
	}
	forwardedBack = []string{
		"Content-Type", "X-Amz-Version-Id", "X-Amz-Transition-Default-Minimum-Object-Size", "X-Amz-Bucket-Arn",
		"Access-Control-Allow-Origin", "Access-Control-Allow-Methods", "Access-Control-Allow-Headers",
		"Access-Control-Expose-Headers", "Access-Control-Max-Age", "Access-Control-Allow-Credentials", "Vary",
	}
)

// settingRoots are the elements that documents of settings begin with, by
// subresource; a policy is JSON.
var settingRoots = map[string]string{
	"accelerate": "AccelerateConfiguration", "acl": "AccessControlPolicy", "cors": "CORSConfiguration",
	"encryption": "ServerSideEncryptionConfiguration", "legal-hold": "LegalHold", "lifecycle": "LifecycleConfiguration",
	"logging": "BucketLoggingStatus", "notification": "NotificationConfiguration", "object-lock": "ObjectLockConfiguration",
	"ownershipControls": "OwnershipControls", "policyStatus": "PolicyStatus", "publicAccessBlock": "PublicAccessBlockConfiguration",
	"replication": "ReplicationConfiguration", "requestPayment": "RequestPaymentConfiguration", "retention": "Retention",
	"tagging": "Tagging", "website": "WebsiteConfiguration",
}

// errIgnored: the upstream took a request of settings for one of bytes.
var errIgnored = refuse(http.StatusNotImplemented, "NotImplemented", "The S3 service below byokd does not know this operation.")

// forward answers an operation of settings with the upstream's word. There are
// S3 services that overlook a subresource they do not know: the answer to a GET
// would then be sealed bytes, and a PUT would replace the object by the document.
// So an answer has to be the document that was asked for, and before something is
// set on an object the upstream is asked for it once.
func (p *Proxy) forward(ctx context.Context, c *call) error {
	req, err := c.forwardRequest()
	if err != nil {
		return err
	}
	sub, err := subresourceOf(c.query)
	if err != nil {
		return err
	}
	if c.key != "" && req.Method == http.MethodPut {
		if err := c.bucket.understands(ctx, req, sub, p.opts.Now()); err != nil {
			return err
		}
	}
	answer, err := c.bucket.Upstream.Forward(ctx, req)
	if err != nil {
		return err
	}
	if req.Method == http.MethodGet && !isSetting(answer.Body, sub) {
		return errIgnored
	}
	return c.relay(answer)
}

// isSetting reports whether a document is what a subresource consists of.
func isSetting(document []byte, sub string) bool {
	if sub == "policy" {
		return json.Valid(document)
	}
	decoder := xml.NewDecoder(bytes.NewReader(document))
	for {
		token, err := decoder.Token()
		if err != nil {
			return false
		}
		if start, ok := token.(xml.StartElement); ok {
			root := start.Name.Local // versitygw calls a Retention ObjectLockRetention
			return root == settingRoots[sub] || strings.TrimPrefix(root, "ObjectLock") == settingRoots[sub]
		}
	}
}

// understands asks the upstream for what is about to be set on an object. That it
// is not set yet is an answer; that the object is not there, or may not be asked
// about, ends the request. A missing bucket is named before a wrong lock, a wrong lock
// before what else the upstream says.
func (b *bucket) understands(ctx context.Context, req ForwardRequest, sub string, now time.Time) error {
	if len(req.Body) > 0 && !isSetting(req.Body, sub) {
		return malformedXML()
	}
	wrongLock := checkLock(req.Body, sub, now)
	req.Method, req.Body, req.Header = http.MethodGet, nil, http.Header{}
	answer, err := b.Upstream.Forward(ctx, req)
	up, refused := asUpstream(err)
	switch {
	case refused && up.Code == "NoSuchBucket":
		return err
	case wrongLock != nil:
		return wrongLock
	case err == nil && !isSetting(answer.Body, sub):
		return errIgnored
	case err == nil, refused && up.Status == http.StatusBadRequest, refused && up.Code == "NoSuchObjectLockConfiguration":
		return nil
	}
	return err
}

// checkLock refuses locks of an object that no upstream would take.
func checkLock(document []byte, sub string, now time.Time) error {
	var lock struct {
		Status, Mode    string
		RetainUntilDate time.Time
	}
	if sub != "legal-hold" && sub != "retention" {
		return nil
	}
	if xml.Unmarshal(document, &lock) != nil {
		return malformedXML()
	}
	switch {
	case sub == "legal-hold" && lock.Status != "ON" && lock.Status != "OFF":
		return malformedXML()
	case sub == "legal-hold", lock.Mode == "" && lock.RetainUntilDate.IsZero(): // none, which takes a retention away
		return nil
	case lock.Mode != "GOVERNANCE" && lock.Mode != "COMPLIANCE":
		return malformedXML()
	case lock.RetainUntilDate.Before(now):
		until := lock.RetainUntilDate.Format(time.RFC3339)
		return invalidArgument("x-amz-object-lock-retain-until-date", until, "The retain until date must be in the future!")
	}
	return nil
}

// forwardRequest is the client's request without what only concerns its own way.
func (c *call) forwardRequest() (ForwardRequest, error) {
	if c.key == "" && c.body.chunks != nil { // such framing is for the bytes of objects
		return ForwardRequest{}, refuse(http.StatusBadRequest, "InvalidRequest", "The value of x-amz-content-sha256 header is invalid.")
	}
	body, err := c.body.readAll(maxSettings)
	if err != nil {
		return ForwardRequest{}, err
	}
	req := ForwardRequest{Method: c.r.Method, Key: c.key, Query: url.Values{}, Header: http.Header{}, Body: body}
	for name, values := range c.query {
		if slices.Contains(subresources, name) || name == "versionId" {
			req.Query[name] = values
		}
	}
	for _, name := range forwardedHeaders {
		if values := c.r.Header.Values(name); len(values) > 0 {
			req.Header[name] = values
		}
	}
	if len(body) > 0 {
		sum := md5.Sum(body) // S3 demands it for some of these, and takes it for all
		req.Header.Set("Content-Md5", base64.StdEncoding.EncodeToString(sum[:]))
	}
	return req, nil
}

// relay answers with what the upstream said.
func (c *call) relay(answer *Forwarded) error {
	h := c.w.header()
	for _, name := range forwardedBack {
		if values := answer.Header.Values(name); len(values) > 0 {
			h[name] = values
		}
	}
	if len(answer.Body) == 0 {
		h.Del("Content-Type")
		return ok(c, answer.Status)
	}
	c.w.begin(answer.Status)
	_, err := c.w.Write(answer.Body)
	return err
}

// createBucket answers CreateBucket. A bucket that byokd serves can be created
// where it is missing upstream.
func (p *Proxy) createBucket(ctx context.Context, c *call) error {
	err := c.bucket.Upstream.Check(ctx)
	if up, is := asUpstream(err); is && up.Status == http.StatusNotFound {
		req, err := c.forwardRequest()
		if err != nil {
			return err
		}
		answer, err := c.bucket.Upstream.Forward(ctx, req)
		if up, is := asUpstream(err); is && up.Status == http.StatusForbidden {
			// In the message, since clients show no more than that.
			refused := refuse(http.StatusForbidden, "AccessDenied", "The bucket configured under objects.buckets.%s.upstream does not exist, and the S3 service below byokd does not let byokd's role create it (%s). Create it there, or allow the role s3:CreateBucket.", c.bucket.name, up.Code)
			refused.Cause = err
			return refused
		}
		if err != nil {
			return err
		}
		c.w.header().Set("Location", "/"+c.bucket.name)
		return c.relay(answer)
	}
	if err != nil {
		return err
	}
	return refuse(http.StatusConflict, "BucketAlreadyOwnedByYou", "Your previous request to create the named bucket succeeded and you already own it.")
}

// deleteBucket answers DeleteBucket. What byokd keeps for itself in a bucket that
// holds nothing else does not keep the bucket alive.
func (p *Proxy) deleteBucket(ctx context.Context, c *call) error {
	req, err := c.forwardRequest()
	if err != nil {
		return err
	}
	answer, err := c.bucket.Upstream.Forward(ctx, req)
	if up, is := asUpstream(err); is && up.Code == "BucketNotEmpty" {
		own, listErr := c.bucket.ownOnly(ctx)
		if listErr != nil || len(own) == 0 {
			return err
		}
		answer, err = p.deleteWithOwn(ctx, c.bucket, req, err)
	}
	if err != nil {
		return err
	}
	return c.relay(answer)
}

// deleteWithOwn deletes byokd's own objects and then the bucket. A bucket that is made in its place gets a keyring of its
// own before anything is sealed. Therefore nothing may be on its way that was sealed under a key of the old one: it would
// stand in no keyring, so that a rewrap would not find its key. notEmpty is the answer where there are objects of clients.
func (p *Proxy) deleteWithOwn(ctx context.Context, b *bucket, req ForwardRequest, notEmpty error) (*Forwarded, error) {
	resume, err := b.writing.suspend(ctx)
	if err != nil {
		return nil, err
	}
	defer resume()
	if b.writes.Load() > 0 {
		return nil, refuse(http.StatusConflict, "OperationAborted", "A conflicting conditional operation is currently in progress against this resource. Try again.").
			hint("Something is just being written into the bucket.")
	}
	own, err := b.ownOnly(ctx) // once more: a write may have ended since
	if err != nil || len(own) == 0 {
		return nil, notEmpty
	}
	keyring, _, err := readKeyring(ctx, b.Upstream)
	if err != nil {
		return nil, err
	}
	answer, err := b.deleteAll(ctx, own, req)
	b.packed.forget()
	if err != nil && keyring != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.limits.step)
		defer cancel()
		if b.ring.putBack(ctx, keyring) == nil {
			return nil, err
		}
	}
	b.ring.forget()
	return answer, err
}

// deleteAll deletes objects and then their bucket.
func (b *bucket) deleteAll(ctx context.Context, all []Ref, req ForwardRequest) (*Forwarded, error) {
	for _, ref := range all {
		if _, err := b.Upstream.Delete(ctx, ref, ""); err != nil {
			return nil, err
		}
	}
	return b.Upstream.Forward(ctx, req)
}

// preflight answers a browser's question with the upstream's word.
func (p *Proxy) preflight(ctx context.Context, c *call) error {
	req, err := c.forwardRequest()
	if err != nil {
		return err
	}
	answer, err := c.bucket.Upstream.Forward(ctx, req)
	if err != nil {
		return err
	}
	answer.Body = nil
	return c.relay(answer)
}

// ownOnly lists the versions of byokd's own objects in a bucket, or nothing when
// there are others.
func (b *bucket) ownOnly(ctx context.Context) ([]Ref, error) {
	page, err := b.Upstream.List(ctx, ListQuery{Kind: ListVersions, Limit: maxListed})
	if err != nil || page.Truncated {
		return nil, err
	}
	var own []Ref
	for _, e := range page.Entries {
		if !hidden(e.Key) {
			return nil, nil
		}
		own = append(own, Ref{Key: e.Key, VersionID: e.VersionID})
	}
	return own, nil
}

// withSettings adds the operations that are handed on to a table of handlers.
func withSettings(table map[Op]handler) map[Op]handler {
	for _, routes := range []map[string]Op{bucketSettings, objectSettings} {
		for _, op := range routes {
			table[op] = (*Proxy).forward
		}
	}
	table["DeleteBucket"], table[opPreflight] = (*Proxy).deleteBucket, (*Proxy).preflight
	table[opRestoreObject] = (*Proxy).restoreArchived
	return table
}

// withRoutes joins two tables of routes.
func withRoutes(routes, settings map[string]Op) map[string]Op {
	maps.Copy(routes, settings)
	return routes
}

// unsigned reports whether a request may come without a signature: browsers ask
// what they may do before they know whether they may sign. The answer says what
// the bucket's CORS rules say, nothing about its objects.
func unsigned(r *http.Request) bool {
	return r.Method == optionsMethod && !strings.HasPrefix(r.Header.Get("Authorization"), sigAlgorithm)
}
