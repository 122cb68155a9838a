package fs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What an XFS is as large as: the inode numbers of the larger need more than 32 bits.
const (
	smallXFS = "1G"
	largeXFS = "4T"
)

// newXFS makes an XFS, sparse, and mounts it.
func newXFS(t *testing.T, size string) string {
	t.Helper()
	requireFUSE(t)
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		lacks(t, "%v", err)
	}
	dir := t.TempDir()
	image, mount := filepath.Join(dir, "image"), filepath.Join(dir, "xfs")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"truncate", "-s", size, image},
		{"mkfs.xfs", "-q", "-K", "-l", "size=64m", image},
		{"mount", "-o", "loop", image, mount},
	} {
		if text, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			lacks(t, "%s: %v: %s", strings.Join(command, " "), err, text)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	return mount
}

// TestOpensByHandle: a keeper need not hold the inodes of a filesystem whose handles are
// ids, which are not those of an XFS with inode64 (the default), nor of a filesystem in
// memory.
func TestOpensByHandle(t *testing.T) {
	memory := t.TempDir()
	if err := unix.Mount("byokd", memory, "tmpfs", 0, "size=1m"); err != nil {
		lacks(t, "mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(memory, 0) })
	for dir, want := range map[string]bool{
		newDisk(t, 16, 20, "", ""): true, newXFS(t, smallXFS): false, newXFS(t, largeXFS): false, memory: false, memory + "/none": false,
	} {
		if got := OpensByHandle(dir); got != want {
			t.Errorf("%s: %v, want %v", dir, got, want)
		}
	}
}

// TestInodesOfLargeXFS: what the kernel knows costs no descriptor there either, is found
// again, and outlives its name where somebody has it open.
func TestInodesOfLargeXFS(t *testing.T) {
	v := newVolumeIn(t, newXFS(t, largeXFS), Options{})
	if _, ok := v.fs.nodes.ids.(*generationIDs); !ok {
		t.Fatalf("ids are %T", v.fs.nodes.ids)
	}
	const files = 400
	name := func(i int) string { return v.path(fmt.Sprintf("d%d/f%d", i%8, i)) }
	for i := range files {
		if i < 8 {
			if err := os.Mkdir(v.path(fmt.Sprint("d", i)), 0o755); err != nil { // XFS spreads directories over its groups
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(name(i), []byte(name(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if n := countBelow(t, v.lower); n > 40 {
		t.Errorf("%d descriptors below for %d files that nobody has open", n, files)
	}
	open, err := os.Open(name(0))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	for i := 0; i < files; i += 4 { // the numbers of these are given to others
		if err := os.Remove(name(i)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name(i)+"-new", []byte(name(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text := make([]byte, 200)
	if n, err := open.ReadAt(text, 0); string(text[:n]) != name(0) {
		t.Errorf("a file without a name: %q, %v", text[:n], err)
	}
	verify := func() {
		t.Helper()
		for i := range files {
			file := name(i)
			if i%4 == 0 {
				file += "-new"
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != name(i) {
				t.Fatalf("%s: %q, %v", file, got, err)
			}
		}
	}
	verify()
	v.freeze()
	v.thaw()
	verify()
	open.Close()
	v.remount()
	verify()
}
