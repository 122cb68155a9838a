package fs

import (
	"sync"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// dirStream is the lower descriptor behind an open directory.
type dirStream struct {
	mu     sync.Mutex
	fd     int
	opened bool // a file's handle has no stream
	buf    []byte
}

func (s *dirStream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened {
		unix.Close(s.fd)
		s.opened = false
	}
}

// direntBytes is how much of a lower directory is read at once.
const direntBytes = 32 << 10

func (c *call) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	h, err := c.openDir(in.NodeId)
	if err != nil {
		return c.fail(err)
	}
	out.Fh, err = c.fs.handles.add(h, c.record)
	if err != nil {
		c.giveUp(h)
	}
	return c.fail(err)
}

func (c *call) openDir(id uint64) (*handle, error) {
	n := c.use(id)
	fd, err := c.fs.nodes.ids.open(id, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	c.fs.nodes.opened(n)
	return &handle{node: n, stream: dirStream{fd: fd, opened: true}}, nil
}

// dirHandle returns the handle of an open directory.
func (c *call) dirHandle(fh, id uint64) (*handle, error) {
	return c.fs.handles.getOf(fh, func() (*handle, error) { return c.openDir(id) }, c.giveUp)
}

// giveUp closes a handle that the kernel does not get.
func (c *call) giveUp(h *handle) {
	h.stream.close()
	c.fs.nodes.closed(h.node)
}

func (c *call) ReleaseDir(in *fuse.ReleaseIn) {
	if h := c.fs.handles.remove(in.Fh); h != nil {
		h.stream.close()
		c.fs.nodes.closed(h.node)
	}
}

func (c *call) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h, err := c.dirHandle(in.Fh, in.NodeId)
	if err != nil {
		return c.fail(err)
	}
	h.stream.mu.Lock() // a rewind takes another descriptor
	defer h.stream.mu.Unlock()
	return c.fail(unix.Fsync(h.stream.fd))
}

func (c *call) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.fail(c.list(in, func(_ int, _ string, e fuse.DirEntry) bool { return out.AddDirEntry(e) }))
}

func (c *call) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.fail(c.list(in, func(dir int, sealed string, e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." {
			return true
		}
		if c.entry(dir, sealed, entry) != nil {
			*entry = fuse.EntryOut{} // removed meanwhile, or damaged: a lookup will tell
		}
		return true
	}))
}

// list gives the entries from the request's offset on until add refuses one.
func (c *call) list(in *fuse.ReadIn, add func(dir int, sealed string, e fuse.DirEntry) bool) error {
	h, err := c.dirHandle(in.Fh, in.NodeId)
	if err != nil {
		return err
	}
	s := &h.stream
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.seek(c.fs.nodes.ids, h.node.id, in.Offset); err != nil {
		return err
	}
	if s.buf == nil {
		s.buf = make([]byte, direntBytes)
	}
	var ahead listedAhead
	defer ahead.end()
	for {
		ahead.end() // it reads buf
		got, err := ignoringEINTR(func() (int, error) { return unix.Getdents(s.fd, s.buf) })
		if err != nil || got == 0 {
			return err
		}
		for rest := s.buf[:got]; len(rest) > 0; {
			if c.cold && !ahead.begun { // what is to come is probably cold, too
				ahead.begin(s.fd, rest)
			}
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			sealed := e.Name
			plain, ok := c.plainName(h.node, sealed)
			if ok {
				e.Mode = c.kindOf(s.fd, sealed, e.Mode)
			}
			if e.Name = plain; ok && !add(s.fd, sealed, e) {
				return nil // the descriptor stands further on: the next call seeks
			}
		}
	}
}

// seek stands the descriptor at an offset that an entry gave. At 0 it takes a
// new one: on ext4 a descriptor whose first look was at the end stays empty.
func (s *dirStream) seek(ids lowerIDs, id, off uint64) error {
	if off == 0 {
		fd, err := ids.open(id, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		unix.Close(s.fd)
		s.fd = fd
		return nil
	}
	_, err := unix.Seek(s.fd, int64(off), unix.SEEK_SET)
	return err
}

// plainName opens a name of a lower directory. What byokd did not write is not
// shown: in the root its own header and ext4's lost+found, elsewhere nothing.
func (c *call) plainName(dir *node, sealed string) (string, bool) {
	if sealed == "." || sealed == ".." {
		return sealed, true
	}
	var plain string
	var err error
	root := c.root()
	seal.Do(func() { plain, err = root.OpenName(sealed) })
	if err != nil {
		c.fs.foreignName(dir, sealed)
		return "", false
	}
	return plain, true
}
