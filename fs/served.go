package fs

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// This file is for who reads the lower directory while the volume is served, as
// `byokd check` does: with the keys of the gate, and without meeting a block that
// is half written.

// errNoRoot: the epoch that was entered is without the volume's root.
var errNoRoot = errors.New("fs: the volume's root is not loaded")

// UseKeys runs use, inside seal.Do, with the volume's root key, which is valid
// during the call only. It waits while the gate is closed, until ctx ends. The
// gate waits for use: it must be short, and wait for nobody.
func (f *Filesystem) UseKeys(ctx context.Context, use func(root *seal.Root) error) error {
	for {
		err := f.useOnce(ctx, use)
		if !errors.Is(err, errNoRoot) {
			return err
		}
		if err := f.guard.Load(ctx, f.header.Volume, f.form.WrappedRoot, f.binding); err != nil {
			return err
		}
	}
}

func (f *Filesystem) useOnce(ctx context.Context, use func(root *seal.Root) error) (err error) {
	pass, err := f.guard.Enter(ctx, keyguard.Work, 0)
	if err != nil {
		return err
	}
	defer pass.Exit()
	root := pass.Keys().Root(f.header.Volume)
	if root == nil {
		return errNoRoot
	}
	seal.Do(func() { err = use(root) })
	return err
}

// Still runs read while no request writes the blocks first to last of the lower
// file that fd is open on, nor changes its size. What only the kernel holds is not
// waited for. read must be short.
func (f *Filesystem) Still(fd int, first, last int64, read func()) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	n, err := f.nodes.hold(fd, &st)
	if err != nil {
		return err
	}
	defer f.nodes.done(n)
	n.content.RLock()
	defer n.content.RUnlock()
	n.ranges.lock(first, last, false)
	defer n.ranges.unlock(first, last, false)
	read()
	return nil
}
