package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/pflag"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// maxKeptRoots bounds the data keys that a decryption keeps: a bucket makes one an hour.
const maxKeptRoots = 1024

// keySource opens data keys for a restore: with the KMS keys that the operator named, never with one that
// only the sealed bytes name, since those may have been made by somebody else under a key of his own.
// It asks KMS once for each data key. Safe for concurrent use once adopt has returned.
type keySource struct {
	aws         awsConfigs
	arns        []string
	context     map[string]string
	kmsEndpoint string
	file        string // the configuration

	loaded  bool // cfg was read
	cfg     Config
	binding keyguard.Binding
	ring    map[seal.KeyID]seal.KeyringKey
	kms     map[string]keyguard.KMS // by ARN; fixed after load
	at      map[string]string       // addresses of KMS by ARN, "" for AWS' own; fixed after load
	waits   func(error)             // tells that KMS does not answer and is asked again; fixed after load

	mu    sync.Mutex
	roots map[seal.KeyID]*seal.Root // guarded by mu
}

func (k *keySource) flags(flags *pflag.FlagSet) {
	flags.StringArrayVar(&k.arns, "key", nil, "ARN of a KMS key that may be asked (may be given several times)")
	flags.StringToStringVar(&k.context, "context", nil, "KMS encryption context, NAME=VALUE (default: that of the configuration, else of the bucket's keyring)")
	flags.StringVar(&k.kmsEndpoint, "kms-endpoint", "", "address of KMS, for a VPC endpoint or a stand-in")
	flags.StringVar(&k.file, "config", "", "configuration file that names keys and buckets")
}

// load makes the clients of the KMS keys that may be asked. It talks to nobody. What is told to people while KMS
// does not answer goes to messages.
func (k *keySource) load(environ []string, messages io.Writer) error {
	k.kms, k.roots = map[string]keyguard.KMS{}, map[seal.KeyID]*seal.Root{}
	var once sync.Once
	k.waits = func(err error) {
		once.Do(func() {
			fmt.Fprintf(messages, "byokd: KMS cannot be asked yet, and is asked again for a minute: %v\n", err)
		})
	}
	endpoints := map[string]string{}
	k.at = endpoints
	for _, arn := range k.arns {
		endpoints[arn] = k.kmsEndpoint
	}
	if k.file != "" {
		cfg, _, err := loadConfig(k.file, environ)
		if err != nil {
			return exitWith(exitConfig, err)
		}
		k.cfg, k.loaded = cfg, true
		for _, key := range cfg.Keys {
			endpoints[key.ARN] = key.Endpoint
		}
	}
	if len(endpoints) == 0 {
		return exitWith(exitUsage, errors.New("which KMS key may be asked? Give --key ARN, or --config FILE"))
	}
	for arn, endpoint := range endpoints {
		client, err := k.aws.newKMS(context.Background(), KeyConfig{ARN: arn, Endpoint: endpoint})
		if err != nil {
			return exitWith(exitUsage, err)
		}
		k.kms[arn] = &boundedKMS{client}
	}
	return nil
}

// region is that of a key.
func (k *keySource) region() string { return regionOfARN(slices.Min(slices.Collect(maps.Keys(k.kms)))) }

// bucket finds a bucket of the configuration by either of its names, and takes its encryption context.
func (k *keySource) bucket(name string) (BucketConfig, error) {
	var known []string
	if k.cfg.Objects != nil {
		known = slices.Sorted(maps.Keys(k.cfg.Objects.Buckets))
		for _, client := range known {
			if b := k.cfg.Objects.Buckets[client]; client == name || b.Upstream.Bucket == name {
				k.binding = bucketBinding(k.cfg, b)
				return b, nil
			}
		}
	}
	return BucketConfig{}, exitWith(exitConfig, fmt.Errorf("%s knows no bucket %q (%s)", k.file, name, strings.Join(known, ", ")))
}

// upstream finds a bucket by the configuration, and by region and address where these are not "", and completes
// the key source from what is known of it.
func (k *keySource) upstream(ctx context.Context, bucket, region, endpoint string) (objstore.Upstream, error) {
	if bucket == "" {
		return nil, exitWith(exitUsage, errors.New("s3:// without a name is no bucket"))
	}
	u := UpstreamConfig{Bucket: bucket, Region: region, Endpoint: endpoint, Checksums: checksumsOmit}
	if k.loaded {
		configured, err := k.bucket(bucket)
		if err != nil {
			return nil, err
		}
		u = configured.Upstream
		u.Region, u.Endpoint = cmp.Or(region, u.Region), cmp.Or(endpoint, u.Endpoint)
	}
	if u.Region == "" {
		ambient, err := k.aws.in(ctx, "")
		if err != nil {
			return nil, err
		}
		u.Region = ambient.Region
	}
	if u.Region == "" {
		u.Region = k.region()
	}
	up, err := k.aws.newUpstream(ctx, u)
	if err != nil {
		return nil, err
	}
	text, err := objstore.ReadKeyring(ctx, up)
	if err != nil {
		return nil, err
	}
	return up, k.adopt(ctx, text)
}

// bucketBinding is the encryption context of a bucket's data keys.
func bucketBinding(cfg Config, b BucketConfig) keyguard.Binding {
	name := b.Upstream.Bucket
	if b.SealedAs != "" {
		name = b.SealedAs
	}
	return keyguard.Binding{Cluster: cfg.Cluster.ID, Resource: "bucket/" + name, Tenant: cfg.Cluster.Tenant}
}

// adopt reads a keyring, which may be missing (nil), and settles the encryption context. A keyring that is
// not authentic is refused where one of the KMS keys can tell, and else only its context is used: KMS
// itself refuses a wrong one.
func (k *keySource) adopt(ctx context.Context, text []byte) error {
	if len(k.context) > 0 {
		k.binding = keyguard.BindingOf(k.context)
	}
	if text == nil {
		if k.binding == (keyguard.Binding{}) {
			return exitWith(exitUsage, errors.New("the encryption context is not known: give --context byokd:cluster=…,byokd:resource=bucket/…, or --config and an s3:// source, or --keyring FILE"))
		}
		return nil
	}
	ring, err := seal.ParseKeyring(text)
	if err != nil {
		return fmt.Errorf("%s: %w", objstore.KeyringObject, err)
	}
	if k.binding == (keyguard.Binding{}) {
		k.binding = keyguard.BindingOf(ring.Binding)
	}
	err = k.open(ctx, ring.Ring, func(root *seal.Root) error { return root.VerifyKeyring(ring) })
	switch {
	case errors.Is(err, errNoKey):
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", objstore.KeyringObject, err)
	}
	k.ring = make(map[seal.KeyID]seal.KeyringKey, len(ring.Keys))
	for _, e := range ring.Keys {
		k.ring[e.ID] = e
	}
	return nil
}

// errNoKey: none of the KMS keys that may be asked wraps a data key.
var errNoKey = fmt.Errorf("%w, and none of the KMS keys that may be asked wraps its data key", seal.ErrWrongKey)

// Use implements objstore.RestoreKeys.
func (k *keySource) Use(ctx context.Context, id seal.KeyID, arn string, wrapped []byte, f func(root *seal.Root) error) error {
	if e, found := k.ring[id]; found {
		if err := k.open(ctx, e, f); !errors.Is(err, errNoKey) {
			return err
		}
	}
	forms := map[string][]byte{arn: wrapped}
	if arn == "" { // not written down: it is one of those that may be asked, or none
		delete(forms, arn)
		for known := range k.kms {
			forms[known] = wrapped
		}
	}
	err := k.open(ctx, seal.KeyringKey{ID: id, Forms: forms}, f)
	if errors.Is(err, errNoKey) {
		err = fmt.Errorf("%w: it says %q. If that is a key of yours: --key %s", errNoKey, arn, arn)
	}
	return err
}

// open runs f on the root of a data key in any of the forms that may be asked for.
func (k *keySource) open(ctx context.Context, e seal.KeyringKey, f func(root *seal.Root) error) error {
	if root := k.kept(e.ID); root != nil {
		var err error
		seal.Do(func() { err = f(root) })
		return err
	}
	err := error(errNoKey)
	for _, arn := range slices.Sorted(maps.Keys(e.Forms)) {
		kms := k.kms[arn]
		if kms == nil {
			continue
		}
		err = keyguard.Patiently(ctx, func() error {
			_, err := kms.Unwrap(ctx, e.Forms[arn], k.binding, func(plain []byte) error {
				root, err := seal.NewRoot(e.ID, plain)
				if err != nil {
					return err
				}
				if err := f(root); err != nil {
					root.Wipe()
					return err
				}
				k.keep(root) // which f has found to be the right one
				return nil
			})
			if fault := (*keyguard.KMSError)(nil); errors.As(err, &fault) && fault.State == keyguard.Unreachable && ctx.Err() == nil {
				k.waits(err)
			}
			return err
		})
		if err == nil {
			return nil
		}
		if keyguard.ReasonOf(err) != keyguard.ReasonUnknownFault {
			err = &keyRefusal{arn: arn, endpoint: k.at[arn], err: err}
		}
	}
	return err
}

// keyRefusal is a failed call of KMS, with the key that it was about.
type keyRefusal struct {
	arn, endpoint string
	err           error
}

func (r *keyRefusal) Error() string { return r.err.Error() }
func (r *keyRefusal) Unwrap() error { return r.err }

func (k *keySource) kept(id seal.KeyID) *seal.Root {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.roots[id]
}

func (k *keySource) keep(root *seal.Root) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.roots) >= maxKeptRoots {
		clear(k.roots) // others may be using them: the collector takes them when they are through
	}
	k.roots[root.ID()] = root
}
