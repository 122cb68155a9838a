package fs

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// names makes, renames, links and removes names, and compares each answer and now
// and then the whole directory with a model.
func names(dir string, r *rand.Rand, going func() bool) error {
	m := nameModel{dir: dir, r: r, kinds: map[string]byte{}, contents: map[string]string{}}
	for step := 0; going(); step++ {
		if err := m.step(step); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
		if step%50 == 0 {
			if err := m.compare(); err != nil {
				return fmt.Errorf("step %d: %w", step, err)
			}
		}
	}
	return m.compare()
}

// nameModel is a flat directory: what each name is (file, directory, symlink), and
// what is in files.
type nameModel struct {
	dir      string
	r        *rand.Rand
	kinds    map[string]byte
	contents map[string]string
}

const modelNames = 12

func (m *nameModel) name() string         { return fmt.Sprint("n", m.r.IntN(modelNames)) }
func (m *nameModel) path(n string) string { return filepath.Join(m.dir, n) }

func expect(what string, err, want error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("%s: %v, want %v", what, err, want)
	}
	return nil
}

func (m *nameModel) set(n string, kind byte, content string) {
	m.kinds[n], m.contents[n] = kind, content
}
func (m *nameModel) drop(n string) { delete(m.kinds, n); delete(m.contents, n) }

func (m *nameModel) step(step int) error {
	a, b := m.name(), m.name()
	have := m.kinds[a] != 0
	switch m.r.IntN(8) {
	case 0:
		return m.create(a, fmt.Sprint(step), have)
	case 1:
		err := unix.Mkdir(m.path(a), 0o700)
		if have {
			return expect("mkdir", err, unix.EEXIST)
		}
		m.set(a, 'd', "")
		return expect("mkdir", err, nil)
	case 2:
		target := fmt.Sprint("target-", step)
		err := unix.Symlink(target, m.path(a))
		if have {
			return expect("symlink", err, unix.EEXIST)
		}
		m.set(a, 'l', target)
		return expect("symlink", err, nil)
	case 3, 4:
		return m.rename(a, b)
	case 5:
		return m.link(a, b)
	case 6:
		return m.exchange(a, b)
	}
	return m.remove(a)
}

func (m *nameModel) create(a, content string, have bool) error {
	fd, err := unix.Open(m.path(a), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600)
	if have {
		return expect("create", err, unix.EEXIST)
	}
	if err != nil {
		return expect("create", err, nil)
	}
	defer unix.Close(fd)
	m.set(a, 'f', content)
	_, err = unix.Write(fd, []byte(content))
	return expect("write", err, nil)
}

func (m *nameModel) rename(a, b string) error {
	from, to := m.kinds[a], m.kinds[b]
	err := unix.Rename(m.path(a), m.path(b))
	switch {
	case from == 0:
		return expect("rename of none", err, unix.ENOENT)
	case a == b:
		return expect("rename to itself", err, nil)
	case from == 'd' && to != 0 && to != 'd':
		return expect("rename of a directory", err, unix.ENOTDIR)
	case from != 'd' && to == 'd':
		return expect("rename to a directory", err, unix.EISDIR)
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", a, b, err)
	}
	same, err2 := m.sameFile(a, b)
	if same || err2 != nil {
		return err2
	}
	m.set(b, from, m.contents[a])
	m.drop(a)
	return nil
}

// sameFile reports whether both names are there after a rename, which happens when
// they are links of one file: then nothing is done.
func (m *nameModel) sameFile(a, b string) (bool, error) {
	var x, y unix.Stat_t
	if err := unix.Lstat(m.path(b), &y); err != nil {
		return false, fmt.Errorf("%s after a rename: %w", b, err)
	}
	err := unix.Lstat(m.path(a), &x)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err == nil && x.Ino != y.Ino {
		err = fmt.Errorf("%s is there after it was renamed", a)
	}
	return err == nil, err
}

func (m *nameModel) link(a, b string) error {
	err := unix.Link(m.path(a), m.path(b))
	switch {
	case m.kinds[a] == 0:
		return expect("link of none", err, unix.ENOENT)
	case m.kinds[b] != 0 && m.kinds[a] != 'd':
		return expect("link", err, unix.EEXIST)
	case m.kinds[a] == 'd':
		if err == nil {
			return errors.New("a directory was linked")
		}
		return nil
	}
	m.set(b, m.kinds[a], m.contents[a])
	return expect("link", err, nil)
}

func (m *nameModel) exchange(a, b string) error {
	err := unix.Renameat2(unix.AT_FDCWD, m.path(a), unix.AT_FDCWD, m.path(b), unix.RENAME_EXCHANGE)
	if m.kinds[a] == 0 || m.kinds[b] == 0 {
		return expect("exchange of none", err, unix.ENOENT)
	}
	m.kinds[a], m.kinds[b] = m.kinds[b], m.kinds[a]
	m.contents[a], m.contents[b] = m.contents[b], m.contents[a]
	return expect("exchange", err, nil)
}

func (m *nameModel) remove(a string) error {
	kind := m.kinds[a]
	m.drop(a)
	if kind == 'd' {
		return expect("rmdir", unix.Rmdir(m.path(a)), nil)
	}
	err := unix.Unlink(m.path(a))
	if kind == 0 {
		return expect("unlink of none", err, unix.ENOENT)
	}
	return expect("unlink", err, nil)
}

func (m *nameModel) compare() error {
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return err
	}
	got := map[string]bool{}
	for _, e := range entries {
		got[e.Name()] = true
		want := m.kinds[e.Name()]
		is := byte('f')
		switch {
		case e.IsDir():
			is = 'd'
		case e.Type()&os.ModeSymlink != 0:
			is = 'l'
		}
		if is != want {
			return fmt.Errorf("%s is %q, the model says %q", e.Name(), is, want)
		}
		text := ""
		switch is {
		case 'f':
			b, err := os.ReadFile(m.path(e.Name()))
			if err != nil {
				return err
			}
			text = string(b)
		case 'l':
			if text, err = os.Readlink(m.path(e.Name())); err != nil {
				return err
			}
		}
		if text != m.contents[e.Name()] {
			return fmt.Errorf("%s holds %q, the model says %q", e.Name(), text, m.contents[e.Name()])
		}
	}
	for n := range m.kinds {
		if !got[n] {
			return fmt.Errorf("%s is missing, the model says %q", n, m.kinds[n])
		}
	}
	return nil
}
