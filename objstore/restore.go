package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

// RestoreKeys gives Restore the use of data keys. Safe for concurrent use.
type RestoreKeys interface {
	// Use runs f inside seal.Do on the root of the data key that a header names: id,
	// wrapped form and the ARN of the KMS key that wraps it, "" for the key of
	// metadata, where that is not written down. The header is not
	// authentic before f has said so; therefore an implementation must not ask just
	// any KMS key that a header names.
	Use(ctx context.Context, id seal.KeyID, keyARN string, wrapped []byte, f func(root *seal.Root) error) error
}

// Restored says what Restore has written.
type Restored struct {
	Plain int64 // bytes
	Parts int   // 1 for an object that was uploaded at once
	// Multipart says that the object has parts. The sealed bytes alone do not tell
	// how many there were: parts missing at the end are noticed only against the
	// ETag of the object (RestoreObject does that) or a number that the caller knows.
	Multipart bool
}

// Restore opens the sealed bytes of one object and writes the plain ones, with
// nothing but the keys and the format: no proxy, no guard, no bucket. What was
// written when it fails is authentic segments of the object, but not all of it, and
// where parts are missing, not in their places. parts is how many parts there have
// to be, 0 if that is not known.
// Errors: those of src, w and keys, the sentinels of internal/seal, and ones that
// Damaged knows.
func Restore(ctx context.Context, src io.Reader, w io.Writer, keys RestoreKeys, parts int) (Restored, error) {
	r := &restore{src: src, w: w, keys: keys,
		plain: make([]byte, batchSegments*seal.SegmentSize), sealed: make([]byte, packedBatch)}
	defer func() { clear(r.plain) }()
	for {
		h, err := r.header()
		if err == io.EOF && r.done.Parts > 0 {
			break
		}
		start := r.done.Plain
		if err == nil {
			err = r.follows(h)
		}
		if err == nil {
			err = r.part(ctx, h)
		}
		if err != nil {
			return r.done, placeOf(r.done.Parts+1, start, err)
		}
		r.object, r.number = h.Object, h.Part
		r.done.Parts++
		r.done.Multipart = h.Part > 0
	}
	if parts > 0 && r.done.Parts != parts {
		return r.done, fmt.Errorf("%w: %d parts of %d", seal.ErrTruncated, r.done.Parts, parts)
	}
	return r.done, nil
}

// PlaceError says where in an object an error of Restore is.
type PlaceError struct {
	Part    int   // from 1, in the order of the bytes; 1 for an object that was uploaded at once
	Segment int64 // of the part, from 0; -1 where the part's header or end is meant
	Offset  int64 // plain bytes of the object before it
	Err     error
}

func (e *PlaceError) Error() string { return fmt.Sprintf("part %d: %v", e.Part, e.Err) }
func (e *PlaceError) Unwrap() error { return e.Err }

// placeOf makes the PlaceError of an error in a part that begins at a plain offset.
func placeOf(part int, start int64, err error) *PlaceError {
	e := &PlaceError{Part: part, Segment: -1, Offset: start, Err: err}
	var s *segmentError
	if errors.As(err, &s) {
		e.Segment, e.Offset = s.index, start+s.index*seal.SegmentSize
	}
	return e
}

// segmentError says which segment of a part could not be opened.
type segmentError struct {
	index int64
	err   error
}

func (e *segmentError) Error() string { return fmt.Sprintf("segment %d: %v", e.index, e.err) }
func (e *segmentError) Unwrap() error { return e.err }

// Damaged reports whether err says that sealed bytes are damaged, cut short,
// foreign or of another version or key, so that trying again is of no use.
func Damaged(err error) bool {
	for _, cause := range []error{errBroken, errForeign, errOtherKMS, errKeyring, seal.ErrTampered, seal.ErrTruncated, seal.ErrNotSealed, seal.ErrUnknownVersion, seal.ErrWrongKey, seal.ErrImpossibleSize} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return false
}

// restore is one run of Restore.
type restore struct {
	src  io.Reader
	w    io.Writer
	keys RestoreKeys
	done Restored

	object seal.ObjectID // of the parts so far
	number uint32        // of the last part

	plain, sealed []byte // one batch
	packer        *packer
}

// header reads the next header; io.EOF when there is no further byte.
func (r *restore) header() (seal.ObjectHeader, error) {
	raw := r.sealed[:seal.ObjectHeaderSize]
	n, err := io.ReadFull(r.src, raw)
	switch {
	case err == io.EOF && r.done.Parts > 0:
		return seal.ObjectHeader{}, io.EOF
	case err == io.EOF || err == io.ErrUnexpectedEOF && r.done.Parts == 0:
		// Too short for any header: it tells at least whether it begins as one.
		if n < 8 || string(raw[:8]) != objectBeginning {
			return seal.ObjectHeader{}, fmt.Errorf("%w: %d bytes in all", seal.ErrNotSealed, n)
		}
		return seal.ObjectHeader{}, fmt.Errorf("%w: %d bytes of a header", seal.ErrTruncated, n)
	case err == io.ErrUnexpectedEOF:
		return seal.ObjectHeader{}, fmt.Errorf("%w: %d bytes of a header", seal.ErrTruncated, n)
	case err != nil:
		return seal.ObjectHeader{}, err
	}
	h, err := seal.ParseObjectHeader(raw)
	if errors.Is(err, seal.ErrNotSealed) && r.done.Parts > 0 {
		err = fmt.Errorf("%w: bytes after the end", errBroken)
	}
	return h, err
}

// objectBeginning is how each sealed object begins.
const objectBeginning = "byokdobj"

// follows checks that a part belongs behind those before it.
func (r *restore) follows(h seal.ObjectHeader) error {
	switch {
	case h.PlainSize > seal.MaxObjectSize:
		return fmt.Errorf("%w: length", errBroken)
	case r.done.Parts == 0:
		return nil
	case r.number == 0 || h.Part == 0 || h.Object != r.object:
		return fmt.Errorf("%w: it belongs to another object", errBroken)
	case h.Part <= r.number:
		return fmt.Errorf("%w: number %d after %d", errBroken, h.Part, r.number)
	}
	return nil
}

// part opens the segments behind a header.
func (r *restore) part(ctx context.Context, h seal.ObjectHeader) error {
	size := int64(h.PlainSize)
	count := seal.SegmentCount(size)
	if h.Suite == seal.SuiteZstd {
		return r.packedPart(ctx, h)
	}
	left := seal.SealedObjectSize(size) - seal.ObjectHeaderSize
	for first := int64(0); first < count; first += batchSegments {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(left, batchSegments*sealedSegment)
		batch := r.sealed[:n]
		if got, err := io.ReadFull(r.src, batch); err == io.EOF || err == io.ErrUnexpectedEOF {
			return fmt.Errorf("%w: %d bytes are missing", seal.ErrTruncated, left-int64(got))
		} else if err != nil {
			return err
		}
		var opened []byte
		err := r.keys.Use(ctx, h.Key, h.KeyARN, h.WrappedKey, func(root *seal.Root) (err error) {
			opened, err = openSegments(root, h, r.plain[:0], batch, first, count)
			return err
		})
		if err != nil {
			return err
		}
		if _, err := r.w.Write(opened); err != nil {
			return err
		}
		left -= n
		r.done.Plain += int64(len(opened))
	}
	return nil
}

// packedPart opens the compressed segments behind a header.
func (r *restore) packedPart(ctx context.Context, h seal.ObjectHeader) error {
	if r.packer == nil {
		var err error
		if r.packer, err = newPacker(); err != nil {
			return err
		}
	}
	size, left := int64(h.PlainSize), int64(h.PackedSize)
	count := seal.SegmentCount(size)
	read := func(b []byte) error {
		_, err := io.ReadFull(r.src, b)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = fmt.Errorf("%w: up to %d bytes are missing", seal.ErrTruncated, left)
		}
		left -= int64(len(b))
		return err
	}
	for first := int64(0); first < count; first += batchSegments {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		batch, err := readPacked(r.sealed, min(batchSegments, count-first), read)
		if err != nil {
			return err
		}
		var opened []byte
		err = r.keys.Use(ctx, h.Key, h.KeyARN, h.WrappedKey, func(root *seal.Root) error {
			cipher, err := root.OpenObject(h)
			if err == nil {
				opened, err = r.packer.openPacked(cipher, r.plain[:0], batch, first, size)
			}
			return err
		})
		if err != nil {
			return err
		}
		if _, err := r.w.Write(opened); err != nil {
			return err
		}
		r.done.Plain += int64(len(opened))
	}
	if left != 0 {
		return fmt.Errorf("%w: packed length", errBroken)
	}
	return nil
}

// openSegments opens a batch that begins with segment first of count.
func openSegments(root *seal.Root, h seal.ObjectHeader, dst, batch []byte, first, count int64) ([]byte, error) {
	cipher, err := root.OpenObject(h)
	if err != nil {
		return nil, err
	}
	for index := first; len(batch) > 0; index++ {
		n := min(len(batch), sealedSegment)
		if dst, err = cipher.OpenSegment(dst, batch[:n], uint64(index), index == count-1); err != nil {
			return nil, &segmentError{index, err}
		}
		batch = batch[n:]
	}
	return dst, nil
}

// RestoreObject is Restore for an object of a bucket. A read that breaks off is
// taken up again where it ended, of the same version; one that was cut at the edge
// of a part is told by the number of parts in the ETag.
func RestoreObject(ctx context.Context, up Upstream, ref Ref, w io.Writer, keys RestoreKeys) (Restored, error) {
	obj, err := up.Get(ctx, GetRequest{Ref: ref})
	if err != nil {
		return Restored{}, err
	}
	src := &sealedReader{ctx: ctx, up: up, ref: ref, etag: obj.ETag, size: obj.Size, body: obj.Body}
	defer src.close()
	return Restore(ctx, src, w, keys, partsOf(obj.ETag))
}

// RestoreMetadata returns what travels beside the bytes of an object, user metadata
// opened. place is the resource of the bucket's encryption context.
func RestoreMetadata(ctx context.Context, up Upstream, ref Ref, place string, keys RestoreKeys) (Attributes, error) {
	info, err := up.Head(ctx, GetRequest{Ref: ref})
	if err != nil {
		return Attributes{}, err
	}
	return openMetadata(ctx, info, place, keys)
}

// openMetadata opens the metadata that came with an object.
func openMetadata(ctx context.Context, info Info, place string, keys RestoreKeys) (Attributes, error) {
	a := info.Attributes
	a.Metadata = clearMetadata(info.Metadata)
	text, key, err := sealedMetadata(info.Metadata)
	if err == nil && text != "" {
		err = keys.Use(ctx, key.id, "", key.wrapped, func(root *seal.Root) error {
			plain, err := root.OpenMeta(place, text)
			if err == nil {
				a.Metadata, err = unpackMetadata(plain)
			}
			return err
		})
	}
	takeChecksums(a.Metadata)
	return a, err
}

// sealedReader reads the sealed bytes of one version of an object, asking again
// where the upstream breaks off.
type sealedReader struct {
	ctx    context.Context
	up     Upstream
	ref    Ref
	etag   string
	size   int64
	body   io.ReadCloser // nil: to be asked for from pos
	pos    int64
	failed int // in a row without a byte
}

// Read implements io.Reader.
func (s *sealedReader) Read(p []byte) (int, error) {
	for s.pos < s.size {
		if s.body == nil {
			if err := s.reopen(); err != nil {
				return 0, err
			}
		}
		n, err := s.body.Read(p[:min(int64(len(p)), s.size-s.pos)])
		s.pos += int64(n)
		if n > 0 {
			s.failed = 0
			return n, nil
		}
		if err == nil {
			continue
		}
		s.close()
		if s.ctx.Err() != nil {
			return 0, context.Cause(s.ctx)
		}
		if s.failed++; s.failed > maxReopens {
			return 0, &UpstreamError{Cause: err}
		}
		if err := pause(s.ctx, s.failed); err != nil {
			return 0, err
		}
	}
	return 0, io.EOF
}

func (s *sealedReader) reopen() error {
	obj, err := s.up.Get(s.ctx, GetRequest{Ref: s.ref, Conditions: Conditions{IfMatch: s.etag}, From: s.pos, To: s.size})
	if up, ok := asUpstream(err); ok && up.Status == 412 {
		return errChanged
	}
	if err == nil {
		s.body = obj.Body
	}
	return err
}

func (s *sealedReader) close() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

// RestoreTarget takes the plain bytes of one object of RestoreAll. Commit is
// called when all of them were written and authentic, Abort otherwise.
type RestoreTarget interface {
	io.Writer
	Commit() error
	Abort()
}

// RestoreAllOptions say what RestoreAll restores and where to.
type RestoreAllOptions struct {
	Upstream Upstream
	Prefix   string
	Keys     RestoreKeys
	Workers  int // objects at once; 0 stands for 4
	// Target is called for each object, at most Workers at once; nil with no error
	// leaves the object out.
	Target func(Entry) (RestoreTarget, error)
	// Progress is told after each object. Calls do not overlap.
	Progress func(RestoreProgress)
}

// RestoreProgress says how far a RestoreAll is.
type RestoreProgress struct {
	Objects int64 // restored
	Skipped int64 // left out by Target
	Failed  int64
	Plain   int64 // bytes written of what was restored
}

// RestoreFailure is an object that could not be restored.
type RestoreFailure struct {
	Key string
	Err error
}

// RestoreAll restores the current version of every object whose key begins with
// a prefix. An object that fails does not keep it from the others: its failures
// are returned at the end, at most 1000 of them. The error is for what ends all.
func RestoreAll(ctx context.Context, o RestoreAllOptions) (RestoreProgress, []RestoreFailure, error) {
	if o.Workers <= 0 {
		o.Workers = 4
	}
	var mu sync.Mutex // guards progress and failures
	var progress RestoreProgress
	var failures []RestoreFailure
	list := func(ctx context.Context, visit func(Entry) error) error {
		return eachObject(ctx, o.Upstream, o.Prefix, false, visit)
	}
	err := inParallel(ctx, o.Workers, list, func(ctx context.Context, e Entry) error {
		done, written, err := restoreEntry(ctx, o, e)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			progress.Failed++
			if len(failures) < maxListed {
				failures = append(failures, RestoreFailure{Key: e.Key, Err: err})
			}
		case !written:
			progress.Skipped++
		default:
			progress.Objects++
			progress.Plain += done.Plain
		}
		if o.Progress != nil {
			o.Progress(progress)
		}
		return nil
	})
	return progress, failures, err
}

func restoreEntry(ctx context.Context, o RestoreAllOptions, e Entry) (done Restored, written bool, err error) {
	target, err := o.Target(e)
	if err != nil || target == nil {
		return Restored{}, false, err
	}
	done, err = RestoreObject(ctx, o.Upstream, Ref{Key: e.Key}, target, o.Keys)
	if err != nil {
		target.Abort()
		return done, false, err
	}
	return done, true, target.Commit()
}

// ReadKeyring returns the text of a bucket's keyring, or nil if it has none. It is
// not authenticated.
func ReadKeyring(ctx context.Context, up Upstream) ([]byte, error) {
	text, _, err := readKeyring(ctx, up)
	return text, err
}
