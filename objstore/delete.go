package objstore

import (
	"context"
	"encoding/xml"
	"net/http"
	"sync"
)

// maxDeleteXML bounds the body of DeleteObjects: 1000 keys of 1024 bytes, each
// byte up to six characters of XML, are about 6 MB.
const maxDeleteXML = 8 << 20

// deleteObject answers DeleteObject.
func (p *Proxy) deleteObject(ctx context.Context, c *call) error {
	d, err := c.bucket.Upstream.Delete(ctx, c.ref(), upstreamETag(c.r.Header.Get("If-Match")))
	if err != nil {
		return err
	}
	c.bucket.layouts.drop(c.ref())
	h := c.w.header()
	if d.DeleteMarker {
		h.Set("X-Amz-Delete-Marker", "true")
	}
	if d.VersionID != "" {
		h.Set("X-Amz-Version-Id", d.VersionID)
	}
	return ok(c, http.StatusNoContent)
}

type xmlDelete struct {
	XMLName xml.Name `xml:"Delete"`
	Quiet   bool
	Objects []struct {
		Key       string
		VersionID string `xml:"VersionId"`
		ETag      string
		// Conditions that would be broken if they were overlooked.
		LastModifiedTime, Size *struct{}
	} `xml:"Object"`
}

type xmlDeleted struct {
	Key                   string
	VersionID             string `xml:"VersionId,omitempty"`
	DeleteMarker          bool   `xml:",omitempty"`
	DeleteMarkerVersionID string `xml:"DeleteMarkerVersionId,omitempty"`
}

type xmlDeleteError struct {
	Key       string
	VersionID string `xml:"VersionId,omitempty"`
	Code      string
	Message   string
}

type xmlDeleteResult struct {
	XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ DeleteResult"`
	Deleted []xmlDeleted
	Errors  []xmlDeleteError `xml:"Error"`
}

// deleteObjects answers DeleteObjects.
func (p *Proxy) deleteObjects(ctx context.Context, c *call) error {
	var doc xmlDelete
	if err := c.body.readXML(maxDeleteXML, &doc); err != nil {
		return err
	}
	if len(doc.Objects) == 0 || len(doc.Objects) > maxListed {
		return malformedXML().hint("A delete request names between 1 and 1000 objects.")
	}
	var refs []Ref
	var conditional []Entry
	var result xmlDeleteResult
	for _, o := range doc.Objects {
		if o.LastModifiedTime != nil || o.Size != nil {
			return refuse(http.StatusNotImplemented, "NotImplemented", "byokd deletes objects under the condition ETag, not under LastModifiedTime or Size.")
		}
		switch err := checkKey(o.Key); {
		case err != nil:
			refused := errorOf(err)
			result.Errors = append(result.Errors, xmlDeleteError{Key: o.Key, VersionID: o.VersionID, Code: refused.Code, Message: refused.Message})
		case o.ETag != "":
			conditional = append(conditional, Entry{Key: o.Key, VersionID: o.VersionID, ETag: upstreamETag(o.ETag)})
		default:
			refs = append(refs, Ref{Key: o.Key, VersionID: o.VersionID})
		}
	}
	done, err := c.bucket.deleteIfSame(ctx, conditional)
	if err == nil && len(refs) > 0 {
		var more []DeleteResult
		more, err = c.bucket.Upstream.DeleteMany(ctx, refs)
		done = append(done, more...)
	}
	if err != nil {
		return err
	}
	for _, d := range done {
		c.bucket.layouts.drop(d.Ref)
		switch {
		case d.Code != "":
			result.Errors = append(result.Errors, xmlDeleteError{Key: d.Key, VersionID: d.VersionID, Code: d.Code, Message: d.Message})
		case !doc.Quiet:
			result.Deleted = append(result.Deleted, xmlDeleted{Key: d.Key, VersionID: d.VersionID, DeleteMarker: d.DeleteMarker, DeleteMarkerVersionID: d.DeleteMarkerVersionID})
		}
	}
	return writeXML(c.w, http.StatusOK, result)
}

// deleteIfSame deletes objects that still have their ETag, each by itself: a service that heeds the condition of
// DeleteObject may overlook the one in a list, and delete what it should not.
func (b *bucket) deleteIfSame(ctx context.Context, objects []Entry) (done []DeleteResult, err error) {
	var mu sync.Mutex // guards done
	list := func(_ context.Context, visit func(Entry) error) error {
		for _, o := range objects {
			if err := visit(o); err != nil {
				return err
			}
		}
		return nil
	}
	err = inParallel(ctx, scanWorkers, list, func(ctx context.Context, o Entry) error {
		r := DeleteResult{Ref: Ref{Key: o.Key, VersionID: o.VersionID}}
		deleted, err := b.Upstream.Delete(ctx, r.Ref, o.ETag)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			refused := errorOf(err)
			r.Code, r.Message = refused.Code, refused.Message
		case deleted.DeleteMarker:
			r.DeleteMarker, r.DeleteMarkerVersionID = true, deleted.VersionID
		}
		mu.Lock()
		defer mu.Unlock()
		done = append(done, r)
		return nil
	})
	return done, err
}
