package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/connlimit"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
	"github.com/byokd/byokd/objstore"
)

// objects is the S3 proxy of the daemon.
type objects struct {
	cfg      Config
	log      *zap.Logger
	listener net.Listener
	server   *http.Server
	buckets  []protected
	warned   time.Time // of too many connections; owned by Accept
}

// protected is one bucket with what its state depends on.
type protected struct {
	guard *keyguard.Guard
	state *bucketState
}

func newObjects(ctx context.Context, d *daemon) (*objects, error) {
	o := &objects{cfg: d.cfg, log: d.log.Named("objstore")}
	settings := d.cfg.Objects
	credentials, err := readCredentials(settings.Credentials.File)
	if err != nil {
		return nil, failure(d.log, "the S3 proxy cannot start", exitConfig, err)
	}
	names := slices.Sorted(maps.Keys(settings.Buckets))
	buckets := make(map[string]objstore.Bucket, len(names))
	states := make(map[string]*bucketState, len(names))
	for _, name := range names {
		b := settings.Buckets[name]
		upstream, err := d.aws.newUpstream(ctx, b.Upstream)
		if err != nil {
			return nil, failure(d.log, "the upstream of bucket "+name, exitConfig, err)
		}
		guard := d.guards[b.Key]
		buckets[name] = objstore.Bucket{Upstream: upstream, Guard: guard, Region: b.Upstream.Region,
			Binding: bucketBinding(d.cfg, b), ClearMetadata: b.Metadata == metadataClear, Compress: b.Compression == compressionZstd}
		title := b.Role
		if title != name {
			title += " (" + name + ")"
		}
		where := "s3://" + name + " at " + settings.Listen + sealedIn(b)
		resource := d.panel.AddResource(title, metrics.KindBucket, where, guard)
		resource.Describe(metrics.Fact{Name: "Format", Value: "AES-256-GCM in segments of 64 KiB"},
			metrics.Fact{Name: "User metadata", Value: b.Metadata}, metrics.Fact{Name: "Compression", Value: b.Compression})
		states[name] = &bucketState{resource: resource, upstream: b.Upstream, log: o.log}
		o.buckets = append(o.buckets, protected{guard, states[name]})
	}
	proxy, err := objstore.New(objstore.Options{Buckets: buckets, Credentials: objstore.StaticCredentials(credentials),
		BaseDomains: settings.Domains, HoldFor: cmp.Or(settings.HoldFor.Duration, -1), // 0s is not the default: it was given
		StallTimeout: settings.StallTimeout.Duration, Observer: bucketObserver{d.registry.NewObjects(names), states}, Logger: o.log})
	if err != nil {
		return nil, failure(d.log, "the S3 proxy cannot start", exitConfig, err)
	}
	if o.listener, err = d.listen("objects", settings.Listen); err != nil {
		return nil, failure(d.log, "the S3 proxy cannot start", exitListen, err)
	}
	o.listener = connlimit.New(o.listener, connectionLimit(maxS3Connections), o.displaced) // below TLS
	o.server = proxy.Server()
	if settings.TLS != nil {
		pair, err := newCertificate(*settings.TLS, o.log)
		if err != nil {
			return nil, failure(d.log, "the S3 proxy cannot start", exitConfig, fmt.Errorf("objects.tls: %w", err))
		}
		o.listener = tls.NewListener(o.listener, pair.config())
	}
	return o, nil
}

// sealedIn names the upstream bucket in what is shown of a bucket.
func sealedIn(b BucketConfig) string { return ", sealed in s3://" + b.Upstream.Bucket }

// displaced tells, once a minute, that clients have more connections than there are places.
func (o *objects) displaced() {
	if now := time.Now(); now.Sub(o.warned) >= time.Minute { // from the one goroutine that accepts
		o.warned = now
		o.log.Warn("too many connections at the S3 proxy: the ones silent for longest are closed. To see whose they are: ss -tnp",
			zap.Int("limit", connectionLimit(maxS3Connections)))
	}
}

// serve answers from the first moment (requests wait for their key there) until ctx ends; then it takes no
// new connection, gives requests under way their share of the time to stop, and cuts off the rest.
func (o *objects) serve(ctx context.Context) error {
	for _, b := range o.buckets {
		b.state.resource.Waiting("waits for the key " + b.guard.Status().Name)
		go func() {
			if waitReady(ctx, b.guard) {
				b.state.serving()
			}
		}()
	}
	ended := make(chan error, 1)
	go func() { ended <- o.server.Serve(o.listener) }()
	o.log.Info("the S3 proxy listens", zap.Stringer("address", o.listener.Addr()))
	select {
	case err := <-ended:
		return failure(o.log, "the S3 proxy has ended", exitFailure, err)
	case <-ctx.Done():
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.cfg.share(1))
	defer cancel()
	if err := o.server.Shutdown(limit); errors.Is(err, context.DeadlineExceeded) {
		o.log.Warn("requests under way were cut off; none of them was acknowledged")
		if err := o.server.Close(); err != nil {
			o.log.Debug("closing connections", zap.Error(err))
		}
	}
	return nil
}
