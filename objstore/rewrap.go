package objstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// rewrapBatch is how many data keys get their new form in one write of the
// keyring: few enough that a crash loses a second of work, many enough that a
// keyring of years is written some hundred times.
const rewrapBatch = 100

// RewrapOptions say which bucket moves from which KMS key to which.
type RewrapOptions struct {
	Upstream Upstream
	// Binding is the encryption context of the bucket's data keys.
	Binding keyguard.Binding
	// From is the KMS key that the bucket is under, To the one it moves to. Rewrap
	// asks From for new keys only where the bucket has no keyring yet.
	From, To keyguard.KMS
	// ReEncrypt asks KMS to wrap under To what From has wrapped, in the same
	// encryption context, without showing it. The plain key stays inside KMS.
	ReEncrypt func(ctx context.Context, wrapped []byte, b keyguard.Binding) ([]byte, error)
	// Scan looks into every object, in all versions, for data keys that the keyring
	// does not list, and lists them first: keys of objects that came from another
	// bucket's backup, or of a keyring that was lost.
	Scan bool
	// DropOld forgets the forms under every KMS key but To, once each form under To
	// was tried. A byokd that is still configured with another key can then make no
	// new data key in this bucket.
	DropOld bool
	// Progress is told how far it is; may be nil. Calls do not overlap.
	Progress func(RewrapProgress)
	// Now is the clock; nil stands for time.Now.
	Now func() time.Time
}

// RewrapProgress says how far a rewrap is.
type RewrapProgress struct {
	Objects   int64 // looked into by the scan so far
	Keys      int   // data keys in the keyring, that of the keyring itself included
	Rewrapped int   // of them, those that To wraps
}

// RewrapReport says what a rewrap found and did.
type RewrapReport struct {
	Keys       int           // data keys in the keyring, that of the keyring itself included
	Rewrapped  int           // of them, those that got their form under To in this run
	Waiting    []KeyringItem // those that To does not wrap
	Found      int           // those that the scan added to the keyring
	Dropped    int           // forms that were forgotten
	Objects    int64         // that the scan looked into
	Unsealed   int64         // of them, those that byokd has not sealed
	Unreadable []string      // objects whose headers the scan could not read, at most 100, with the reason
	KMS        []string      // ARNs of the KMS keys that wrap anything in the keyring
	Generation uint64        // of the keyring
}

// KeyringItem names a data key and the KMS keys that wrap it. It is no secret.
type KeyringItem struct {
	ID      string
	Created time.Time
	KMS     []string
}

// Rewrap puts a form under another KMS key beside each wrapped data key of a
// bucket, while byokd goes on serving it: no object is written, no ETag changes.
// It may be stopped or killed at any time and begun anew; what is done stays done.
// Each new form is unwrapped with To and compared before it is written.
//
// A byokd that is still configured with From goes on as before, and so does one
// that is configured with To. Order of a move: Rewrap; configure To everywhere;
// Rewrap again with DropOld, for the keys that were made meanwhile; only then
// disable From.
func Rewrap(ctx context.Context, o RewrapOptions) (*RewrapReport, error) {
	r := newRewrap(o)
	if err := r.begin(ctx, true); err != nil {
		return nil, err
	}
	for {
		missing := r.missing()
		r.report.Keys = r.count()
		r.progress()
		if len(missing) == 0 {
			break
		}
		if err := r.batch(ctx, missing[:min(len(missing), rewrapBatch)]); err != nil {
			return r.result(), err
		}
	}
	if o.DropOld {
		if err := r.drop(ctx); err != nil {
			return r.result(), err
		}
	}
	return r.result(), nil
}

// RewrapStatus tells what a Rewrap with these options would have to do, and
// writes nothing. It needs From or To, whichever opens the keyring, and not
// ReEncrypt.
func RewrapStatus(ctx context.Context, o RewrapOptions) (*RewrapReport, error) {
	r := newRewrap(o)
	if err := r.begin(ctx, false); err != nil {
		return nil, err
	}
	return r.result(), nil
}

// rewrap is one run. It belongs to the goroutine that began it.
type rewrap struct {
	o      RewrapOptions
	ring   *keyring
	report RewrapReport
	tried  map[seal.KeyID]bool // forms under To that were unwrapped in this run
}

func newRewrap(o RewrapOptions) *rewrap {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Progress == nil {
		o.Progress = func(RewrapProgress) {}
	}
	kms := []keyguard.KMS{o.To}
	if o.From != nil {
		kms = append(kms, o.From)
	}
	keys := directKeys{kms: kms, creates: o.From, binding: o.Binding, now: o.Now}
	return &rewrap{o: o, ring: newKeyring(o.Upstream, o.Binding, keys), tried: map[seal.KeyID]bool{}}
}

// begin reads the keyring, makes it if it is missing, and scans.
func (r *rewrap) begin(ctx context.Context, write bool) error {
	ring, err := r.ring.fetch(ctx)
	if err == nil && ring.Generation == 0 && write {
		err = r.ring.add(ctx)
	}
	if err != nil || !r.o.Scan {
		return err
	}
	found, err := r.scan(ctx)
	if err != nil {
		return err
	}
	r.report.Found = len(found)
	if !write {
		for _, e := range found {
			r.report.Waiting = append(r.report.Waiting, itemOf(e))
		}
		return nil
	}
	for chunk := range slices.Chunk(found, rewrapBatch) {
		if err := r.ring.add(ctx, chunk...); err != nil {
			return err
		}
	}
	return nil
}

// entries are all entries of the keyring, its own key first.
func (r *rewrap) entries() []seal.KeyringKey {
	ring, seen := r.ring.known()
	if !seen {
		return nil
	}
	return append([]seal.KeyringKey{ring.Ring}, ring.Keys...)
}

func (r *rewrap) count() int { return len(r.entries()) }

// missing are the entries that To does not wrap.
func (r *rewrap) missing() (missing []seal.KeyringKey) {
	for _, e := range r.entries() {
		if e.Forms[r.o.To.ARN()] == nil {
			missing = append(missing, e)
		}
	}
	return missing
}

func (r *rewrap) progress() {
	r.o.Progress(RewrapProgress{Objects: r.report.Objects, Keys: r.count(), Rewrapped: r.count() - len(r.missing())})
}

// batch gives some entries their form under To.
func (r *rewrap) batch(ctx context.Context, entries []seal.KeyringKey) error {
	if r.o.From == nil || r.o.ReEncrypt == nil {
		return fmt.Errorf("objstore: %d data keys are not under %s yet, and the key that they are under was not given", len(entries), r.o.To.ARN())
	}
	forms := make(map[seal.KeyID][]byte, len(entries))
	for _, e := range entries {
		wrapped, ok := formUnder(e, r.o.From.ARN())
		if !ok {
			return fmt.Errorf("%w: data key %s is wrapped by %v, not by %s: rewrap from that key first", errOtherKMS, e.ID, slices.Sorted(maps.Keys(e.Forms)), r.o.From.ARN())
		}
		err := keyguard.Patiently(ctx, func() (err error) {
			forms[e.ID], err = r.o.ReEncrypt(ctx, wrapped, r.o.Binding)
			return err
		})
		if err != nil {
			return fmt.Errorf("data key %s: %w", e.ID, err)
		}
		if err := r.try(ctx, e, forms[e.ID]); err != nil {
			return err
		}
	}
	to := r.o.To.ARN()
	err := r.ring.change(ctx, func(ring *seal.Keyring) (changed bool, err error) {
		for _, e := range eachEntry(ring) {
			if wrapped := forms[e.ID]; wrapped != nil && e.Forms[to] == nil {
				e.Forms = maps.Clone(e.Forms)
				e.Forms[to], changed = wrapped, true
			}
		}
		return changed, nil
	})
	if err == nil {
		r.report.Rewrapped += len(forms)
	}
	return err
}

// eachEntry are the entries of a keyring that may be changed.
func eachEntry(ring *seal.Keyring) []*seal.KeyringKey {
	all := []*seal.KeyringKey{&ring.Ring}
	for i := range ring.Keys {
		all = append(all, &ring.Keys[i])
	}
	return all
}

// try unwraps a form under To and compares the key with its entry.
func (r *rewrap) try(ctx context.Context, e seal.KeyringKey, wrapped []byte) error {
	err := unwrapDirect(ctx, r.o.To, r.o.Binding, e.ID, wrapped, func(root *seal.Root) error { return root.VerifyKeyringKey(e) })
	if err != nil {
		return fmt.Errorf("data key %s does not open under %s: %w", e.ID, r.o.To.ARN(), err)
	}
	r.tried[e.ID] = true
	return nil
}

// drop forgets every form but those under To.
func (r *rewrap) drop(ctx context.Context) error {
	to := r.o.To.ARN()
	for _, e := range r.entries() {
		if !r.tried[e.ID] {
			if err := r.try(ctx, e, e.Forms[to]); err != nil {
				return err
			}
		}
	}
	dropped := 0
	err := r.ring.change(ctx, func(ring *seal.Keyring) (bool, error) {
		dropped = 0
		for _, e := range eachEntry(ring) {
			if e.Forms[to] == nil || !r.tried[e.ID] {
				return false, fmt.Errorf("data key %s was made meanwhile under another KMS key: configure %s everywhere, then rewrap again", e.ID, to)
			}
			dropped += len(e.Forms) - 1
			e.Forms = map[string][]byte{to: e.Forms[to]}
		}
		return dropped > 0, nil
	})
	if err == nil {
		r.report.Dropped = dropped
	}
	return err
}

// result completes the report.
func (r *rewrap) result() *RewrapReport {
	ring, _ := r.ring.known()
	r.report.Keys, r.report.Generation, r.report.KMS = r.count(), ring.Generation, ring.KMS()
	for _, e := range r.missing() {
		r.report.Waiting = append(r.report.Waiting, itemOf(e))
	}
	return &r.report
}

func itemOf(e seal.KeyringKey) KeyringItem {
	return KeyringItem{ID: e.ID.String(), Created: time.Unix(e.Created, 0).UTC(), KMS: slices.Sorted(maps.Keys(e.Forms))}
}

// directKeys uses keys straight behind KMS, for tools that have no guard.
type directKeys struct {
	kms     []keyguard.KMS // in the order in which they are tried
	creates keyguard.KMS   // nil where nothing is made
	binding keyguard.Binding
	now     func() time.Time
}

// use implements keyringKeys.
func (d directKeys) use(ctx context.Context, entry seal.KeyringKey, f func(root *seal.Root) error) error {
	for _, kms := range d.kms {
		if wrapped, ok := formUnder(entry, kms.ARN()); ok {
			return unwrapDirect(ctx, kms, d.binding, entry.ID, wrapped, f)
		}
	}
	return fmt.Errorf("%w: the bucket's keyring names %v", errOtherKMS, slices.Sorted(maps.Keys(entry.Forms)))
}

// create implements keyringKeys.
func (d directKeys) create(ctx context.Context) (seal.KeyringKey, error) {
	if d.creates == nil {
		return seal.KeyringKey{}, errors.New("objstore: the bucket has no keyring")
	}
	var wrapped []byte
	err := keyguard.Patiently(ctx, func() (err error) {
		wrapped, _, err = d.creates.GenerateDataKey(ctx, d.binding, func([]byte) error { return nil })
		return err
	})
	return seal.KeyringKey{ID: seal.NewID(), Created: d.now().Unix(), Forms: map[string][]byte{d.creates.ARN(): wrapped}}, err
}

// unwrapDirect runs f inside seal.Do on a root that lives for the call only.
func unwrapDirect(ctx context.Context, kms keyguard.KMS, b keyguard.Binding, id seal.KeyID, wrapped []byte, f func(root *seal.Root) error) error {
	return keyguard.Patiently(ctx, func() error {
		_, err := kms.Unwrap(ctx, wrapped, b, func(plain []byte) error {
			root, err := seal.NewRoot(id, plain)
			if err != nil {
				return err
			}
			defer root.Wipe()
			return f(root)
		})
		return err
	})
}
