package volumeread

import (
	"errors"
	"fmt"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

const (
	block = seal.BlockSize
	// batch is how many blocks are read and opened at once: 256 KiB, so that the
	// keys are asked for rarely and Ctrl-C is obeyed soon.
	batch = 64
)

// File is the content of a regular file.
type File struct {
	walk  *walk
	entry *Entry
	fd    int
	id    seal.FileID
	known bool  // id
	lower int64 // bytes in whole blocks
	size  int64 // plain
}

// Size is the plain size. A last block that is damaged counts as full.
func (f *File) Size() int64 { return f.size }

// file visits a regular file. Its attributes need its id.
func (w *walk) file(fd int, e *Entry) error {
	f := &File{walk: w, entry: e, fd: fd, lower: e.Stat.Size - e.Stat.Size%block} // a block cut short was never acknowledged
	if err := f.identify(); err != nil {
		return err
	}
	if !f.known && f.lower > 0 {
		f.size = seal.BlockStart(f.lower / block)
		return w.fault(e, NoFileID, fmt.Errorf("neither block 0 nor the attribute %s names the file: nothing of it can be opened", idAttribute))
	}
	if err := w.attributes(fd, e, f.id); err != nil {
		return err
	}
	if f.lower > 0 {
		if err := f.measure(); err != nil {
			return err
		}
	}
	return w.visit.File(e, f)
}

// identify takes the file's id from its attribute or block 0.
func (f *File) identify() error {
	raw, err := attribute(func(b []byte) (int, error) { return unix.Fgetxattr(f.fd, idAttribute, b) })
	if err == nil && (len(raw) == len(f.id) || f.walk.volume.header.SealedOwnership && len(raw) > len(f.id)) {
		f.id, f.known = seal.FileID(raw), true
	}
	if f.lower == 0 {
		return nil
	}
	var head [seal.FileHeaderSize]byte
	if err := readFull(f.fd, head[:], 0); err != nil {
		return nil // told when the block is read
	}
	id, err := seal.ParseFileHeader(head[:])
	switch {
	case err != nil:
		return nil // so is this
	case !f.known:
		f.id, f.known = id, true
	case f.id != id:
		return f.walk.fault(f.entry, IDMismatch, fmt.Errorf("block 0 says %s, the attribute %s: %s", id, idAttribute, f.id))
	}
	return nil
}

// measure finds the plain size: it is in the last block.
func (f *File) measure() error {
	last := f.lower/block - 1
	length := seal.PayloadOf(last)
	var sealed [block]byte
	err := f.still(last, last, func() error { return readFull(f.fd, sealed[:], last*block) })
	if err == nil && !seal.IsHole(sealed[:]) {
		err = f.walk.volume.keys(func(root *seal.Root) error {
			cipher, err := root.File(f.id)
			if err != nil {
				return err
			}
			var plain [seal.BlockPayload]byte
			if n, err := cipher.OpenBlock(plain[:], uint64(last), sealed[:]); err == nil {
				length = n
			}
			clear(plain[:])
			return nil // a block that does not open is told when it is read
		})
		if err != nil {
			return err
		}
	}
	f.size = seal.BlockStart(last) + int64(length)
	return nil
}

// still runs read while nobody writes the blocks, where somebody may.
func (f *File) still(first, last int64, read func() error) (err error) {
	if f.walk.volume.served == nil {
		return read()
	}
	return errors.Join(f.walk.volume.served.Still(f.fd, first, last, func() { err = read() }), err)
}

// Blocks reads the file from its beginning to its end and gives yield every piece
// of it that is authentic and not a hole, in order; plain is valid during the
// call. Faults are told to the visitor on the way. It returns how many bytes were
// faulty, and an error of yield, of the visitor or of the context.
func (f *File) Blocks(yield func(off int64, plain []byte) error) (faulty int64, err error) {
	sealed, plain := make([]byte, batch*block), make([]byte, batch*seal.BlockPayload)
	end := f.lower / block
	for first := int64(0); first < end; {
		if err := f.walk.ctx.Err(); err != nil {
			return faulty, err
		}
		first = f.data(first)
		count := min(batch, end-first)
		if count <= 0 {
			break
		}
		bad, err := f.piece(first, sealed[:count*block], plain, yield)
		faulty += bad
		if err != nil {
			return faulty, err
		}
		first += count
	}
	return faulty, nil
}

// data returns the first block from index on that is not in a hole of the lower
// file, or one beyond the end.
func (f *File) data(index int64) int64 {
	off, err := unix.Seek(f.fd, index*block, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return f.lower / block
	case err != nil:
		return index // the lower filesystem does not tell: holes are read as zeros
	}
	return max(index, off/block)
}

// opened is what became of one block.
type opened struct {
	n   int // plain bytes; -1 for a hole
	err error
}

// piece reads and opens some blocks, gives them to yield and tells their faults.
func (f *File) piece(first int64, sealed, plain []byte, yield func(int64, []byte) error) (faulty int64, err error) {
	var result [batch]opened
	count := len(sealed) / block
	f.read(sealed, first, result[:count])
	if err := f.open(first, sealed, plain, result[:count]); err != nil {
		return 0, err
	}
	if f.walk.volume.served != nil {
		if err := f.again(first, sealed, plain, result[:count]); err != nil {
			return 0, err
		}
	}
	for i, r := range result[:count] {
		index := first + int64(i)
		off := seal.BlockStart(index)
		length := min(int64(seal.PayloadOf(index)), f.size-off) // short blocks within the file are filled up with zeros
		switch {
		case r.err != nil:
			faulty += length
			reason := Damaged
			if errors.As(r.err, new(unix.Errno)) {
				reason = Unreadable
			}
			err = f.walk.visit.Fault(Fault{Path: f.entry.Path, Lower: f.entry.Lower, Offset: off, Length: length, Reason: reason, Detail: r.err.Error()})
		case r.n >= 0:
			err = yield(off, plain[i*seal.BlockPayload:][:length])
		}
		if err != nil {
			return faulty, err
		}
	}
	return faulty, nil
}

// open opens blocks that were read.
func (f *File) open(first int64, sealed, plain []byte, result []opened) error {
	return f.walk.volume.keys(func(root *seal.Root) error {
		cipher, err := root.File(f.id)
		if err != nil {
			return err
		}
		for i := range result {
			one := sealed[i*block:][:block]
			switch {
			case result[i].err != nil:
			case seal.IsHole(one):
				result[i].n = -1
			default:
				result[i].n, result[i].err = cipher.OpenBlock(plain[i*seal.BlockPayload:][:seal.BlockPayload], uint64(first)+uint64(i), one)
			}
		}
		if f.walk.volume.served != nil { // a freeze may follow
			clear(plain)
		}
		return nil
	})
}

// again looks once more at the blocks that could not be read or opened: they may
// have been half written.
func (f *File) again(first int64, sealed, plain []byte, result []opened) error {
	for i := range result {
		if result[i].err == nil {
			continue
		}
		index, one := first+int64(i), sealed[i*block:][:block]
		result[i].err = f.still(index, index, func() error { return readFull(f.fd, one, index*block) })
		if err := f.open(index, one, plain[i*seal.BlockPayload:][:seal.BlockPayload], result[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

// read reads blocks, one by one where together they cannot be read.
func (f *File) read(sealed []byte, first int64, result []opened) {
	if readFull(f.fd, sealed, first*block) == nil {
		return
	}
	for i := range result {
		result[i].err = readFull(f.fd, sealed[i*block:][:block], (first+int64(i))*block)
	}
}

// readFull fills b; what lies beyond the end is zeros, which is a hole.
func readFull(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pread(fd, b, off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			clear(b)
			return nil
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}
