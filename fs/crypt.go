package fs

import (
	"github.com/byokd/byokd/internal/seal"
)

// A job is what a call asks of the keys: to open or to seal a run of blocks.
// It is run by crypt inside seal.Do, which wipes stack and registers behind it,
// so it holds no result but in the caller's buffers.
type job struct {
	kind   jobKind
	dst    []byte // plain bytes wanted
	src    []byte // plain bytes given
	sealed []byte // whole blocks
	index  int64  // of the first block
	skip   int    // plain bytes of the first block that are not asked for
	head   edge   // of a sealRange
	tail   edge
	ahead  ahead // blocks of a sealRange that are sealed already

	n   int   // openOne: the block's length
	bad int64 // the block that failed
	err error
}

// ahead says which blocks of the write in hand lie sealed in the call's scratch;
// to is exclusive.
type ahead struct{ from, to int64 }

type jobKind uint8

const (
	openRange jobKind = iota // holes and short blocks read as zeros
	openOne
	sealRange
	sealOne // src is the whole of one block
)

// crypt runs a job with the keys of the call's pass, a large one on two cores
// where one is free.
func (c *call) crypt(n *node, j job) error {
	c.job, c.other, c.jobFile = j, job{}, n.fileID
	if busy := c.fs.crypting.Add(1); int(busy) <= c.fs.cores/2 && c.split() {
		c.both.Add(1)
		go c.beside()
	}
	seal.Do(c.runJob) // a method value bound once: a closure here would allocate for each request
	c.both.Wait()
	c.fs.crypting.Add(-1)
	c.edges = [2]edge{c.job.head, c.job.tail}
	if c.other.sealed != nil {
		c.edges[1] = c.other.tail
	}
	err, bad := c.job.err, c.job.bad
	if err == nil {
		err, bad = c.other.err, c.other.bad
	}
	if err != nil {
		clear(c.job.dst)
		clear(c.other.dst)
		c.fs.damaged(n, bad, err)
	}
	c.job.dst, c.job.src, c.other = nil, nil, job{}
	return err
}

// splitBlocks is how many blocks, about 70 µs of work, are worth waking another
// core for.
const splitBlocks = 64

// split gives half of a large job to c.other, and reports whether it did.
func (c *call) split() bool {
	j := &c.job
	blocks := int64(len(j.sealed)) / block
	if blocks < splitBlocks || j.kind != openRange && j.kind != sealRange || j.ahead.from < j.ahead.to {
		return false
	}
	half := j.index + blocks/2
	at := seal.BlockStart(half) - seal.BlockStart(j.index) - int64(j.skip)
	o := job{kind: j.kind, sealed: j.sealed[blocks/2*block:], index: half, tail: j.tail}
	if j.kind == openRange {
		o.dst, j.dst = j.dst[at:], j.dst[:at:at]
	} else {
		o.src, j.src, j.tail = j.src[at:], j.src[:at:at], edge{}
	}
	j.sealed = j.sealed[:blocks/2*block]
	c.other = o
	return true
}

func (c *call) run() { c.do(&c.job, &c.opened) }

// runBeside runs the other half, in a goroutine of its own.
func (c *call) runBeside() {
	defer c.both.Done()
	seal.Do(c.runOther)
}

func (c *call) runOtherHalf() { c.do(&c.other, &c.openedBeside) }

func (c *call) do(j *job, scratch *[seal.BlockPayload]byte) {
	root := c.pass.Keys().Root(c.fs.header.Volume)
	cipher, err := root.File(c.jobFile)
	if err != nil {
		j.err = err
		return
	}
	switch j.kind {
	case openRange:
		j.open(cipher, scratch)
	case openOne:
		j.n, j.err = cipher.OpenBlock(j.dst, uint64(j.index), j.sealed)
		j.bad = j.index
	case sealRange:
		j.seal(cipher)
	case sealOne:
		cipher.SealBlock(j.sealed, uint64(j.index), j.src)
	}
}

// open opens blocks into dst; what does not fit there whole goes through
// scratch, which is wiped.
func (j *job) open(cipher seal.FileCipher, scratch *[seal.BlockPayload]byte) {
	index, skip, dst := j.index, j.skip, j.dst
	for rest := j.sealed; len(dst) > 0; rest = rest[block:] {
		payload := seal.PayloadOf(index) - skip
		if whole := wholeBlocks(index, skip, len(dst)); whole > 0 {
			length := seal.BlockStart(index+whole) - seal.BlockStart(index)
			if bad, err := cipher.OpenBlocks(dst[:length], uint64(index), rest[:whole*block]); err != nil {
				j.err, j.bad = err, int64(bad)
				clear(j.dst)
				return
			}
			dst, index, rest = dst[length:], index+whole, rest[(whole-1)*block:]
			continue
		}
		want := min(payload, len(dst))
		out := dst[:want]
		switch {
		case seal.IsHole(rest[:block]):
			clear(out)
		default:
			n, err := cipher.OpenBlock(scratch[:], uint64(index), rest[:block])
			if err != nil {
				j.err, j.bad = err, index
				clear(j.dst)
				return
			}
			copied := 0
			if n > skip {
				copied = copy(out, scratch[skip:n])
			}
			clear(out[copied:])
		}
		dst, index, skip = dst[want:], index+1, 0
	}
	clear(scratch[:])
}

// wholeBlocks returns how many whole blocks from index on lie within length
// plain bytes.
func wholeBlocks(index int64, skip, length int) int64 {
	if skip > 0 {
		return 0
	}
	last, _ := seal.BlockAt(seal.BlockStart(index) + int64(length))
	return last - index
}

// seal seals the whole blocks of src and the edges.
func (j *job) seal(cipher seal.FileCipher) {
	from, to := j.index, j.index+int64(len(j.sealed))/block // whole blocks: [from, to)
	if j.head.plain != nil {
		if j.err = j.head.seal(cipher, from, j.sealed[:block]); j.err != nil {
			j.bad = from
			return
		}
		from++
	}
	if j.tail.plain != nil {
		to--
		if j.err = j.tail.seal(cipher, to, j.sealed[(to-j.index)*block:]); j.err != nil {
			j.bad = to
			return
		}
	}
	if j.ahead.from < j.ahead.to {
		j.sealWhole(cipher, from, min(j.ahead.from, to))
		from = max(from, j.ahead.to)
	}
	j.sealWhole(cipher, from, to)
}

// sealWhole seals the blocks [from, to) of src. All but one are sealed from where
// they are: room is made for their length before them, which src has for all but
// its first byte.
func (j *job) sealWhole(cipher seal.FileCipher, from, to int64) {
	at := func(index int64) int64 { return seal.BlockStart(index) - seal.BlockStart(j.index) - int64(j.skip) }
	place := func(from, to int64) []byte { return j.sealed[(from-j.index)*block : (to-j.index)*block] }
	if from < to && (from == 0 || at(from) < roomBefore) {
		cipher.SealBlock(place(from, from+1), uint64(from), j.src[at(from):][:seal.PayloadOf(from)])
		from++
	}
	if from < to {
		cipher.SealBlocks(place(from, to), uint64(from), j.src[at(from)-roomBefore:at(to)])
	}
}

// roomBefore is what SealBlocks asks for before the first block.
const roomBefore = 2
