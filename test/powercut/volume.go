//go:build linux

package powercut

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/awskms"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// patience bounds each wait for the guard and for an unmount, on a machine that may
// have far more to do than it can.
const patience = 3 * time.Minute

var binding = keyguard.Binding{Cluster: "acme-test", Resource: "volume/powercut"}

// key is one KMS key and the guard that watches it, for all volumes of a test.
type key struct {
	kms   *kmstest.Local
	arn   string
	guard *keyguard.Guard
	log   *zap.Logger
	stop  context.CancelFunc
	ended chan error
}

func newKey(log *zap.Logger) (*key, error) {
	kms, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		return nil, err
	}
	arn, err := kms.CreateKey("", "", "", false)
	if err != nil {
		return nil, err
	}
	cfg := aws.Config{Credentials: credentials.NewStaticCredentialsProvider(kmstest.TenantAccessKey, kmstest.TenantSecret, "")}
	client, err := awskms.New(cfg, arn, awskms.Options{Endpoint: kms.URL()})
	if err != nil {
		return nil, err
	}
	guard, err := keyguard.New(client, keyguard.Options{Name: "primary", ProbeBinding: binding, ProbeInterval: 100 * time.Millisecond, Logger: log})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	k := &key{kms: kms, arn: arn, guard: guard, log: log, stop: stop, ended: make(chan error, 1)}
	go func() { k.ended <- guard.Run(ctx) }()
	return k, k.await("the key to be usable", keyguard.Status.Ready)
}

func (k *key) close() error {
	k.stop()
	err := <-k.ended
	k.kms.Close()
	return err
}

func (k *key) await(what string, ok func(keyguard.Status) bool) error {
	deadline := time.After(patience)
	for {
		changed := k.guard.Changed()
		if ok(k.guard.Status()) {
			return nil
		}
		select {
		case <-changed:
		case <-deadline:
			return fmt.Errorf("waited %v for %s: %s", patience, what, k.guard.Status().Headline())
		}
	}
}

// freeze takes the key away, waits until the gate is closed, and gives it back.
// That the keys are erased cannot be waited for here: the workloads hang in calls of
// this process then, and a thread that a signal met on its way into such a call
// takes it only when the call returns (keyguard/signals_linux.go).
func (k *key) freeze() error {
	if err := k.kms.Disable(k.arn); err != nil {
		return err
	}
	frozen := k.await("a freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen })
	return errors.Join(frozen, k.kms.Enable(k.arn), k.await("a thaw", keyguard.Status.Ready))
}

// view is how files on a lower filesystem are reached: as they are, or through
// a byokd volume.
type view interface {
	// create makes the place where the files are to be; open opens it.
	create(lower string) error
	// open returns the directory of the files and how it is closed again.
	open(lower string) (dir string, close func() error, err error)
	// mounts is where an open view has mounted something.
	mounts() []string
}

// bare is the control without byokd.
type bare struct{}

func (bare) create(string) error { return nil }
func (bare) mounts() []string    { return nil }
func (bare) open(lower string) (string, func() error, error) {
	return lower, func() error { return nil }, nil
}

// sealed is a byokd volume, mounted at dir.
type sealed struct {
	key   *key
	cache fs.CacheMode
	dir   string
}

// below is the directory of the lower filesystem that byokd gets.
func below(lower string) string { return lower + "/sealed" }

func (s sealed) mounts() []string { return []string{s.dir} }

// ownershipVariable has the volumes keep owners and modes sealed.
const ownershipVariable = "BYOKD_TEST_OWNERSHIP"

func ownership() fs.Ownership {
	if os.Getenv(ownershipVariable) == fs.OwnershipSealed.String() {
		return fs.OwnershipSealed
	}
	return fs.OwnershipLower
}

func (s sealed) create(lower string) error {
	if err := os.Mkdir(below(lower), 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f, err := fs.OpenLocked(below(lower), s.key.guard, fs.Options{Logger: s.key.log})
	if err != nil {
		return err
	}
	_, err = f.Create(ctx, binding, ownership())
	return errors.Join(err, f.Close())
}

func (s sealed) open(lower string) (string, func() error, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f, err := fs.OpenLocked(below(lower), s.key.guard, fs.Options{Cache: s.cache, Logger: s.key.log})
	if err != nil {
		return "", nil, fmt.Errorf("open the volume: %w", err)
	}
	if err := f.Unlock(ctx, binding); err != nil {
		return "", nil, errors.Join(fmt.Errorf("open the volume: %w", err), f.Close())
	}
	if err := f.Mount(s.dir); err != nil {
		return "", nil, errors.Join(fmt.Errorf("mount the volume: %w", err), f.Close())
	}
	settlePoll(s.dir)
	return s.dir, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return errors.Join(f.Unmount(ctx), f.Close())
	}, nil
}

// settlePoll lets the kernel learn that the mount does not serve POLL. Go's
// runtime asks it of each file it opens, with a call during which the goroutine
// keeps its processor, which the process that serves the mount may lack then.
func settlePoll(dir string) {
	fd, err := unix.Open(dir+"/.go-fuse-epoll-hack", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // the name is go-fuse's; without it there is nothing to settle
	}
	defer unix.Close(fd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
}
