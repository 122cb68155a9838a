package fs

import (
	"golang.org/x/sys/unix"
)

// What is done again after another process has died over it. Most calls may simply
// be: a WRITE puts the same bytes in the same place. Those that make or remove a
// name would fail because they have succeeded. That they have is told by the name
// itself: the kernel holds the directory for the length of the call, so nobody else
// has made or removed a name in it meanwhile, and it asks for a new name only where
// it knows that there is none, and for the removal of one only where it knows that
// there is. What a name does not tell is recorded before (record.before).

// repeated reports whether an earlier process may have carried the call out: it was
// found in the journal, or the kernel has sent it again.
func (c *call) repeated() bool { return c.again || isResent(&c.header) }

// The bit that tells a record.before that was stored from none.
const beforeStored = 1 << 63

// before returns what was there before the call: what an earlier process has
// recorded, or what look says now, which is recorded.
func (c *call) before(look func() uint64) uint64 {
	if c.record == nil {
		return look()
	}
	if was := c.record.before.Load(); c.again && was != 0 {
		return was &^ beforeStored
	}
	now := look() &^ beforeStored
	c.record.before.Store(now | beforeStored)
	return now
}

// exchanged reports whether an earlier process has exchanged the name for another
// already: then another inode has it.
func (c *call) exchanged(dir int, sealed string) bool {
	if c.record == nil {
		return false
	}
	inode := func() uint64 {
		var st unix.Stat_t
		if unix.Fstatat(dir, sealed, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return 0
		}
		return st.Ino
	}
	was := c.before(inode)
	return c.again && was != inode()
}

// tookBefore returns the failure that an earlier process has taken from the handle, to
// tell it in its answer to this call.
func (c *call) tookBefore() error {
	if c.record == nil || !c.again {
		return nil
	}
	if errno := unix.Errno(c.record.before.Load() &^ beforeStored); errno != 0 {
		return errno
	}
	return nil
}

// hadAttribute reports whether the attribute was there before the call, if that
// matters to it and there is a journal that tells; otherwise where not.
func (c *call) hadAttribute(path, name string, matters, otherwise bool) bool {
	if c.record == nil || !matters {
		return otherwise
	}
	return c.before(func() uint64 {
		if _, err := unix.Getxattr(path, name, nil); err != nil {
			return 0
		}
		return 1
	}) == 1
}
