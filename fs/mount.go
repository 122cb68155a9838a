package fs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/byokd/byokd/internal/fusemount"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Capabilities of include/uapi/linux/fuse.h that go-fuse has no name for.
const capHandleKillprivV2 = 1 << 28

// mountOptions are the protocol's settings; why each, with figures, stands in
// docs/ARCHITECTURE.md, "Kernel settings".
func (f *Filesystem) mountOptions() *fuse.MountOptions {
	o := &fuse.MountOptions{
		MaxWrite:                 maxWrite,
		MaxBackground:            1024, // waiting READs must not crowd out the flush of dirty pages
		ExplicitDataCacheControl: true, // we invalidate, nobody else
		DisableSplice:            true, // nothing to splice: data is opened in memory
		Name:                     "byokd",
		Logger:                   libraryLog(f.log),
		// KILLPRIV_V2 spares a GETXATTR(security.capability) with each write.
		ExtraCapabilities: capHandleKillprivV2 | fuse.CAP_READDIRPLUS_AUTO,
	}
	if f.options.Cache == Writeback {
		o.ExtraCapabilities |= fuse.CAP_WRITEBACK_CACHE
	}
	return o
}

// Mount mounts the volume at dir and serves it. It returns when the mount
// answers. dir must be an existing, empty directory.
func (f *Filesystem) Mount(dir string) error {
	f.mountMu.Lock()
	defer f.mountMu.Unlock()
	if f.loop.Load() != nil {
		return errors.New("mounted already")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if f.runtimeFDs, err = runtimeDescriptors(); err != nil {
		return err
	}
	l, err := f.connect(dir)
	if err != nil {
		return err
	}
	own := &ownMount{fs: f, dir: dir}
	f.begin(l, own)
	f.mountpoint.Store(&dir)
	if err := f.awaitAnswer(dir); err != nil {
		return fmt.Errorf("the mount at %s does not answer: %w", dir, err)
	}
	if own.device, err = fusemount.DeviceOf(dir); err == nil {
		_ = fusemount.WidenReadAhead(own.device)
		err = f.boundDirty(own)
	}
	if err != nil {
		f.bdi.Store(&bdi{})
		f.log.Warn("the mount's dirty pages cannot be bounded: a freeze under heavy writing may not drain in time", zap.Error(err))
	}
	if f.options.Cache == Writeback && l.granted()&fuse.CAP_WRITEBACK_CACHE == 0 {
		f.log.Warn("the kernel did not grant the writeback cache: small writes will be slow")
	}
	if f.options.Keep.resumes() {
		f.background.Go(f.awaitKeyOrDrop)
	}
	f.log.Info("mounted", zap.String("at", dir), zap.Bool("taken over", f.options.Keep.resumes()), zap.Stringer("cache", f.options.Cache), zap.String("volume", f.header.Volume.String()))
	return nil
}

// begin serves a device. mountMu is held.
func (f *Filesystem) begin(l *loop, s Services) {
	f.services.Store(&s)
	f.parking.killed = s.Killed
	f.loop.Store(l)
	l.start()
}

// boundDirty has the kernel keep the mount's dirty pages within what the reserve
// below can take.
func (f *Filesystem) boundDirty(s Services) error {
	limits, err := newBDI(s.LimitDirty, f.reserve.dirtyBudget(f.options.DirtyLimit))
	f.bdi.Store(limits)
	f.setDirtyBudget() // the reserve may have been filled meanwhile
	return err
}

// mountServices are those of the mount, nil when there is none.
func (f *Filesystem) mountServices() Services {
	if s := f.services.Load(); s != nil {
		return *s
	}
	return nil
}

// awaitAnswer waits until INIT was answered. It asks the mount, and so apart: were
// this process killed before it has answered itself, the thread would hang, and with
// the process's descriptors the next one would wait for it in vain.
func (f *Filesystem) awaitAnswer(dir string) error {
	if f.options.Keep.resumes() {
		return nil
	}
	answered := make(chan error, 1)
	f.apart(-1, func(int) {
		var st unix.Statfs_t
		answered <- unix.Statfs(dir, &st)
	})
	return <-answered
}

// connect returns the loop of a mount: of a new one at dir, or of the one that is
// there.
func (f *Filesystem) connect(dir string) (*loop, error) {
	k := f.options.Keep
	if k.resumes() {
		return f.takeOver()
	}
	if err := mountable(dir); err != nil {
		return nil, err
	}
	dev, err := fusemount.Open()
	if err != nil {
		return nil, err
	}
	var j *journal
	if k != nil {
		if j, err = newJournal(f.header.Volume); err == nil {
			err = k.Deposit(dev, j.fd)
		}
		if err != nil {
			unix.Close(dev)
			return nil, err
		}
		j.stall = k.after
		f.nodes.keepJournal(j)
		if f.nodes.byNumber() != nil {
			j.head.numbers.Store(1)
		}
		f.handles.journal = j
	}
	if err := fusemount.Mount(dev, dir); err != nil {
		unix.Close(dev)
		return nil, err
	}
	return newLoop(f, dev, j), nil
}

// granted returns the capabilities the kernel and we agreed on.
func (l *loop) granted() uint64 {
	l.init.Lock()
	defer l.init.Unlock()
	return l.init.reply.Flags64()
}

// mountable refuses a mount point that is not an empty directory: what lies in
// it would be hidden, and written through by whoever has it open.
func mountable(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, unix.ENOTCONN):
		return fmt.Errorf("%s is a mount whose daemon died; `umount -l %s` removes it: %w", dir, dir, err)
	case err != nil:
		return err
	case len(entries) > 0:
		return fmt.Errorf("the mount point %s is not empty (it holds %s): what is in it would be hidden, not encrypted. Move it away, and let nothing write there before byokd has mounted", dir, entries[0].Name())
	}
	return nil
}

// Wait returns when the mount is gone: by Unmount, by an administrator's
// umount, or because the connection was aborted.
func (f *Filesystem) Wait(ctx context.Context) error {
	l := f.loop.Load()
	if l == nil {
		return errors.New("not mounted")
	}
	select {
	case <-l.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Unmount ends the mount. While the gate is open it flushes first; calls that
// wait at a closed gate end with an error, for their filesystem goes away. If
// files are open the mount is detached, and they lose it when this process
// exits. A mount that was passed to us is left to who made it (passed.go). It does
// not outlast ctx.
func (f *Filesystem) Unmount(ctx context.Context) error {
	f.mountMu.Lock()
	defer f.mountMu.Unlock()
	l := f.loop.Load()
	if l == nil {
		return nil
	}
	if f.mountedAt() == "" {
		f.leave(ctx, l)
		return nil
	}
	done := make(chan error, 1)
	f.apart(-1, func(int) { done <- f.takeAway(ctx, l) })
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), unix.Unmount(f.mountedAt(), unix.MNT_FORCE|unix.MNT_DETACH))
	}
	f.dismiss()
	f.stopIdleDrop()
	err = errors.Join(err, l.close())
	f.loop.Store(nil)
	f.services.Store(nil)
	f.mountpoint.Store(nil)
	return err
}

// takeAway removes the mount. One that is busy or frozen is detached, and
// MNT_FORCE aborts the connection, which ends the calls that wait and our reads;
// so what the kernel holds dirty is flushed before.
func (f *Filesystem) takeAway(ctx context.Context, l *loop) error {
	dir := f.mountedAt()
	if !f.closed.Load() {
		// Before, not by, the unmount: where a copy of the mount lives on in
		// another mount namespace, an unmount here flushes nothing.
		f.flush(ctx)
		f.drop(ctx, l, f.nodes.all())
		switch err := unix.Unmount(dir, 0); {
		case err == nil, errors.Is(err, unix.EINVAL): // EINVAL: not mounted any more
			return nil
		case !errors.Is(err, unix.EBUSY):
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		f.flush(ctx) // what its users wrote meanwhile
		f.drop(ctx, l, f.nodes.all())
	}
	if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("detach %s: %w", dir, err)
	}
	return nil
}
