package fusemount

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symlinks a path may lead through, as for the kernel.
const maxLinks = 40

// Resolve follows the symlinks of an absolute path as the kernel does, but enters no
// mount of ours, which may not answer: where the path leads into one, that mount is
// returned, and real is where it is mounted. What does not exist is left as it is
// written.
func Resolve(path string) (real string, into *Mounted, err error) {
	mounts, err := List()
	if err != nil {
		return "", nil, err
	}
	at, rest := "/", components(path)
	for links := 0; ; {
		into = topmost(mounts, at)
		if len(rest) == 0 || into != nil && rest[0] != ".." { // from the root of a mount, ".." leads out again
			return at, into, nil
		}
		next := filepath.Join(at, rest[0]) // at has no links, so ".." is its parent
		if topmost(mounts, next) != nil {
			at, rest = next, rest[1:] // which is no link, and need not be asked
			continue
		}
		target, err := os.Readlink(next)
		switch {
		case errors.Is(err, unix.EINVAL): // no link
			at, rest = next, rest[1:]
		case err != nil:
			return filepath.Join(append([]string{at}, rest...)...), nil, nil
		default:
			if links++; links > maxLinks {
				return "", nil, unix.ELOOP
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			rest = append(components(target), rest[1:]...)
		}
	}
}

func components(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// topmost returns the mount of ours at a directory, nil where there is none or
// something else is mounted over it.
func topmost(mounts []Mounted, dir string) *Mounted {
	for i := range mounts {
		if m := &mounts[i]; m.Dir == dir {
			if device, err := DeviceOf(dir); err == nil && device == m.Device {
				return m
			}
		}
	}
	return nil
}

// DeviceOf returns the device number of what is at a path, without asking who serves
// it if that is the root of a mount.
func DeviceOf(path string) (uint64, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	return unix.Mkdev(st.Dev_major, st.Dev_minor), err
}
