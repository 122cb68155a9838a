package fs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A passed mount is one that somebody else has made, who keeps a copy of the FUSE
// device: the CSI node driver, in Kubernetes, so that this process needs no
// privilege. Three things are different from a mount of our own:
//
//   - It outlives us. Calls that are not answered when we die or stop wait for a
//     successor, who has the kernel send them again (NOTIFY_RESEND); what only we
//     knew is kept by the mounter under the names below.
//   - It is mounted before there is a key, and somebody may look at it: so INIT,
//     STATFS and the root are answered at once (OpenLocked).
//   - No file of it is opened here, for that would be a call that waits for
//     ourselves and that the end of this process does not end. What needs an open
//     file is asked of the mounter (Services).

// Passed is a mount made by somebody else.
type Passed struct {
	Device   int            // the FUSE device; becomes the filesystem's
	Held     map[string]int // what a predecessor left with Services.Hold, in use from now on
	Services Services
}

const (
	// heldInit names a memfd with the kernel's INIT request and our reply.
	heldInit = "init"
	// heldInode and a node id name the O_PATH descriptor of an inode without a name.
	heldInode = "inode/"
)

// notifyResend has the kernel send unanswered requests again, with resentBit in
// their numbers (Linux 6.9).
const (
	notifyResend = 7
	resentBit    = 1 << 63 // FUSE_UNIQUE_RESEND
)

// Serve serves a mount that somebody else has made. It returns at once: INIT is
// answered when it comes.
func (f *Filesystem) Serve(p Passed) error {
	f.mountMu.Lock()
	defer f.mountMu.Unlock()
	if f.loop.Load() != nil {
		return errors.New("mounted already")
	}
	var err error
	if f.runtimeFDs, err = runtimeDescriptors(); err != nil {
		return err
	}
	init, resumed, err := p.init()
	if err != nil {
		return err
	}
	f.passed = true
	f.nodes.forgetOrphan = f.forgetOrphan
	if resumed {
		if err := f.resume(p.Held); err != nil {
			return fmt.Errorf("take over from the byokd before: %w", err)
		}
	}
	l := newLoop(f, p.Device, nil)
	f.services.Store(&p.Services)
	f.parking.killed = p.Services.Killed
	if resumed {
		l.initialised(splitInit(init))
	}
	f.loop.Store(l)
	l.start()
	if resumed {
		if err := notify(p.Device, notifyResend, nil); err != nil {
			f.log.Error("calls that the byokd before did not answer hang: the kernel does not send them again (Linux 6.9 does)", zap.Error(err))
		}
		f.background.Go(func() { f.disinherit(l) })
	}
	if err := f.boundDirty(p.Services); err != nil {
		f.log.Warn("the mount's dirty pages cannot be bounded: a freeze under heavy writing may not drain in time", zap.Error(err))
	}
	f.log.Info("serving a mount that was passed to us", zap.Bool("taken over", resumed), zap.Stringer("cache", f.options.Cache))
	return nil
}

// init returns the INIT that a predecessor agreed on with the kernel: its request
// and, behind it, the reply.
func (p Passed) init() (init []byte, resumed bool, err error) {
	fd, found := p.Held[heldInit]
	if !found {
		return nil, false, nil
	}
	defer unix.Close(fd)
	delete(p.Held, heldInit)
	text := make([]byte, 4096)
	n, err := unix.Pread(fd, text, 0)
	if err != nil {
		return nil, false, fmt.Errorf("read the INIT of the byokd before: %w", err)
	}
	return text[:n], true, nil
}

// resume makes the node table ready for ids that the kernel had from a predecessor.
func (f *Filesystem) resume(held map[string]int) error {
	f.handles.resume()
	f.nodes.resumed = true
	inodes := map[uint64]int{}
	for name, fd := range held {
		id, err := strconv.ParseUint(strings.TrimPrefix(name, heldInode), 10, 64)
		if !strings.HasPrefix(name, heldInode) || err != nil {
			unix.Close(fd)
			continue
		}
		inodes[id] = fd
	}
	return f.inherit(inodes)
}

// keepInit deposits what successors must know. It is called before the reply
// leaves, so that there is no time at which the kernel knows and nobody else.
func (f *Filesystem) keepInit(request, reply []byte) {
	s := f.mountServices()
	if s == nil || !f.passed {
		return
	}
	fd, err := unix.MemfdCreate("byokd-init", unix.MFD_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		file := append(binary.NativeEndian.AppendUint32(nil, uint32(len(request))), request...)
		if _, err = unix.Write(fd, append(file, reply...)); err == nil {
			err = s.Hold(heldInit, fd)
		}
	}
	if err != nil {
		f.log.Error("a byokd that comes after this one cannot take the mount over", zap.Error(os.NewSyscallError("deposit INIT", err)))
	}
}

// splitInit undoes keepInit.
func splitInit(file []byte) (request, reply []byte) {
	if len(file) < 4 {
		return nil, nil
	}
	n := int(binary.NativeEndian.Uint32(file))
	file = file[4:]
	n = min(n, len(file))
	return bytes.Clone(file[:n]), bytes.Clone(file[n:])
}

// leave ends our service of a passed mount: what the kernel holds dirty is flushed
// while the gate is open, calls being served are answered, and those that come or
// wait are left to a successor. The mount itself is its maker's to take away.
func (f *Filesystem) leave(ctx context.Context, l *loop) {
	if !f.closed.Load() {
		f.flush(ctx)
		f.drop(ctx, l, f.nodes.all())
	}
	l.mute.Store(true)
	f.dismiss()
	// Those who wait for a request would take one that is the successor's.
	f.mountServices().Stir(ctx, func() bool { return l.waiting.Load() > 0 })
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for l.atWork() > 0 && ctx.Err() == nil {
		select {
		case <-look.C:
		case <-ctx.Done():
		}
	}
	f.log.Info("the mount is left to the next byokd: calls wait", zap.Bool("all answered", ctx.Err() == nil))
}

// keepOrphan has the mounter keep the inode of a node that is about to lose its name
// and that somebody has open, for successors. Who has it open since before we took
// over is not known here.
func (f *Filesystem) keepOrphan(n *node) {
	if !f.passed || n.opens.Load() == 0 && !f.nodes.resumed {
		return
	}
	fd, err := f.nodes.pathFD(n)
	if err == nil {
		n.orphan.Store(true) // also where Hold fails: a mounter that is away is told when it is back
		err = f.mountServices().Hold(heldInode+strconv.FormatUint(n.id, 10), fd)
	}
	if err != nil {
		f.log.Warn("a file that is open and has no name any more would be lost with this process", zap.Uint64("inode", n.id), zap.Error(err))
	}
}

// forgetOrphan gives back what keepOrphan deposited.
func (f *Filesystem) forgetOrphan(id uint64) {
	if s := f.mountServices(); s != nil {
		s.Release(heldInode + strconv.FormatUint(id, 10))
	}
}

// isResent reports whether the kernel sends the request a second time: a
// predecessor may have carried it out.
func isResent(header *fuse.InHeader) bool { return header.Unique&resentBit != 0 }
