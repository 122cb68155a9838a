//go:build linux

package test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// roles are the loads. Each makes what it needs in its own directory and then
// loops flat out until it is told to stop.
var roles = map[string]func(*worker) error{
	"cached":    (*worker).cached,
	"direct":    (*worker).direct,
	"sendfile":  (*worker).sendfile,
	"mapped":    (*worker).mapped,
	"names":     (*worker).names,
	"rewrite":   (*worker).rewrite,
	"beside":    (*worker).beside,
	"store":     (*worker).store,
	"journal":   (*worker).journal,
	"overwrite": (*worker).overwrite,
	"bulk":      (*worker).bulk,
	"create":    (*worker).create,
	"verify":    (*worker).verify,
	"list":      (*worker).list,
	"clear":     (*worker).clear,
	"call":      (*worker).call,
	"registers": (*worker).threadRegisters,
	"signalled": (*worker).signalled,
	"hog":       (*worker).hog,
}

// readers and writers are all of them that a revocation has to stop.
func readers() []string { return []string{"cached", "direct", "sendfile", "mapped", "names", "beside"} }
func writers() []string {
	return []string{"store", "journal", "overwrite", "bulk", "create", "rewrite"}
}

const (
	fileSize  = 4 << 20 // of the files that are read: as much plaintext in the kernel's cache for each
	bulkSize  = 4 << 20 // of one big write()
	bulkSlots = 4
	slotSize  = 512 // of one small overwrite
	slots     = 2048
	entrySize = 320 // of a journal entry; no divisor of a sealed block's payload
	keptFiles = 32  // that create leaves
)

// make opens a new file in the worker's directory.
func (w *worker) make(name string, flags int) (*os.File, error) {
	if err := os.MkdirAll(w.Dir, 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(w.path(name), os.O_RDWR|os.O_CREATE|flags, 0o644)
}

// path gives a name in the worker's directory; it is secret, and so holds the canary.
func (w *worker) path(name string) string { return filepath.Join(w.Dir, name+"-"+w.Canary) }

// filled makes a file of fileSize bytes of pattern, and returns what is in it.
func (w *worker) filled(name string) (*os.File, []byte, error) {
	f, err := w.make(name, 0)
	if err != nil {
		return nil, nil, err
	}
	content := make([]byte, fileSize)
	pattern(content, w.Canary, 0)
	if _, err := f.Write(content); err != nil {
		return nil, nil, err
	}
	return f, content, f.Sync()
}

// cached reads a file through the kernel's cache.
func (w *worker) cached() error {
	f, want, err := w.filled("cached")
	if err != nil {
		return err
	}
	buf := make([]byte, 128<<10)
	for off := 0; !w.stopped(); off = (off + len(buf)) % len(want) {
		if err := w.do("pread", func() error { return readWhole(int(f.Fd()), buf, want, off) }); err != nil {
			return err
		}
	}
	return nil
}

// readWhole reads into buf at off, all of it, and compares.
func readWhole(fd int, buf, want []byte, off int) error {
	n, err := unix.Pread(fd, buf, int64(off))
	if err != nil {
		return err
	}
	if n != len(buf) {
		return fmt.Errorf("a short read: %d bytes of %d at %d", n, len(buf), off)
	}
	if !bytes.Equal(buf, want[off:off+n]) {
		return fmt.Errorf("what was read at %d is not what was written", off)
	}
	return nil
}

// direct reads without the kernel's cache.
func (w *worker) direct() error {
	_, want, err := w.filled("direct")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(w.path("direct"), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	buf, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	for off := 0; !w.stopped(); off = (off + len(buf)) % len(want) {
		if err := w.do("direct pread", func() error { return readWhole(int(f.Fd()), buf, want, off) }); err != nil {
			return err
		}
	}
	return nil
}

// sendfile moves a file within the kernel, to memory that no freeze concerns.
func (w *worker) sendfile() error {
	f, want, err := w.filled("sendfile")
	if err != nil {
		return err
	}
	to, err := unix.MemfdCreate("sendfile", 0)
	if err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for off := 0; !w.stopped(); off = (off + len(buf)) % len(want) {
		if _, err := unix.Seek(to, 0, io.SeekStart); err != nil {
			return err
		}
		for from, left := int64(off), len(buf); left > 0; {
			err := w.do("sendfile", func() error {
				n, err := unix.Sendfile(to, int(f.Fd()), &from, left)
				if err == nil && n == 0 {
					err = io.ErrUnexpectedEOF
				}
				left -= n
				return err
			})
			if err != nil {
				return err
			}
		}
		if err := readWholeAt(to, buf, want[off:off+len(buf)]); err != nil {
			return err
		}
	}
	return nil
}

func readWholeAt(fd int, buf, want []byte) error {
	if n, err := unix.Pread(fd, buf, 0); err != nil || n != len(buf) || !bytes.Equal(buf, want) {
		return fmt.Errorf("what sendfile moved: %d bytes, equal %v, %w", n, bytes.Equal(buf, want), err)
	}
	return nil
}

// mapped loads from a shared and a private mapping, page by page.
func (w *worker) mapped() error {
	f, want, err := w.filled("mapped")
	if err != nil {
		return err
	}
	shared, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	private, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	var got [recordSize]byte
	for page := 0; !w.stopped(); page = (page + pageSize) % fileSize {
		for _, memory := range [][]byte{shared, private} {
			w.begin()
			copy(got[:], memory[page:])
			w.end()
			if !bytes.Equal(got[:], want[page:page+recordSize]) {
				return fmt.Errorf("page at %d: %w", page, differs(got[:], w.Canary, uint64(page/recordSize)))
			}
		}
	}
	return nil
}

// names asks for everything about files but their main content.
func (w *worker) names() error {
	const files = 16
	for i := range files {
		f, err := w.make(fmt.Sprint("file", i), 0)
		if err != nil {
			return err
		}
		if _, err := f.WriteString(w.Canary); err != nil {
			return err
		}
		if err := unix.Fsetxattr(int(f.Fd()), "user.note", []byte(w.Canary), 0); err != nil {
			return err
		}
		if err := os.Symlink("to-"+w.Canary, w.path(fmt.Sprint("link", i))); err != nil {
			return err
		}
		f.Close()
	}
	for i := 0; !w.stopped(); i = (i + 1) % files {
		file, link := w.path(fmt.Sprint("file", i)), w.path(fmt.Sprint("link", i))
		for _, call := range []struct {
			what string
			make func() (string, error)
		}{
			{"stat", func() (string, error) { _, err := os.Lstat(file); return w.Canary, err }},
			{"readlink", func() (string, error) { target, err := os.Readlink(link); return target[min(3, len(target)):], err }},
			{"getxattr", func() (string, error) { return getxattr(file, "user.note") }},
			{"open, read, close", func() (string, error) { text, err := os.ReadFile(file); return string(text), err }},
			{"readdir", func() (string, error) { return w.Canary, listed(w.Dir, 2*files) }},
		} {
			err := w.do(call.what, func() error {
				got, err := call.make()
				if err == nil && got != w.Canary {
					err = fmt.Errorf("got %q", got)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func getxattr(file, name string) (string, error) {
	var value [128]byte
	n, err := unix.Getxattr(file, name, value[:])
	return string(value[:max(n, 0)]), err
}

func listed(dir string, want int) error {
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) != want {
		err = fmt.Errorf("%d entries instead of %d", len(entries), want)
	}
	return err
}

// list counts the directories of the workers: the mount as a newcomer sees it.
func (w *worker) list() error { return listed(w.Dir, len(readers())+len(writers())) }

// rewrite changes pages in the first half of a file, pages that the kernel does
// not have, while beside loads the second half: with write-through the kernel
// keeps such a page locked for as long as the WRITE waits, and what lies behind
// it must go all the same.
func (w *worker) rewrite() error {
	f, want, err := w.filled("shared")
	if err != nil {
		return err
	}
	for page := 0; !w.stopped(); page = (page + pageSize) % (fileSize / 2) {
		if page == 0 {
			if err := unix.Fadvise(int(f.Fd()), 0, fileSize/2, unix.FADV_DONTNEED); err != nil {
				return err
			}
		}
		err := w.do("pwrite", func() error { return pwrite(int(f.Fd()), want[page:page+recordSize], int64(page)) })
		if err != nil {
			return err
		}
	}
	return nil
}

// beside loads the second half of the file that rewrite writes, last page first.
func (w *worker) beside() error {
	if err := os.MkdirAll(w.Dir, 0o755); err != nil {
		return err
	}
	w.Dir = strings.Replace(w.Dir, "/beside-", "/rewrite-", 1)
	var f *os.File
	for {
		info, err := os.Stat(w.path("shared"))
		if err == nil && info.Size() == fileSize {
			break
		}
		time.Sleep(time.Millisecond) // between two looks
	}
	f, err := os.Open(w.path("shared"))
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	var got [recordSize]byte
	for page := fileSize - pageSize; !w.stopped(); page -= pageSize {
		w.begin()
		copy(got[:], memory[page:])
		w.end()
		if err := differs(got[:], w.Canary, uint64(page/recordSize)); err != nil {
			return fmt.Errorf("page at %d: %w", page, err)
		}
		if page == fileSize/2 {
			page = fileSize
		}
	}
	return nil
}

// clear empties a directory.
func (w *worker) clear() error {
	entries, err := os.ReadDir(w.Dir)
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(w.Dir, e.Name())); err != nil {
			return err
		}
	}
	return err
}
