package fs

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// TestRefusedAttributes: of extended attributes user.* is served. The others
// would act on the lower files, and are refused as a filesystem without them
// does, which tools know how to take.
func TestRefusedAttributes(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		writePattern(t, v.path("f"), 5000)
		acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
		for name, value := range map[string][]byte{
			"security.capability": {1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, "security.selinux": []byte("label"), "security.x": {1},
			"trusted.x": {1}, "system.posix_acl_access": acl, "system.posix_acl_default": acl, "user.byokd.id": {1}, "user.byokd.other": {1},
		} {
			for _, file := range []string{"f", "."} {
				if file == "f" && name == "system.posix_acl_default" {
					continue // of directories only, by the kernel itself
				}
				if err := unix.Setxattr(v.path(file), name, value, 0); !errors.Is(err, unix.EOPNOTSUPP) {
					t.Errorf("set %s of %s: %v", name, file, err)
				}
				if _, err := unix.Getxattr(v.path(file), name, make([]byte, 100)); !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
					t.Errorf("get %s of %s: %v", name, file, err)
				}
				if err := unix.Removexattr(v.path(file), name); !errors.Is(err, unix.EOPNOTSUPP) {
					t.Errorf("remove %s of %s: %v", name, file, err)
				}
			}
		}
		names := make([]byte, 1000)
		err := unix.Setxattr(v.path("f"), "user.mine", []byte("value"), 0)
		n, lerr := unix.Listxattr(v.path("f"), names)
		if list := string(names[:max(n, 0)]); err != nil || lerr != nil || list != "user.mine\x00" {
			t.Errorf("attributes %q, %v, %v", list, err, lerr)
		}
		var below []string
		for _, path := range v.lowerFiles() {
			n, err := unix.Listxattr(path, names)
			if err != nil {
				t.Fatal(err)
			}
			below = append(below, strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")...)
		}
		for _, name := range below {
			if name != "" && !strings.HasPrefix(name, "user.") {
				t.Errorf("%s was set below", name)
			}
		}
	})
}

// TestRefusedRanges: blocks are bound to their place, so what would move them is
// refused and nothing is changed.
func TestRefusedRanges(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		want := writePattern(t, v.path("f"), 10*pageSize)
		fd, err := unix.Open(v.path("f"), unix.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, mode := range []uint32{unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE, unix.FALLOC_FL_UNSHARE_RANGE, unix.FALLOC_FL_PUNCH_HOLE, 0x4000} {
			if err := unix.Fallocate(fd, mode, pageSize, pageSize); !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("fallocate mode %#x: %v", mode, err)
			}
		}
		for _, request := range []uint{unix.FICLONE, 0xc020660b /* FS_IOC_FIEMAP */, unix.FS_IOC_GETFLAGS, 0x8004587d /* EXT4_IOC_SHUTDOWN */} {
			if err := unix.IoctlSetInt(fd, request, fd); !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EFAULT) {
				t.Errorf("ioctl %#x: %v", request, err)
			}
		}
		if err := unix.Renameat2(unix.AT_FDCWD, v.path("f"), unix.AT_FDCWD, v.path("g"), unix.RENAME_WHITEOUT); !errors.Is(err, unix.EINVAL) {
			t.Errorf("rename leaving a whiteout: %v", err)
		}
		if got, err := os.ReadFile(v.path("f")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the file has changed at %d, %v", firstDifference(got, want), err)
		}
	})
}

// TestInodeNumbersStay: numbers are the lower inodes', and the same after the
// kernel has forgotten them and after a remount.
func TestInodeNumbersStay(t *testing.T) {
	v := newVolume(t, Options{})
	names := []string{".", "f", "d", "d/f", "l", "h", "p"}
	err := errors.Join(os.WriteFile(v.path("f"), nil, 0o644), os.Mkdir(v.path("d"), 0o755), os.WriteFile(v.path("d/f"), nil, 0o644),
		os.Symlink("f", v.path("l")), os.Link(v.path("f"), v.path("h")), unix.Mkfifo(v.path("p"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	numbers := func() map[string]uint64 {
		inodes := map[string]uint64{}
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Lstat(v.path(name), &st); err != nil {
				t.Fatal(err)
			}
			inodes[name] = st.Ino
		}
		return inodes
	}
	before := numbers()
	if before["f"] != before["h"] || before["f"] == before["d/f"] {
		t.Errorf("links and files: %v", before)
	}
	_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0) // not everywhere allowed; the remount is
	forgotten := numbers()
	v.remount()
	for name, ino := range numbers() {
		if ino != before[name] || forgotten[name] != ino {
			t.Errorf("%s: %d, %d when forgotten, %d after a remount", name, before[name], forgotten[name], ino)
		}
	}
}

// TestRefusedTargets: a symlink's target may be as long as its sealed form fits below.
func TestRefusedTargets(t *testing.T) {
	for _, ownership := range []Ownership{OwnershipLower, OwnershipSealed} {
		t.Run(ownership.String(), func(t *testing.T) {
			t.Setenv(ownershipVariable, ownership.String())
			v := newVolume(t, Options{})
			if err := unix.Symlink(strings.Repeat("t", seal.TargetMax), v.path("longest")); err != nil {
				t.Errorf("the longest target: %v", err)
			}
			for _, length := range []int{seal.TargetMax + 1, unix.PathMax - 1} {
				if err := unix.Symlink(strings.Repeat("t", length), v.path("longer")); !errors.Is(err, unix.ENAMETOOLONG) {
					t.Errorf("a target of %d bytes: %v, want ENAMETOOLONG", length, err)
				}
			}
		})
	}
}
