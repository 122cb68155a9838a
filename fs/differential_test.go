package fs

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The differential test does the same random operations on a mount and on a
// plain directory of the same lower filesystem, and compares every result: what
// a plain directory says is right. It runs in a process of its own, which
// freezes and remounts meet at any point.
//
// BYOKD_OPS sets the number of operations in each cache mode (10,000 without),
// BYOKD_SEED repeats a run.

const (
	opsEnv   = "BYOKD_OPS"
	seedEnv  = "BYOKD_SEED"
	usersEnv = "BYOKD_TEST_USERS" // operations are those of several users

	compareEvery = 500  // operations between two looks at the whole trees, ten times as many in runs of millions
	remountEvery = 2500 // and between two remounts, the same
	remountsTold = 20   // remounts between two lines of progress
	toldOfLast   = 25   // operations shown when results differ
	treeMost     = 500  // entries that are begun anew with a remount: few names, many operations
)

func numberFrom(env string, otherwise uint64) uint64 {
	n, err := strconv.ParseUint(os.Getenv(env), 10, 64)
	if err != nil {
		return otherwise
	}
	return n
}

func TestDifferential(t *testing.T) {
	seed, ops := numberFrom(seedEnv, rand.Uint64()), numberFrom(opsEnv, 10_000)
	t.Logf("%s=%d %s=%d", seedEnv, seed, opsEnv, ops)
	t.Setenv(seedEnv, strconv.FormatUint(seed, 10))
	t.Setenv(opsEnv, strconv.FormatUint(ops, 10))
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		p := newVictim(t, "differential", v.mount, t.TempDir())
		p.start()
		freezes, remounts := 0, 0
		freeze := time.NewTimer(freezeAfter())
		defer freeze.Stop()
		for {
			select {
			case line := <-p.lines:
				if line == "remount" {
					remounts++
					if remounts%remountsTold == 0 {
						t.Logf("%d remounts, %d freezes", remounts, freezes)
					}
					v.remount()
					if _, err := p.stdin.Write([]byte("\n")); err != nil {
						t.Fatal(err)
					}
					continue
				}
				if !strings.HasPrefix(line, "done ") {
					t.Fatalf("%s=%d: %q", seedEnv, seed, line)
				}
				t.Logf("%s operations, %d freezes, %d remounts", strings.TrimPrefix(line, "done "), freezes, remounts)
				return
			case <-freeze.C:
				v.freeze()
				v.thaw()
				freezes++
				freeze.Reset(freezeAfter())
			}
		}
	})
}

// freezeAfter draws how long operations go on between freezes, which take a
// second each.
func freezeAfter() time.Duration { return time.Duration(500+rand.IntN(3000)) * time.Millisecond }

// side is one of the two directories with what is open in it.
type side struct {
	root string
	fds  [6]int
	maps [3]mapping
}

// mapping is a shared mapping; fd tells how far it may be touched.
type mapping struct {
	memory []byte
	off    int64
	fd     int
}

func (s *side) path(name string) string { return s.root + "/" + name }

func (s *side) closeAll() {
	for i := range s.fds {
		s.close(i)
	}
	for i := range s.maps {
		s.unmap(i)
	}
}

func (s *side) close(i int) error {
	if s.fds[i] < 0 {
		return unix.EBADF
	}
	err := unix.Close(s.fds[i])
	s.fds[i] = -1
	return err
}

func (s *side) unmap(i int) {
	if m := &s.maps[i]; m.memory != nil {
		_ = unix.Munmap(m.memory)
		_ = unix.Close(m.fd)
		*m = mapping{}
	}
}

// differ compares two sides.
type differ struct {
	rand  *rand.Rand
	sides [2]*side
	log   []string
	users bool // not all operations are root's
	tree  int  // entries when the trees were compared last
}

// user is who does an operation.
type user struct{ uid, gid int }

// become has the thread act as a user towards filesystems: the kernel takes the
// capabilities of root from it that concern them, and gives them back.
func (u user) become() {
	_, _ = unix.SetfsgidRetGid(u.gid)
	_, _ = unix.SetfsuidRetUid(u.uid)
}

func prepareDifferential(mount, plain string) (func() (string, error), error) {
	d := &differ{rand: rand.New(rand.NewPCG(numberFrom(seedEnv, 0), 0)), users: os.Getenv(usersEnv) != ""}
	for i, root := range []string{mount + "/tree", plain + "/tree"} {
		if err := unix.Mkdir(root, 0o755); err != nil {
			return nil, err
		}
		if d.users {
			if err := unix.Chmod(root, 0o777); err != nil {
				return nil, err
			}
		}
		d.sides[i] = &side{root: root}
		for j := range d.sides[i].fds {
			d.sides[i].fds[j] = -1
		}
	}
	ops := int(numberFrom(opsEnv, 0))
	rarer := 1
	if ops > 1_000_000 {
		rarer = 10
	}
	return func() (string, error) {
		for i := 1; i <= ops; i++ {
			if err := d.step(); err != nil {
				return "", fmt.Errorf("operation %d: %w", i, err)
			}
			if i%(compareEvery*rarer) == 0 || i == ops {
				if err := d.compare(); err != nil {
					return "", fmt.Errorf("after operation %d: %w", i, err)
				}
			}
			if i%(remountEvery*rarer) == 0 {
				d.sides[0].closeAll()
				d.sides[1].closeAll()
				fmt.Println("remount")
				if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
					return "", err
				}
				if err := d.compare(); err != nil {
					return "", fmt.Errorf("after operation %d and a remount: %w", i, err)
				}
				if err := d.beginAnew(); err != nil {
					return "", fmt.Errorf("after operation %d: %w", i, err)
				}
			}
		}
		return strconv.Itoa(ops), nil
	}, nil
}

// operation is drawn once and done on each side; it returns all that it sees.
type operation struct {
	what string
	do   func(s *side) string
}

func (d *differ) step() error {
	op := drawing[d.rand.IntN(len(drawing))](d)
	var saw [2]string
	var as user
	if d.users {
		as = []user{{0, 0}, {1, 1}, {1, 1}, {1, 2}, {2, 1}, {2, 2}}[d.rand.IntN(6)]
		op.what = fmt.Sprintf("as %d:%d %s", as.uid, as.gid, op.what)
	}
	for i, s := range d.sides {
		as.become()
		saw[i] = op.do(s)
		user{}.become()
	}
	d.log = append(d.log, op.what+" = "+saw[1])
	if len(d.log) > toldOfLast {
		d.log = d.log[1:]
	}
	if saw[0] != saw[1] {
		return d.differs(fmt.Sprintf("%s\n  mount: %s\n  plain: %s", op.what, saw[0], saw[1]))
	}
	return nil
}

func (d *differ) differs(how string) error {
	fmt.Fprintf(os.Stderr, "%s=%d\n%s\nthe last operations, and what the plain directory said:\n  %s\n",
		seedEnv, numberFrom(seedEnv, 0), how, strings.Join(d.log, "\n  "))
	return fmt.Errorf("the mount differs from a plain directory, see above")
}

// compare compares the whole trees.
func (d *differ) compare() error {
	var trees [2][]string
	for i, s := range d.sides {
		var err error
		if trees[i], err = describe(s.root, ""); err != nil {
			return d.differs(err.Error())
		}
	}
	d.tree = len(trees[0])
	if slices.Equal(trees[0], trees[1]) {
		return nil
	}
	for i := range max(len(trees[0]), len(trees[1])) {
		line := [2]string{}
		for j, tree := range trees {
			if i < len(tree) {
				line[j] = tree[i]
			}
		}
		if line[0] != line[1] {
			return d.differs(fmt.Sprintf("trees\n  mount: %s\n  plain: %s", line[0], line[1]))
		}
	}
	return nil
}

// beginAnew empties trees that have grown. Renames nest directories, which are
// never empty again, so that without it a run of millions of operations looks
// at ever more that no operation reaches.
func (d *differ) beginAnew() error {
	if d.tree < treeMost {
		return nil
	}
	for _, s := range d.sides {
		names, err := os.ReadDir(s.root)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := os.RemoveAll(s.path(name.Name())); err != nil {
				return err
			}
		}
	}
	return d.compare()
}

// deepest is how long a path below the root may be that describe goes down to:
// renames nest directories without an end, and a path of the kernel has one.
const deepest = unix.PathMax - 1000

// describe tells all there is to see of a directory.
func describe(root, dir string) ([]string, error) {
	if len(dir) > deepest {
		return []string{dir + " too deep"}, nil
	}
	names, err := list(root + "/" + dir)
	if err != nil {
		return nil, err
	}
	var tree []string
	for _, entry := range names {
		name := dir + "/" + strings.Fields(entry)[0]
		path := root + name
		line := entry + " " + statOf(path) + " xattrs " + xattrsOf(path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return nil, err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			below, err := describe(root, name)
			if err != nil {
				return nil, err
			}
			tree = append(tree, below...)
		case unix.S_IFLNK:
			line += " -> " + readlinkOf(path)
		case unix.S_IFREG:
			content, err := wholeFile(path)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			line += " " + digest(content)
		}
		tree = append(tree, name+" "+line)
	}
	return tree, nil
}

func wholeFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	content := bytes.NewBuffer(make([]byte, 0, st.Size+bytes.MinRead))
	_, err = content.ReadFrom(readerOf(fd))
	return content.Bytes(), err
}

// readerOf reads a descriptor without the runtime's poller.
type readerOf int

func (r readerOf) Read(b []byte) (int, error) {
	n, err := unix.Read(int(r), b)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

// list returns the sorted names of a directory, with their kinds.
func list(path string) ([]string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 1024)
	var names []string
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			sort.Strings(names)
			return names, nil
		}
		for rest := buf[:n]; len(rest) > 0; {
			length := int(rest[16]) | int(rest[17])<<8 // struct linux_dirent64
			name, _, _ := strings.Cut(string(rest[19:length]), "\x00")
			if name != "." && name != ".." {
				names = append(names, fmt.Sprintf("%s kind %d", name, rest[18]))
			}
			rest = rest[length:]
		}
	}
}

// digest shortens contents so that a difference can be read: length, sum, and
// where the zeros end.
func digest(b []byte) string {
	zeros := 0
	for zeros < len(b) && b[zeros] == 0 {
		zeros++
	}
	sum := sha256.Sum256(b)
	return fmt.Sprintf("%d bytes, %d zeros first, sum %x", len(b), zeros, sum[:8])
}

func said(err error) string {
	if err == nil {
		return "ok"
	}
	return err.Error()
}

func statOf(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return said(err)
	}
	return showStat(&st)
}

func showStat(st *unix.Stat_t) string {
	size := st.Size
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0 // sealed names are longer
	}
	return fmt.Sprintf("mode %o nlink %d owner %d:%d rdev %d size %d", st.Mode, st.Nlink, st.Uid, st.Gid, st.Rdev, size)
}

func xattrsOf(path string) string {
	b := make([]byte, 4096)
	n, err := unix.Llistxattr(path, b)
	if err != nil {
		return said(err)
	}
	var names []string
	for _, name := range strings.Split(string(b[:n]), "\x00") {
		if strings.HasPrefix(name, "user.") {
			names = append(names, name+"="+xattrOf(path, name))
		}
	}
	sort.Strings(names)
	return strings.Join(names, ",")
}

func xattrOf(path, name string) string {
	b := make([]byte, 4096)
	n, err := unix.Lgetxattr(path, name, b)
	if err != nil {
		return said(err)
	}
	return digest(b[:n])
}

func readlinkOf(path string) string {
	b := make([]byte, 4096)
	n, err := unix.Readlink(path, b)
	if err != nil {
		return said(err)
	}
	return string(b[:n])
}
