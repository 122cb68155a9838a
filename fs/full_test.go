package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newDisk makes an ext4 of a few MiB on a loop device, whose image is in memory
// of at most backed MiB, and returns where it is mounted.
func newDisk(t testing.TB, mebibytes, backed int64, mkfs, options string) string {
	t.Helper()
	requireFUSE(t)
	dir := t.TempDir()
	image, disk := filepath.Join(dir, "memory", "image"), filepath.Join(dir, "disk")
	err := errors.Join(os.Mkdir(filepath.Dir(image), 0o755), os.Mkdir(disk, 0o755),
		unix.Mount("byokd-test", filepath.Dir(image), "tmpfs", 0, fmt.Sprintf("size=%dm", backed)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(filepath.Dir(image), unix.MNT_DETACH) })
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, mebibytes<<20)); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
				t.Fatalf("%s %v: %v\n%s", name, args, err, out)
			}
			t.Skipf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	run("mkfs.ext4", append(strings.Fields(mkfs), "-q", "-F", "-b", "4096", "-m", "0", image)...)
	run("mount", "-o", "loop"+options, image, disk)
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("the disk cannot be unmounted: %v", err)
			_ = unix.Unmount(disk, unix.MNT_DETACH)
		}
	})
	return disk
}

// TestFullDisk: what write(2) has accepted can be flushed though the disk is
// full; more is refused, at the write; what needs no space goes on; and with
// room again all is as before.
func TestFullDisk(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		disk := newDisk(t, 64, 80, "", "")
		v := newVolumeIn(t, disk, o)
		full := newVictim(t, "fill", v.mount, v.path("fills"))
		full.start()
		t.Log(full.finishes(60 * time.Second))
		if v.fs.reserve.short.Load() != (o.Cache == Writeback) {
			t.Errorf("the reserve was drawn on: %v", v.fs.reserve.short.Load())
		}
		v.remount()
		again := newVictim(t, "fill-verify", v.mount, v.path("fills"))
		again.start()
		t.Log(again.finishes(60 * time.Second))
		if err := os.Remove(v.path("fills")); err != nil {
			t.Fatal(err)
		}
		var space unix.Statfs_t // the kernel tells us a moment later that it has forgotten the file
		await(t, func() string { return fmt.Sprintf("%d blocks free without the file", space.Bavail) },
			func() bool { return unix.Statfs(disk, &space) == nil && space.Bavail*uint64(space.Frsize) > 32<<20 })
		await(t, func() string { return "space that came free does not fill the reserve" }, v.fs.reserve.refilled)
		more := newVictim(t, "fill", v.mount, v.path("fills"))
		more.start()
		t.Log(more.finishes(60 * time.Second))
	})
}

const fillChunk = 100_003

// fill fills the disk by one file and looks at what still goes.
func fill(dir, file string) (func() (string, error), error) {
	kept, err := keptFile(dir + "/kept")
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC, 0o644)
		if err != nil {
			return "", err
		}
		size, err := appendUntilFull(fd, 0)
		if !errors.Is(err, unix.ENOSPC) {
			return "", fmt.Errorf("a full disk says %w", err)
		}
		if err := unix.Fsync(fd); err != nil {
			return "", fmt.Errorf("fsync of %d accepted bytes: %w", size, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Size != size {
			return "", fmt.Errorf("size %d after %d accepted bytes, %w", st.Size, size, err)
		}
		if n, err := unix.Pread(fd, make([]byte, 100), size); n != 0 || err != nil {
			return "", fmt.Errorf("read of the end: %d, %w", n, err)
		}
		var space unix.Statfs_t
		if err := unix.Statfs(dir, &space); err != nil || space.Bavail*uint64(space.Frsize) > 1<<20 {
			return "", fmt.Errorf("%d blocks free on a full disk, %w", space.Bavail, err)
		}
		more, err := appendUntilFull(fd, size) // ext4 may have found some
		if !errors.Is(err, unix.ENOSPC) || more > size+1<<20 {
			return "", fmt.Errorf("%d bytes more on a full disk: %w", more-size, err)
		}
		return fmt.Sprintf("%d bytes", size), errors.Join(kept.rewrite(), unix.Close(fd))
	}, nil
}

// appendUntilFull writes its pattern from off on until the disk says no, and
// returns where that was.
func appendUntilFull(fd int, off int64) (size int64, err error) {
	for size = off; ; {
		n, err := unix.Write(fd, fillPattern(size))
		size += int64(max(n, 0))
		if err != nil {
			return size, err
		}
	}
}

// fillPattern is the content of one chunk, which tells where it belongs.
func fillPattern(off int64) []byte {
	b := make([]byte, fillChunk)
	for i := range b {
		at := off + int64(i)
		b[i] = byte(at) ^ byte(at>>8) ^ byte(at>>16)
	}
	return b
}

func verifyFill(_, file string) (func() (string, error), error) {
	return func() (string, error) {
		got, err := wholeFile(file)
		for off := 0; err == nil && off < len(got); off += fillChunk {
			part := got[off:min(off+fillChunk, len(got))]
			if string(part) != string(fillPattern(int64(off))[:len(part)]) {
				err = fmt.Errorf("what was accepted at %d of %d is not there", off, len(got))
			}
		}
		return fmt.Sprintf("%d bytes equal", len(got)), err
	}, nil
}

// kept is a file with its blocks, and a mapping of one that is preallocated.
type kept struct {
	fd     int
	memory []byte
}

func keptFile(file string) (*kept, error) {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return nil, err
	}
	const size = 1 << 20
	if _, err := unix.Pwrite(fd, fillPattern(0), 0); err != nil {
		return nil, err
	}
	mapped, err := unix.Open(file+".mapped", unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(unix.Fsync(fd), unix.Fallocate(mapped, 0, 0, size)); err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(mapped, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return &kept{fd, memory}, err
}

// rewrite writes where there are blocks, which a full disk does not prevent.
func (k *kept) rewrite() error {
	for i := range 3 {
		if _, err := unix.Pwrite(k.fd, fillPattern(int64(i))[:20_000], 4096); err != nil {
			return fmt.Errorf("rewrite %d: %w", i, err)
		}
		if err := unix.Fsync(k.fd); err != nil {
			return fmt.Errorf("fsync of rewrite %d: %w", i, err)
		}
		for at := i; at < len(k.memory); at += 4096 {
			k.memory[at]++
		}
		if err := unix.Msync(k.memory, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync of preallocated blocks: %w", err)
		}
	}
	return nil
}
