package csinode

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Their compilation is not to take its milliseconds of each start of byokd.
var (
	podUID = pattern(`^[A-Za-z0-9][A-Za-z0-9-]{0,62}$`)
	// dnsLabel is what Kubernetes takes for the name of a pod's volume.
	dnsLabel = pattern(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	volumeID = pattern(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
)

func pattern(text string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(text) })
}

// socketName is the socket in the pod's in-memory volume.
const socketName = "mount.sock"

// targetOf checks that a target path is where kubelet has the inline volumes of a
// pod: DIR/pods/UID/volumes/kubernetes.io~csi/NAME/mount. It returns the pod's uid.
func (d *Driver) targetOf(target string) (uid string, err error) {
	rel, ok := strings.CutPrefix(target, filepath.Join(d.options.KubeletDir, "pods")+"/")
	parts := strings.Split(rel, "/")
	if !ok || len(parts) != 5 || filepath.Clean(target) != target || !podUID().MatchString(parts[0]) ||
		parts[1] != "volumes" || parts[2] != "kubernetes.io~csi" || !dnsLabel().MatchString(parts[3]) || parts[4] != "mount" {
		return "", fmt.Errorf("%q is not the place of an inline volume below %s", target, d.options.KubeletDir)
	}
	return parts[0], nil
}

// errNotYet: kubelet has not mounted the in-memory volume yet. It tries again.
var errNotYet = errors.New("the pod's in-memory volume is not there yet")

// openRun opens the in-memory volume of a pod with O_PATH.
func (d *Driver) openRun(uid, name string) (int, error) {
	base, err := unix.Open(d.options.KubeletDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: d.options.KubeletDir, Err: err}
	}
	defer unix.Close(base)
	path := filepath.Join("pods", uid, "volumes", "kubernetes.io~empty-dir", name)
	fd, err := unix.Openat2(base, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
	if errors.Is(err, unix.ENOENT) {
		return -1, errNotYet
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		unix.Close(fd)
		return -1, errNotYet // a directory on disk is what is there before the mount
	}
	return fd, nil
}

// listenIn listens on the socket in the directory that fd, O_PATH, refers to. A name
// that is there is removed, never followed.
func listenIn(fd int) (*net.UnixListener, error) {
	if err := unix.Unlinkat(fd, socketName, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("%s is in the way in the pod's in-memory volume: %w", socketName, err)
	}
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(s), socketName)
	defer file.Close() // the listener has a copy
	if err := unix.Bind(s, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, socketName)}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err := openToAll(fd); err != nil {
		return nil, err
	}
	if err := unix.Listen(s, 4); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// openToAll lets the sidecar connect, whoever it runs as: only containers that mount
// the in-memory volume see the socket. The inode is changed that was looked at.
func openToAll(dir int) error {
	fd, err := unix.Openat(dir, socketName, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open socket", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("stat socket", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s in the pod's in-memory volume was replaced", socketName)
	}
	return os.NewSyscallError("chmod socket", unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o666))
}
