package fs

import (
	"errors"

	"golang.org/x/sys/unix"
)

// A request that the kernel sends again (passed.go) may have been carried out by the
// predecessor, which died before it could say so. Nobody else can have come between:
// the kernel holds the directory's lock, or the inode's, for as long as it waits, and
// no other program writes the lower tree. So that a name is there which was to be
// made, or is gone which was to be removed, is the predecessor's work, and success.
// What reads, writes, cuts or syncs is done again. An exchange of two names is done
// again too: whether it was done cannot be seen, and about one death in the
// microseconds between the exchange and its answer leaves the names as they were.

// madeBefore reports whether a call that makes a name failed because it had been made.
func (c *call) madeBefore(err error) bool {
	return errors.Is(err, unix.EEXIST) && c.repeated()
}

// goneBefore reports whether a call that removes something failed because it was
// removed before.
func (c *call) goneBefore(err error) bool {
	return (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODATA)) && c.repeated()
}

// renamedBefore reports whether a rename failed because it had been done.
func (c *call) renamedBefore(err error, to int, name string) bool {
	var st unix.Stat_t
	return c.goneBefore(err) && unix.Fstatat(to, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}
