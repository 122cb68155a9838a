package objstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

const (
	// stagingPrefix begins the keys of sealed copies that have not replaced their
	// plain objects yet.
	stagingPrefix = hiddenPrefix + "sealing/"
	// convertWorkers is how many objects are converted at once: each moves its bytes
	// six times, so a few keep a network busy.
	convertWorkers = 4
	// convertPasses bounds how often objects that were replaced under the conversion
	// are looked at again.
	convertPasses = 3
	// replaceAttempts bounds how often the last step is tried against a failing
	// upstream. The sealed copy stays, so the next run takes it from there.
	replaceAttempts = 5
)

// ConvertOptions say what Convert does.
type ConvertOptions struct {
	Prefix   string // of the keys to convert; "" for all
	DryRun   bool   // count only
	Workers  int    // objects at once; 0 stands for 4
	Progress func(ConvertReport)
}

// ConvertReport says what a conversion found and did so far.
type ConvertReport struct {
	Objects     int64 // looked at
	Sealed      int64 // of them, sealed already
	Plain       int64 // of them, plain
	PlainBytes  int64 // length of the plain ones
	Converted   int64 // plain ones that are sealed now
	Changed     int64 // plain ones that somebody replaced or deleted meanwhile: theirs stays
	OldVersions int64 // noncurrent versions that are plain, and stay so
	Failed      int64
	Failures    []RestoreFailure // at most 1000
}

// convert is one run of Convert.
type convert struct {
	p *Proxy
	b *bucket
	o ConvertOptions

	mu     sync.Mutex
	report ConvertReport    // guarded by mu
	again  []Entry          // guarded by mu: objects that were replaced under the conversion
	left   map[string]Entry // guarded by mu: copies of former runs, by their keys

	lock lockSource // fixed once objects are visited
}

// Convert seals the plain objects of a bucket in place. Each is read, sealed into
// a copy aside, the copy is read back, opened and compared, and only then put in
// the object's place, under the condition that nobody has replaced the object
// meanwhile: a writer who did keeps his. Then the object is read and compared once
// more before the copy is removed. A run may be stopped or killed at any time; the
// next one goes on. Metadata, tags, content headers, locks and, where byokd may
// read them, ACLs are kept. Noncurrent versions stay as they are; where a lock keeps the
// plain object, it becomes one. Convert waits while the key is frozen.
func (p *Proxy) Convert(ctx context.Context, name string, o ConvertOptions) (ConvertReport, error) {
	b := p.buckets[name]
	if b == nil {
		return ConvertReport{}, fmt.Errorf("objstore: there is no bucket %q", name)
	}
	if o.Workers <= 0 {
		o.Workers = convertWorkers
	}
	if o.Progress == nil {
		o.Progress = func(ConvertReport) {}
	}
	v := &convert{p: p, b: b, o: o}
	err := v.run(ctx)
	return v.report, err
}

func (v *convert) run(ctx context.Context) error {
	if !v.o.DryRun {
		if err := v.checkConditions(ctx); err != nil {
			return err
		}
		if err := v.findLeftovers(ctx); err != nil {
			return err
		}
		var err error
		if v.lock.lockable, err = v.b.lockable(ctx); err != nil {
			return err
		}
	}
	list := func(ctx context.Context, visit func(Entry) error) error {
		return eachObject(ctx, v.b.Upstream, v.o.Prefix, false, visit)
	}
	for pass := 1; ; pass++ {
		if err := inParallel(ctx, v.o.Workers, list, v.visit); err != nil {
			return err
		}
		changed := v.again
		if v.again = nil; len(changed) == 0 || pass == convertPasses {
			break
		}
		list = func(ctx context.Context, visit func(Entry) error) error { return v.refreshed(ctx, changed, visit) }
	}
	if err := v.oldVersions(ctx); err != nil || v.o.Prefix != "" {
		return err
	}
	for key := range v.left { // whose objects were deleted since
		if _, err := v.b.Upstream.Delete(ctx, Ref{Key: key}, ""); err != nil {
			return err
		}
	}
	return nil
}

// findLeftovers lists the sealed copies of runs that ended early.
func (v *convert) findLeftovers(ctx context.Context) error {
	v.left = map[string]Entry{}
	q := ListQuery{Kind: ListV2, Prefix: stagingPrefix, Limit: maxListed}
	for {
		page, err := v.b.Upstream.List(ctx, q)
		if err != nil {
			return err
		}
		for _, e := range page.Entries {
			v.left[e.Key] = e
		}
		if !page.Truncated || page.NextToken == q.SubMarker {
			return nil
		}
		q.SubMarker = page.NextToken
	}
}

// hasLeftover reports whether a former run left a copy of an object, which from here on is no longer one whose object was
// deleted.
func (v *convert) hasLeftover(e Entry) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, found := v.left[stagedKey(e.Key)]
	delete(v.left, stagedKey(e.Key))
	return found
}

// settle removes the copy that a former run left of an object which is sealed by
// now, once the object was read to its end. Else it is all there is.
func (v *convert) settle(ctx context.Context, e Entry) error {
	key := stagedKey(e.Key)
	if _, err := v.digest(ctx, &call{bucket: v.b, lane: v.p.lanes.Add(1)}, Ref{Key: e.Key}, e.ETag); err != nil {
		return fmt.Errorf("the copy that an earlier run left at %s is kept: %w", key, err)
	}
	_, err := v.b.Upstream.Delete(ctx, Ref{Key: key}, "")
	return err
}

// stagedKey is where the sealed copy of an object waits.
func stagedKey(key string) string {
	sum := sha256.Sum256([]byte(key))
	return stagingPrefix + hex.EncodeToString(sum[:])
}

// checkConditions refuses an upstream that ignores If-Match, where a writer who
// comes between would be overwritten.
func (v *convert) checkConditions(ctx context.Context) error {
	key := stagingPrefix + "condition"
	req := PutRequest{Key: key, Conditions: Conditions{IfMatch: `"00000000000000000000000000000000"`}}
	_, err := v.b.Upstream.Put(ctx, req, strings.NewReader("x"), 1)
	if err == nil {
		if _, err := v.b.Upstream.Delete(ctx, Ref{Key: key}, ""); err != nil {
			return err
		}
		return errors.New("the S3 service below byokd ignores If-Match on PutObject: an object that is replaced during the conversion would be lost, so nothing is converted")
	}
	if up, ok := asUpstream(err); ok && (up.Status == http.StatusPreconditionFailed || up.Status == http.StatusNotFound && up.Code != "NoSuchBucket") {
		return nil
	}
	return fmt.Errorf("asking the S3 service below byokd whether it knows If-Match: %w", err)
}

// refreshed visits objects under the ETags that they have now.
func (v *convert) refreshed(ctx context.Context, entries []Entry, visit func(Entry) error) error {
	for _, e := range entries {
		info, err := v.b.Upstream.Head(ctx, GetRequest{Ref: Ref{Key: e.Key}})
		if up, ok := asUpstream(err); ok && up.Status == http.StatusNotFound {
			continue
		}
		if err != nil {
			return err
		}
		e.ETag, e.Size = info.ETag, info.Size
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

// visit looks at one object, and converts it.
func (v *convert) visit(ctx context.Context, e Entry) error {
	leftover := v.hasLeftover(e)
	plain, err := v.isPlain(ctx, Ref{Key: e.Key}, e)
	v.count(func(r *ConvertReport) {
		r.Objects++
		switch {
		case err == nil && plain:
			r.Plain++
			r.PlainBytes += e.Size
		case err == nil:
			r.Sealed++
		}
	})
	if err == nil && !plain && leftover {
		err = v.settle(ctx, e)
	}
	if err == nil && plain && !v.o.DryRun {
		err = v.object(ctx, e)
		if err == nil {
			v.count(func(r *ConvertReport) { r.Converted++ })
		}
	}
	return v.judge(ctx, e, plain, err)
}

// judge sorts the outcome of one object: replaced meanwhile, failed, or a reason
// to end the run.
func (v *convert) judge(ctx context.Context, e Entry, plain bool, err error) error {
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case replaced(err):
		v.count(func(r *ConvertReport) {
			if r.Objects--; plain {
				r.Plain--
				r.PlainBytes -= e.Size
			}
			r.Changed++
			v.again = append(v.again, e)
		})
	default:
		v.count(func(r *ConvertReport) {
			r.Failed++
			if len(r.Failures) < maxListed {
				r.Failures = append(r.Failures, RestoreFailure{Key: e.Key, Err: err})
			}
		})
	}
	return nil
}

// replaced reports whether an object is no longer the one that was listed.
func replaced(err error) bool {
	up, ok := asUpstream(err)
	return errors.Is(err, errChanged) || ok && (up.Status == http.StatusPreconditionFailed || up.Status == http.StatusConflict || up.Status == http.StatusNotFound && up.Code != "NoSuchBucket")
}

func (v *convert) count(add func(*ConvertReport)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	add(&v.report)
	v.o.Progress(v.report)
}

// isPlain reports whether byokd has not sealed an object. One that begins as a
// sealed one but is damaged is an error.
func (v *convert) isPlain(ctx context.Context, ref Ref, e Entry) (bool, error) {
	if e.Size < seal.SealedObjectSize(0) {
		return true, nil
	}
	_, _, err := fetchHeader(ctx, v.b.Upstream, GetRequest{Ref: ref, Conditions: Conditions{IfMatch: e.ETag}})
	if errors.Is(err, seal.ErrNotSealed) {
		return true, nil
	}
	return false, err
}

// object converts one plain object.
func (v *convert) object(ctx context.Context, e Entry) error {
	c := &call{bucket: v.b, lane: v.p.lanes.Add(1), key: e.Key, r: (&http.Request{}).WithContext(ctx)}
	info, rules, err := v.p.headWithRules(ctx, v.b, GetRequest{Ref: Ref{Key: e.Key}, Conditions: Conditions{IfMatch: e.ETag}}, v.lock)
	if err != nil {
		return err
	}
	staged := Ref{Key: stagedKey(e.Key)}
	src := &plainSourceOf{sealedReader: sealedReader{ctx: ctx, up: v.b.Upstream, ref: Ref{Key: e.Key}, etag: e.ETag, size: info.Size}, sum: sha256.New()}
	store := v.p.store
	if locks(withRules(ctx, rules)) { // see there why in parts; the copy itself is not locked
		store = v.p.storeLarge
	}
	stored, err := store(ctx, c, PutRequest{Key: staged.Key, Attributes: Attributes{ContentType: defaultContentType}}, src, info.Size)
	if err != nil {
		return err
	}
	if err := v.compare(ctx, c, staged, stored.ETag, src.sum.Sum(nil)); err != nil {
		return fmt.Errorf("the sealed copy: %w", err)
	}
	err = v.replace(withRules(ctx, rules), c, e, info, staged, stored.ETag, src.sum.Sum(nil))
	if err == nil || replaced(err) {
		_, deleteErr := v.b.Upstream.Delete(ctx, staged, "")
		err = errors.Join(err, deleteErr)
	}
	return err
}

// plainSourceOf is a plain object of the upstream as the source of a sealing. It
// hashes what it yields.
type plainSourceOf struct {
	sealedReader
	sum hash.Hash
}

// Read implements io.Reader.
func (s *plainSourceOf) Read(b []byte) (int, error) {
	n, err := s.sealedReader.Read(b)
	s.sum.Write(b[:n])
	return n, err
}

// finish implements plainSource: that all bytes were read is all there is to say.
func (s *plainSourceOf) finish() error { return nil }

// release implements the end of a sealing.
func (s *plainSourceOf) release() { s.close() }

// errDiffers: what was stored does not open to what was read.
var errDiffers = errors.New("it does not open to the bytes that were sealed")

// digest opens an object to its end and returns the hash of its plain bytes.
func (v *convert) digest(ctx context.Context, c *call, ref Ref, etag string) ([]byte, error) {
	obj, err := v.b.Upstream.Get(ctx, GetRequest{Ref: ref, Conditions: Conditions{IfMatch: etag}})
	if err != nil {
		return nil, err
	}
	o, err := v.p.openWhole(ctx, c, ref, obj)
	if err != nil {
		obj.Body.Close()
		return nil, err
	}
	plain := &plainReader{ctx: ctx, o: o}
	defer plain.release()
	sum := sha256.New()
	if _, err := io.Copy(sum, plain); err != nil {
		return nil, err
	}
	if err := plain.finish(); err != nil && err != io.EOF {
		return nil, err
	}
	return sum.Sum(nil), nil
}

// compare compares what an object opens to with the hash of plain bytes.
func (v *convert) compare(ctx context.Context, c *call, ref Ref, etag string, want []byte) error {
	got, err := v.digest(ctx, c, ref, etag)
	if err == nil && !bytes.Equal(got, want) {
		err = errDiffers
	}
	return err
}

// replace puts the staged copy, byte for byte, in the place of the plain object,
// and compares what is there afterwards.
func (v *convert) replace(ctx context.Context, c *call, e Entry, info Info, staged Ref, stagedETag string, want []byte) error {
	a := info.Attributes
	var err error
	if a.Metadata, err = v.b.sealMetadata(ctx, c.lane, info.Metadata); err != nil {
		return err
	}
	if a.Tagging, err = (&copySource{bucket: v.b, ref: Ref{Key: e.Key}}).tagging(ctx, info); err != nil {
		return err
	}
	match := e.ETag // what may be replaced: the plain object, or what this run has put there
	for attempt := 1; ; attempt++ {
		stored, err := v.relay(ctx, staged, stagedETag, PutRequest{Key: e.Key, Attributes: a, Conditions: Conditions{IfMatch: match}})
		if err == nil {
			match = stored.ETag
			err = v.compare(ctx, c, Ref{Key: e.Key}, match, want)
		} else if passing(err) && v.arrived(ctx, c, e, match, want) {
			return nil
		}
		if err == nil || replaced(err) || attempt == replaceAttempts || !passing(err) && !Damaged(err) && !errors.Is(err, errDiffers) {
			return err
		}
		if err := pause(ctx, attempt); err != nil {
			return err
		}
	}
}

// arrived reports whether a write whose answer was lost has been carried out.
func (v *convert) arrived(ctx context.Context, c *call, e Entry, match string, want []byte) bool {
	info, err := v.b.Upstream.Head(ctx, GetRequest{Ref: Ref{Key: e.Key}})
	return err == nil && info.ETag != match && v.compare(ctx, c, Ref{Key: e.Key}, info.ETag, want) == nil
}

// relay copies sealed bytes as they are, in as many parts as they have: the count
// in the ETag is part of the format, and a CopyObject would lose it.
func (v *convert) relay(ctx context.Context, from Ref, etag string, to PutRequest) (Stored, error) {
	up := v.b.Upstream
	first, info, err := fetchHeader(ctx, up, GetRequest{Ref: from, Conditions: Conditions{IfMatch: etag}})
	if err != nil {
		return Stored{}, err
	}
	to.Metadata = keepPacked(to.Metadata, info.Metadata)
	whole := &sealedReader{ctx: ctx, up: up, ref: from, etag: etag, size: info.Size}
	defer whole.close()
	if first.Part == 0 {
		return up.Put(ctx, to, whole, info.Size)
	}
	lay, err := v.b.complete(ctx, from, info, first)
	if err != nil {
		return Stored{}, err
	}
	id, err := up.CreateUpload(ctx, to.Key, to.Attributes)
	if err != nil {
		return Stored{}, err
	}
	var parts []Part
	for i := range lay.count {
		s := lay.part(i)
		etag, err := up.PutPart(ctx, to.Key, id, int32(s.number), io.LimitReader(whole, s.sealedSize), s.sealedSize)
		if err != nil {
			v.p.abandon(&call{bucket: v.b, r: (&http.Request{}).WithContext(ctx)}, to.Key, id)
			return Stored{}, err
		}
		parts = append(parts, Part{Number: int32(s.number), ETag: etag, Size: s.sealedSize})
	}
	stored, err := up.CompleteUpload(ctx, to.Key, id, parts, to.Conditions)
	if err != nil {
		v.p.abandon(&call{bucket: v.b, r: (&http.Request{}).WithContext(ctx)}, to.Key, id)
	}
	return stored, err
}

// oldVersions counts the plain noncurrent versions, which a conversion cannot
// replace and does not delete.
func (v *convert) oldVersions(ctx context.Context) error {
	if versions, err := versioned(ctx, v.b.Upstream); err != nil || !versions {
		return err
	}
	list := func(ctx context.Context, visit func(Entry) error) error {
		return eachObject(ctx, v.b.Upstream, v.o.Prefix, true, func(e Entry) error {
			if e.Latest {
				return nil
			}
			return visit(e)
		})
	}
	return inParallel(ctx, scanWorkers, list, func(ctx context.Context, e Entry) error {
		plain, err := v.isPlain(ctx, Ref{Key: e.Key, VersionID: e.VersionID}, e)
		if _, isUpstream := asUpstream(err); isUpstream && !replaced(err) {
			return err
		}
		if plain {
			v.count(func(r *ConvertReport) { r.OldVersions++ })
		}
		return nil
	})
}
