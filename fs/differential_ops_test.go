package fs

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What the differential test draws from; what stands twice is drawn twice as
// often.
var drawing = []func(*differ) operation{
	(*differ).open, (*differ).open, (*differ).open, (*differ).open, (*differ).closing,
	(*differ).pwrite, (*differ).pwrite, (*differ).pwrite, (*differ).pwrite, (*differ).write, (*differ).write,
	(*differ).pread, (*differ).pread, (*differ).pread, (*differ).seek,
	(*differ).ftruncate, (*differ).ftruncate, (*differ).truncateName, (*differ).fallocate, (*differ).fallocate,
	(*differ).rename, (*differ).rename, (*differ).link, (*differ).unlink, (*differ).unlink, (*differ).mkdir, (*differ).rmdir,
	(*differ).symlink, (*differ).readlink, (*differ).mknod, (*differ).tmpfile,
	(*differ).chmod, (*differ).chown, (*differ).utimens, (*differ).stat, (*differ).stat, (*differ).fstat, (*differ).fstat,
	(*differ).setxattr, (*differ).getxattr, (*differ).removexattr,
	(*differ).mmap, (*differ).store, (*differ).store, (*differ).load, (*differ).munmap,
	(*differ).fsync, (*differ).readdir, (*differ).copyRange, (*differ).statfs, (*differ).reopen,
}

// name draws a path: few enough that operations meet, of any kind.
func (d *differ) name() string {
	parts := make([]string, 1+d.rand.IntN(3)*d.rand.IntN(2))
	for i := range parts {
		parts[i] = string(rune('a' + d.rand.IntN(5)))
	}
	if d.rand.IntN(40) == 0 {
		parts[len(parts)-1] = strings.Repeat("n", 175-d.rand.IntN(2))
	}
	return strings.Join(parts, "/")
}

func (d *differ) slot() int { return d.rand.IntN(len(side{}.fds)) }

// offset draws a place in a file, often at the edge of a block or a page.
func (d *differ) offset() int64 {
	const far = 300_000
	switch d.rand.IntN(6) {
	case 0:
		return max(0, 4032+int64(d.rand.IntN(60))*4064+int64(d.rand.IntN(5))-2)
	case 1:
		return max(0, int64(d.rand.IntN(70))*4096+int64(d.rand.IntN(5))-2)
	case 2:
		return int64(d.rand.IntN(far))
	default:
		return int64(d.rand.IntN(20_000))
	}
}

func (d *differ) length() int {
	switch d.rand.IntN(8) {
	case 0:
		return d.rand.IntN(200_000)
	case 1:
		return 4096 * (1 + d.rand.IntN(4))
	case 2:
		return 0
	default:
		return d.rand.IntN(6000)
	}
}

func (d *differ) data(length int) []byte {
	b := make([]byte, length)
	first := byte(1 + d.rand.IntN(250))
	for i := range b {
		b[i] = first + byte(i%5)
	}
	return b
}

func (d *differ) open() operation {
	i, name := d.slot(), d.name()
	flags := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_RDWR}[d.rand.IntN(4)]
	for _, f := range []int{unix.O_CREAT, unix.O_CREAT, unix.O_EXCL, unix.O_TRUNC, unix.O_APPEND, unix.O_NOFOLLOW} {
		if d.rand.IntN(4) == 0 {
			flags |= f
		}
	}
	if d.rand.IntN(2) == 0 { // most slots are to be of use
		flags = unix.O_RDWR | unix.O_CREAT | flags&unix.O_APPEND
	}
	switch d.rand.IntN(30) {
	case 0:
		flags |= unix.O_DSYNC
	case 1:
		flags |= unix.O_SYNC
	case 2:
		flags |= unix.O_DIRECTORY
	}
	mode := uint32(d.rand.IntN(0o10000))
	return operation{fmt.Sprintf("open %d %s flags %#x mode %o", i, name, flags, mode), func(s *side) string {
		_ = s.close(i)
		fd, err := unix.Open(s.path(name), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
		if err == nil {
			s.fds[i] = fd
		}
		return said(err)
	}}
}

func (d *differ) closing() operation {
	i := d.slot()
	return operation{fmt.Sprint("close ", i), func(s *side) string { return said(s.close(i)) }}
}

// reopen opens what a slot has open once more, though its name may be gone.
func (d *differ) reopen() operation {
	i, j := d.slot(), d.slot()
	flags := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC}[d.rand.IntN(4)]
	return operation{fmt.Sprintf("reopen %d as %d flags %#x", i, j, flags), func(s *side) string {
		if s.fds[i] < 0 || i == j {
			return "not open"
		}
		fd, err := unix.Open(procFD(s.fds[i]), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			_ = s.close(j)
			s.fds[j] = fd
		}
		return said(err)
	}}
}

func (d *differ) pwrite() operation {
	i, off, b := d.slot(), d.offset(), d.data(d.length())
	return operation{fmt.Sprintf("pwrite %d at %d: %d", i, off, len(b)), func(s *side) string {
		n, err := unix.Pwrite(s.fds[i], b, off)
		return fmt.Sprint(n, said(err))
	}}
}

func (d *differ) write() operation {
	i, b := d.slot(), d.data(d.length())
	return operation{fmt.Sprintf("write %d: %d", i, len(b)), func(s *side) string {
		n, err := unix.Write(s.fds[i], b)
		return fmt.Sprint(n, said(err))
	}}
}

func (d *differ) pread() operation {
	i, off, length := d.slot(), d.offset(), d.length()
	return operation{fmt.Sprintf("pread %d at %d: %d", i, off, length), func(s *side) string {
		b := make([]byte, length)
		n, err := unix.Pread(s.fds[i], b, off)
		return digest(b[:max(n, 0)]) + said(err)
	}}
}

func (d *differ) seek() operation {
	i, off, whence := d.slot(), d.offset(), d.rand.IntN(5)
	return operation{fmt.Sprintf("lseek %d %d whence %d", i, off, whence), func(s *side) string {
		var st unix.Stat_t
		if unix.Fstat(s.fds[i], &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return "a directory's offsets are its own"
		}
		at, err := unix.Seek(s.fds[i], off, whence)
		if whence == unix.SEEK_DATA || whence == unix.SEEK_HOLE {
			// Either may find less than there is, but not what is not there; and
			// the next write is at the same place on both sides again.
			wrong := err == nil && (at < off || at > st.Size)
			_, err = unix.Seek(s.fds[i], off, unix.SEEK_SET)
			return fmt.Sprint(wrong, said(err))
		}
		return fmt.Sprint(at, said(err))
	}}
}

func (d *differ) ftruncate() operation {
	i, size := d.slot(), d.offset()
	return operation{fmt.Sprintf("ftruncate %d to %d", i, size), func(s *side) string { return said(unix.Ftruncate(s.fds[i], size)) }}
}

func (d *differ) truncateName() operation {
	name, size := d.name(), d.offset()
	if d.rand.IntN(4) == 0 {
		size = 0
	}
	return operation{fmt.Sprintf("truncate %s to %d", name, size), func(s *side) string { return said(unix.Truncate(s.path(name), size)) }}
}

func (d *differ) fallocate() operation {
	i, off, length := d.slot(), d.offset(), int64(d.length())
	mode := []uint32{
		0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
		unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE,
	}[d.rand.IntN(5)]
	return operation{fmt.Sprintf("fallocate %d mode %#x at %d: %d", i, mode, off, length), func(s *side) string {
		return said(unix.Fallocate(s.fds[i], mode, off, length))
	}}
}

func (d *differ) rename() operation {
	from, to := d.name(), d.name()
	flags := []uint{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[d.rand.IntN(4)]
	return operation{fmt.Sprintf("rename %s to %s flags %d", from, to, flags), func(s *side) string {
		return said(unix.Renameat2(unix.AT_FDCWD, s.path(from), unix.AT_FDCWD, s.path(to), flags))
	}}
}

func (d *differ) link() operation {
	from, to, flags := d.name(), d.name(), unix.AT_SYMLINK_FOLLOW*d.rand.IntN(2)
	return operation{fmt.Sprintf("link %s to %s flags %#x", from, to, flags), func(s *side) string {
		return said(unix.Linkat(unix.AT_FDCWD, s.path(from), unix.AT_FDCWD, s.path(to), flags))
	}}
}

func (d *differ) unlink() operation {
	name := d.name()
	return operation{"unlink " + name, func(s *side) string { return said(unix.Unlink(s.path(name))) }}
}

func (d *differ) mkdir() operation {
	name, mode := d.name(), uint32(d.rand.IntN(0o10000))
	return operation{fmt.Sprintf("mkdir %s mode %o", name, mode), func(s *side) string { return said(unix.Mkdir(s.path(name), mode)) }}
}

func (d *differ) rmdir() operation {
	name := d.name()
	return operation{"rmdir " + name, func(s *side) string { return said(unix.Rmdir(s.path(name))) }}
}

func (d *differ) symlink() operation {
	name, target := d.name(), d.name()
	if d.rand.IntN(4) == 0 {
		target = strings.Repeat("x/", 1+d.rand.IntN(1500))
	}
	return operation{fmt.Sprintf("symlink %s -> %.20s", name, target), func(s *side) string { return said(unix.Symlink(target, s.path(name))) }}
}

func (d *differ) readlink() operation {
	name := d.name()
	return operation{"readlink " + name, func(s *side) string { return readlinkOf(s.path(name)) }}
}

func (d *differ) mknod() operation {
	name, mode := d.name(), uint32(d.rand.IntN(0o1000))
	mode |= []uint32{unix.S_IFIFO, unix.S_IFREG, unix.S_IFSOCK}[d.rand.IntN(3)] // devices cannot be opened: the mount is nodev
	return operation{fmt.Sprintf("mknod %s mode %o", name, mode), func(s *side) string {
		return said(unix.Mknod(s.path(name), mode, 0))
	}}
}

// tmpfile makes a file without a name, and perhaps gives it one.
func (d *differ) tmpfile() operation {
	i, dir, name, b := d.slot(), d.name(), d.name(), d.data(d.length())
	if d.rand.IntN(2) == 0 {
		dir = "."
	}
	return operation{fmt.Sprintf("tmpfile %d in %s with %d as %s", i, dir, len(b), name), func(s *side) string {
		_ = s.close(i)
		fd, err := unix.Open(s.path(dir), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
		if err != nil {
			return said(err)
		}
		s.fds[i] = fd
		_, err = unix.Write(fd, b)
		return said(err) + said(unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, s.path(name), unix.AT_SYMLINK_FOLLOW))
	}}
}

func (d *differ) chmod() operation {
	name, i, mode := d.name(), d.slot(), uint32(d.rand.IntN(0o10000))
	byName := d.rand.IntN(2) == 0
	return operation{fmt.Sprintf("chmod %s or %d: %o", name, i, mode), func(s *side) string {
		if byName {
			return said(unix.Chmod(s.path(name), mode))
		}
		return said(unix.Fchmod(s.fds[i], mode))
	}}
}

func (d *differ) chown() operation {
	name, uid, gid := d.name(), d.rand.IntN(4)-1, d.rand.IntN(4)-1
	if d.users && uid < 0 && gid < 0 {
		// Who does not own a file may not take its set-id bits in this way; but to us the
		// kernel says the same as when somebody writes to it, who may and must.
		uid = 0
	}
	return operation{fmt.Sprintf("lchown %s %d:%d", name, uid, gid), func(s *side) string { return said(unix.Lchown(s.path(name), uid, gid)) }}
}

func (d *differ) utimens() operation {
	name := d.name()
	ts := []unix.Timespec{
		{Sec: int64(d.rand.IntN(1 << 31)), Nsec: int64(d.rand.IntN(1e9))},
		{Sec: int64(d.rand.IntN(1<<32)) - 1<<31, Nsec: int64(d.rand.IntN(1e9))},
	}
	return operation{fmt.Sprint("utimens ", name, ts), func(s *side) string {
		err := unix.UtimesNanoAt(unix.AT_FDCWD, s.path(name), ts, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return said(err)
		}
		var st unix.Stat_t
		err = unix.Lstat(s.path(name), &st)
		if age := time.Since(time.Unix(st.Atim.Unix())); age >= 0 && age < time.Minute {
			st.Atim = unix.Timespec{} // a symbolic link that name leads through: looking has just set it
		}
		return fmt.Sprint(st.Atim, st.Mtim, said(err))
	}}
}

func (d *differ) stat() operation {
	name := d.name()
	return operation{"stat " + name, func(s *side) string {
		var st unix.Stat_t
		if err := unix.Stat(s.path(name), &st); err != nil {
			return said(err) + statOf(s.path(name))
		}
		return showStat(&st) + statOf(s.path(name))
	}}
}

func (d *differ) fstat() operation {
	i := d.slot()
	return operation{fmt.Sprint("fstat ", i), func(s *side) string {
		var st unix.Stat_t
		if err := unix.Fstat(s.fds[i], &st); err != nil {
			return said(err)
		}
		return showStat(&st)
	}}
}

func (d *differ) attribute() string { return "user." + string(rune('a'+d.rand.IntN(3))) }

func (d *differ) setxattr() operation {
	name, attribute, value := d.name(), d.attribute(), d.data(d.rand.IntN(300))
	flags := []int{0, 0, unix.XATTR_CREATE, unix.XATTR_REPLACE}[d.rand.IntN(4)]
	return operation{fmt.Sprintf("setxattr %s %s: %d flags %d", name, attribute, len(value), flags), func(s *side) string {
		return said(unix.Lsetxattr(s.path(name), attribute, value, flags))
	}}
}

func (d *differ) getxattr() operation {
	name, attribute, size := d.name(), d.attribute(), d.rand.IntN(200)
	return operation{fmt.Sprintf("getxattr %s %s into %d", name, attribute, size), func(s *side) string {
		n, err := unix.Lgetxattr(s.path(name), attribute, make([]byte, size))
		return fmt.Sprint(n, said(err)) + xattrsOf(s.path(name))
	}}
}

func (d *differ) removexattr() operation {
	name, attribute := d.name(), d.attribute()
	return operation{fmt.Sprintf("removexattr %s %s", name, attribute), func(s *side) string {
		return said(unix.Lremovexattr(s.path(name), attribute))
	}}
}

func (d *differ) mapSlot() int { return d.rand.IntN(len(side{}.maps)) }

func (d *differ) mmap() operation {
	i, m, first, pages := d.slot(), d.mapSlot(), int64(d.rand.IntN(8)), 1+d.rand.IntN(16)
	return operation{fmt.Sprintf("mmap %d as %d: %d pages from %d", i, m, pages, first), func(s *side) string {
		s.unmap(m)
		var st unix.Stat_t
		if unix.Fstat(s.fds[i], &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return "no file" // a device's mapping is its driver's
		}
		memory, err := unix.Mmap(s.fds[i], first*pageSize, pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return said(err)
		}
		fd, err := unix.Dup(s.fds[i])
		s.maps[m] = mapping{memory, first * pageSize, fd}
		return said(err)
	}}
}

// inFile returns the part of a mapping that may be touched: what lies in the file.
func (m *mapping) inFile() []byte {
	var st unix.Stat_t
	if m.memory == nil || unix.Fstat(m.fd, &st) != nil {
		return nil
	}
	return m.memory[:min(int64(len(m.memory)), max(st.Size-m.off, 0))]
}

func (d *differ) store() operation {
	m, off, b, sync := d.mapSlot(), d.rand.IntN(20_000), d.data(d.rand.IntN(6000)), d.rand.IntN(8)
	return operation{fmt.Sprintf("store %d at %d: %d, msync %v", m, off, len(b), sync == 0), func(s *side) string {
		memory := s.maps[m].inFile()
		n := copy(memory[min(off, len(memory)):], b)
		var err error
		if sync == 0 && memory != nil {
			err = unix.Msync(s.maps[m].memory, unix.MS_SYNC)
		}
		return fmt.Sprint(n, said(err))
	}}
}

func (d *differ) load() operation {
	m := d.mapSlot()
	return operation{fmt.Sprintf("load %d", m), func(s *side) string { return digest(s.maps[m].inFile()) }}
}

func (d *differ) munmap() operation {
	m := d.mapSlot()
	return operation{fmt.Sprintf("munmap %d", m), func(s *side) string { s.unmap(m); return "ok" }}
}

func (d *differ) fsync() operation {
	i, data := d.slot(), d.rand.IntN(2) == 0
	return operation{fmt.Sprintf("fsync %d, data only %v", i, data), func(s *side) string {
		if data {
			return said(unix.Fdatasync(s.fds[i]))
		}
		return said(unix.Fsync(s.fds[i]))
	}}
}

func (d *differ) readdir() operation {
	name := d.name()
	if d.rand.IntN(3) == 0 {
		name = "."
	}
	return operation{"readdir " + name, func(s *side) string {
		names, err := list(s.path(name))
		return strings.Join(names, ",") + said(err)
	}}
}

func (d *differ) copyRange() operation {
	i, j, from, to, length := d.slot(), d.slot(), d.offset(), d.offset(), d.length()
	return operation{fmt.Sprintf("copy_file_range %d at %d to %d at %d: %d", i, from, j, to, length), func(s *side) string {
		a, b := from, to
		n, err := unix.CopyFileRange(s.fds[i], &a, s.fds[j], &b, length, 0)
		return fmt.Sprint(n, said(err))
	}}
}

// statfs differs in its figures; that it makes sense is what can be said.
func (d *differ) statfs() operation {
	return operation{"statfs", func(s *side) string {
		var st unix.Statfs_t
		err := unix.Statfs(s.root, &st)
		return fmt.Sprint(said(err), st.Blocks > 0, st.Bavail <= st.Bfree, st.Bfree <= st.Blocks, st.Files >= st.Ffree, st.Namelen >= 175)
	}}
}
