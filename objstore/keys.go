package objstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// admit waits until the key of the request's bucket may be used, for HoldFor at
// most and while the server is not being stopped; else it ends with errHeld.
func (p *Proxy) admit(ctx context.Context, c *call) error {
	if pass, ok := c.bucket.Guard.TryEnter(keyguard.Work, c.lane); ok {
		pass.Exit() // the gate may close again at once; every batch asks anew
		return nil
	}
	start := time.Now()
	p.opts.Observer.Held(c.bucket.name, 1)
	defer func() {
		p.opts.Observer.Held(c.bucket.name, -1)
		c.held += time.Since(start)
	}()
	limited, giveUp := context.WithTimeout(ctx, p.opts.HoldFor)
	defer giveUp()
	defer context.AfterFunc(p.stopping, giveUp)()
	pass, err := c.bucket.Guard.Enter(limited, keyguard.Work, c.lane)
	switch {
	case err == nil:
		pass.Exit()
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case limited.Err() != nil:
		return errHeld
	}
	return err
}

// within runs a step of a request that has not been answered yet. It waits for a frozen key of b for HoldFor at most, and
// no longer once the server is being stopped; its calls of KMS and of the upstream may take limits.step all the same, since they take their time with the key, too.
func (p *Proxy) within(ctx context.Context, b *bucket, step func(context.Context) error) error {
	held, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	giveUpFrozen := func() {
		if frozen(b.Guard) {
			giveUp(errHeld)
		}
	}
	defer context.AfterFunc(p.stopping, giveUpFrozen)()
	if p.opts.HoldFor < p.limits.step {
		defer time.AfterFunc(p.opts.HoldFor, giveUpFrozen).Stop()
	}
	limited, cancel := context.WithTimeout(held, max(p.opts.HoldFor, p.limits.step))
	defer cancel()
	err := step(limited)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case held.Err() != nil:
		return errHeld
	case limited.Err() != nil && errors.Is(err, context.DeadlineExceeded):
		return b.outOfTime(err)
	}
	return err
}

// outOfTime says what a step that ended with err for want of time has waited for: the key, or the upstream.
func (b *bucket) outOfTime(err error) error {
	s := b.Guard.Status()
	if !s.Ready() || s.Key != keyguard.Enabled {
		return errHeld
	}
	if _, ok := asUpstream(err); ok {
		return err
	}
	if s.Warning != "" { // a call that the key's policy does not allow is repeated as long as there is time
		return errHeld
	}
	return &UpstreamError{Cause: err}
}

// dataKey names a bucket data key and carries its wrapped form. It holds nothing
// secret.
type dataKey struct {
	id      seal.KeyID
	arn     string // the KMS key that wraps it; "" where that was not written down
	wrapped []byte
}

// dataKeyOf is the key of an object's or part's header.
func dataKeyOf(h seal.ObjectHeader) dataKey {
	return dataKey{id: h.Key, arn: h.KeyARN, wrapped: h.WrappedKey}
}

// formOf returns the form of a data key that the bucket's KMS key can unwrap:
// the one at hand, or after a rewrap the one in the keyring.
func (b *bucket) formOf(ctx context.Context, key dataKey) ([]byte, error) {
	if keyguard.SameKey(key.arn, b.keyARN) {
		return key.wrapped, nil
	}
	unnamed := key.arn == ""
	entry, found, err := b.ring.entry(ctx, key.id, unnamed)
	if err != nil && !(unnamed && errors.Is(err, errKeyring)) {
		return nil, err
	}
	if wrapped, ok := formUnder(entry, b.keyARN); found && ok {
		return wrapped, nil
	}
	if unnamed {
		return key.wrapped, nil // KMS will tell
	}
	return nil, fmt.Errorf("%w: %s wraps its data key %s", errOtherKMS, key.arn, key.id)
}

// withKey runs f on the root of a data key, inside a pass and inside seal.Do, and
// loads the key first if this epoch has not seen it. The pass is returned after
// its Exit, so that the caller can ask Err again before plain bytes leave.
func (b *bucket) withKey(ctx context.Context, lane uint32, key dataKey, f func(root *seal.Root) error) (keyguard.Pass, error) {
	for {
		pass, err := b.Guard.Enter(ctx, keyguard.Work, lane)
		if err != nil {
			return pass, err
		}
		root := pass.Keys().Root(key.id)
		if root == nil {
			pass.Exit()
			if err := b.load(ctx, key); err != nil {
				return pass, err
			}
			continue
		}
		seal.Do(func() { err = f(root) })
		frozen := pass.Err()
		pass.Exit()
		if errors.Is(err, seal.ErrWiped) {
			continue // the epoch ended while f worked
		}
		if err == nil {
			err = frozen
		}
		return pass, err
	}
}

// load unwraps a data key into the present epoch.
func (b *bucket) load(ctx context.Context, key dataKey) error {
	wrapped, err := b.formOf(ctx, key)
	if err != nil {
		return err
	}
	return loadError(b.Guard.Load(ctx, key.id, wrapped, b.Binding))
}

// loadError explains a data key that KMS did not unwrap although it answers.
func loadError(err error) error {
	if errors.Is(err, keyguard.ErrMisconfigured) {
		return &Error{Status: http.StatusUnprocessableEntity, Code: "SealBroken", Cause: err,
			Message: "KMS refused the object's wrapped data key: it was damaged, or belongs to another key, cluster or bucket. Check keys.*.arn and cluster.id, or restore the object."}
	}
	return err
}

// guardedKeys lets a bucket's keyring use the keys behind its guard.
type guardedKeys struct {
	bucket *bucket
	now    func() time.Time
}

// use implements keyringKeys.
func (g guardedKeys) use(ctx context.Context, entry seal.KeyringKey, f func(root *seal.Root) error) error {
	wrapped, ok := formUnder(entry, g.bucket.keyARN)
	if !ok {
		return fmt.Errorf("%w: the bucket's keyring names %v", errOtherKMS, slices.Sorted(maps.Keys(entry.Forms)))
	}
	for {
		_, err := g.bucket.withKey(ctx, 0, dataKey{id: entry.ID, arn: g.bucket.keyARN, wrapped: wrapped}, f)
		if !isFrozen(err) {
			return err
		}
	}
}

// create implements keyringKeys.
func (g guardedKeys) create(ctx context.Context) (seal.KeyringKey, error) {
	id, wrapped, err := g.bucket.Guard.Create(ctx, g.bucket.Binding)
	return seal.KeyringKey{ID: id, Created: g.now().Unix(), Forms: map[string][]byte{g.bucket.keyARN: wrapped}}, err
}

// writingKey is the data key that new objects of one bucket are sealed under. It
// is made by the first object of each period, and stands in the bucket's keyring
// before anything is sealed under it. A proxy that has just started takes the
// newest one of the keyring while its period lasts.
type writingKey struct {
	bucket *bucket
	period time.Duration
	limit  int64
	now    func() time.Time
	making chan struct{} // holds one token while a key is made

	mu    sync.Mutex
	key   dataKey   // guarded by mu
	since time.Time // guarded by mu
	used  int64     // guarded by mu
}

func newWritingKey(b *bucket, period time.Duration, limit int64, now func() time.Time) *writingKey {
	return &writingKey{bucket: b, period: period, limit: limit, now: now, making: make(chan struct{}, 1)}
}

// take returns the key for one more object or part. It waits while frozen if a
// key has to be made.
func (w *writingKey) take(ctx context.Context) (dataKey, error) {
	for {
		if key, ok := w.present(); ok {
			return key, nil
		}
		select {
		case w.making <- struct{}{}:
		case <-ctx.Done():
			return dataKey{}, ctx.Err()
		}
		err := w.renew(ctx)
		<-w.making
		if err != nil {
			return dataKey{}, err
		}
	}
}

// suspend takes the key away and has those who need one wait until resume is called.
func (w *writingKey) suspend(ctx context.Context) (resume func(), err error) {
	select {
	case w.making <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key = dataKey{}
	return func() { <-w.making }, nil
}

// present counts one use of the key there is, if it is still good for one.
func (w *writingKey) present() (dataKey, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.key.wrapped == nil || w.used >= w.limit || w.now().Sub(w.since) >= w.period {
		return dataKey{}, false
	}
	w.used++
	return w.key, true
}

// good is present without counting.
func (w *writingKey) good() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key.wrapped != nil && w.used < w.limit && w.now().Sub(w.since) < w.period
}

// renew makes a key unless somebody else just has. The caller holds the token.
func (w *writingKey) renew(ctx context.Context) error {
	if w.good() {
		return nil
	}
	ring, err := w.ring(ctx)
	if err != nil {
		return err
	}
	if w.continues(ring) {
		return nil
	}
	entry, err := w.bucket.ring.make(ctx)
	if err != nil {
		return err
	}
	if err := w.bucket.ring.add(ctx, entry); err != nil {
		return err
	}
	w.set(entry, w.now())
	return nil
}

// ring returns the keyring: what this proxy has seen of it, since it writes it
// under its ETag anyway, or else what is upstream.
func (w *writingKey) ring(ctx context.Context) (seal.Keyring, error) {
	if ring, seen := w.bucket.ring.known(); seen {
		return ring, nil
	}
	return w.bucket.ring.fetch(ctx)
}

// continues takes the newest key of the keyring: at the start if it is young
// enough, and at any age when the keyring has no room for another.
func (w *writingKey) continues(ring seal.Keyring) bool {
	if len(ring.Keys) == 0 {
		return false
	}
	newest := ring.Keys[len(ring.Keys)-1]
	made := time.Unix(newest.Created, 0)
	if len(ring.Keys) >= seal.MaxKeyringKeys {
		made = w.now()
	} else if age := w.now().Sub(made); w.has() || age >= w.period || age <= -w.period {
		return false
	}
	if _, ok := newest.Forms[w.bucket.keyARN]; !ok {
		return false
	}
	w.set(newest, made)
	return true
}

// has reports whether there was a key already.
func (w *writingKey) has() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key.wrapped != nil
}

// set begins a period.
func (w *writingKey) set(entry seal.KeyringKey, since time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	arn := w.bucket.keyARN
	w.key, w.since, w.used = dataKey{id: entry.ID, arn: arn, wrapped: entry.Forms[arn]}, since, 0
}
