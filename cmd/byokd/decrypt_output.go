package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
)

// partialSuffix ends the name of a file that is not complete yet.
const partialSuffix = ".byokd-partial"

// emptySealed is the sealed length of an empty object.
var emptySealed = seal.SealedObjectSize(0)

// outputFile is a file that appears under its name when it is complete.
type outputFile struct {
	*os.File
	root *os.Root // nil: name is relative to the working directory
	name string
	// beside makes the content of the file of metadata, which is there before the
	// file itself is; may be nil.
	beside func() ([]byte, error)
}

// newOutputFile begins a file that must not exist yet.
func newOutputFile(name string) (*outputFile, error) {
	if _, err := os.Lstat(name); err == nil {
		return nil, fmt.Errorf("%s exists already; byokd decrypt writes over nothing", name)
	}
	o := &outputFile{name: name}
	var err error
	if o.File, err = o.create(name + partialSuffix); err != nil {
		return nil, err
	}
	return o, nil
}

// create makes a new file in place of one that an earlier run may have left. Plain bytes never go
// through a name that is there already: whoever may write to the directory could have made it a
// symlink to elsewhere, or keep it open. O_EXCL follows no symlink at the end of a name.
func (o *outputFile) create(name string) (*os.File, error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	remove, open := os.Remove, os.OpenFile
	if o.root != nil {
		remove, open = o.root.Remove, o.root.OpenFile
	}
	if err := remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return open(name, flags, 0o600)
}

// Commit implements objstore.RestoreTarget: what is there under its name is all of it, also after a crash.
func (o *outputFile) Commit() error {
	err := o.Sync()
	if err = errors.Join(err, o.Close()); err == nil && o.beside != nil {
		err = o.writeBeside()
	}
	if err == nil {
		err = o.rename(o.name)
	}
	if err != nil {
		o.remove()
	}
	return err
}

// metadataSuffix ends the name of the file with an object's metadata.
const metadataSuffix = ".metadata.json"

// writeBeside writes the file of metadata, over nothing: an object may have its name,
// too. One that holds the same was left by a run that ended before the object's file was there.
func (o *outputFile) writeBeside() error {
	text, err := o.beside()
	if err != nil {
		return err
	}
	name := o.name + metadataSuffix
	switch info, err := o.lstat(name); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	case info.Mode().IsRegular() && o.holds(name, text):
		return nil
	default:
		return fmt.Errorf("%s exists already and is not the metadata of this object; byokd decrypt writes over nothing (restore elsewhere, or without --metadata)", name)
	}
	f, err := o.create(name + partialSuffix)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return o.rename(name)
}

// lstat looks at a name beside the file, without following a symlink.
func (o *outputFile) lstat(name string) (os.FileInfo, error) {
	if o.root != nil {
		return o.root.Lstat(name)
	}
	return os.Lstat(name)
}

// holds reports whether a regular file holds text.
func (o *outputFile) holds(name string, text []byte) bool {
	read := os.ReadFile
	if o.root != nil {
		read = o.root.ReadFile
	}
	got, err := read(name)
	return err == nil && bytes.Equal(got, text)
}

// Abort implements objstore.RestoreTarget.
func (o *outputFile) Abort() {
	_ = o.Close() // nothing of it is kept
	o.remove()
}

// rename gives a complete file its name.
func (o *outputFile) rename(name string) error {
	if o.root != nil {
		return o.root.Rename(name+partialSuffix, name)
	}
	return os.Rename(name+partialSuffix, name)
}

// remove is best effort: a file that is left says by its name what it is.
func (o *outputFile) remove() {
	remove := os.Remove
	if o.root != nil {
		remove = o.root.Remove
	}
	_ = remove(o.name + partialSuffix)
	_ = remove(o.name + metadataSuffix + partialSuffix)
}

// outputTree is a directory for the objects below a prefix. Keys come from the storage: none of them may
// lead out of it, not by its name and not over a symlink.
type outputTree struct {
	root   *os.Root
	prefix string
	resume bool
}

func newOutputTree(dir, prefix string, resume bool) (*outputTree, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	// What follows the last slash of the prefix begins the names, as with a file copy.
	return &outputTree{root: root, prefix: prefix[:strings.LastIndex(prefix, "/")+1], resume: resume}, nil
}

// Close ends the use of the directory.
func (t *outputTree) Close() { _ = t.root.Close() }

// target begins the file of an object.
func (t *outputTree) target(e objstore.Entry) (*outputFile, error) {
	name := strings.TrimPrefix(e.Key, t.prefix)
	if dir, found := strings.CutSuffix(name, "/"); found && e.Size == emptySealed && filepath.IsLocal(dir) {
		return nil, t.root.MkdirAll(dir, 0o700) // how consoles write a folder down
	}
	if name != filepath.Clean(name) || !filepath.IsLocal(name) || strings.HasSuffix(name, partialSuffix) {
		return nil, fmt.Errorf("the key cannot be a file name below %s: restore this object alone, with -o", t.root.Name())
	}
	if _, err := t.root.Lstat(name); err == nil {
		if t.resume {
			return nil, nil
		}
		return nil, errors.New("its file exists already; byokd decrypt writes over nothing (--resume leaves such objects out)")
	}
	if dir := filepath.Dir(name); dir != "." {
		if err := t.root.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	o := &outputFile{root: t.root, name: name}
	var err error
	if o.File, err = o.create(name + partialSuffix); err != nil {
		return nil, err
	}
	return o, nil
}
