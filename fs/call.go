package fs

import (
	"sync"
	"time"
	"unsafe"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// call is one request being served: its pass, its scratch memory, and the
// operations (ops_*.go) as methods, so that each finds its keys in its own
// pass. A call belongs to its slot and serves one request at a time.
type call struct {
	fuse.RawFileSystem // what we do not implement is ENOSYS

	fs     *Filesystem
	header fuse.InHeader
	pass   keyguard.Pass
	inside bool // pass is in use
	// reading says that the call is counted in Filesystem.reading.
	reading bool
	cached  *node    // whose pages the kernel has after this reply
	used    []*node  // nodes in use until the reply is written
	looked  []uint64 // references given to the kernel by this reply
	bytes   int
	errno   fuse.Status
	// loaded says that the length of a file was read, and cold that the disk was
	// waited for.
	loaded, cold bool

	sealed []byte // scratchSize bytes, page-aligned for O_DIRECT
	block  []byte // one block
	// Plaintext of the blocks at the edges of a write, and of one being opened.
	head, plain, opened [seal.BlockPayload]byte

	record  *record      // of the request, in the journal; nil without one
	slot    *journalSlot // where record is
	forgets uint32       // FORGETs of the request so far
	again   bool         // an earlier process may have done some of it, or all

	began time.Time // when the request was read

	// aside has the request wait without the slot, if it can.
	aside      func(request []byte, class keyguard.Class) bool
	parks      func()      // called before the request waits at the gate in its slot
	wipeBehind func(n int) // wipes the slot but for a request of n bytes

	edges   [2]edge // of the write in hand: its first and its last block
	ahead   ahead
	left    []byte // by the write before this one: the beginning of its first block (seams.go)
	job     job
	jobFile seal.FileID
	other   job            // half of job, where it was split
	both    sync.WaitGroup // until other is done

	openedBeside             [seal.BlockPayload]byte
	runJob, runOther, beside func() // run, runOtherHalf and runBeside, bound once
}

func (c *call) init(f *Filesystem, scratch []byte) {
	c.RawFileSystem = fuse.NewDefaultRawFileSystem()
	c.fs = f
	c.sealed, c.block = scratch[:scratchSize:scratchSize], scratch[scratchSize:][:block:block]
	c.runJob, c.runOther, c.beside = c.run, c.runOtherHalf, c.runBeside
}

func (c *call) begin(header *fuse.InHeader) {
	c.header, c.forgets, c.loaded, c.cold = *header, 0, false, false
}

func (c *call) enter(pass keyguard.Pass) { c.pass, c.inside = pass, true }

// end closes the books on a request whose reply has been written.
func (c *call) end() {
	if c.cached != nil {
		c.cached.touched.Store(true) // after the reply: now the kernel has the pages
	}
	c.leave()
	c.bytes, c.errno = 0, fuse.OK
}

// undo takes back what a reply that does not leave would have given.
func (c *call) undo() {
	c.takeBack()
	c.leave()
}

// takeBack takes back the references that the reply would have given.
func (c *call) takeBack() {
	for _, id := range c.looked {
		c.fs.nodes.takeBack(id, c.slot)
	}
	c.looked = c.looked[:0]
}

func (c *call) leave() {
	for i, n := range c.used {
		c.fs.nodes.done(n)
		c.used[i] = nil
	}
	c.used, c.looked, c.cached = c.used[:0], c.looked[:0], nil
	if c.inside {
		c.pass.Exit()
		c.pass, c.inside = keyguard.Pass{}, false
	}
	if c.reading {
		c.fs.reading.Add(-1)
		c.reading = false
	}
}

// wipe clears the plaintext of past requests; the slot is idle.
func (c *call) wipe() {
	clear(c.head[:])
	clear(c.plain[:])
	clear(c.opened[:])
	clear(c.openedBeside[:])
}

func (c *call) name() string { return ruleOf(c.header.Opcode).name }

// use returns the node of an id until the reply is written.
func (c *call) use(id uint64) *node {
	n := c.fs.nodes.use(id)
	c.used = append(c.used, n)
	return n
}

// dir returns an O_PATH descriptor of a directory and the sealed form of a name
// in it.
func (c *call) dir(id uint64, name string) (int, string, error) {
	n := c.use(id)
	n.dir.Store(true)
	fd, err := c.fs.nodes.pathFD(n)
	if err != nil {
		return -1, "", err
	}
	sealed, err := c.sealName(name)
	return fd, sealed, err
}

func (c *call) sealName(name string) (sealed string, err error) {
	root := c.root()
	seal.Do(func() { sealed, err = root.SealName(name) })
	return sealed, err
}

// root gives the volume's keys.
func (c *call) root() *seal.Root { return c.pass.Keys().Root(c.fs.header.Volume) }

// fail ends an operation: the one place where an error becomes an errno.
func (c *call) fail(err error) fuse.Status {
	c.errno = status(err)
	switch errno := unix.Errno(c.errno); errno {
	case unix.EMFILE, unix.ENFILE:
		c.fs.outOfDescriptors(errno)
	case unix.EIO, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.ESTALE:
		c.fs.failures.note(err)
	}
	return c.errno
}

// tellAgainAfter is how often a lack that makes calls fail is logged.
const tellAgainAfter = time.Minute

// outOfDescriptors says why calls fail that could not open a lower file.
func (f *Filesystem) outOfDescriptors(errno unix.Errno) {
	now, told := time.Now().UnixNano(), f.lackTold.Load()
	if now-told < int64(tellAgainAfter) || !f.lackTold.CompareAndSwap(told, now) {
		return
	}
	var limit unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	f.log.Error("calls fail because no descriptor is left: raise the limit of open files, or that of the machine (fs.file-max) where the error names the system",
		zap.Uint64("limit", limit.Cur), zap.Int("inodes", f.nodes.known()), zap.Error(errno))
}

func (c *call) String() string { return "byokd" }

// Attributes and names are cached by the kernel until we take them back: at a
// freeze, and nobody else changes the lower tree. They never lapse by themselves:
// a read(2) beyond the end would ask for them as a write(2) does (reserve.go).
const cacheFor = 10 * 365 * 24 * time.Hour

// inHeaderSize is checked against the library at compile time.
const inHeaderSize = 40

var _ [inHeaderSize - unsafe.Sizeof(fuse.InHeader{})]struct{}
var _ [unsafe.Sizeof(fuse.InHeader{}) - inHeaderSize]struct{}
