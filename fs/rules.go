package fs

import (
	"unsafe"

	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// A rule says what the gate asks of an operation.
type rule struct {
	name     string
	gate     gateRule
	plain    bool // the reply may carry plaintext and the call may be made again: it is, if the epoch ends before the reply leaves
	observed bool
}

type gateRule uint8

const (
	// always: needs no key and must be answered while frozen, or the kernel
	// and the tools of the operator hang with the application.
	always gateRule = iota
	// work: waits from the first moment of a freeze on.
	work
	// drainUnlessTimes: passes while the kernel's dirty pages are flushed, because the
	// flush itself needs it (docs/ARCHITECTURE.md, "Freeze"). The times of a file that
	// the kernel writes back are never held: they need no key, and while they wait
	// nobody who has the file open can be killed, nor a sync(2) end
	// (fs/fs-writeback.c, inode_wait_for_writeback).
	drainUnlessTimes
	// drainRead: passes likewise, until the freeze holds reads back.
	drainRead
	// drainIfCached: pages the kernel flushes pass likewise; a caller's own write is
	// work.
	drainIfCached
	// workUnlessRoot: waits, but for the root directory, which is answered
	// from memory so that df, umount and kubelet do not hang.
	workUnlessRoot
)

// Opcodes, include/uapi/linux/fuse.h.
const (
	opForget      = 2
	opGetattr     = 3
	opRead        = 15
	opWrite       = 16
	opInit        = 26
	opInterrupt   = 36
	opBatchForget = 42
)

// rules is indexed by opcode. What is not in it is answered without a key: the
// protocol server says ENOSYS.
var rules = [64]rule{
	1:  {"lookup", work, true, true},
	2:  {"forget", always, false, false},
	3:  {"getattr", workUnlessRoot, true, true},
	4:  {"setattr", drainUnlessTimes, false, true},
	5:  {"readlink", work, true, true},
	6:  {"symlink", work, false, true},
	8:  {"mknod", work, false, true},
	9:  {"mkdir", work, false, true},
	10: {"unlink", work, false, true},
	11: {"rmdir", work, false, true},
	12: {"rename", work, false, true},
	13: {"link", work, false, true},
	14: {"open", work, false, true},
	15: {"read", drainRead, true, true},
	16: {"write", drainIfCached, false, true},
	17: {"statfs", always, false, false},
	18: {"release", always, false, false},
	20: {"fsync", work, false, true},
	21: {"setxattr", work, false, true},
	22: {"getxattr", work, true, true},
	23: {"listxattr", work, true, true},
	24: {"removexattr", work, false, true},
	25: {"flush", always, false, false},
	26: {"init", always, false, false},
	27: {"opendir", always, false, true}, // what is in it is asked by READDIR
	28: {"readdir", work, true, true},
	29: {"releasedir", always, false, false},
	30: {"fsyncdir", work, false, true},
	35: {"create", work, false, true},
	36: {"interrupt", always, false, false},
	38: {"destroy", always, false, false},
	39: {"ioctl", always, false, false},
	42: {"forget", always, false, false},
	43: {"fallocate", work, false, true},
	44: {"readdirplus", work, true, true},
	45: {"rename", work, false, true},
	46: {"lseek", always, false, false},
	47: {"copy_file_range", work, false, true},
	51: {"tmpfile", work, false, true},
}

func ruleOf(opcode uint32) rule {
	if opcode < uint32(len(rules)) {
		return rules[opcode]
	}
	return rule{}
}

// enter takes the pass that a request needs, waiting for it.
func (f *Filesystem) enter(r rule, c *call, request []byte) error {
	class := keyguard.Work
	switch r.gate {
	case always:
		return nil
	case workUnlessRoot:
		if c.header.NodeId == fuse.FUSE_ROOT_ID {
			if !f.isUnlocked() {
				return nil
			}
			if pass, ok := f.guard.TryEnter(class, fuse.FUSE_ROOT_ID); ok {
				c.enter(pass)
			}
			return nil
		}
	case drainUnlessTimes:
		class = keyguard.Drain
		if c.flushesTimes(request) && f.isUnlocked() {
			pass, ok := f.guard.TryEnter(class, uint32(c.header.NodeId))
			switch {
			case ok && pass.Keys().Root(f.header.Volume) != nil:
				c.enter(pass)
				return nil
			case ok:
				pass.Exit()
			case c.remembers(c.use(c.header.NodeId)):
				return nil
			}
		}
	case drainRead:
		class = f.readClass(c)
	case drainIfCached:
		in := (*fuse.WriteIn)(unsafe.Pointer(&request[0]))
		if in.WriteFlags&fuse.WRITE_CACHE != 0 {
			class = keyguard.Drain
		}
	}
	pass, err := f.admit(c, class, request)
	if err == nil {
		c.enter(pass)
	}
	return err
}

// readClass lets a READ in while the gate drains, until reads are held back.
func (f *Filesystem) readClass(c *call) keyguard.Class {
	f.reading.Add(1) // before the look, so that a freeze either is seen or sees us
	if f.holdReads.Load() {
		f.reading.Add(-1)
		return keyguard.Work
	}
	c.reading = true
	return keyguard.Drain
}
