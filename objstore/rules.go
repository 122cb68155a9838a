package objstore

import (
	"context"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.uber.org/zap"
)

// An object that byokd writes anew (an upload whose parts do not add up, a plain object
// that is sealed in place) is a new one to the service below: its lock, its ACL and where
// a web site redirects it to would be gone. They are read, and become the headers that
// create the new one, so that there is no moment without them.

// rewriteHeaders are those of the rules of an object that a HEAD tells.
var rewriteHeaders = []string{"X-Amz-Website-Redirect-Location", "X-Amz-Server-Side-Encryption-Bucket-Key-Enabled"}

const (
	lockModeHeader  = "X-Amz-Object-Lock-Mode"
	lockUntilHeader = "X-Amz-Object-Lock-Retain-Until-Date"
	legalHoldHeader = "X-Amz-Object-Lock-Legal-Hold"
)

// grantHeaders are the headers that give the rights which an ACL of an object names.
var grantHeaders = map[string]string{
	"READ": "X-Amz-Grant-Read", "READ_ACP": "X-Amz-Grant-Read-Acp", "WRITE_ACP": "X-Amz-Grant-Write-Acp", "FULL_CONTROL": "X-Amz-Grant-Full-Control",
}

// lockSource says where the lock of an object is to be found.
type lockSource struct {
	lockable bool        // objects of the bucket can be locked
	told     http.Header // the lock by the client's word, where byokd may not read it; else nil
}

// lockable reports whether objects of the bucket can be locked. There are no locks without
// versions, which byokd's own object in the bucket tells, and needs no right to.
func (b *bucket) lockable(ctx context.Context) (bool, error) {
	ctx = context.WithValue(ctx, passingKey{}, (*passedThrough)(nil))
	info, err := b.Upstream.Head(ctx, GetRequest{Ref: Ref{Key: KeyringObject}})
	if err == nil && info.VersionID == "" {
		return false, nil
	}
	if up, refused := asUpstream(err); err != nil && (!refused || up.Status != http.StatusNotFound) {
		return false, err
	}
	answer, err := b.Upstream.Forward(ctx, ForwardRequest{Method: http.MethodGet, Query: url.Values{"object-lock": {""}}, Header: http.Header{}})
	up, refused := asUpstream(err)
	switch {
	case err == nil: // what a store answers that overlooks the question is another document
		return isSetting(answer.Body, "object-lock"), nil
	case refused && up.Status == http.StatusForbidden: // it may have
		return true, nil
	case refused && up.Code != "NoSuchBucket" && (up.Status >= 400 && up.Status < 500 || up.Status == http.StatusNotImplemented):
		return false, nil
	}
	return false, err
}

// lockSourceOf finds out where the lock of an upload can be read once it is completed,
// and refuses the request where it cannot. It comes before the upload is completed, since
// what is locked cannot be taken back.
func (p *Proxy) lockSourceOf(ctx context.Context, c *call, id UploadID) (lockSource, error) {
	lockable, err := c.bucket.lockable(ctx)
	if err != nil || !lockable {
		return lockSource{}, err
	}
	_, err = c.bucket.readLock(ctx, Ref{Key: c.key}, p.opts.Now())
	up, refused := asUpstream(err)
	switch {
	case refused && (up.Status == http.StatusNotFound || up.Status == http.StatusMethodNotAllowed): // no object yet, or a delete marker
	case refused && up.Status == http.StatusForbidden:
		begun, _ := c.bucket.uploads.get(id)
		if begun.lock == nil {
			return lockSource{}, errLockUnknown(err)
		}
		return lockSource{lockable: true, told: begun.lock}, nil
	case err != nil:
		return lockSource{}, err
	}
	return lockSource{lockable: true}, nil
}

// lockOf are the headers of a request that lock what it creates.
func lockOf(h http.Header) http.Header {
	lock := http.Header{}
	for _, name := range []string{lockModeHeader, lockUntilHeader, legalHoldHeader} {
		if values := h.Values(name); len(values) > 0 {
			lock[name] = values
		}
	}
	return lock
}

// headWithRules is a HEAD that also returns the headers which create another object with
// the same rules. An error says that a lock which it may have could not be told.
func (p *Proxy) headWithRules(ctx context.Context, b *bucket, req GetRequest, lock lockSource) (Info, http.Header, error) {
	told := &passedThrough{op: string(OpHeadObject), sent: passedOf(ctx).general(), got: http.Header{}}
	info, err := b.Upstream.Head(context.WithValue(ctx, passingKey{}, told), req)
	if err != nil {
		return info, nil, err
	}
	ref := req.Ref
	if info.VersionID != "" {
		ref.VersionID = info.VersionID
	}
	rules := http.Header{}
	switch {
	case lock.told != nil:
		rules = lock.told.Clone()
	case lock.lockable:
		if rules, err = b.readLock(ctx, ref, p.opts.Now()); err != nil {
			return info, nil, err
		}
	}
	for _, name := range rewriteHeaders {
		if values := told.got.Values(name); len(values) > 0 {
			rules[name] = values
		}
	}
	grants, err := b.grantsOf(ctx, ref)
	if err != nil && !b.aclUntold.Swap(true) {
		p.log.Warn("the ACL of an object that is written anew could not be read, so the new one has the ACL of any new object (told once; where access is denied, byokd's role lacks s3:GetObjectAcl)",
			zap.String("bucket", b.name), zap.String("key", req.Key), zap.Error(err))
	}
	for name, values := range grants {
		rules[name] = values
	}
	return info, rules, nil
}

// readLock returns the headers that lock another object as one is locked.
func (b *bucket) readLock(ctx context.Context, ref Ref, now time.Time) (http.Header, error) {
	var lock struct {
		Mode            string
		RetainUntilDate time.Time
	}
	var hold struct{ Status string }
	h := http.Header{}
	if err := b.ruleOf(ctx, ref, "retention", &lock); err != nil {
		return nil, err
	}
	if err := b.ruleOf(ctx, ref, "legal-hold", &hold); err != nil {
		return nil, err
	}
	if lock.Mode != "" && lock.RetainUntilDate.After(now) { // one that is over locks nothing, and none would take it
		h.Set(lockModeHeader, lock.Mode)
		h.Set(lockUntilHeader, lock.RetainUntilDate.UTC().Format(time.RFC3339Nano))
	}
	if hold.Status == "ON" {
		h.Set(legalHoldHeader, hold.Status)
	}
	return h, nil
}

// ruleOf reads one setting of an object into doc, which stays as it is where there is
// none.
func (b *bucket) ruleOf(ctx context.Context, ref Ref, sub string, doc any) error {
	query := url.Values{sub: {""}}
	if ref.VersionID != "" {
		query.Set("versionId", ref.VersionID)
	}
	answer, err := b.Upstream.Forward(ctx, ForwardRequest{Method: http.MethodGet, Key: ref.Key, Query: query, Header: http.Header{}})
	up, refused := asUpstream(err)
	switch {
	case refused && up.Status == http.StatusBadRequest, refused && up.Code == "NoSuchObjectLockConfiguration":
		return nil // the bucket has no locks, the object none
	case err != nil:
		return fmt.Errorf("asking for the %s of %s: %w", sub, ref.Key, err)
	case !isSetting(answer.Body, sub):
		return errIgnored
	}
	return xml.Unmarshal(answer.Body, doc)
}

// grantsOf returns the headers that give another object the ACL of one; none where that
// is the one of any new object.
func (b *bucket) grantsOf(ctx context.Context, ref Ref) (http.Header, error) {
	var acl struct {
		Owner  struct{ ID string }
		Grants []struct {
			Grantee    struct{ ID, URI string }
			Permission string
		} `xml:"AccessControlList>Grant"`
	}
	err := b.ruleOf(ctx, ref, "acl", &acl)
	if up, refused := asUpstream(err); refused && up.Status == http.StatusNotImplemented || err == error(errIgnored) {
		return nil, nil // a store without ACLs
	}
	if err != nil {
		return nil, err
	}
	grantees, others := map[string][]string{}, false
	for _, g := range acl.Grants {
		name, known := grantHeaders[g.Permission]
		grantee := `id="` + g.Grantee.ID + `"`
		if g.Grantee.URI != "" {
			grantee = `uri="` + g.Grantee.URI + `"`
		}
		if !known {
			return nil, fmt.Errorf("objstore: the ACL of %s grants %q, which byokd does not know", ref.Key, g.Permission)
		}
		others = others || g.Permission != "FULL_CONTROL" || g.Grantee.ID != acl.Owner.ID
		grantees[name] = append(grantees[name], grantee)
	}
	h := http.Header{}
	for name, list := range grantees {
		if others {
			h.Set(name, strings.Join(list, ", "))
		}
	}
	return h, nil
}

// withRules gives requests that create an object these headers instead of the client's.
func withRules(ctx context.Context, rules http.Header) context.Context {
	p := &passedThrough{sent: passedOf(ctx).general(), got: http.Header{}}
	for name, values := range rules {
		p.sent[name] = values
	}
	return context.WithValue(ctx, passingKey{}, p)
}

// locks reports whether requests that create an object lock it.
func locks(ctx context.Context) bool {
	p := passedOf(ctx)
	return p != nil && (p.sent.Get(lockModeHeader) != "" || p.sent.Get(legalHoldHeader) != "")
}

// errLockUnknown refuses an upload that would have to be written anew in a bucket with
// locks, where byokd may not read them.
func errLockUnknown(cause error) *Error {
	e := refuse(http.StatusBadRequest, "InvalidRequest", "The parts of this upload, but for the last, are not multiples of 65536 bytes, so that byokd would have to write the object anew, and it may not read the lock that the new one must have. "+
		"Use a part size that is a multiple of 64 KiB, or allow byokd's role s3:GetObjectRetention and s3:GetObjectLegalHold.")
	e.Cause = cause
	return e
}
