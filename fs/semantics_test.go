package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What databases and the tools around them ask of a filesystem, each done by a
// process on the mount and by another on a plain directory of the same lower
// filesystem, which is right by definition. What they say must be equal.
var semantics = map[string]func(say func(what string, results ...any)) error{
	"users":            severalUsers,
	"locks":            locksHeld,
	"seekdir":          seekDuringChange,
	"rename-overwrite": renameOverwrite,
	"terabytes":        sparseTerabytes,
	"special":          specialFiles,
	"directory-sync":   directorySync,
	"times":            timesOfFiles,
	"mapped-unlinked":  mappedUnlinked,
	"mapped-truncated": mappedTruncated,
	"copy-range":       copiedRanges,
	"cut-to-same":      cutToSameSize,
}

// TestSemanticsWithSealedOwners is the same where owners and modes are attributes.
func TestSemanticsWithSealedOwners(t *testing.T) {
	t.Setenv(ownershipVariable, OwnershipSealed.String())
	TestSemantics(t)
}

func TestSemantics(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		for name := range semantics {
			t.Run(name, func(t *testing.T) {
				plain := t.TempDir()
				mounted := v.path(name)
				if err := os.Mkdir(mounted, 0o755); err != nil {
					t.Fatal(err)
				}
				var words [2][]string
				for i, dir := range []string{mounted, plain} {
					p := newVictim(t, "semantics", dir, name)
					p.start()
					words[i] = strings.Split(p.finishes(30*time.Second), "; ")
				}
				for i, word := range words[1] {
					if i >= len(words[0]) || words[0][i] != word {
						t.Errorf("the mount differs from a plain directory:\n  mount: %s\n  plain: %s", words[0][min(i, len(words[0])-1)], word)
					}
				}
				t.Logf("%q", words[1])
			})
		}
	})
}

// prepareSemantics runs in the directory, which other users may not come to
// from above.
func prepareSemantics(dir, name string) (func() (string, error), error) {
	return func() (string, error) {
		var said []string
		say := func(what string, results ...any) {
			for i, r := range results {
				if r == nil {
					results[i] = "ok"
				}
			}
			said = append(said, what+": "+strings.TrimSpace(fmt.Sprintln(results...)))
		}
		err := errors.Join(os.Chdir(dir), semantics[name](say))
		return strings.Join(said, "; "), err
	}, nil
}

func create(name string, mode uint32) error {
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, mode)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fchmod(fd, mode), unix.Close(fd))
}

func shown(name string) string {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return err.Error()
	}
	return showStat(&st)
}

// severalUsers: the kernel decides by mode and owner (default_permissions), new
// files are the caller's, and who writes without privilege takes the set-id bits.
func severalUsers(say func(string, ...any)) error {
	unix.Umask(0)
	for _, f := range []struct {
		name string
		mode uint32
	}{{"secret", 0o600}, {"write", 0o6777}, {"append", 0o6777}, {"truncate", 0o6777}, {"chmod", 0o777}} {
		if err := create(f.name, f.mode); err != nil {
			return err
		}
	}
	for _, d := range []struct {
		name string
		mode uint32
	}{{"closed", 0o755}, {"sticky", 0o1777}, {"group", 0o2777}} {
		if err := errors.Join(unix.Mkdir(d.name, 0o755), unix.Chmod(d.name, d.mode)); err != nil {
			return err
		}
	}
	err := errors.Join(create("sticky/root", 0o666), unix.Chown("group", 0, 77),
		syscall.Setgroups([]int{1000}), syscall.Setresgid(1000, 1000, 1000), syscall.Setresuid(1000, 1000, 1000))
	if err != nil {
		return err
	}
	_, err = unix.Open("secret", unix.O_RDONLY, 0)
	say("read a secret", err)
	say("create where it is closed", create("closed/new", 0o644))
	say("create", create("sticky/mine", 0o4755), shown("sticky/mine"))
	say("delete another's", unix.Unlink("sticky/root"))
	say("rename another's", unix.Rename("sticky/root", "sticky/r"))
	say("create in a group's directory", create("group/file", 0o644), shown("group/file"))
	say("mkdir there", unix.Mkdir("group/dir", 0o755), shown("group/dir"))
	say("symlink", unix.Symlink("x", "group/link"), shown("group/link"))
	say("fifo", unix.Mkfifo("group/fifo", 0o600), shown("group/fifo"))
	say("set-id bits of a fifo", unix.Mkfifo("sticky/fifo", 0o6755), shown("sticky/fifo"))
	say("device", unix.Mknod("group/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	say("chmod another's", unix.Chmod("chmod", 0o600))
	say("give away", unix.Chown("sticky/mine", 0, -1))
	say("set-group-id of another group", unix.Chmod("group/file", 0o2755), shown("group/file"))
	say("times of another's", unix.UtimesNanoAt(unix.AT_FDCWD, "chmod", make([]unix.Timespec, 2), 0))
	say("attribute of a secret", unix.Setxattr("secret", "user.a", nil, 0))
	// Set-group-id without group execution is kept, as FUSE prescribes; ext4
	// takes it from those who are not in the group.
	for _, name := range []string{"write", "append"} {
		fd, err := unix.Open(name, unix.O_WRONLY|map[bool]int{true: unix.O_APPEND}[name == "append"], 0)
		_, werr := unix.Write(fd, []byte("x"))
		say(name+" with set-id bits", err, werr, unix.Close(fd), shown(name))
	}
	say("truncate with set-id bits", unix.Truncate("truncate", 10), shown("truncate"))
	return nil
}

// tryLocks tries what another process may have locked.
func tryLocks(say func(string, ...any)) {
	fd, err := unix.Open("locked", unix.O_RDWR, 0)
	say("open", err)
	for _, l := range []struct {
		what  string
		cmd   int
		start int64
		kind  int16
	}{
		{"fcntl", unix.F_SETLK, 0, unix.F_WRLCK}, {"fcntl shared", unix.F_SETLK, 40, unix.F_RDLCK}, {"fcntl shared, alone", unix.F_SETLK, 40, unix.F_WRLCK},
		{"fcntl beside", unix.F_SETLK, 10, unix.F_WRLCK}, {"OFD", unix.F_OFD_SETLK, 20, unix.F_WRLCK}, {"fcntl against OFD", unix.F_SETLK, 20, unix.F_RDLCK},
	} {
		say(l.what, unix.FcntlFlock(uintptr(fd), l.cmd, &unix.Flock_t{Type: l.kind, Start: l.start, Len: 10}))
	}
	owner := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
	err = unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &owner)
	say("owner", err, owner.Type, owner.Start, owner.Len, owner.Pid == int32(os.Getppid()))
	say("flock", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB))
	say("shared flock", unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB))
}

// locksHeld takes locks of all three kinds, lets another process try them, and
// again when they are given back.
func locksHeld(say func(string, ...any)) error {
	if err := create("locked", 0o644); err != nil {
		return err
	}
	fd, err := unix.Open("locked", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = errors.Join(
		unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 10}),
		unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: 40, Len: 10}),
		unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 20, Len: 10}),
		unix.Flock(fd, unix.LOCK_EX))
	if err != nil {
		return err
	}
	other := func(when string) error {
		cmd := exec.Command(os.Args[0], ".", "")
		cmd.Env = append(os.Environ(), victimEnv+"=try-locks")
		cmd.Stdin = strings.NewReader("\n")
		out, err := cmd.Output()
		_, word, _ := strings.Cut(string(out), "done ")
		say(when, strings.TrimSpace(word))
		return err
	}
	if err := other("held"); err != nil {
		return err
	}
	unix.Close(fd)
	return other("given back")
}

func prepareTryLocks(string, string) (func() (string, error), error) {
	return func() (string, error) {
		var said []string
		tryLocks(func(what string, results ...any) { said = append(said, what+" "+fmt.Sprint(results...)) })
		return strings.Join(said, ", "), nil
	}, nil
}

// dirReader reads a directory in small pieces and counts what it saw.
type dirReader struct {
	fd   int
	seen map[string]int
	next int64 // where the last entry says that the next one is
}

// read reads so many pieces, all that there are with -1.
func (r *dirReader) read(pieces int) error {
	buf := make([]byte, 2048)
	for ; pieces != 0; pieces-- {
		n, err := unix.Getdents(r.fd, buf)
		if err != nil || n == 0 {
			return err
		}
		for rest := buf[:n]; len(rest) > 0; { // struct linux_dirent64
			length := int(binary.NativeEndian.Uint16(rest[16:]))
			name, _, _ := strings.Cut(string(rest[19:length]), "\x00")
			r.seen[name]++
			r.next = int64(binary.NativeEndian.Uint64(rest[8:]))
			rest = rest[length:]
		}
	}
	return nil
}

// from goes to a place and reads all from there.
func (r *dirReader) from(at int64) error {
	_, err := unix.Seek(r.fd, at, unix.SEEK_SET)
	clear(r.seen)
	return errors.Join(err, r.read(-1))
}

// seekDuringChange: what is in a directory all the time is listed once, whatever
// comes and goes beside it and wherever a reader goes back to.
func seekDuringChange(say func(string, ...any)) error {
	const files = 800
	name := func(i int) string { return fmt.Sprintf("entry-%04d", i) }
	for i := range files {
		if err := create(name(i), 0o644); err != nil {
			return err
		}
	}
	fd, err := unix.Open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	r := &dirReader{fd: fd, seen: map[string]int{}}
	if err := r.read(5); err != nil {
		return err
	}
	at, before := r.next, maps.Clone(r.seen)
	for i := range files {
		switch i % 4 {
		case 0:
			err = errors.Join(err, unix.Unlink(name(i)))
		case 1:
			err = errors.Join(err, create("new-"+name(i), 0o644))
		}
	}
	stayed := func(seen map[string]int) (missing, doubled int) {
		for i := range files {
			if n := seen[name(i)]; i%4 != 0 && n == 0 {
				missing++
			} else if n > 1 {
				doubled++
			}
		}
		return missing, doubled
	}
	err = errors.Join(err, r.read(-1))
	missing, doubled := stayed(r.seen)
	say("on during the change", err, missing, doubled)
	err = r.from(at)
	for entry, n := range before {
		r.seen[entry] += n
	}
	missing, doubled = stayed(r.seen)
	say("back to a place", err, missing, doubled)
	err = r.from(0)
	missing, doubled = stayed(r.seen)
	say("from the beginning", err, missing, doubled, len(r.seen))
	return unix.Close(fd)
}

// renameOverwrite: link counts and open descriptors of what was replaced.
func renameOverwrite(say func(string, ...any)) error {
	for _, name := range []string{"a", "b", "c"} {
		if err := create(name, 0o644); err != nil {
			return err
		}
	}
	fd, err := unix.Open("b", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	count := func() string {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		return fmt.Sprint(st.Nlink, err)
	}
	say("link", unix.Link("b", "b2"), count(), shown("b"))
	say("overwrite", unix.Rename("a", "b"), count(), shown("b"), shown("b2"))
	say("overwrite the other", unix.Rename("c", "b2"), count(), shown("b2"))
	_, err = unix.Pwrite(fd, []byte("still here"), 5000)
	say("write to what has no name", err, unix.Fsync(fd), count())
	back := make([]byte, 10)
	_, err = unix.Pread(fd, back, 5000)
	say("read it", err, string(back))
	say("onto itself", unix.Link("b", "same"), unix.Rename("b", "same"), shown("b"), shown("same"))
	say("directories", unix.Mkdir("d", 0o755), unix.Mkdir("e", 0o755), unix.Mkdir("e/f", 0o755), unix.Rename("d", "e"), unix.Rename("e", "d"), shown("d"), shown("e"), shown("."))
	return nil
}

// sparseTerabytes: databases and disk images make files larger than the disk.
func sparseTerabytes(say func(string, ...any)) error {
	const tera = int64(1) << 40
	fd, err := unix.Open("large", unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return err
	}
	look := func(off int64) string {
		b := make([]byte, 10_000)
		n, err := unix.Pread(fd, b, off)
		return digest(b[:max(n, 0)]) + said(err)
	}
	say("grow", unix.Ftruncate(fd, 8*tera+5), shown("large"), look(5*tera), look(8*tera))
	_, err = unix.Pwrite(fd, []byte("in the middle"), 7*tera-5)
	say("write", err, look(7*tera-3000), look(7*tera-9995))
	_, err = unix.Pwrite(fd, []byte("behind"), 12*tera+4031)
	say("write behind", err, shown("large"), look(12*tera), unix.Fsync(fd))
	say("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1, 7*tera), look(7*tera-5))
	say("cut", unix.Ftruncate(fd, 7*tera+3), shown("large"), look(7*tera-3))
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	say("space", err, st.Blocks < 200)
	say("too large", unix.Ftruncate(fd, 1<<62), shown("large"))
	// A write(2) there is EFBIG only with write-through: the kernel's writeback
	// cache has no limit of ours to ask.
	return unix.Close(fd)
}

func specialFiles(say func(string, ...any)) error {
	say("device", unix.Mknod("null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), shown("null"))
	say("block device", unix.Mknod("disk", unix.S_IFBLK|0o600, int(unix.Mkdev(253, 1000))), shown("disk"))
	say("fifo", unix.Mkfifo("fifo", 0o644), shown("fifo"))
	fd, err := unix.Open("fifo", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 5)
	_, werr := unix.Write(fd, []byte("water"))
	_, rerr := unix.Read(fd, b)
	say("through the fifo", werr, rerr, string(b), shown("fifo"))
	server, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	address := &unix.SockaddrUnix{Name: "socket"}
	say("socket", unix.Bind(server, address), unix.Listen(server, 1), unix.Connect(client, address), shown("socket"))
	say("rename and link", unix.Rename("socket", "socket2"), unix.Link("fifo", "fifo2"), shown("fifo2"), unix.Unlink("null"), shown("null"))
	names, err := list(".")
	sort.Strings(names)
	say("list", names, err)
	say("ioctl", unix.IoctlSetInt(fd, 0x5821, 0) != nil)
	return nil
}

func directorySync(say func(string, ...any)) error {
	say("mkdir", unix.Mkdir("d", 0o755), create("d/f", 0o644))
	fd, err := unix.Open("d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	say("sync", err, unix.Fsync(fd), unix.Fdatasync(fd))
	say("sync of a removed one", unix.Unlink("d/f"), unix.Rmdir("d"), unix.Fsync(fd), unix.Close(fd))
	return nil
}

// timesOfFiles: nanoseconds, years before 1970, and times that a write made.
func timesOfFiles(say func(string, ...any)) error {
	if err := create("f", 0o644); err != nil {
		return err
	}
	times := func(fd int) string {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		return fmt.Sprint(st.Atim, st.Mtim, err)
	}
	fd, err := unix.Open("f", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	at := []unix.Timespec{{Sec: 1_700_000_000, Nsec: 1}, {Sec: -5, Nsec: 999_999_999}}
	_, err = unix.Pwrite(fd, []byte("dirty"), 0)
	say("set after a write", err, unix.UtimesNanoAt(unix.AT_FDCWD, "f", at, 0), times(fd), unix.Fsync(fd), times(fd))
	unix.Close(fd)
	if fd, err = unix.Open("f", unix.O_RDWR, 0); err != nil {
		return err
	}
	say("after a close", times(fd))
	at[0].Nsec, at[1].Nsec = unix.UTIME_OMIT, unix.UTIME_OMIT
	say("omitted", unix.UtimesNanoAt(unix.AT_FDCWD, "f", at, 0), times(fd))
	before := time.Now().Add(-time.Second) // the kernel's clock of times is coarse
	_, err = unix.Pwrite(fd, []byte("again"), 0)
	var st unix.Stat_t
	serr := unix.Fstat(fd, &st)
	say("a write is new", err, serr, time.Unix(st.Mtim.Unix()).After(before), time.Unix(st.Ctim.Unix()).After(before))
	return unix.Close(fd)
}
