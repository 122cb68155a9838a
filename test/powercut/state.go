//go:build linux

package powercut

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// medium holds one crash state after the other, in a file of memory that a loop
// device can be put on. Cuts are taken in ascending order.
type medium struct {
	file    *os.File
	content []byte // of file, mapped
	durable []byte // what no power cut takes away at the last cut
	events  []event
	next    int      // events[:next] are in durable
	written []bool   // sectors of durable that were ever written
	pending []sliver // written since the last flush, at the last cut
	scanned int      // events[next:scanned] are in pending
}

// sliver is the part of an event within one sector.
type sliver struct {
	off  int64
	data []byte // nil for zeros
	n    int64
}

func newMedium(size int64, events []event) (*medium, error) {
	fd, err := unix.MemfdCreate("powercut", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	m := &medium{file: os.NewFile(uintptr(fd), "powercut"), events: events, written: make([]bool, size/sector)}
	if err := m.file.Truncate(size); err != nil {
		return nil, err
	}
	if m.content, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, err
	}
	m.durable, err = unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	return m, err
}

func (m *medium) close() {
	_ = unix.Munmap(m.content)
	_ = unix.Munmap(m.durable)
	m.file.Close()
}

// cutAt makes the state of a power cut after events[:cut], of which kept says for
// each sliver that no flush has made durable whether it reached the medium.
func (m *medium) cutAt(cut int, kept []bool) error {
	m.advance(cut)
	if err := m.restore(); err != nil {
		return err
	}
	for i, s := range m.pending {
		if kept[i] {
			apply(m.content, s)
		}
	}
	return nil
}

// keep copies the state into a file, if dir is not empty and not too many have
// been lost already, and returns its name.
func (m *medium) keep(dir, name string, lost int) (string, error) {
	const enough = 5
	if dir == "" || lost >= enough {
		return "", nil
	}
	path := filepath.Join(dir, name)
	return path, os.WriteFile(path, m.content, 0o600)
}

// advance brings durable and pending to a cut.
func (m *medium) advance(cut int) {
	for ; m.scanned < cut; m.scanned++ {
		e := m.events[m.scanned]
		if !e.flush {
			m.pending = append(m.pending, slivers(e)...)
			continue
		}
		for _, s := range m.pending {
			apply(m.durable, s)
			m.written[s.off/sector] = true
		}
		m.pending, m.next = m.pending[:0], m.scanned+1
	}
}

func apply(content []byte, s sliver) {
	if s.data == nil {
		clear(content[s.off : s.off+s.n])
		return
	}
	copy(content[s.off:], s.data)
}

func slivers(e event) []sliver {
	var out []sliver
	for off, end := e.off, e.off+e.n; off < end; {
		to := min((off/sector+1)*sector, end)
		s := sliver{off: off, n: to - off}
		if e.data != nil {
			s.data = e.data[off-e.off : to-e.off]
		}
		out, off = append(out, s), to
	}
	return out
}

// restore makes the file equal to durable again, whatever the mount of the state
// before has written into it.
func (m *medium) restore() error {
	size := int64(len(m.content))
	fd := int(m.file.Fd())
	var off int64
	for off < size { // what the file has
		from, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return fmt.Errorf("the memory file's data: %w", err)
		}
		to, err := unix.Seek(fd, from, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("the memory file's holes: %w", err)
		}
		for at := from; at < to; at += sector {
			m.copySector(at)
		}
		off = to
	}
	for i, written := range m.written { // what the file lacks, or has a hole for since the mount before: zeroing punches holes
		if written {
			m.copySector(int64(i) * sector)
		}
	}
	return nil
}

func (m *medium) copySector(at int64) {
	if have, want := m.content[at:at+sector], m.durable[at:at+sector]; !bytes.Equal(have, want) {
		copy(have, want)
	}
}

// draw asks a rule for each of n slivers.
func draw(rule func() bool, n int) []bool {
	kept := make([]bool, n)
	for i := range kept {
		kept[i] = rule()
	}
	return kept
}

// subset returns a rule for which unflushed slivers reach the medium: none, all,
// few, most, those up to some moment, or all but one in a while.
func subset(r *rand.Rand, pending int) func() bool {
	kept := 0
	switch r.IntN(6) {
	case 0:
		return func() bool { return false }
	case 1:
		return func() bool { return true }
	case 2:
		until := r.IntN(pending + 1)
		return func() bool { kept++; return kept <= until }
	default:
		p := []float64{0.1, 0.5, 0.9}[r.IntN(3)]
		return func() bool { return r.Float64() < p }
	}
}
