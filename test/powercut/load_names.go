//go:build linux

package powercut

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// namesLoad creates, replaces, links, renames and unlinks whole files in
// three directories, and syncs the directories.
type namesLoad struct {
	slots map[string][]version
	tag   uint64
}

// version is what a name stands for from some moment on.
type version struct {
	begin, acked int    // places in the log
	tag          uint64 // of the content; 0 for no file
	inPlace      bool   // written under its name: until it is acknowledged it may be there in part
	moves        string // the name that this one's file came from or went to in the same rename
}

func (*namesLoad) name() string { return "names" }

var nameDirs = []string{"a", "b", "c"}

func (l *namesLoad) run(ctx context.Context, w *world) error {
	l.slots = map[string][]version{}
	var names []string
	for _, d := range nameDirs {
		if err := os.Mkdir(filepath.Join(w.dir, d), 0o700); err != nil {
			return err
		}
		for i := range 4 {
			names = append(names, fmt.Sprintf("%s/file-%d", d, i))
		}
	}
	if err := syncPath(w.dir); err != nil {
		return err
	}
	for ctx.Err() == nil {
		one, other := names[w.rand.IntN(len(names))], names[w.rand.IntN(len(names))]
		if one == other {
			continue
		}
		if err := l.step(w, one, other); err != nil {
			return err
		}
	}
	return nil
}

func (l *namesLoad) current(name string) uint64 {
	if v := l.slots[name]; len(v) > 0 {
		return v[len(v)-1].tag
	}
	return 0
}

func (l *namesLoad) step(w *world, one, other string) error {
	from, to := filepath.Join(w.dir, one), filepath.Join(w.dir, other)
	has, free := l.current(one), l.current(other) == 0
	switch {
	case has == 0:
		l.tag++
		return l.change(w, map[string]version{one: {tag: l.tag, inPlace: true}}, func() error { return writeFile(from, l.tag) })
	case w.rand.IntN(3) == 0: // replace, as configuration files are
		l.tag++
		if err := writeFile(from+".new", l.tag); err != nil {
			return err
		}
		return l.change(w, map[string]version{one: {tag: l.tag}}, func() error { return os.Rename(from+".new", from) })
	case free && w.rand.IntN(2) == 0:
		return l.change(w, map[string]version{other: {tag: has}}, func() error { return os.Link(from, to) })
	case w.rand.IntN(2) == 0 && l.current(other) != has: // of two names of one file rename does nothing
		return l.change(w, map[string]version{one: {moves: other}, other: {tag: has, moves: one}}, func() error { return os.Rename(from, to) })
	default:
		return l.change(w, map[string]version{one: {}}, func() error { return os.Remove(from) })
	}
}

// change notes new versions of names, makes them, and makes them durable.
func (l *namesLoad) change(w *world, versions map[string]version, do func() error) error {
	begin := w.now()
	for name, v := range versions {
		v.begin, v.acked = begin, unacknowledged
		l.slots[name] = append(l.slots[name], v)
	}
	if err := do(); err != nil {
		return err
	}
	for name := range versions {
		if err := syncPath(filepath.Join(w.dir, filepath.Dir(name))); err != nil {
			return err
		}
	}
	for name := range versions {
		v := l.slots[name]
		v[len(v)-1].acked = w.now()
	}
	return nil
}

const unacknowledged = int(^uint(0) >> 1)

// contentOf is what a file with this tag holds: up to five blocks.
func contentOf(tag uint64) []byte {
	b := make([]byte, tag*2654435761%20000)
	pattern(b, tag, 0)
	return b
}

func writeFile(path string, tag uint64) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for b := contentOf(tag); len(b) > 0; {
		n, err := unix.Write(fd, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return unix.Fsync(fd)
}

func (l *namesLoad) check(dir string, cut int) error {
	for name, versions := range l.slots {
		if err := l.checkName(dir, name, versions, cut); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (l *namesLoad) checkName(dir, name string, versions []version, cut int) error {
	got, err := os.ReadFile(filepath.Join(dir, name))
	there := err == nil
	if !there && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	possible := []version{{}} // no file, before the first
	for _, v := range versions {
		switch {
		case v.acked <= cut:
			possible = []version{v}
		case v.begin < cut:
			possible = append(possible, v)
		}
	}
	for _, v := range possible {
		switch {
		case !there && v.tag == 0 && (v.moves == "" || v.acked <= cut):
			return nil
		case !there && v.tag == 0: // moved, perhaps: then it is there
			_, err := os.Lstat(filepath.Join(dir, v.moves))
			return err
		case there && v.tag != 0 && bytes.Equal(got, contentOf(v.tag)):
			return nil
		case there && v.inPlace && v.acked > cut && partOf(got, contentOf(v.tag)):
			return nil
		}
	}
	if !there {
		return fmt.Errorf("is not there; expected %+v", possible)
	}
	return fmt.Errorf("%d bytes that are none of %+v", len(got), possible)
}

// partOf tells whether got is a beginning of want, with zeros where it was not
// written yet.
func partOf(got, want []byte) bool {
	if len(got) > len(want)+sector {
		return false
	}
	for i, b := range got {
		if b != 0 && (i >= len(want) || b != want[i]) {
			return false
		}
	}
	return true
}
