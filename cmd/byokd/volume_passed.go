package main

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/handover"
	"github.com/byokd/byokd/keyguard"
)

// passed tells whether somebody else mounts for us.
func (v *volume) passed() bool { return v.cfg.Volume.MountSocket != "" }

// servePassed serves a mount that the node driver has made. It is served before the key is asked, for somebody
// may look at it already; calls wait until the key is usable. When ctx ends, the mount is left as it is.
func (v *volume) servePassed(ctx context.Context) error {
	f, err := v.openLocked()
	if err != nil {
		return err
	}
	defer v.close(f)
	stay, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	ended, err := v.takeOver(ctx, stay, f)
	if err != nil || ended == nil {
		return err
	}
	unlocked, err := v.unlock(ctx, f)
	if err == nil && unlocked {
		v.mounted.Store(f)
		v.resource.Describe(v.facts()...)
		v.resource.Serving()
		unwatch := v.watchLower(ctx, f)
		select {
		case <-ended:
			unwatch()
			err = errors.New("the node driver has taken it away")
			v.resource.Failed(err.Error(), "")
			err = failure(v.log, "the mount has ended", exitMount, err)
		case <-ctx.Done():
			unwatch()
		}
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.cfg.share(2))
	defer cancel()
	err = errors.Join(err, f.Unmount(limit))
	v.mounted.Store(nil)
	return err
}

// takeOver waits for the mount and begins to serve it. The channel is closed when the mount ends; it is nil when
// ctx ended first. Until stay ends the node driver is held on to.
func (v *volume) takeOver(ctx, stay context.Context, f *fs.Filesystem) (ended chan struct{}, err error) {
	v.resource.Waiting("waits for the mount from the node driver")
	client, device, held, err := handover.Take(ctx, v.cfg.Volume.MountSocket, v.log, func(err error) {
		v.log.Warn("waiting for the node driver's mount: is `byokd node` running on this node?", zap.Error(err))
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, nil
	case err != nil:
		v.resource.Failed(err.Error(), "")
		return nil, failure(v.log, "the node driver's mount cannot be taken over", exitMount, err)
	}
	if err := f.Serve(fs.Passed{Device: device, Held: held, Services: client}); err != nil {
		return nil, failure(v.log, "the mount cannot be served", exitMount, err)
	}
	v.log.Info("the node driver has passed its mount", zap.String("mount", client.Mount()))
	go client.Stay(stay)
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		_ = f.Wait(stay)
	}()
	return ended, nil
}

// unlock makes the volume if need be and lets the calls in once its key is usable. false when ctx ended first.
func (v *volume) unlock(ctx context.Context, f *fs.Filesystem) (bool, error) {
	if made, err := v.make(ctx, f); err != nil || !made {
		return false, err
	}
	v.resource.Waiting("waits for the key " + v.cfg.Volume.Key)
	err := f.Unlock(ctx, v.binding)
	switch {
	case ctx.Err() != nil || errors.Is(err, keyguard.ErrStopped):
		return false, nil
	case err != nil:
		return false, failure(v.log, "volume.lower is refused", exitLower, err)
	}
	return waitReady(ctx, v.guard), nil
}
