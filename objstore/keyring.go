package objstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

const (
	// KeyringObject is the object of each bucket that lists its data keys.
	KeyringObject = hiddenPrefix + "keyring"

	// keyringAttempts bounds how often one change of a keyring is tried against
	// other writers and a failing upstream. Writers of one bucket change it about
	// once an hour each, so a conflict is rare and two in a row are rarer.
	keyringAttempts = 10
	// keyringPause is the longest first pause between two attempts.
	keyringPause = 50 * time.Millisecond
)

// keyring reads and writes the keyring of one bucket, and remembers the newest
// that it has seen. It holds nothing secret. Safe for concurrent use.
type keyring struct {
	up      Upstream
	binding keyguard.Binding
	keys    keyringKeys

	mu   sync.Mutex
	ring seal.Keyring       // guarded by mu: the newest seen, authentic; zero before
	etag string             // guarded by mu: "" when it has to be read again
	at   map[seal.KeyID]int // guarded by mu: places in ring.Keys
}

// keyringKeys is what a keyring needs of those who may use keys: the proxy's are
// behind a guard, the tools' straight behind KMS. Safe for concurrent use.
type keyringKeys interface {
	// use runs f inside seal.Do on the root of an entry. It returns errOtherKMS when
	// no form of the entry is wrapped by a KMS key at hand.
	use(ctx context.Context, entry seal.KeyringKey, f func(root *seal.Root) error) error
	// create makes a key and returns it with one form, without its check.
	create(ctx context.Context) (seal.KeyringKey, error)
}

// newKeyring talks to nobody.
func newKeyring(up Upstream, b keyguard.Binding, keys keyringKeys) *keyring {
	return &keyring{up: up, binding: b, keys: keys}
}

// fetch reads the keyring. One that is not there is no error: it has generation 0,
// unless there was one before.
func (k *keyring) fetch(ctx context.Context) (seal.Keyring, error) {
	before, seen := k.known()
	text, etag, err := readKeyring(ctx, k.up)
	if err != nil {
		return seal.Keyring{}, err
	}
	if text == nil {
		if seen {
			return seal.Keyring{}, fmt.Errorf("%w: it is gone", errKeyring)
		}
		return seal.Keyring{}, nil
	}
	ring, err := seal.ParseKeyring(text)
	if err != nil {
		return seal.Keyring{}, fmt.Errorf("%w: %w", errKeyring, err)
	}
	if !maps.Equal(ring.Binding, k.binding.Context()) {
		return seal.Keyring{}, fmt.Errorf("%w: it was made for %v, the configuration says %v", errKeyring, ring.Binding, k.binding.Context())
	}
	err = k.keys.use(ctx, ring.Ring, func(root *seal.Root) error { return root.VerifyKeyring(ring) })
	switch {
	case errors.Is(err, keyguard.ErrMisconfigured):
		return seal.Keyring{}, fmt.Errorf("%w: KMS refused its wrapped key: %v", errKeyring, err)
	case errors.Is(err, seal.ErrTampered), errors.Is(err, seal.ErrWrongKey):
		return seal.Keyring{}, fmt.Errorf("%w: %w", errKeyring, err)
	case err != nil:
		return seal.Keyring{}, err
	}
	return ring, k.accept(ring, etag, before.Generation)
}

// readKeyring returns the text of a bucket's keyring, or nil.
func readKeyring(ctx context.Context, up Upstream) (text []byte, etag string, err error) {
	for attempt := 1; ; attempt++ {
		text, etag, err = readKeyringOnce(ctx, up)
		if err == nil || !passing(err) || attempt == keyringAttempts {
			return text, etag, err
		}
		if err := pause(ctx, attempt); err != nil {
			return nil, "", err
		}
	}
}

func readKeyringOnce(ctx context.Context, up Upstream) ([]byte, string, error) {
	obj, err := up.Get(ctx, GetRequest{Ref: Ref{Key: KeyringObject}})
	if up, ok := asUpstream(err); ok && up.Status == http.StatusNotFound && up.Code != "NoSuchBucket" {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	defer obj.Body.Close()
	text, err := io.ReadAll(io.LimitReader(obj.Body, seal.KeyringMax+1))
	if err == nil && len(text) <= seal.KeyringMax && int64(len(text)) != obj.Length {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, "", &UpstreamError{Cause: err}
	}
	return text, obj.ETag, nil
}

// accept remembers an authentic keyring unless a newer one is known. It refuses
// one below the generation that was known when it was asked for.
func (k *keyring) accept(ring seal.Keyring, etag string, floor uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case ring.Generation < floor:
		return fmt.Errorf("%w: it was put back to generation %d after generation %d was seen", errKeyring, ring.Generation, floor)
	case ring.Generation < k.ring.Generation:
		return nil // somebody here has written meanwhile
	case ring.Generation == k.ring.Generation && !bytes.Equal(ring.MAC, k.ring.MAC):
		return fmt.Errorf("%w: there are two of generation %d: one was put there by hand, or the upstream ignores conditional writes", errKeyring, ring.Generation)
	}
	k.ring, k.etag = ring, etag
	k.at = make(map[seal.KeyID]int, len(ring.Keys))
	for i := range ring.Keys {
		k.at[ring.Keys[i].ID] = i
	}
	return nil
}

// known returns the newest keyring seen, which the caller must not change.
func (k *keyring) known() (seal.Keyring, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ring, k.ring.Generation > 0
}

// entry finds a data key. What is not in the newest keyring seen is looked for
// upstream, unless the caller can do without and there was one.
func (k *keyring) entry(ctx context.Context, id seal.KeyID, optional bool) (seal.KeyringKey, bool, error) {
	find := func() (seal.KeyringKey, bool) {
		k.mu.Lock()
		defer k.mu.Unlock()
		i, found := k.at[id]
		if !found {
			return seal.KeyringKey{}, false
		}
		return k.ring.Keys[i], true
	}
	if e, found := find(); found {
		return e, true, nil
	}
	if _, seen := k.known(); !seen || !optional {
		if _, err := k.fetch(ctx); err != nil {
			return seal.KeyringKey{}, false, err
		}
	}
	e, found := find()
	return e, found, nil
}

// add puts data keys into the keyring, and makes the keyring if there is none.
func (k *keyring) add(ctx context.Context, entries ...seal.KeyringKey) error {
	return k.change(ctx, func(ring *seal.Keyring) (changed bool, err error) {
		have := make(map[seal.KeyID]bool, len(ring.Keys))
		for i := range ring.Keys {
			have[ring.Keys[i].ID] = true
		}
		for _, e := range entries {
			if have[e.ID] {
				continue
			}
			if len(ring.Keys) >= seal.MaxKeyringKeys {
				return false, errKeyringFull
			}
			ring.Keys, changed = append(ring.Keys, e), true
		}
		return changed, nil
	})
}

// change applies edit to the newest keyring and writes it, again and again until
// no other writer came between. edit gets a copy, and says whether it changed it;
// it must not change the Forms of an entry in place. When the answer to a write
// was lost, the next one is a conflict, and the next edit finds its change made.
func (k *keyring) change(ctx context.Context, edit func(*seal.Keyring) (changed bool, err error)) error {
	for attempt := 1; ; attempt++ {
		err := k.changeOnce(ctx, edit)
		if err == nil || !passing(err) && !conflict(err) || attempt == keyringAttempts {
			return explainConditional(err)
		}
		if conflict(err) {
			k.forgetETag()
		}
		if err := pause(ctx, attempt); err != nil {
			return err
		}
	}
}

func (k *keyring) changeOnce(ctx context.Context, edit func(*seal.Keyring) (bool, error)) error {
	ring, etag, err := k.newest(ctx)
	if err != nil {
		return err
	}
	ring.Keys = slices.Clone(ring.Keys)
	made := ring.Generation == 0
	if made {
		if ring.Ring, err = k.make(ctx); err != nil {
			return err
		}
		ring.Binding = k.binding.Context()
	}
	changed, err := edit(&ring)
	if err != nil || !changed && !made {
		return err
	}
	ring.Generation++
	err = k.keys.use(ctx, ring.Ring, func(root *seal.Root) (err error) {
		ring, err = root.SignKeyring(ring)
		return err
	})
	if err != nil {
		return err
	}
	text, err := ring.Marshal()
	if err != nil {
		return err
	}
	req := PutRequest{Key: KeyringObject, Attributes: Attributes{ContentType: "text/plain"}, Conditions: Conditions{IfMatch: etag}}
	if made {
		req.Conditions = Conditions{IfNoneMatch: "*"}
	}
	stored, err := k.up.Put(ctx, req, bytes.NewReader(text), int64(len(text)))
	if err != nil {
		return err
	}
	if made {
		if err := k.checkConditions(ctx, text); err != nil {
			return err
		}
	}
	return k.accept(ring, stored.ETag, 0)
}

// checkConditions asks, once for each new keyring, whether the upstream refuses to
// make it a second time. One that does not would lose keys where two write.
func (k *keyring) checkConditions(ctx context.Context, text []byte) error {
	req := PutRequest{Key: KeyringObject, Attributes: Attributes{ContentType: "text/plain"}, Conditions: Conditions{IfNoneMatch: "*"}}
	if _, err := k.up.Put(ctx, req, bytes.NewReader(text), int64(len(text))); err != nil {
		return nil // refused, or nobody can tell now
	}
	_, err := k.up.Delete(ctx, Ref{Key: KeyringObject}, "")
	return errors.Join(fmt.Errorf("%w: the S3 service below byokd ignores conditional writes (If-None-Match on PutObject), which keep two writers from losing each other's keys: use one that knows them", errKeyring), err)
}

// newest returns the keyring to change, with the ETag that it has upstream.
func (k *keyring) newest(ctx context.Context) (seal.Keyring, string, error) {
	present := func() (seal.Keyring, string) {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.ring, k.etag
	}
	if ring, etag := present(); etag != "" {
		return ring, etag, nil
	}
	if _, err := k.fetch(ctx); err != nil {
		return seal.Keyring{}, "", err
	}
	ring, etag := present()
	return ring, etag, nil
}

// putBack puts the keyring back into a bucket that stays although it was to be deleted: the parts of uploads that were begun
// stand under its keys. Where it is still there, nothing is done.
func (k *keyring) putBack(ctx context.Context, text []byte) error {
	req := PutRequest{Key: KeyringObject, Attributes: Attributes{ContentType: "text/plain"}, Conditions: Conditions{IfNoneMatch: "*"}}
	for attempt := 1; ; attempt++ {
		_, err := k.up.Put(ctx, req, bytes.NewReader(text), int64(len(text)))
		if err == nil || conflict(err) {
			k.forgetETag()
			return nil
		}
		if !passing(err) || attempt == keyringAttempts {
			return err
		}
		if err := pause(ctx, attempt); err != nil {
			return err
		}
	}
}

// forget makes it a keyring that was never seen.
func (k *keyring) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ring, k.etag, k.at = seal.Keyring{}, "", nil
}

func (k *keyring) forgetETag() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.etag = ""
}

// make makes a key and completes its entry.
func (k *keyring) make(ctx context.Context) (seal.KeyringKey, error) {
	entry, err := k.keys.create(ctx)
	if err != nil {
		return seal.KeyringKey{}, err
	}
	err = k.keys.use(ctx, entry, func(root *seal.Root) (err error) {
		entry.Check, err = root.KeyringCheck(entry.Created)
		return err
	})
	return entry, err
}

// conflict reports whether another writer was quicker.
func conflict(err error) bool {
	up, ok := asUpstream(err)
	return ok && (up.Status == http.StatusPreconditionFailed || up.Status == http.StatusConflict)
}

// passing reports whether a failure of the upstream may be over a moment later.
func passing(err error) bool {
	up, ok := asUpstream(err)
	return ok && (up.Status == 0 || up.Status == http.StatusTooManyRequests || up.Status >= 500 && up.Status != http.StatusNotImplemented)
}

// explainConditional says what is missing below where conditional writes are.
func explainConditional(err error) error {
	if up, ok := asUpstream(err); ok && up.Status == http.StatusNotImplemented {
		return fmt.Errorf("%w: the S3 service below byokd does not support conditional writes (If-Match on PutObject), which keep two writers from losing each other's keys: %w", errKeyring, err)
	}
	return err
}

// pause waits between two attempts: twice as long each time, at most a second,
// and never as long as another who waits.
func pause(ctx context.Context, attempt int) error {
	timer := time.NewTimer(rand.N(min(keyringPause<<attempt, time.Second)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// formUnder returns the form of an entry that a KMS key can unwrap.
func formUnder(e seal.KeyringKey, keyARN string) ([]byte, bool) {
	if wrapped, ok := e.Forms[keyARN]; ok {
		return wrapped, true
	}
	for _, arn := range slices.Sorted(maps.Keys(e.Forms)) {
		if keyguard.SameKey(arn, keyARN) {
			return e.Forms[arn], true
		}
	}
	return nil, false
}
