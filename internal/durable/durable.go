package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrTooLarge is returned by ReadFile for a file above its limit.
var ErrTooLarge = errors.New("durable: file larger than its limit")

// ErrNotRegular is returned by ReadFile for a directory, pipe or device.
var ErrNotRegular = errors.New("durable: not a regular file")

// TempName returns the path of the temporary file that WriteFile uses for path.
func TempName(path string) string { return path + ".tmp" }

// WriteFile replaces the file at path by data with the permissions perm. After
// nil, the new content survives a power cut. After an error the file at path is
// the old or the new one, and which of them survives a power cut is open: the
// caller repeats the write or reads the file again before relying on either.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return replace(osSteps{}, path, data, perm)
}

// steps is what replacing a file asks of the operating system.
type steps interface {
	create(path string, perm fs.FileMode) (tempFile, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(path string) error
}

// tempFile is a file being written.
type tempFile interface {
	Write([]byte) (int, error)
	Sync() error
	Close() error
}

func replace(s steps, path string, data []byte, perm fs.FileMode) (err error) {
	temp := TempName(path)
	f, err := s.create(temp, perm)
	if err != nil {
		return fmt.Errorf("durable: %w", err)
	}
	if err := fill(f, data); err != nil {
		return errors.Join(fmt.Errorf("durable: %w", err), s.remove(temp))
	}
	if err := s.rename(temp, path); err != nil {
		return errors.Join(fmt.Errorf("durable: %w", err), s.remove(temp))
	}
	if err := s.syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("durable: %s was replaced, but is not durable: %w", path, err)
	}
	return nil
}

// fill writes, syncs and closes f; it closes f in any case.
func fill(f tempFile, data []byte) error {
	_, err := f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// ReadFile returns the content of a regular file of at most limit bytes. It
// returns ErrTooLarge for a larger one, without reading it all, and ErrNotRegular
// for anything else, without waiting on it.
func ReadFile(path string, limit int) ([]byte, error) {
	// Without O_NONBLOCK, opening a pipe that somebody put there would hang.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("durable: %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, fmt.Errorf("durable: %w", err)
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s", ErrNotRegular, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("durable: %w", err)
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%w: %s", ErrTooLarge, path)
	}
	return data, nil
}

// osSteps does the real thing.
type osSteps struct{}

func (osSteps) create(path string, perm fs.FileMode) (tempFile, error) {
	// A file left by a crash may have other permissions or be a trap that points
	// elsewhere: never write through it.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(perm); err != nil { // whatever the umask
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return f, nil
}

func (osSteps) rename(from, to string) error { return os.Rename(from, to) }

func (osSteps) remove(path string) error { return os.Remove(path) }

func (osSteps) syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
