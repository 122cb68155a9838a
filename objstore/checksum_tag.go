package objstore

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/seal"
)

// The checksum of an object that was uploaded in parts is known only when it is
// completed: its metadata is fixed by then, and so are the headers of its parts. It is
// kept in a tag of the object, which can be set afterwards, and which S3 takes along
// wherever the version goes: replication, restored versions, lifecycle. It is sealed under the data
// key of the first part and bound to the object's id, so that on another object it is
// nobody's. Clients do not see the tag, and keep it when they set their own.
//
// It is a service to those who ask, not a promise: where the tag cannot be set, or was
// taken away, reads return no checksum.

const (
	// ownTag is the tag's key.
	ownTag = "byokd-checksum"
	// maxTags is how many tags S3 lets an object have.
	maxTags = 10
)

// ownTagPlace is what the sealed checksum of an object is bound to.
func (b *bucket) ownTagPlace(object seal.ObjectID) string {
	return b.Binding.Resource + "\x00checksum\x00" + hex.EncodeToString(object[:])
}

// splitOwnTag takes byokd's own out of the tags of an object.
func splitOwnTag(tags []Tag) (clients []Tag, own *Tag) {
	for _, t := range tags {
		if t.Key == ownTag {
			own = &t
			continue
		}
		clients = append(clients, t)
	}
	return clients, own
}

// refuseOwnTag keeps clients from setting what is byokd's.
func refuseOwnTag(keys []string) error {
	if slices.Contains(keys, ownTag) {
		return refuse(http.StatusBadRequest, "InvalidTag", "The tag %s is byokd's own.", ownTag).with("TagKey", ownTag)
	}
	return nil
}

// keepSum stores the checksum of an upload that was completed. It cannot fail the
// upload, which is an object already; what is in the way is told once.
func (p *Proxy) keepSum(ctx context.Context, c *call, stored Stored, whole wholeSum) {
	if whole.algorithm == "" {
		return
	}
	err := p.within(ctx, c.bucket, func(ctx context.Context) error { return c.bucket.setOwnTag(ctx, c.lane, c.key, stored, whole) })
	switch {
	case errors.Is(err, errTagsMixed):
		p.log.Warn("tags of an object may be those of the one that it replaced; compare them, and set them again (a bucket with versions does not have this race)",
			zap.String("bucket", c.bucket.name), zap.String("key", c.key), zap.String("request", c.id), zap.Error(err))
	case err == nil:
		c.bucket.untold.Store(false)
	case ctx.Err() == nil && !c.bucket.untold.Swap(true):
		p.log.Warn("the checksum of an upload in parts could not be kept with its object, so reads do not return it (told once; where access is denied, byokd's role lacks s3:GetObjectTagging or s3:PutObjectTagging)",
			zap.String("bucket", c.bucket.name), zap.String("key", c.key), zap.String("request", c.id), zap.Error(err))
	}
}

// setOwnTag adds byokd's tag to those of an object that was just completed. It names
// the version, if there are any. Without, another object that takes its place meanwhile
// would get its tags: S3 sets tags under no condition. So everything that takes time (a
// key may have to be waited for) comes before, the object is looked at again just
// before the tags are set, and once more afterwards, so that at least it is told.
func (b *bucket) setOwnTag(ctx context.Context, lane uint32, key string, stored Stored, whole wholeSum) error {
	ref, same := Ref{Key: key, VersionID: stored.VersionID}, Conditions{IfMatch: stored.ETag}
	header, _, err := fetchHeader(ctx, b.Upstream, GetRequest{Ref: ref, Conditions: same})
	if err != nil {
		return err
	}
	text, err := b.sealOwnTag(ctx, lane, header, whole)
	if err != nil {
		return err
	}
	tags, _, err := b.Upstream.GetTags(ctx, ref)
	if err != nil {
		return err
	}
	if tags, _ = splitOwnTag(tags); len(tags) >= maxTags {
		return fmt.Errorf("the object has %d tags already", len(tags))
	}
	look := func() (err error) {
		if ref.VersionID == "" {
			_, err = b.Upstream.Head(ctx, GetRequest{Ref: ref, Conditions: same})
		}
		return err
	}
	if err := look(); err != nil {
		return err
	}
	if _, err = b.Upstream.PutTags(ctx, ref, append(tags, Tag{Key: ownTag, Value: text})); err != nil {
		return err
	}
	if up, refused := asUpstream(look()); refused && up.Status == http.StatusPreconditionFailed {
		return errTagsMixed
	}
	return nil
}

// errTagsMixed: an object was replaced in the moment in which its tags were set.
var errTagsMixed = errors.New("the object was replaced while the checksum of the one before was kept in its tags: the new object may have the tags of the old one")

// sealOwnTag is the value of byokd's tag of the object that a part's header is of.
func (b *bucket) sealOwnTag(ctx context.Context, lane uint32, header seal.ObjectHeader, whole wholeSum) (text string, err error) {
	for {
		_, err = b.withKey(ctx, lane, dataKeyOf(header), func(root *seal.Root) (err error) {
			text, err = root.SealMeta(b.ownTagPlace(header.Object), []byte(whole.algorithm+":"+whole.value))
			return err
		})
		if !isFrozen(err) {
			return text, err
		}
	}
}

// ownTagOf returns byokd's tag of an object, or nil. It is asked for once
// for each layout in memory, and only where an object in parts has tags at all.
func (b *bucket) ownTagOf(ctx context.Context, ref Ref, info Info, lay *layout) *Tag {
	if info.TagCount == 0 || !multipart(info.ETag) {
		return nil
	}
	if own, seen := lay.ownTag(); seen {
		return own
	}
	if info.VersionID != "" {
		ref.VersionID = info.VersionID
	}
	tags, _, err := b.Upstream.GetTags(ctx, ref)
	if err != nil {
		return nil // the object is read without, and asked again the next time
	}
	_, own := splitOwnTag(tags)
	lay.setOwnTag(own)
	return own
}

// keptSums are the checksums that keepSum has kept, by algorithm. own is what ownTagOf
// returned.
func (p *Proxy) keptSums(ctx context.Context, c *call, b *bucket, lay *layout, own *Tag) (sums map[string]string) {
	if own == nil {
		return nil
	}
	_ = p.within(ctx, b, func(ctx context.Context) error { // without the key there are none
		sums = b.openOwnTag(ctx, c.lane, lay, own.Value)
		return nil
	})
	return sums
}

// openOwnTag returns the checksum in byokd's tag, if it is of this object.
func (b *bucket) openOwnTag(ctx context.Context, lane uint32, lay *layout, text string) map[string]string {
	header, known := lay.header(0)
	if id, err := seal.MetaKey(text); !known || err != nil || id != header.Key {
		return nil
	}
	for {
		var plain []byte
		_, err := b.withKey(ctx, lane, dataKeyOf(header), func(root *seal.Root) (err error) {
			plain, err = root.OpenMeta(b.ownTagPlace(lay.object), text)
			return err
		})
		if isFrozen(err) {
			continue
		}
		algorithm, value, _ := strings.Cut(string(plain), ":")
		if err != nil || !validSum(algorithm, value) {
			return nil // of another object, or damaged: no checksum is better than a wrong one
		}
		return map[string]string{algorithm: value}
	}
}

// presentOwnTag is byokd's tag of an object, or nil, also where tags may not be read. It
// comes before tags are set: an upstream whose answer is none that could be read may not
// know of tags, and would take what sets them for the object itself.
func (b *bucket) presentOwnTag(ctx context.Context, ref Ref) (*Tag, error) {
	tags, _, err := b.Upstream.GetTags(ctx, ref)
	if up, ok := asUpstream(err); ok && up.Status >= http.StatusBadRequest {
		return nil, nil // which the operation itself will say, or not mind
	}
	_, own := splitOwnTag(tags)
	return own, err
}

// withSums is stored metadata with checksums added.
func (p *Proxy) withSums(ctx context.Context, c *call, stored, sums map[string]string) (out map[string]string, err error) {
	if len(sums) == 0 {
		return stored, nil
	}
	err = p.within(ctx, c.bucket, func(ctx context.Context) error {
		meta, err := c.bucket.openMetadata(ctx, c.lane, stored)
		if err != nil {
			return err
		}
		putChecksums(meta, sums)
		out, err = c.bucket.sealMetadata(ctx, c.lane, meta)
		return err
	})
	return out, err
}
