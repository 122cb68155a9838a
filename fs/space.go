package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What a file takes on the disk (st_blocks) is what the lower file takes. With the
// writeback cache the kernel holds data that has no lower block yet, does not count it
// as ext4 would, and asks for no attributes (cacheFor) until somebody closes the file
// (fs/fuse/file.c, fuse_flush). So a file that stays open would be shown for good as
// it was when it was opened, mostly without a block; and `tar --sparse` archives a file
// without blocks as a hole, unread. Therefore an open file is always shown with some,
// and while it grows the kernel is made to ask again from time to time.

// leastBlocks is what an open file is shown with at least, in units of 512 bytes: one
// block of data that the kernel may hold.
const leastBlocks = block / 512

// showLeast sees to it that a regular file that is open is shown with some blocks.
func (f *Filesystem) showLeast(out *fuse.Attr) {
	if out.Blocks == 0 && f.options.Cache == Writeback {
		out.Blocks = leastBlocks
	}
}

// askForSpace has the kernel ask for the attributes of a file that is about to be
// written, if it was told that there is no block of it. Like askAgain it may be sent by a
// handler: the caller keeps the inode.
func (c *call) askForSpace(n *node) {
	if c.fs.options.Cache != Writeback {
		return
	}
	var st unix.Stat_t
	if l := c.fs.loop.Load(); l != nil && unix.Fstat(n.file.buffered(), &st) == nil && st.Blocks == 0 {
		_ = invalidate(l.dev, n.id, -1, 0)
	}
}

// retellSpace has the kernel ask for the attributes of those open files that take another
// space than when this was called last. One call at a time.
func (f *Filesystem) retellSpace(l *loop) {
	if f.options.Cache != Writeback || f.closed.Load() {
		return
	}
	var changed []uint64
	for _, n := range f.nodes.useOpen() {
		var st unix.Stat_t
		if n.file.isOpen() && unix.Fstat(n.file.buffered(), &st) == nil && st.Blocks != n.blocks {
			n.blocks = st.Blocks
			changed = append(changed, n.id)
		}
		f.nodes.done(n)
	}
	if len(changed) > 0 {
		f.forgetAttributes(f.serving, l, changed)
	}
}
