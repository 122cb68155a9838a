package objstore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

const (
	// scanWorkers is how many objects are looked into at once: one small request
	// each, which an upstream answers in some 10 ms.
	scanWorkers = 16
	// maxUnreadable bounds the list of objects that a scan could not read.
	maxUnreadable = 100
)

// eachObject calls visit for every object of a bucket, in all versions where it
// has some, byokd's own objects left out, from one goroutine.
func eachObject(ctx context.Context, up Upstream, prefix string, versions bool, visit func(Entry) error) error {
	q := ListQuery{Kind: ListV2, Prefix: prefix, Limit: maxListed}
	if versions {
		q.Kind = ListVersions
	}
	for {
		page, err := up.List(ctx, q)
		if err != nil {
			return err
		}
		for _, e := range page.Entries {
			if e.DeleteMarker || hidden(e.Key) {
				continue
			}
			if err := visit(e); err != nil {
				return err
			}
		}
		if !page.Truncated {
			return nil
		}
		marker, sub := page.NextMarker, page.NextToken
		if marker == q.Marker && sub == q.SubMarker {
			return fmt.Errorf("objstore: the upstream's listing does not go on after %q", marker)
		}
		q.Marker, q.SubMarker = marker, sub
		if q.Kind == ListV2 {
			q.Marker = ""
		}
	}
}

// inParallel calls work for each entry that list gives, in workers goroutines,
// and returns the first error, after which the others end early.
func inParallel(ctx context.Context, workers int, list func(context.Context, func(Entry) error) error, work func(context.Context, Entry) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	entries := make(chan Entry)
	var running sync.WaitGroup
	for range workers {
		running.Go(func() {
			for e := range entries {
				if err := work(ctx, e); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	err := list(ctx, func(e Entry) error {
		select {
		case entries <- e:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(entries)
	running.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// versioned reports whether a bucket has or had versions.
func versioned(ctx context.Context, up Upstream) (bool, error) {
	status, err := up.Versioning(ctx)
	if up, ok := asUpstream(err); ok && up.Code == "NotImplemented" {
		return false, nil
	}
	return status != "", err
}

// scan returns the data keys that objects name and the keyring does not list.
func (r *rewrap) scan(ctx context.Context) ([]seal.KeyringKey, error) {
	versions, err := versioned(ctx, r.o.Upstream)
	if err != nil {
		return nil, err
	}
	known := map[seal.KeyID]bool{}
	for _, e := range r.entries() {
		known[e.ID] = true
	}
	var mu sync.Mutex // guards known, found and r.report
	found := map[seal.KeyID]dataKey{}
	list := func(ctx context.Context, visit func(Entry) error) error {
		return eachObject(ctx, r.o.Upstream, "", versions, visit)
	}
	err = inParallel(ctx, scanWorkers, list, func(ctx context.Context, e Entry) error {
		keys, err := keysOf(ctx, r.o.Upstream, e)
		if _, isUpstream := asUpstream(err); isUpstream || ctx.Err() != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, key := range keys {
			if !known[key.id] {
				known[key.id], found[key.id] = true, key
			}
		}
		r.report.Objects++
		switch {
		case errors.Is(err, seal.ErrNotSealed), errors.Is(err, errForeign):
			r.report.Unsealed++
		case err != nil && len(r.report.Unreadable) < maxUnreadable:
			r.report.Unreadable = append(r.report.Unreadable, e.Key+": "+err.Error())
		}
		r.progress()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return r.adopt(ctx, found)
}

// adopt makes entries of data keys that were found in headers.
func (r *rewrap) adopt(ctx context.Context, found map[seal.KeyID]dataKey) ([]seal.KeyringKey, error) {
	var entries []seal.KeyringKey
	for _, key := range found {
		e := seal.KeyringKey{ID: key.id, Created: r.o.Now().Unix()}
		for _, kms := range r.ring.keys.(directKeys).kms {
			if key.arn == "" || keyguard.SameKey(key.arn, kms.ARN()) {
				e.Forms = map[string][]byte{kms.ARN(): key.wrapped}
				err := unwrapDirect(ctx, kms, r.o.Binding, key.id, key.wrapped, func(root *seal.Root) (err error) {
					e.Check, err = root.KeyringCheck(e.Created)
					return err
				})
				if err == nil || key.arn != "" {
					break
				}
			}
		}
		if e.Check == nil {
			r.report.Unreadable = append(r.report.Unreadable, fmt.Sprintf("data key %s of some objects: wrapped by %q, which is neither of the two KMS keys, or for another bucket", key.id, key.arn))
			continue
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// keysOf returns the data keys that the headers and the metadata of an object
// name.
func keysOf(ctx context.Context, up Upstream, e Entry) ([]dataKey, error) {
	var keys []dataKey
	ref := Ref{Key: e.Key, VersionID: e.VersionID}
	at := int64(0)
	for i := range partsOf(e.ETag) {
		h, info, err := fetchHeader(ctx, up, GetRequest{Ref: ref, Conditions: Conditions{IfMatch: e.ETag}, From: at})
		if up, ok := asUpstream(err); ok && (up.Status == 404 || up.Status == 412) {
			return nil, nil // deleted or replaced meanwhile: what replaced it is sealed under a listed key
		}
		if err != nil {
			return keys, foreignRange(err)
		}
		if text, key, err := sealedMetadata(info.Metadata); i == 0 && err == nil && text != "" {
			keys = append(keys, key)
		}
		keys = append(keys, dataKeyOf(h))
		if h.PlainSize > seal.MaxObjectSize {
			return keys, fmt.Errorf("%w: length of part %d", errBroken, i+1)
		}
		at += h.SealedSize()
	}
	return keys, nil
}
