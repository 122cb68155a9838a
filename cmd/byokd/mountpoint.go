package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// statTimeout bounds how long a look at the mount point may take: a healthy mount answers for its root
// from memory, a hanging one must not hang our start.
const statTimeout = 3 * time.Second

// maxStale bounds the number of dead mounts on top of each other that are cleared away: one for each
// killed run since anybody looked.
const maxStale = 64

var (
	errMountPoint  = errors.New("volume.mount cannot be used")
	errNoDirectory = errors.New("does not exist")
)

// prepareMountPoint makes sure that dir is an empty directory without a mount of byokd on it, and makes it where only its
// last part is missing (in a pod, its parent is a volume that is empty at first). Dead mounts of a killed byokd are cleared
// away; a live one, or anything else in the way, is refused.
func prepareMountPoint(dir string, log *zap.Logger) error {
	if err := os.Mkdir(dir, 0o755); err == nil {
		log.Info("the mount point is made", zap.String("mount", dir))
	}
	for range maxStale {
		err := statWithin(dir, statTimeout)
		if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) {
			log.Info("a dead mount of a killed byokd is cleared away", zap.String("mount", dir))
			if err := detach(dir); err != nil {
				return fmt.Errorf("%w: a dead mount is on it and cannot be removed (type: umount -l %s): %w", errMountPoint, dir, err)
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errMountPoint, err)
		}
		return emptyMountPoint(dir)
	}
	return fmt.Errorf("%w: %s has more than %d dead mounts on it", errMountPoint, dir, maxStale)
}

// emptyMountPoint checks a directory that answers.
func emptyMountPoint(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("%w: %w", errMountPoint, err)
	}
	if kind := mountedAt(string(mounts), dir); strings.HasPrefix(kind, "fuse") {
		return fmt.Errorf("%w: a running program serves a %s filesystem on %s already; stop that one first", errMountPoint, kind, dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", errMountPoint, err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%w: %s is not empty (%s, …); what is in it would be hidden below the mount. Move it away, and let nothing write there before byokd has mounted", errMountPoint, dir, entries[0].Name())
	}
	return nil
}

// statWithin tells whether dir is a directory, giving up on a filesystem that does not answer.
func statWithin(dir string, timeout time.Duration) error {
	result := make(chan error, 1)
	go func() {
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is not a directory", dir)
		}
		if err == nil {
			// The kernel may still remember the attributes of a dead mount's root; this it has to ask for.
			var unused unix.Statfs_t
			err = unix.Statfs(dir, &unused)
		}
		result <- err
	}()
	select {
	case err := <-result:
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s %w; type: mkdir -p %s", dir, errNoDirectory, dir)
		}
		return err
	case <-time.After(timeout):
		return fmt.Errorf("a filesystem is mounted on %s that does not answer; type: umount -l %s", dir, dir)
	}
}

// mountedAt returns the type of the filesystem that is mounted on dir last, or nothing. mountinfo is the
// content of /proc/self/mountinfo.
func mountedAt(mountinfo, dir string) string {
	if resolved, err := filepath.EvalSymlinks(dir); err == nil {
		dir = resolved
	}
	kind := ""
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, about := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) >= 5 && len(about) >= 1 && unescapeMount(fields[4]) == dir {
			kind = about[0]
		}
	}
	return kind
}

// unescapeMount undoes what the kernel does to blanks and backslashes in mountinfo.
func unescapeMount(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// detach removes the mount on dir, with the set-uid fusermount3 where we may not ourselves.
func detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || !errors.Is(err, unix.EPERM) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*statTimeout)
	defer cancel()
	if out, runErr := exec.CommandContext(ctx, "fusermount3", "-u", "-z", "--", dir).CombinedOutput(); runErr != nil {
		return fmt.Errorf("%w; fusermount3: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
