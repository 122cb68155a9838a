//go:build linux

package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Writers count on their board what they have begun, what was accepted and what
// was acknowledged as durable. Every content follows from its number, so these
// counters are all that verify needs.

// write makes one counted write.
func (w *worker) write(what string, call func() error) error {
	w.Begun.Add(1)
	if err := w.do(what, call); err != nil {
		return err
	}
	w.Written.Add(1)
	return nil
}

// ack makes the call that makes everything written so far durable.
func (w *worker) ack(what string, call func() error) error {
	if err := w.do(what, call); err != nil {
		return err
	}
	w.Acked.Store(w.Written.Load())
	return nil
}

// pwrite writes all of buf.
func pwrite(fd int, buf []byte, off int64) error {
	n, err := unix.Pwrite(fd, buf, off)
	if err == nil && n != len(buf) {
		err = fmt.Errorf("a short write: %d bytes of %d", n, len(buf))
	}
	return err
}

// store writes through a shared mapping.
func (w *worker) store() error {
	f, _, err := w.filled("store")
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	const between = 256 // stores between two msyncs
	var record [recordSize]byte
	for k := uint64(0); !w.stopped(); k++ {
		pattern(record[:], w.Canary, k)
		page := k % (fileSize / pageSize) * pageSize
		if err := w.write("store", func() error { copy(memory[page:], record[:]); return nil }); err != nil {
			return err
		}
		if k%between == between-1 {
			if err := w.ack("msync", func() error { return unix.Msync(memory, unix.MS_SYNC) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// journal appends entries, each made durable.
func (w *worker) journal() error {
	f, err := w.make("journal", os.O_APPEND)
	if err != nil {
		return err
	}
	entry := make([]byte, entrySize)
	for k := uint64(0); !w.stopped(); k++ {
		pattern(entry, w.Canary, k<<8)
		if err := w.write("append", func() error { return wrote(unix.Write(int(f.Fd()), entry))(len(entry)) }); err != nil {
			return err
		}
		if err := w.ack("fdatasync", func() error { return unix.Fdatasync(int(f.Fd())) }); err != nil {
			return err
		}
	}
	return nil
}

// wrote turns a short write into an error.
func wrote(n int, err error) func(want int) error {
	return func(want int) error {
		if err == nil && n != want {
			err = fmt.Errorf("a short write: %d bytes of %d", n, want)
		}
		return err
	}
}

// overwrite writes small records all over a file.
func (w *worker) overwrite() error {
	f, err := w.make("overwrite", 0)
	if err != nil {
		return err
	}
	if err := f.Truncate(slots * slotSize); err != nil {
		return err
	}
	const between = 64 // writes between two fsyncs
	record := make([]byte, slotSize)
	for k := uint64(0); !w.stopped(); k++ {
		pattern(record, w.Canary, k<<8)
		if err := w.write("pwrite", func() error { return pwrite(int(f.Fd()), record, int64(slotOf(k))*slotSize) }); err != nil {
			return err
		}
		if k%between == between-1 {
			if err := w.ack("fsync", func() error { return unix.Fsync(int(f.Fd())) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// slotOf scatters the numbers of writes over the slots (Knuth's multiplier).
func slotOf(k uint64) uint64 { return k * 0x9e3779b97f4a7c15 >> 32 % slots }

// bulk makes big writes: a freeze finds it inside one.
func (w *worker) bulk() error {
	f, err := w.make("bulk", 0)
	if err != nil {
		return err
	}
	buf := make([]byte, bulkSize)
	for k := uint64(0); !w.stopped(); k++ {
		pattern(buf, w.Canary, k<<32)
		if err := w.write("big pwrite", func() error { return pwrite(int(f.Fd()), buf, int64(k%bulkSlots)*bulkSize) }); err != nil {
			return err
		}
		if err := w.ack("fsync", func() error { return unix.Fsync(int(f.Fd())) }); err != nil {
			return err
		}
	}
	return nil
}

// create makes files as careful programs do: written beside, synced, renamed,
// the directory synced. Old ones are removed.
func (w *worker) create() error {
	if err := os.MkdirAll(w.Dir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(w.Dir)
	if err != nil {
		return err
	}
	for k := uint64(0); !w.stopped(); k++ {
		if err := w.createOne(k); err != nil {
			return err
		}
		if err := w.ack("fsync of the directory", func() error { return unix.Fsync(int(dir.Fd())) }); err != nil {
			return err
		}
		if k >= keptFiles {
			if err := w.do("unlink", func() error { return os.Remove(w.numbered(k - keptFiles)) }); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *worker) numbered(k uint64) string { return w.path(fmt.Sprintf("made-%08d", k)) }

// madeSize varies from a part of a block to some blocks.
func madeSize(k uint64) int { return recordSize * int(1+k%200) }

func (w *worker) createOne(k uint64) error {
	w.Begun.Add(1)
	content := make([]byte, madeSize(k))
	pattern(content, w.Canary, k<<16)
	beside := w.path("beside")
	var f *os.File
	steps := []struct {
		what string
		call func() (err error)
	}{
		{"create", func() (err error) { f, err = os.Create(beside); return err }},
		{"write", func() error { return pwrite(int(f.Fd()), content, 0) }},
		{"fsync", func() error { return unix.Fsync(int(f.Fd())) }},
		{"close", func() error { return f.Close() }},
		{"rename", func() error { return os.Rename(beside, w.numbered(k)) }},
	}
	for _, s := range steps {
		if err := w.do(s.what, s.call); err != nil {
			return err
		}
	}
	w.Written.Add(1)
	return nil
}

// claim is what a writer was told: numbers of its board.
type claim struct {
	Role                  string
	Dir                   string
	Begun, Written, Acked uint64
}

// claims collects what the writers among the workers were told.
func claims(workers []*writerState) []claim {
	var all []claim
	for _, w := range workers {
		if w.Begun.Load() > 0 {
			all = append(all, claim{Role: w.task.Role, Dir: w.task.Dir, Begun: w.Begun.Load(), Written: w.Written.Load(), Acked: w.Acked.Load()})
		}
	}
	return all
}

// verify reads back everything that was claimed. After a crash only what was
// acknowledged counts, else everything that was accepted.
func (w *worker) verify() error {
	var all []error
	for _, c := range w.Claims {
		v := worker{task: task{Dir: c.Dir, Canary: w.Canary}}
		if !w.Crash {
			c.Acked = c.Written
		}
		if c.Acked == 0 {
			all = append(all, fmt.Errorf("%s: nothing was acknowledged, so this verifies nothing", c.Role))
		}
		var err error
		switch c.Role {
		case "store":
			err = v.verifySlots(c, "store", func(k uint64) int64 { return int64(k % (fileSize / pageSize) * pageSize) }, recordSize, 0)
		case "overwrite":
			err = v.verifySlots(c, "overwrite", func(k uint64) int64 { return int64(slotOf(k)) * slotSize }, slotSize, 8)
		case "bulk":
			err = v.verifySlots(c, "bulk", func(k uint64) int64 { return int64(k%bulkSlots) * bulkSize }, bulkSize, 32)
		case "journal":
			err = v.verifyJournal(c)
		case "create":
			err = v.verifyMade(c)
		default:
			err = errors.New("nobody knows how to verify it")
		}
		if err != nil {
			all = append(all, fmt.Errorf("%s (begun %d, written %d, acknowledged %d): %w", c.Role, c.Begun, c.Written, c.Acked, err))
		}
	}
	return errors.Join(all...)
}

// verifySlots checks that each slot holds its last acknowledged write. A slot
// with a later one that was begun may hold either, or after a crash a mixture,
// but must be readable.
func (w *worker) verifySlots(c claim, name string, place func(k uint64) int64, size int, shift uint) error {
	f, err := os.Open(w.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	last, open := map[int64]uint64{}, map[int64]bool{}
	for k := range c.Begun {
		if k < c.Acked {
			last[place(k)] = k
		} else {
			open[place(k)] = true
		}
	}
	buf := make([]byte, size)
	for at, k := range last {
		if _, err := f.ReadAt(buf, at); err != nil {
			return fmt.Errorf("at %d: %w", at, err)
		}
		if open[at] {
			continue
		}
		if err := differs(buf, w.Canary, k<<shift); err != nil {
			return fmt.Errorf("write %d at %d: %w", k, at, err)
		}
	}
	return nil
}

func (w *worker) verifyJournal(c claim) error {
	text, err := os.ReadFile(w.path("journal"))
	if err != nil {
		return err
	}
	if len(text) < int(c.Acked)*entrySize || len(text) > int(c.Begun)*entrySize {
		return fmt.Errorf("%d bytes; %d were acknowledged and %d begun", len(text), c.Acked*entrySize, c.Begun*entrySize)
	}
	for k := range c.Acked {
		if err := differs(text[k*entrySize:][:entrySize], w.Canary, k<<8); err != nil {
			return fmt.Errorf("entry %d: %w", k, err)
		}
	}
	return nil
}

func (w *worker) verifyMade(c claim) error {
	first := uint64(0)
	if c.Begun > keptFiles { // older ones were removed, the oldest of these perhaps
		first = c.Begun - keptFiles
	}
	for k := first; k < c.Acked; k++ {
		text, err := os.ReadFile(w.numbered(k))
		if err != nil {
			return err
		}
		if len(text) != madeSize(k) {
			return fmt.Errorf("file %d has %d bytes, not %d", k, len(text), madeSize(k))
		}
		if err := differs(text, w.Canary, k<<16); err != nil {
			return fmt.Errorf("file %d: %w", k, err)
		}
	}
	names, err := filepath.Glob(filepath.Join(w.Dir, "made-*"))
	if err == nil && len(names) > keptFiles+2 {
		err = fmt.Errorf("%d files are there; %d were kept", len(names), keptFiles)
	}
	return err
}

// contains reports whether text holds the canary in any form in which it could
// have been stored by mistake.
func contains(text []byte, forms [][]byte) bool {
	for _, form := range forms {
		if bytes.Contains(text, form) {
			return true
		}
	}
	return false
}
