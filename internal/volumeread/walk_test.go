package volumeread

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// lowerVolume is a volume as byokd leaves it on the disk, made by hand.
type lowerVolume struct {
	t    *testing.T
	dir  string
	root *seal.Root
}

func newLowerVolume(t *testing.T) *lowerVolume {
	t.Helper()
	l := &lowerVolume{t: t, dir: t.TempDir()}
	id := seal.NewID()
	var err error
	l.root, err = seal.NewRoot(id, bytes.Repeat([]byte{7}, seal.RootSize))
	l.must(err)
	header, err := l.root.SignVolumeHeader(seal.VolumeHeader{
		Volume: id, Generation: 1, KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/one", WrappedRoot: []byte{1}, Probe: []byte{2},
	})
	l.must(err)
	text, err := header.Marshal()
	l.must(err)
	l.must(os.WriteFile(filepath.Join(l.dir, seal.VolumeHeaderName), text, 0o600))
	return l
}

func (l *lowerVolume) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// at is the lower path of a plain one.
func (l *lowerVolume) at(names ...string) string {
	l.t.Helper()
	path := l.dir
	for _, name := range names {
		sealed, err := l.root.SealName(name)
		l.must(err)
		path = filepath.Join(path, sealed)
	}
	return path
}

func (l *lowerVolume) file(content []byte, names ...string) {
	l.t.Helper()
	id := seal.NewID()
	cipher, err := l.root.File(id)
	l.must(err)
	var sealed []byte
	for index := int64(0); len(content) > 0; index++ {
		n := min(len(content), seal.PayloadOf(index))
		var block [seal.BlockSize]byte
		cipher.SealBlock(block[:], uint64(index), content[:n])
		sealed, content = append(sealed, block[:]...), content[n:]
	}
	path := l.at(names...)
	l.must(os.WriteFile(path, sealed, 0o600))
	l.must(unix.Setxattr(path, idAttribute, id[:], 0))
}

func (l *lowerVolume) link(target string, names ...string) {
	l.t.Helper()
	sealed, err := l.root.SealTarget([]byte(target))
	l.must(err)
	l.must(os.Symlink(string(sealed), l.at(names...)))
}

// alone serves a volume to which nobody writes but the test's visitor.
type alone struct{}

func (alone) Still(_ int, _, _ int64, read func()) error { read(); return nil }

// seen is a Visitor that notes what it is told, and may change the volume meanwhile.
type seen struct {
	what   map[string]string // by plain path
	faults []Fault
	enter  func(e *Entry)
}

func (s *seen) Enter(e *Entry) error {
	if s.enter != nil {
		s.enter(e)
	}
	s.what[e.Path] = "directory"
	return nil
}
func (s *seen) Leave(*Entry) error   { return nil }
func (s *seen) Fault(f Fault) error  { s.faults = append(s.faults, f); return nil }
func (s *seen) Other(e *Entry) error { s.what[e.Path] = "→ " + e.Target; return nil }
func (s *seen) File(e *Entry, f *File) error {
	var content []byte
	faulty, err := f.Blocks(func(off int64, plain []byte) error {
		content = append(append(content, make([]byte, off-int64(len(content)))...), plain...)
		return nil
	})
	s.what[e.Path] = fmt.Sprintf("%d bytes, %d faulty, %q", f.Size(), faulty, bytes.TrimRight(content, "\x00"))
	return err
}

// walk opens the volume and visits it.
func (l *lowerVolume) walk(served Server, visit *seen) *Volume {
	l.t.Helper()
	v, err := open(l.dir, served)
	l.must(err)
	l.t.Cleanup(func() { v.Close() })
	l.must(v.Unlock(func(f func(*seal.Root) error) (err error) {
		seal.Do(func() { err = f(l.root) })
		return err
	}))
	visit.what = map[string]string{}
	l.must(v.Walk(context.Background(), visit))
	return v
}

// TestWalk visits each kind of entry and finds each kind of damage.
func TestWalk(t *testing.T) {
	l := newLowerVolume(t)
	long := bytes.Repeat([]byte("long"), 3000)
	l.must(os.Mkdir(l.at("dir"), 0o700))
	l.file([]byte("content"), "dir", "short")
	l.file(long, "dir", "long")
	l.file(nil, "empty")
	l.link("to/elsewhere", "link")
	want := map[string]string{
		".": "directory", "dir": "directory", "dir/short": `7 bytes, 0 faulty, "content"`, "dir/long": fmt.Sprintf("12000 bytes, 0 faulty, %q", long),
		"empty": `0 bytes, 0 faulty, ""`, "link": "→ to/elsewhere",
	}
	var s seen
	l.walk(nil, &s)
	if !maps.Equal(s.what, want) || len(s.faults) != 0 {
		t.Errorf("%v %v instead of %v", s.what, s.faults, want)
	}

	l.must(os.WriteFile(l.dir+"/foreign", nil, 0o600))
	f, err := os.OpenFile(l.at("dir", "long"), os.O_WRONLY, 0)
	l.must(err)
	_, err = f.WriteAt([]byte{0xff, 0xff}, seal.BlockSize+1000)
	l.must(errors.Join(err, f.Close()))
	l.must(unix.Setxattr(l.at("dir", "short"), idAttribute, make([]byte, len(seal.FileID{})), 0))
	s = seen{}
	l.walk(nil, &s)
	got := map[Reason]string{}
	slices.SortFunc(s.faults, func(a, b Fault) int { return -strings.Compare(a.Path, b.Path) })
	for _, f := range s.faults {
		got[f.Reason] += fmt.Sprintf("%s %d+%d ", f.Path, f.Offset, f.Length)
	}
	if want := map[Reason]string{
		Foreign: ". 0+0 ", Damaged: fmt.Sprintf("dir/short 0+%d dir/long %d+%d ", seal.PayloadOf(0), seal.BlockStart(1), seal.BlockPayload), IDMismatch: "dir/short 0+0 ",
	}; !maps.Equal(got, want) {
		t.Errorf("%v instead of %v", got, want)
	}
}

// first returns a name whose sealed form comes before those of the others: names are visited in lower order.
func (l *lowerVolume) first(others ...string) string {
	for i := 0; ; i++ {
		name := fmt.Sprintf("dir-%d", i)
		if !slices.ContainsFunc(others, func(other string) bool { return l.at(other) < l.at(name) }) {
			return name
		}
	}
}

// TestWalkWhileNamesGo removes and replaces names after they were listed: in a volume that is served that is
// life, and is counted; in one that nobody serves nothing may go, and it is told as a fault.
func TestWalkWhileNamesGo(t *testing.T) {
	for name, c := range map[string]struct {
		change func(l *lowerVolume, dir string) // as the walk enters dir, when the root has been listed
		gone   int
	}{
		"nothing":                       {func(*lowerVolume, string) {}, 0},
		"the directory that is entered": {func(l *lowerVolume, dir string) { l.must(os.RemoveAll(l.at(dir))) }, 1},
		"names not yet listed":          {func(l *lowerVolume, dir string) { l.must(os.Remove(l.at(dir, "inner"))) }, 0},
		"names that were listed":        {func(l *lowerVolume, _ string) { l.must(errors.Join(os.Remove(l.at("link")), os.Remove(l.at("zzz")))) }, 2},
		"a link by a directory": {func(l *lowerVolume, _ string) {
			l.must(errors.Join(os.Remove(l.at("link")), os.Mkdir(l.at("link"), 0o700)))
		}, 0},
		"a file by another with its name": {func(l *lowerVolume, _ string) {
			l.file([]byte("other"), "new")
			l.must(os.Rename(l.at("new"), l.at("zzz")))
		}, 0},
	} {
		for _, served := range []Server{nil, alone{}} {
			t.Run(fmt.Sprintf("%s, served %t", name, served != nil), func(t *testing.T) {
				l := newLowerVolume(t)
				dir := l.first("link", "zzz", "new")
				l.must(os.Mkdir(l.at(dir), 0o700))
				l.file([]byte("inner"), dir, "inner")
				l.link("target", "link")
				l.file([]byte("last"), "zzz")
				s := seen{enter: func(e *Entry) {
					if e.Path == dir {
						c.change(l, dir)
					}
				}}
				changed, faults := c.gone, 0
				if served == nil {
					changed, faults = 0, c.gone
				}
				if v := l.walk(served, &s); v.Changed() != int64(changed) || len(s.faults) != faults {
					t.Errorf("%d names had gone, and %v", v.Changed(), s.faults)
				}
				for _, f := range s.faults {
					if f.Reason != Unreadable {
						t.Errorf("%+v", f)
					}
				}
			})
		}
	}
}
