package main

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/fusemount"
)

// outsideMounts refuses a lower directory that lies in a mount of byokd: everything would be sealed twice, and when the
// other's key is away this one could neither freeze in time nor stop. The directory itself is not asked, for that may hang.
func outsideMounts(lower string) error {
	_, into, err := fusemount.Resolve(lower)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", lower, err)
	case into != nil:
		return fmt.Errorf("%s lies in what byokd has mounted at %s: everything would be encrypted twice, and a freeze of that volume would hang this byokd. "+
			"Name a directory on the disk itself, and look whether volume.mount and volume.lower are interchanged. What is mounted where: findmnt -t %s", lower, into.Dir, fusemount.Type)
	}
	return nil
}

// apartFromLower refuses a mount point in the lower directory, and one that would hide it, where that shows only when symlinks
// and bind mounts are followed (validate compares the paths as they are written). Neither has to exist, and the mount point
// need not answer.
func apartFromLower(mount, lower string) error {
	realMount, _, err := fusemount.Resolve(mount)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errMountPoint, mount, err)
	}
	realLower, _, err := fusemount.Resolve(lower)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errMountPoint, lower, err)
	}
	const wayOut = "name directories that lie beside each other. Where they are: realpath %s %s"
	switch {
	case liesIn(realMount, realLower):
		return fmt.Errorf("%w: %s lies in volume.lower, %s, when symlinks and bind mounts are followed; "+wayOut, errMountPoint, mount, lower, mount, lower)
	case liesIn(realLower, realMount):
		return fmt.Errorf("%w: volume.lower, %s, lies in %s when symlinks and bind mounts are followed, and would be hidden; "+wayOut, errMountPoint, lower, mount, mount, lower)
	}
	return nil
}

// liesIn tells whether dir, a path without symlinks, is parent or lies in it, by whatever name.
func liesIn(dir, parent string) bool {
	want, err := directoryID(parent)
	if err != nil {
		return false // what does not exist has nothing in it
	}
	for ; ; dir = filepath.Dir(dir) {
		if id, err := directoryID(dir); err == nil && id == want {
			return true
		}
		if dir == filepath.Dir(dir) {
			return false
		}
	}
}

// directoryID identifies a directory under all its names, without asking who serves it if it is the root of a mount.
func directoryID(dir string) (id [3]uint64, err error) {
	var st unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	return [3]uint64{uint64(st.Dev_major), uint64(st.Dev_minor), st.Ino}, err
}
