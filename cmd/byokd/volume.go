package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/keeper"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// volume is the encrypted filesystem of the daemon, from the look at its directories to the unmount.
type volume struct {
	cfg     Config
	log     *zap.Logger
	header  seal.VolumeHeader // zero while the lower directory is empty; written by inspect, then by serve
	probe   []byte            // the header's probe for the configured key
	fresh   bool              // the lower directory has no volume yet
	binding keyguard.Binding  // encryption context of this volume

	worker          *keeper.Worker // nil without a keeper
	device, journal int            // of the mount of the worker before, -1 where there is none
	workers         *metrics.Workers

	guard    *keyguard.Guard
	resource *metrics.Resource
	observer *metrics.FS
	mounted  atomic.Pointer[fs.Filesystem] // while mounted; metrics and abandon read it
	lower    atomic.Uint32                 // fs.LowerState, as it was last seen
}

func newVolume(cfg Config, log *zap.Logger, w *keeper.Worker) *volume {
	if cfg.Volume == nil {
		return nil
	}
	v := &volume{cfg: cfg, log: log.Named("fs"), worker: w, device: -1, journal: -1}
	if w != nil {
		v.device, v.journal = w.Take("device"), w.Take("journal")
	}
	return v
}

// inspect looks at both directories before any key is asked, and refuses what waiting would not mend.
func (v *volume) inspect() error {
	if err := refuseRequestTimeouts(fuseSysctls); err != nil {
		return failure(v.log, "the kernel would break a freeze", exitMount, err)
	}
	if err := outsideMounts(v.cfg.Volume.Lower); err != nil {
		return failure(v.log, "volume.lower is refused", exitLower, err)
	}
	if !v.passed() && !v.takesOver() {
		err := apartFromLower(v.cfg.Volume.Mount, v.cfg.Volume.Lower)
		if err == nil {
			err = prepareMountPoint(v.cfg.Volume.Mount, v.log)
		}
		if err != nil {
			return failure(v.log, "the volume cannot be mounted", exitMount, err)
		}
	}
	header, err := fs.ReadHeader(v.cfg.Volume.Lower)
	switch {
	case errors.Is(err, fs.ErrNotInitialised) && v.cfg.Volume.Create == createNever:
		return failure(v.log, "volume.lower is refused", exitLower, errNoneToBeMade(v.cfg.Volume.Lower))
	case errors.Is(err, fs.ErrNotInitialised):
		v.fresh = true
		// The resource name is unique to the volume, so that KMS itself refuses to unwrap one volume's
		// root key in the name of another, and it tells a person who reads CloudTrail which disk it was.
		v.binding = keyguard.Binding{Cluster: v.cfg.Cluster.ID, Tenant: v.cfg.Cluster.Tenant,
			Resource: "volume/" + v.cfg.Volume.Role + "/" + seal.NewID().String()}
		return nil
	case err != nil:
		return failure(v.log, "volume.lower is refused", exitLower, err)
	}
	v.remember(header)
	if err := v.belongs(); err != nil {
		return failure(v.log, "volume.lower is refused", exitLower, err)
	}
	v.warnOfOwnership()
	return nil
}

func errNoneToBeMade(lower string) error {
	return fmt.Errorf("%s is empty, and no volume is to be made in it (volume.create: never). Its disk is not mounted? To see: findmnt --target %s", lower, lower)
}

// remember takes over what the volume's header says.
func (v *volume) remember(header seal.VolumeHeader) {
	v.header = header
	v.binding = keyguard.BindingOf(header.Binding)
}

// belongs compares what the volume remembers with what the configuration says.
func (v *volume) belongs() error {
	arn := v.cfg.Keys[v.cfg.Volume.Key].ARN
	form, err := fs.FormUnder(v.header, arn)
	if err != nil {
		return fmt.Errorf("the volume in %s is under the key\n  %s\nthe configuration names (keys.%s.arn)\n  %s\n"+
			"Name the first key again; or, if the volume is meant to move to the other one, type: byokd key rewrap --config FILE --to %s",
			v.cfg.Volume.Lower, v.header.KeyARN, v.cfg.Volume.Key, arn, arn)
	}
	v.probe = form.Probe
	if err := v.sameOwnership(); err != nil {
		return err
	}
	if v.binding.Cluster != v.cfg.Cluster.ID || v.binding.Tenant != v.cfg.Cluster.Tenant {
		return fmt.Errorf("the volume in %s was made for cluster %q, tenant %q; the configuration says %q, %q. Both are bound to the data and cannot be changed",
			v.cfg.Volume.Lower, v.binding.Cluster, v.binding.Tenant, v.cfg.Cluster.ID, v.cfg.Cluster.Tenant)
	}
	return nil
}

// connect registers the volume with the daemon's guard, page and metrics.
func (v *volume) connect(d *daemon) {
	v.guard = d.guards[v.cfg.Volume.Key]
	name := v.cfg.Volume.Role + " disk"
	if v.cfg.Volume.Role == "elasticsearch" {
		name = "Elasticsearch disk"
	}
	v.resource = d.panel.AddResource(name, metrics.KindVolume, v.cfg.Volume.where(), v.guard)
	v.observer = d.registry.NewFS(v.gauges)
	if v.worker != nil {
		restarts := map[string]uint64{}
		for _, c := range keeper.Causes() {
			restarts[c.String()] = v.worker.Restarts[c]
		}
		v.workers = d.registry.NewWorkers(restarts)
	}
}

// where is the place that is shown of a volume.
func (v *VolumeConfig) where() string {
	if v.Mount != "" {
		return v.Mount
	}
	return v.MountSocket
}

// facts are what the page shows of a mounted volume.
func (v *volume) facts() []metrics.Fact {
	facts := []metrics.Fact{{Name: "Volume", Value: v.header.Volume.String()},
		{Name: "Format", Value: fmt.Sprintf("%d: AES-256-GCM in blocks of 4 KiB, names AES-SIV", v.header.Version)},
		{Name: "Sealed in", Value: v.cfg.Volume.Lower}, {Name: "Owners and modes", Value: ownershipInWords(v.header)}, {Name: "Cache", Value: v.cfg.Volume.Cache},
		{Name: "Context", Value: v.binding.Resource}}
	return append(facts, v.restarts()...)
}

func (v *volume) gauges() (metrics.VolumeGauges, bool) {
	f := v.mounted.Load()
	if f == nil {
		return metrics.VolumeGauges{}, false
	}
	s := f.Stats()
	return metrics.VolumeGauges{LowerFreeBytes: s.LowerFreeBytes, ParkedCalls: int64(s.Parked), Writeback: s.Writeback,
		ReserveMissing: s.ReserveMissing, Inodes: s.Inodes, UndrainedFiles: s.Undrained, ForeignNames: s.ForeignNames,
		Lower: fs.LowerState(v.lower.Load()), LowerFailures: f.LowerFailures()}, true
}

// serve makes the volume if need be, mounts it once its key is usable, and serves until ctx ends or the
// mount does. It leaves nothing mounted.
func (v *volume) serve(ctx context.Context) error {
	if v.passed() {
		return v.servePassed(ctx)
	}
	if v.takesOver() {
		return v.serveOn(ctx)
	}
	f, err := v.open(ctx)
	if err != nil || f == nil {
		return err
	}
	defer v.close(f)
	v.resource.Waiting("is being mounted")
	if err := f.Mount(v.cfg.Volume.Mount); err != nil {
		v.resource.Failed(err.Error(), "")
		return failure(v.log, "the volume cannot be mounted", exitMount, err)
	}
	defer v.guardMount()()
	return v.untilEnd(ctx, f)
}

// untilEnd serves a mount until ctx ends, and takes it away, or until somebody else does.
func (v *volume) untilEnd(ctx context.Context, f *fs.Filesystem) (err error) {
	v.mounted.Store(f)
	v.resource.Describe(v.facts()...)
	v.resource.Serving()
	unwatch := v.watchLower(ctx, f)
	ended := make(chan error, 1)
	go func() { ended <- f.Wait(context.WithoutCancel(ctx)) }()
	select {
	case err = <-ended:
		unwatch()
		v.mounted.Store(nil)
		if err == nil {
			err = errors.New("somebody else has unmounted it")
		}
		v.resource.Failed(err.Error(), "")
		return failure(v.log, "the mount has ended", exitMount, err)
	case <-ctx.Done():
		unwatch()
	}
	return v.unmount(ctx, f, ended)
}

// open returns the volume, made first where there is none. nil when ctx ended before the key was usable.
func (v *volume) open(ctx context.Context) (*fs.Filesystem, error) {
	f, err := v.openLocked()
	if err != nil {
		return nil, err
	}
	if unlocked, err := v.unlock(ctx, f); err != nil || !unlocked {
		v.close(f)
		return nil, err
	}
	return f, nil
}

// openLocked returns the volume before its key was asked.
func (v *volume) openLocked() (*fs.Filesystem, error) {
	f, err := fs.OpenLocked(v.cfg.Volume.Lower, v.guard, v.options())
	if err != nil {
		return nil, failure(v.log, "volume.lower is refused", exitLower, err)
	}
	return f, nil
}

// close closes a volume that is not mounted any more.
func (v *volume) close(f *fs.Filesystem) {
	if err := f.Close(); err != nil {
		v.log.Error("the lower directory was not closed cleanly", zap.Error(err))
	}
}

// make makes the volume where there is none. false when ctx ended before the key was usable.
func (v *volume) make(ctx context.Context, f *fs.Filesystem) (made bool, err error) {
	if !v.fresh {
		return true, nil
	}
	v.resource.Waiting("waits for the key " + v.cfg.Volume.Key + " to make a new volume")
	header, err := f.Create(ctx, v.binding, v.ownership())
	if ctx.Err() != nil || errors.Is(err, keyguard.ErrStopped) {
		return false, nil // on the way out; a header that was written all the same is found next time
	}
	if err != nil {
		return false, failure(v.log, "no volume can be made in volume.lower", exitLower, err)
	}
	v.header = header
	v.log.Info("made a new volume", zap.String("lower", v.cfg.Volume.Lower), zap.Stringer("volume", header.Volume), zap.Stringer("ownership", fs.OwnershipOf(header)))
	return true, nil
}

// options are those of the filesystem.
func (v *volume) options() fs.Options {
	cache := fs.Writeback
	if v.cfg.Volume.Cache == cacheWritethrough {
		cache = fs.Writethrough
	}
	return fs.Options{Cache: cache, DirtyLimit: v.cfg.Volume.DirtyLimit.Bytes, Observer: v.observer, Keep: v.keep(), Logger: v.log}
}

// unmount flushes and unmounts within its share of the time to stop.
func (v *volume) unmount(ctx context.Context, f *fs.Filesystem, ended <-chan error) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.cfg.share(2))
	defer cancel()
	err := f.Unmount(limit)
	v.mounted.Store(nil)
	if err != nil {
		return failure(v.log, "the volume was not unmounted cleanly", exitFailure, err)
	}
	select {
	case <-ended:
	case <-limit.Done(): // detached; a frozen process still holds it
	}
	v.log.Info("unmounted", zap.String("mount", v.cfg.Volume.Mount))
	return nil
}

// abandon detaches the mount without flushing. Processes that use it fail from now on. It tells whether there was one.
func (v *volume) abandon() bool {
	if v.mounted.Load() == nil {
		return false
	}
	if v.passed() { // the mount is the node driver's: it stays for the next byokd
		return true
	}
	if err := detach(v.cfg.Volume.Mount); err != nil {
		v.log.Error("the mount is left behind", zap.String("mount", v.cfg.Volume.Mount), zap.Error(err))
	}
	return true
}

// fuseSysctls is where the kernel's settings for FUSE are read.
const fuseSysctls = "/proc/sys/fs/fuse"

// refuseRequestTimeouts refuses kernels set to abort FUSE connections whose requests take long: a freeze
// would then end in errors instead of waiting (Linux 6.15 and later have these settings, 0 by default).
func refuseRequestTimeouts(sysctls string) error {
	for _, name := range []string{"default_request_timeout", "max_request_timeout"} {
		value, err := os.ReadFile(filepath.Join(sysctls, name))
		if err == nil && strings.TrimSpace(string(value)) != "0" {
			return fmt.Errorf("fs.fuse.%s is %s seconds, so a longer freeze would abort the mount; type: sysctl fs.fuse.%s=0", name, strings.TrimSpace(string(value)), name)
		}
	}
	return nil
}
