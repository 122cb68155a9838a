package fusemount

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tree makes directories and symlinks, those with a target, in a directory without symlinks in its path.
func tree(t *testing.T, links map[string]string, dirs ...string) string {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range links {
		if err := os.Symlink(strings.ReplaceAll(target, "ROOT", root), filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestResolve(t *testing.T) {
	root := tree(t, map[string]string{"absolute": "ROOT/a/b", "a/up": "../c", "chain": "a/up/../absolute", "dangling": "a/none/../x", "loop": "loop2", "loop2": "loop"}, "a/b/d", "c")
	for path, want := range map[string]string{
		"a/b":          "a/b",
		"a//b/./":      "a/b",
		"absolute/d":   "a/b/d",
		"a/up":         "c",
		"chain/d":      "a/b/d",
		"a/b/to/make":  "a/b/to/make", // nothing is there yet
		"absolute/new": "a/b/new",
	} {
		got, into, err := Resolve(root + "/" + path)
		if err != nil || into != nil || got != filepath.Join(root, want) {
			t.Errorf("%s: %s, %v, %v; want %s", path, got, into, err, want)
		}
		if kernels, err := filepath.EvalSymlinks(root + "/" + path); err == nil && kernels != got {
			t.Errorf("%s: %s, but the kernel comes to %s", path, got, kernels)
		}
	}
	if _, _, err := Resolve(root + "/loop/x"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop of symlinks: %v", err)
	}
}

// A path into a mount of ours is recognised without asking that mount, which here nobody serves: a question would hang.
func TestResolveStopsAtAMount(t *testing.T) {
	dev, err := Open()
	if err != nil || os.Geteuid() != 0 {
		if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
			t.Fatalf("BYOKD_REQUIRE names fuse, and nothing can be mounted: %v", err)
		}
		t.Skipf("nothing can be mounted here: %v", err)
	}
	defer unix.Close(dev)
	root := tree(t, map[string]string{"link": "ROOT/mount/sealed", "near": "mount", "beside": "mount/../other"}, "mount", "other", "bound")
	at := filepath.Join(root, "mount")
	if err := Mount(dev, at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = End(at) })
	into := func(path string) string {
		t.Helper()
		real, m, err := Resolve(filepath.Join(root, path))
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if m == nil {
			return ""
		}
		if real != m.Dir {
			t.Errorf("%s: the mount at %s is at %s", path, m.Dir, real)
		}
		return m.Dir
	}
	for _, path := range []string{"mount", "mount/sealed", "link", "link/below", "near", "near/x"} {
		if got := into(path); got != at {
			t.Errorf("%s leads into %q", path, got)
		}
	}
	for _, path := range []string{"other", "mountain", "beside", ""} {
		if got := into(path); got != "" {
			t.Errorf("%s leads into %q", path, got)
		}
	}

	// A bind mount is one of ours, too; what is hidden by another mount is out of the way.
	bound := filepath.Join(root, "bound")
	if err := unix.Mount(at, bound, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(bound, unix.MNT_DETACH) })
	if got := into("bound/x"); got != bound {
		t.Errorf("by a bind mount: into %q", got)
	}
	if err := unix.Mount("none", at, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	hidden := into("mount/sealed")
	if err := unix.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
	if hidden != "" {
		t.Errorf("below a tmpfs: into %q", hidden)
	}
}
