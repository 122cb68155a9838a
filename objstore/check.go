package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// CheckReason says in one word what is wrong with an object.
type CheckReason string

const (
	CheckDamaged        CheckReason = "damaged"         // a segment or header does not authenticate
	CheckTruncated      CheckReason = "truncated"       // bytes or parts are missing at an end
	CheckMixed          CheckReason = "mixed"           // each part is authentic, but they do not belong together
	CheckMetadata       CheckReason = "metadata"        // the bytes are sound, the user metadata is not
	CheckNotSealed      CheckReason = "not_sealed"      // byokd did not write it
	CheckWrongKey       CheckReason = "wrong_key"       // its data key is another's, or its wrapped form is damaged
	CheckUnknownVersion CheckReason = "unknown_version" // of a newer byokd
	CheckUnreadable     CheckReason = "unreadable"      // the store does not give it
)

// checkAttempts is how often an object is read that is replaced while it is read.
const checkAttempts = 3

// CheckFault is the first thing that is wrong with an object.
type CheckFault struct {
	Key       string
	VersionID string // "" in a bucket without versions
	Part      int    // from 1; 0 where no part is meant
	Segment   int64  // of the part, from 0; -1 where no segment is meant
	Offset    int64  // plain bytes before it, all of them authentic
	Reason    CheckReason
	Err       error
}

// CheckProgress says how far a Check is.
type CheckProgress struct {
	Objects int64 // read, faulty ones included
	Sealed  int64 // bytes read
	Plain   int64 // bytes that are authentic
	Faults  int64
	Changed int64 // replaced or deleted while they were read, and therefore left out
}

// CheckOptions say what Check reads.
type CheckOptions struct {
	Upstream Upstream
	Prefix   string
	// Current leaves out what is not the current version of its key.
	Current bool
	// Place is the resource of the bucket's encryption context.
	Place   string
	Keys    RestoreKeys
	Workers int // objects at once; 0 stands for 4
	// Fault is told each fault, Progress each step; neither overlaps with itself or
	// the other. Both may be nil.
	Fault    func(CheckFault)
	Progress func(CheckProgress)
}

// CheckSize adds up what Check will read, by the bucket's listing alone.
func CheckSize(ctx context.Context, o CheckOptions) (objects, sealed int64, err error) {
	versions, err := o.versions(ctx)
	if err != nil {
		return 0, 0, err
	}
	err = eachObject(ctx, o.Upstream, o.Prefix, versions, func(e Entry) error {
		objects++
		sealed += e.Size
		return nil
	})
	return objects, sealed, err
}

func (o CheckOptions) versions(ctx context.Context) (bool, error) {
	if o.Current {
		return false, nil
	}
	return versioned(ctx, o.Upstream)
}

// Check reads and opens every object of a bucket below a prefix, in all versions,
// with its metadata, and tells what is wrong. It writes nothing. byokd may serve the
// bucket meanwhile. An error ends it before everything was read: the store cannot be
// reached, or the keys cannot be used.
func Check(ctx context.Context, o CheckOptions) (CheckProgress, error) {
	if o.Workers <= 0 {
		o.Workers = 4
	}
	c := &check{o: o}
	versions, err := o.versions(ctx)
	if err != nil {
		return CheckProgress{}, err
	}
	list := func(ctx context.Context, visit func(Entry) error) error {
		return eachObject(ctx, o.Upstream, o.Prefix, versions, visit)
	}
	err = inParallel(ctx, o.Workers, list, c.object)
	return c.done, err
}

// check is one run of Check.
type check struct {
	o    CheckOptions
	mu   sync.Mutex // guards done, and keeps calls of Fault and Progress apart
	done CheckProgress
}

// update changes done and tells of it.
func (c *check) update(change func(*CheckProgress)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.done)
	if c.o.Progress != nil {
		c.o.Progress(c.done)
	}
}

// object checks one object, again if it is replaced meanwhile.
func (c *check) object(ctx context.Context, e Entry) error {
	var restored Restored
	var err error
	for range checkAttempts {
		restored, err = c.read(ctx, Ref{Key: e.Key, VersionID: e.VersionID})
		if !errors.Is(err, errChanged) {
			break
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if up, ok := asUpstream(err); errors.Is(err, errChanged) || ok && up.Status == 404 && up.Code != "NoSuchBucket" {
		c.update(func(p *CheckProgress) { p.Changed++ })
		return nil
	}
	fault := CheckFault{Key: e.Key, VersionID: e.VersionID, Segment: -1, Offset: restored.Plain, Err: err}
	if err != nil {
		if fault.Reason = checkReason(err); fault.Reason == "" {
			return fmt.Errorf("%s: %w", e.Key, err)
		}
		var place *PlaceError
		if errors.As(err, &place) {
			fault.Part, fault.Segment, fault.Offset = place.Part, place.Segment, place.Offset
		}
	}
	c.update(func(p *CheckProgress) {
		p.Objects++
		p.Plain += restored.Plain
		if err == nil {
			return
		}
		p.Faults++
		if c.o.Fault != nil {
			c.o.Fault(fault)
		}
	})
	return nil
}

// errMetadata: the bytes of an object are sound, its metadata is not.
var errMetadata = errors.New("user metadata")

// read reads an object to its end.
func (c *check) read(ctx context.Context, ref Ref) (Restored, error) {
	obj, err := c.o.Upstream.Get(ctx, GetRequest{Ref: ref})
	if err != nil {
		return Restored{}, err
	}
	src := &sealedReader{ctx: ctx, up: c.o.Upstream, ref: ref, etag: obj.ETag, size: obj.Size, body: obj.Body}
	defer src.close()
	done, err := Restore(ctx, &checkedReader{c, src}, io.Discard, c.o.Keys, partsOf(obj.ETag))
	if err != nil {
		return done, err
	}
	if _, err := openMetadata(ctx, obj.Info, c.o.Place, c.o.Keys); err != nil {
		return done, fmt.Errorf("%w: %w", errMetadata, err)
	}
	return done, nil
}

// checkedReader counts what is read.
type checkedReader struct {
	check *check
	src   io.Reader
}

// Read implements io.Reader.
func (r *checkedReader) Read(p []byte) (int, error) {
	n, err := r.src.Read(p)
	r.check.update(func(p *CheckProgress) { p.Sealed += int64(n) })
	return n, err
}

// notAboutObject are refusals that every further request would meet.
var notAboutObject = []string{"NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "SlowDown", "ServiceUnavailable"}

// checkReason sorts an error; "" is one that is not about the object.
func checkReason(err error) CheckReason {
	up, isUpstream := asUpstream(err)
	switch {
	case isUpstream && up.Status != 0 && !slices.Contains(notAboutObject, up.Code):
		return CheckUnreadable
	case keyguard.StateOf(err) == keyguard.Misconfigured && isKMS(err), errors.Is(err, seal.ErrWrongKey):
		return CheckWrongKey
	case !Damaged(err):
		return ""
	case errors.Is(err, errMetadata):
		return CheckMetadata
	case errors.Is(err, seal.ErrNotSealed), errors.Is(err, errForeign):
		return CheckNotSealed
	case errors.Is(err, seal.ErrUnknownVersion):
		return CheckUnknownVersion
	case errors.Is(err, seal.ErrTruncated):
		return CheckTruncated
	case errors.Is(err, errBroken):
		return CheckMixed
	}
	return CheckDamaged
}

func isKMS(err error) bool {
	var kms *keyguard.KMSError
	return errors.As(err, &kms)
}
