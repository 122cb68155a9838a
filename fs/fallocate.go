package fs

import (
	"github.com/byokd/byokd/internal/seal"
	"golang.org/x/sys/unix"
)

// fallocate serves the modes that have a meaning for whole blocks; the others
// are refused as a filesystem without them would.
func (c *call) fallocate(n *node, mode uint32, off, length int64) error {
	end := off + length
	if off < 0 || length <= 0 || end < 0 {
		return unix.EINVAL
	}
	switch mode {
	case 0, unix.FALLOC_FL_KEEP_SIZE:
		if !c.fs.reserve.refilled() {
			return unix.ENOSPC
		}
		if err := c.preallocate(n, off, end); err != nil {
			return err
		}
		if mode == 0 && end > n.size {
			return c.grow(n, end)
		}
		return nil
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return c.zero(n, off, min(end, n.size))
	case unix.FALLOC_FL_ZERO_RANGE:
		if err := c.zero(n, off, min(end, n.size)); err != nil || end <= n.size {
			return err
		}
		return c.grow(n, end)
	default: // COLLAPSE_RANGE and INSERT_RANGE would move blocks, whose place is authenticated
		return unix.EOPNOTSUPP
	}
}

// preallocate reserves lower blocks. KEEP_SIZE, so that the last lower block
// stays the one that carries the length.
func (c *call) preallocate(n *node, off, end int64) error {
	first, _ := seal.BlockAt(off)
	last, _ := seal.BlockAt(end - 1)
	return n.file.fallocate(unix.FALLOC_FL_KEEP_SIZE, first*block, (last-first+1)*block)
}

// zero makes [off, end) read as zeros: whole blocks become holes, edges are
// rewritten. Block 0 names the file and the last block carries its length, so
// both are rewritten rather than punched.
func (c *call) zero(n *node, off, end int64) error {
	if off >= end {
		return nil
	}
	first, _ := seal.BlockAt(off)
	last, _ := seal.BlockAt(end - 1)
	final := n.lower/block - 1
	punchable := func(index int64) bool {
		return index != 0 && index != final && off <= seal.BlockStart(index) && seal.BlockStart(index+1) <= end
	}
	holeFrom, holeTo := first, last+1
	if !punchable(first) {
		holeFrom++
		if err := c.zeroWithin(n, first, off, end); err != nil {
			return err
		}
	}
	if last >= holeFrom && !punchable(last) {
		holeTo--
		if err := c.zeroWithin(n, last, off, end); err != nil {
			return err
		}
	}
	if holeFrom >= holeTo {
		return nil
	}
	c.fs.hot.drop(n.serial, holeFrom, holeTo-1)
	return n.file.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, holeFrom*block, (holeTo-holeFrom)*block)
}

// zeroWithin rewrites one block with [off, end) of the file zeroed in it.
func (c *call) zeroWithin(n *node, index, off, end int64) error {
	length, err := c.existing(n, index, c.plain[:])
	if err != nil {
		return err
	}
	start := seal.BlockStart(index)
	from, to := max(off-start, 0), min(end-start, int64(length))
	if from >= to {
		return nil // beyond its length it reads as zeros already
	}
	clear(c.plain[from:to])
	return c.writeBlock(n, index, c.plain[:length])
}
