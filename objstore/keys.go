package objstore

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// admit waits until the key of the request's bucket may be used, for HoldFor at
// most.
func (p *Proxy) admit(ctx context.Context, c *call) error {
	if pass, ok := c.bucket.Guard.TryEnter(keyguard.Work, c.lane); ok {
		pass.Exit() // the gate may close again at once; every batch asks anew
		return nil
	}
	return p.hold(ctx, c, func(ctx context.Context) error {
		pass, err := c.bucket.Guard.Enter(ctx, keyguard.Work, c.lane)
		if err != nil {
			return err
		}
		pass.Exit()
		return nil
	})
}

// hold runs a wait for the key that ends with errHeld after HoldFor, for
// requests that have not been answered yet.
func (p *Proxy) hold(ctx context.Context, c *call, wait func(context.Context) error) error {
	start := time.Now()
	p.opts.Observer.Held(c.bucket.name, 1)
	defer func() {
		p.opts.Observer.Held(c.bucket.name, -1)
		c.held += time.Since(start)
	}()
	limited, cancel := context.WithTimeout(ctx, p.opts.HoldFor)
	defer cancel()
	return asHeld(ctx, limited, wait(limited))
}

// within runs a step of a request that has not been answered yet, and lets it
// wait for a frozen key for HoldFor at most.
func (p *Proxy) within(ctx context.Context, step func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, p.opts.HoldFor)
	defer cancel()
	return asHeld(ctx, limited, step(limited))
}

// asHeld turns the end of a limited wait into errHeld, and leaves the end of the
// request itself alone.
func asHeld(ctx, limited context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case limited.Err() != nil && errors.Is(err, context.DeadlineExceeded):
		return errHeld
	}
	return err
}

// dataKey names a bucket data key and carries its wrapped form. It holds nothing
// secret.
type dataKey struct {
	id      seal.KeyID
	wrapped []byte
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
			if err := b.Guard.Load(ctx, key.id, key.wrapped, b.Binding); err != nil {
				return pass, loadError(err)
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

// loadError explains a data key that KMS did not unwrap although it answers.
func loadError(err error) error {
	if errors.Is(err, keyguard.ErrMisconfigured) {
		return &Error{Status: http.StatusUnprocessableEntity, Code: "SealBroken", Cause: err,
			Message: "KMS refused the object's wrapped data key: it was damaged, or belongs to another key, cluster or bucket. Check keys.*.arn and cluster.id, or restore the object."}
	}
	return err
}

// writingKey is the data key that new objects of one bucket are sealed under. It
// is made by the first object of each period.
type writingKey struct {
	guard   *keyguard.Guard
	binding keyguard.Binding
	period  time.Duration
	limit   int64
	now     func() time.Time
	making  chan struct{} // holds one token while a key is made

	mu    sync.Mutex
	key   dataKey   // guarded by mu
	since time.Time // guarded by mu
	used  int64     // guarded by mu
}

func newWritingKey(g *keyguard.Guard, b keyguard.Binding, period time.Duration, limit int64, now func() time.Time) *writingKey {
	return &writingKey{guard: g, binding: b, period: period, limit: limit, now: now, making: make(chan struct{}, 1)}
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
	id, wrapped, err := w.guard.Create(ctx, w.binding)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key, w.since, w.used = dataKey{id: id, wrapped: wrapped}, w.now(), 0
	return nil
}
