package fs

import (
	"errors"
	"fmt"
	"math"

	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// This file maps plain ranges of a file to its sealed blocks. The rules of the
// format are in docs/FORMAT.md, "Files"; what they say about order is here:
//
//   - block 0, which names the file, exists before any other block;
//   - a block is replaced as a whole, and an existing one through O_DIRECT;
//   - the shortened tail block is durable before the lower file is cut;
//   - the length is in the last block and nowhere else.
//
// Callers hold node.content: shared to read and to write in place, alone to
// change sizes. Those who share it keep off each other's blocks by node.ranges.

const block = seal.BlockSize

// load reads what a node must know of its lower file: id, sizes. It holds
// node.content alone.
func (c *call) load(n *node) error {
	if n.known {
		return nil
	}
	if err := c.openLower(n); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(n.file.buffered(), &st); err != nil {
		return err
	}
	lower := st.Size - st.Size%block // a cut block was never acknowledged
	n.lower, n.size = lower, 0
	if err := c.loadID(n); err != nil {
		return err
	}
	if lower > 0 {
		last := lower/block - 1
		c.loaded = true
		length, err := c.openBlock(n, last, c.plain[:])
		var errno unix.Errno
		if errors.As(err, &errno) {
			return err
		}
		if length < 0 || err != nil { // a hole as the last block counts as full, and so does a damaged one: reads of it fail, the rest of the file does not
			length = seal.PayloadOf(last)
		}
		n.size = seal.BlockStart(last) + int64(length)
	}
	n.known = true
	return nil
}

// share takes node.content shared, with the node loaded and open.
func (c *call) share(n *node) error {
	for {
		n.content.RLock()
		if n.known && n.file.isOpen() {
			return nil
		}
		n.content.RUnlock()
		if err := c.own(n); err != nil {
			return err
		}
		n.content.Unlock()
	}
}

// own takes node.content alone, with the node loaded and open.
func (c *call) own(n *node) error {
	n.content.Lock()
	err := c.openLower(n)
	if err == nil {
		err = c.load(n)
	}
	if err != nil {
		n.content.Unlock()
	}
	return err
}

// openLower opens the lower descriptors of a node in use.
func (c *call) openLower(n *node) error {
	if n.file.isOpen() {
		return nil
	}
	n.meta.Lock()
	defer n.meta.Unlock()
	if n.file.isOpen() {
		return nil
	}
	return n.file.open(c.fs.nodes.ids, n.id)
}

// loadID takes the file's id from block 0 or from the extended attribute;
// either suffices. A file without blocks and without an id gets one now.
func (c *call) loadID(n *node) error {
	if n.hasID {
		return nil
	}
	fd := n.file.buffered()
	if found, err := c.storedID(n, fd); found || err != nil {
		return err
	}
	if n.lower > 0 {
		if err := c.readLower(n, c.sealed[:block], 0); err != nil {
			return err
		}
		id, err := seal.ParseFileHeader(c.sealed[:block])
		if err != nil {
			return fmt.Errorf("%w (block 0: %v)", ErrNoFileID, err)
		}
		n.fileID, n.hasID = id, true
		return nil
	}
	return c.giveID(n, fd)
}

// storedID takes the file's id from its extended attribute, which is set when the
// file is made, in the transaction of the inode, and so never later than the data.
func (c *call) storedID(n *node, fd int) (found bool, err error) {
	var raw [seal.AttributesMax]byte
	got, err := unix.Fgetxattr(fd, seal.IDAttribute, raw[:])
	if err != nil {
		return false, nil // block 0 has it, too
	}
	if !c.fs.sealsOwners() {
		if got != len(n.fileID) {
			return false, nil
		}
	} else {
		n.owner.mu.Lock()
		defer n.owner.mu.Unlock()
		if err := c.learn(n, raw[:got], false); err != nil {
			return false, err
		}
	}
	if got >= len(n.fileID) {
		n.fileID, n.hasID = seal.FileID(raw[:]), true
	}
	return n.hasID, nil
}

func (c *call) giveID(n *node, fd int) error {
	id := seal.NewID()
	if err := unix.Fsetxattr(fd, seal.IDAttribute, id[:], 0); err != nil {
		return err
	}
	n.fileID, n.hasID = id, true
	return nil
}

// readPlain reads into dst from plain offset off and returns how many bytes
// there are before the end of the file.
func (c *call) readPlain(n *node, dst []byte, off int64) (int, error) {
	if off >= n.size || len(dst) == 0 {
		return 0, nil
	}
	dst = dst[:min(int64(len(dst)), n.size-off)]
	first, skip := seal.BlockAt(off)
	last, _ := seal.BlockAt(off + int64(len(dst)) - 1)
	sealed := c.sealed[:(last-first+1)*block]
	n.ranges.lock(first, last, false)
	err := c.readLower(n, sealed, first*block)
	n.ranges.unlock(first, last, false)
	if err != nil {
		return 0, err
	}
	err = c.crypt(n, job{kind: openRange, dst: dst, sealed: sealed, index: first, skip: skip})
	if err != nil {
		return 0, err
	}
	return len(dst), nil
}

// openBlock opens one block into dst and returns its length, or -1 for a hole.
func (c *call) openBlock(n *node, index int64, dst []byte) (int, error) {
	if length, ok := c.fs.hot.get(n.serial, index, dst); ok {
		return length, nil
	}
	one := c.block[:block]
	got, err := n.file.readCached(one, index*block)
	c.cold = c.cold || err == unix.EAGAIN
	if got < block {
		if err := c.readLower(n, one, index*block); err != nil {
			return 0, err
		}
	}
	if seal.IsHole(one) {
		return -1, nil
	}
	err = c.crypt(n, job{kind: openOne, dst: dst, sealed: one, index: index})
	return c.job.n, err
}

// writePlain writes data at plain offset off, growing the file as needed.
func (c *call) writePlain(n *node, data []byte, off int64) error {
	if len(data) == 0 {
		return nil
	}
	if err := c.ensureFirst(n, off); err != nil {
		return err
	}
	// A request of maxWrite may touch two blocks more than the scratch holds;
	// the pieces are bounded by it.
	for len(data) > 0 {
		first, skip := seal.BlockAt(off)
		room := seal.BlockStart(first+scratchBlocks) - off
		piece := data[:min(int64(len(data)), room)]
		if err := c.writePiece(n, piece, off, first, skip); err != nil {
			return err
		}
		data, off = data[len(piece):], off+int64(len(piece))
	}
	return nil
}

// inPlace reports whether a write changes no size, so that it may share the file
// with others.
func (n *node) inPlace(off int64, length int) bool {
	end := off + int64(length)
	if length == 0 || end > n.size {
		return false
	}
	first, _ := seal.BlockAt(off)
	last, _ := seal.BlockAt(end - 1)
	return (last+1)*block <= n.lower && last-first < scratchBlocks
}

// overwrite writes data over what is there; inPlace has said that it may.
func (c *call) overwrite(n *node, data []byte, off int64) error {
	first, skip := seal.BlockAt(off)
	last, _ := seal.BlockAt(off + int64(len(data)) - 1)
	n.ranges.lock(first, last, true)
	defer n.ranges.unlock(first, last, true)
	sealed, err := c.sealPiece(n, data, off, first, last, skip)
	if err != nil {
		return err
	}
	if err := c.store(n, sealed, first); err != nil {
		return err
	}
	c.remember(n, first, last)
	return nil
}

// ensureFirst writes an empty block 0 where a write to a later block would
// come before it.
func (c *call) ensureFirst(n *node, off int64) error {
	if n.lower > 0 || off < seal.FirstPayload {
		return nil
	}
	return c.writeBlock(n, 0, nil)
}

func (c *call) writePiece(n *node, data []byte, off, first int64, skip int) error {
	last, _ := seal.BlockAt(off + int64(len(data)) - 1)
	sealed, err := c.sealPiece(n, data, off, first, last, skip)
	if err != nil {
		return err
	}
	if err := c.store(n, sealed, first); err != nil {
		return c.withdraw(n, err)
	}
	n.lower = max(n.lower, (last+1)*block)
	n.size = max(n.size, off+int64(len(data)))
	c.remember(n, first, last)
	return nil
}

// sealPiece seals the blocks that data touches, as they will be.
func (c *call) sealPiece(n *node, data []byte, off, first, last int64, skip int) ([]byte, error) {
	sealed := c.sealed[:(last-first+1)*block]
	if err := c.readEdges(n, data, off, first, last, skip); err != nil {
		return nil, err
	}
	err := c.crypt(n, job{kind: sealRange, src: data, sealed: sealed, index: first, skip: skip, head: c.edges[0], tail: c.edges[1], ahead: c.ahead})
	return sealed, err
}

// aheadBlocks is how many whole blocks make it worth sealing them apart.
const aheadBlocks = 8

// sealAhead seals those blocks that data covers whole, before the file is held
// alone: writes that grow a file come one after the other to its end, but their
// sealing, half of the work, can go on in parallel.
func (c *call) sealAhead(n *node, data []byte, off int64) error {
	first, skip := seal.BlockAt(off)
	end := off + int64(len(data))
	a := ahead{from: first}
	if skip > 0 {
		a.from++
	}
	a.to, _ = seal.BlockAt(end)
	if a.to-a.from < aheadBlocks || a.to-first >= scratchBlocks {
		return nil
	}
	err := c.crypt(n, job{kind: sealRange, src: data[seal.BlockStart(a.from)-off:], sealed: c.sealed[(a.from-first)*block : (a.to-first)*block], index: a.from})
	if err == nil {
		c.ahead = a
	}
	return err
}

// existing reads the block that a write will change in part, zeros where there
// is none, and returns its length.
func (c *call) existing(n *node, index int64, dst []byte) (length int, err error) {
	if index*block < n.lower {
		if length, err = c.openBlock(n, index, dst); err != nil {
			return 0, err
		}
		hole := length < 0
		length = max(length, 0)
		if hole && (index+1)*block == n.lower { // a hole as the last block counts as full
			length = seal.PayloadOf(index)
			clear(dst[:length])
		}
	}
	clear(dst[length:seal.BlockPayload])
	return length, nil
}

// writeBlock seals plain as the whole of one block.
func (c *call) writeBlock(n *node, index int64, plain []byte) error {
	c.ahead = ahead{} // it lies there
	sealed := c.sealed[:block]
	if err := c.crypt(n, job{kind: sealOne, sealed: sealed, index: index, src: plain}); err != nil {
		return err
	}
	if err := c.store(n, sealed, index); err != nil {
		return err
	}
	n.lower = max(n.lower, (index+1)*block)
	return nil
}

// store writes sealed blocks from block index first on, in runs: through the
// page cache those whose pages are clean, with O_DIRECT those whose pages may be
// under writeback (dirty.go).
func (c *call) store(n *node, sealed []byte, first int64) error {
	last := first + int64(len(sealed))/block - 1
	c.fs.hot.drop(n.serial, first, last)
	n.dirty.ask(n.file.buffered())
	for from := first; from <= last; {
		length, dirty := n.dirty.run(from, last, n.lower/block)
		to := from + length
		run := sealed[(from-first)*block : (to-first)*block]
		if err := c.storeRun(n, run, from, dirty); err != nil {
			return err
		}
		from = to
	}
	return nil
}

func (c *call) storeRun(n *node, run []byte, index int64, dirty bool) error {
	if dirty {
		c.fs.turns.take()
		defer c.fs.turns.give()
		return c.rewrite(n, run, index*block)
	}
	n.writing.Lock()
	c.fs.turns.take()
	err := n.file.writeClean(run, index*block)
	c.fs.turns.give()
	n.writing.Unlock()
	if n.dirty.note(index, index+int64(len(run))/block-1) { // also after an error: a part may be written
		c.fs.settleLower(n)
	}
	return err
}

// withdraw takes back what a write that failed (with err, which is returned) has
// appended: blocks beyond what we take for the end would be the end after a
// restart. The old last block may have been written already, so sizes are read
// anew.
func (c *call) withdraw(n *node, err error) error {
	n.known = false
	return errors.Join(err, n.truncateLower(n.lower))
}

func (c *call) rewrite(n *node, sealed []byte, at int64) error {
	if n.file.direct.Load() == 0 {
		n.meta.Lock()
		var err error
		if n.file.direct.Load() == 0 { // nobody was quicker
			err = n.file.openDirect(c.fs.stable)
		}
		n.meta.Unlock()
		if err != nil {
			return err
		}
	}
	return n.file.rewrite(sealed, at)
}

// readLower reads sealed blocks when it is the call's turn.
func (c *call) readLower(n *node, sealed []byte, at int64) error {
	c.fs.turns.take()
	defer c.fs.turns.give()
	return n.file.readAt(sealed, at)
}

// truncate sets the plain size.
func (c *call) truncate(n *node, size int64) error {
	switch {
	case size == n.size: // for its times, and for what was allocated beyond the end
		return n.truncateLower(n.lower)
	case size == 0:
		c.fs.hot.drop(n.serial, 0, math.MaxInt64)
		if err := n.truncateLower(0); err != nil {
			return err
		}
		n.size, n.lower = 0, 0
		return nil
	case size < n.size:
		return c.shrink(n, size)
	default:
		return c.grow(n, size)
	}
}

// shrink makes the shortened tail block durable and only then cuts: after a
// power cut between the two the old tail, full, must not stand at the new end.
func (c *call) shrink(n *node, size int64) error {
	last, _ := seal.BlockAt(size - 1)
	length := int(size - seal.BlockStart(last))
	was, err := c.existing(n, last, c.plain[:])
	if err != nil {
		return err
	}
	n.known = false // after a failure the old size may be the file's, or the new one
	if was != length {
		if err := c.writeBlock(n, last, c.plain[:length]); err != nil {
			return err
		}
		if err := c.fs.sync(n, true); err != nil {
			return err
		}
	}
	c.fs.hot.drop(n.serial, last+1, math.MaxInt64)
	if err := n.truncateLower((last + 1) * block); err != nil {
		return err
	}
	n.size, n.lower, n.known = size, (last+1)*block, true
	return nil
}

// grow extends the file with zeros: the blocks between are holes, the last one
// carries the length.
func (c *call) grow(n *node, size int64) error {
	last, _ := seal.BlockAt(size - 1)
	length := int(size - seal.BlockStart(last))
	if err := c.ensureFirst(n, seal.BlockStart(last)); err != nil {
		return err
	}
	was, err := c.existing(n, last, c.plain[:])
	if err != nil {
		return err
	}
	if length == seal.PayloadOf(last) && was == 0 && last*block >= n.lower {
		if err := n.truncateLower((last + 1) * block); err != nil { // a hole as the last block counts as full
			return err
		}
		n.lower = (last + 1) * block
	} else if err := c.writeBlock(n, last, c.plain[:length]); err != nil {
		return err
	}
	n.size = size
	return nil
}
