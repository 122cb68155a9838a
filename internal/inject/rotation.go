package inject

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// lookEvery is how often the Secret and the webhook configuration are looked at. A replica has another's renewal
	// after this; settle has room for it.
	lookEvery = 10 * time.Second
	// lookTimeout bounds one look.
	lookTimeout = 8 * time.Second
)

// ErrConflict says that somebody else has changed an object since it was read.
var ErrConflict = errors.New("changed meanwhile by somebody else")

// Store keeps what the replicas share. Every write names the version that was read and fails with ErrConflict
// when that is not the present one: that is the lock between replicas.
type Store interface {
	// Certificates reads the Secret. An absent one is empty and has the version "".
	Certificates(ctx context.Context) (data map[string][]byte, version string, err error)
	// SetCertificates writes the Secret; "" makes it.
	SetCertificates(ctx context.Context, data map[string][]byte, version string) error
	// Trust reads the CA bundle of the webhook configuration, nil where its webhooks differ.
	Trust(ctx context.Context) (bundle []byte, version string, err error)
	// SetTrust writes the CA bundle of all its webhooks.
	SetTrust(ctx context.Context, bundle []byte, version string) error
}

// Rotator keeps certificate and trust in order, and renews both, beside the other replicas. Safe for concurrent use.
type Rotator struct {
	Store    Store
	Names    []string // at which API servers reach us
	Observer Observer
	Log      *zap.Logger
	Now      func() time.Time

	present atomic.Pointer[certificates] // what is served
	failure atomic.Pointer[error]        // of the last look; nil when all was well
}

// Certificate is for a TLS server.
func (r *Rotator) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := r.present.Load(); c != nil {
		return c.server, nil
	}
	return nil, errors.New("no certificate yet")
}

// Ready tells why the API servers cannot be answered, nil when they can.
func (r *Rotator) Ready() error {
	c := r.present.Load()
	switch failure := r.failure.Load(); {
	case c == nil && failure != nil:
		return *failure
	case c == nil:
		return errors.New("there is no certificate yet")
	case !r.Now().Before(c.server.Leaf.NotAfter):
		return fmt.Errorf("the certificate ended at %s", c.server.Leaf.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// Run looks after the certificates until ctx ends.
func (r *Rotator) Run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		r.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look does what is to be done now, and tells how it went.
func (r *Rotator) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	err := r.renew(ctx)
	if errors.Is(err, ErrConflict) {
		err = r.renew(ctx) // another replica was quicker: take up what it has made
	}
	if errors.Is(err, ErrConflict) || ctx.Err() != nil && errors.Is(err, context.Canceled) {
		r.Log.Info("the certificates are looked after once more at the next look", zap.Error(err))
		return
	}
	r.Observer.Renewed(err)
	if err == nil {
		r.failure.Store(nil)
		return
	}
	r.failure.Store(&err)
	r.Log.Error("the certificates cannot be looked after", zap.Error(err))
}

// renew reads, renews and publishes. The trust is read before the Secret: were it the other way round, a bundle that
// another replica has replaced meanwhile could be put back.
func (r *Rotator) renew(ctx context.Context) error {
	trusted, trustVersion, err := r.Store.Trust(ctx)
	if err != nil {
		return err
	}
	data, version, err := r.Store.Certificates(ctx)
	if err != nil {
		return err
	}
	had, err := parseCertificates(data)
	if err != nil && !errors.Is(err, errNoCertificates) {
		r.Log.Warn("the Secret with the certificates is damaged and made anew", zap.Error(err))
	}
	want, changed, err := had.renewed(r.Names, trusted, r.Now())
	if err != nil {
		return err
	}
	if changed {
		fresh, err := want.secret()
		if err != nil {
			return err
		}
		if err := r.Store.SetCertificates(ctx, fresh, version); err != nil {
			return err
		}
	}
	if bundle := want.bundle(); !bytes.Equal(trusted, bundle) {
		if err := r.Store.SetTrust(ctx, bundle, trustVersion); err != nil {
			return err
		}
		r.Log.Info("the API servers are told which authorities to trust", zap.Int("authorities", len(want.authorities)))
	}
	r.takeUp(want)
	return nil
}

// takeUp serves what the Secret holds.
func (r *Rotator) takeUp(c *certificates) {
	before := r.present.Swap(c)
	server, authority := c.ends()
	r.Observer.Certified(server, authority)
	if before == nil || !bytes.Equal(before.server.Certificate[0], c.server.Certificate[0]) {
		r.Log.Info("a certificate is taken up", zap.Time("notAfter", server), zap.Time("authorityNotAfter", authority))
	}
}
