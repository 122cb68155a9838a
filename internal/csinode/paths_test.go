package csinode

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

func newTestDriver(t *testing.T) *Driver {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("BYOKD_REQUIRE") != "" {
			t.Fatal("BYOKD_REQUIRE is set, but this is not root")
		}
		t.Skip("needs root")
	}
	d, err := New(Options{NodeName: "here", KubeletDir: t.TempDir(), StateDir: t.TempDir(), Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTargets(t *testing.T) {
	d, err := New(Options{NodeName: "here", KubeletDir: "/var/lib/kubelet/", StateDir: "/state", Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	const good = "/var/lib/kubelet/pods/0c5fd3e5-6a9f/volumes/kubernetes.io~csi/byokd-mount/mount"
	if uid, err := d.targetOf(good); err != nil || uid != "0c5fd3e5-6a9f" {
		t.Errorf("%s, %v", uid, err)
	}
	for _, bad := range []string{"", "/", "/etc", good + "/", good + "/..", "/var/lib/kubelet/pods/../volumes/kubernetes.io~csi/a/mount",
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/../mount", "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/a/mount",
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/a/b/mount", "/var/lib/kubelet2/pods/u/volumes/kubernetes.io~csi/a/mount",
		"/var/lib/kubelet/pods/u/./volumes/kubernetes.io~csi/a/mount"} {
		if uid, err := d.targetOf(bad); err == nil {
			t.Errorf("%q is taken, for pod %q", bad, uid)
		}
	}
}

// TestPlantedLinks: a pod that puts links where the driver works leads it nowhere.
func TestPlantedLinks(t *testing.T) {
	d := newTestDriver(t)
	volumes := filepath.Join(d.options.KubeletDir, "pods/uid/volumes/kubernetes.io~empty-dir")
	elsewhere := t.TempDir()
	if err := errors.Join(os.MkdirAll(volumes, 0o755), unix.Mount("tmpfs", elsewhere, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(elsewhere, unix.MNT_DETACH) }()
	if err := os.Symlink(elsewhere, filepath.Join(volumes, "run")); err != nil {
		t.Fatal(err)
	}
	if fd, err := d.openRun("uid", "run"); err == nil {
		unix.Close(fd)
		t.Error("a link in the place of the in-memory volume is followed")
	}
	if err := os.Mkdir(filepath.Join(volumes, "disk"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := d.openRun("uid", "disk"); !errors.Is(err, errNotYet) {
		t.Errorf("a directory that is not in memory: %v", err)
	}
	if _, err := d.openRun("uid", "absent"); !errors.Is(err, errNotYet) {
		t.Errorf("no directory: %v", err)
	}

	// A link in the place of the socket: it goes, and what it points to stays as it is.
	victim := filepath.Join(elsewhere, "victim")
	run := filepath.Join(volumes, "tmpfs")
	if err := errors.Join(os.WriteFile(victim, nil, 0o600), os.Mkdir(run, 0o755), unix.Mount("tmpfs", run, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(run, unix.MNT_DETACH) }()
	if err := os.Symlink(victim, filepath.Join(run, socketName)); err != nil {
		t.Fatal(err)
	}
	fd, err := d.openRun("uid", "tmpfs")
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	l, err := listenIn(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(victim); err != nil || info.Mode() != 0o600 {
		t.Errorf("the link's target is %v, %v", info, err)
	}
	info, err := os.Lstat(filepath.Join(run, socketName))
	if err != nil || info.Mode().Type() != os.ModeSocket || info.Mode().Perm() != 0o666 {
		t.Errorf("the socket is %v, %v", info, err)
	}
	c, err := net.Dial("unixpacket", filepath.Join(run, socketName))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	// A directory there is in the way, and is told.
	if err := errors.Join(os.Remove(filepath.Join(run, socketName)), os.Mkdir(filepath.Join(run, socketName), 0o755)); err != nil {
		t.Fatal(err)
	}
	if l, err := listenIn(fd); err == nil {
		l.Close()
		t.Error("it listens in spite of a directory of its name")
	}
}
