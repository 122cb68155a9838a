package fs

import (
	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func (c *call) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := c.use(in.NodeId)
	if err := c.share(n); err != nil {
		return c.fail(err)
	}
	readOnly, writes := n.file.readOnly.Load(), in.Flags&unix.O_ACCMODE != unix.O_RDONLY
	mayLackBlocks := writes && n.lower <= block // beyond, block 0 is there
	n.content.RUnlock()
	if readOnly && writes {
		return c.fail(unix.EROFS)
	}
	if err := c.openable(n); err != nil {
		return c.fail(err)
	}
	c.askAgain(n)
	if mayLackBlocks {
		c.askForSpace(n)
	}
	return c.fail(c.handle(n, in.Flags, out))
}

// handle opens a handle on a node.
func (c *call) handle(n *node, flags uint32, out *fuse.OpenOut) error {
	c.fs.nodes.opened(n)
	fh, err := c.fs.handles.add(&handle{node: n, writes: flags&unix.O_ACCMODE != unix.O_RDONLY}, c.record)
	if err != nil {
		c.fs.nodes.closed(n)
		return err
	}
	out.Fh, out.OpenFlags = fh, fuse.FOPEN_KEEP_CACHE
	return nil
}

func (c *call) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	dir, sealed, err := c.dir(in.NodeId, name)
	if err != nil {
		return c.fail(err)
	}
	f, err := c.newFile(dir, sealed, &in.InHeader, in.Mode)
	if err != nil {
		return c.fail(err)
	}
	return c.fail(c.openNew(f, dir, sealed, in.Flags, out))
}

// openNew makes a node and a handle of a file just created; its descriptor becomes
// theirs.
func (c *call) openNew(f newFile, dir int, sealed string, flags uint32, out *fuse.CreateOut) error {
	fd := f.fd
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return err
	}
	if sealed == "" {
		dir = fd
	}
	n, err := c.fs.nodes.look(dir, sealed, &st, c.slot)
	if err != nil {
		unix.Close(fd)
		return err
	}
	c.used, c.looked = append(c.used, n), append(c.looked, n.id)
	n.content.Lock()
	n.meta.Lock()
	n.file.close()
	n.file.adopt(fd)
	n.dirty.fresh()
	n.meta.Unlock()
	n.known, n.hasID, n.fileID, n.size, n.lower = true, true, f.id, 0, 0
	if c.fs.sealsOwners() {
		n.owner.mu.Lock()
		n.owner.known, n.owner.attributes, n.owner.id, n.owner.hasID, n.owner.damaged = true, f.attributes, f.id, true, false
		n.owner.mu.Unlock()
	}
	n.content.Unlock()
	if err := c.fill(n, &st, &out.Attr); err != nil {
		return err
	}
	c.fs.showLeast(&out.Attr) // it is about to be open
	out.NodeId, out.Generation = n.id, 1
	out.SetEntryTimeout(cacheFor)
	out.SetAttrTimeout(cacheFor)
	err = c.handle(n, flags, &out.OpenOut)
	if sealed == "" && err == nil { // it is open, and has no name
		c.fs.nodes.pin(n, true)
		c.fs.keepOrphan(n)
	}
	return err
}

func (c *call) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, err := c.fs.nodes.pathFD(c.use(in.NodeId))
	if err != nil {
		return c.fail(err)
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(dir), unix.O_TMPFILE|unix.O_RDWR|unix.O_NOATIME|unix.O_CLOEXEC, c.modeBelow(in.Mode))
	})
	if err != nil {
		return c.fail(err)
	}
	f, err := c.dressFile(dir, fd, &in.InHeader, in.Mode)
	if err != nil {
		unix.Close(fd)
		return c.fail(err)
	}
	return c.fail(c.openNew(f, -1, "", in.Flags, out))
}

// readFile serves READ into dst and returns how much there was.
func (c *call) readFile(in *fuse.ReadIn, dst []byte) (int, fuse.Status) {
	n := c.use(in.NodeId)
	c.cached = n
	if in.Offset > seal.MaxFileSize {
		return 0, fuse.OK
	}
	if err := c.share(n); err != nil {
		return 0, c.fail(err)
	}
	defer n.content.RUnlock()
	got, err := c.readPlain(n, dst, int64(in.Offset))
	if err != nil {
		return 0, c.fail(err)
	}
	c.bytes = got
	return got, fuse.OK
}

// writeFile serves WRITE.
func (c *call) writeFile(in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n := c.use(in.NodeId)
	c.cached = n
	if in.Offset > seal.MaxFileSize-uint64(len(data)) {
		return 0, c.fail(unix.EFBIG)
	}
	if c.record != nil {
		c.record.saveRooms(data, int64(in.Offset))
	}
	flush := in.WriteFlags&fuse.WRITE_CACHE != 0
	written, err := c.write(n, data, int64(in.Offset), flush)
	for flush && err != nil && c.fs.yieldReserve(err, len(data)) {
		written, err = c.write(n, data, int64(in.Offset), flush)
	}
	if err != nil {
		return 0, c.fail(err)
	}
	if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
		if err := c.killSetID(n); err != nil {
			return 0, c.fail(err)
		}
	}
	c.bytes = written
	if flush {
		c.fs.flushed.Add(1)
	}
	return uint32(written), fuse.OK
}

// write shares the file with others where it can. What is not a flush leaves a
// reserve that was drawn on to those. It returns how much was written.
func (c *call) write(n *node, data []byte, off int64, flush bool) (int, error) {
	large := flush && len(data) >= seamBytes
	if large {
		c.fs.seams.enter(n, off, off+int64(len(data)))
		defer c.fs.seams.exit(n, off, off+int64(len(data)))
	}
	if err := c.share(n); err != nil {
		return 0, err
	}
	if n.inPlace(off, len(data)) {
		defer n.content.RUnlock()
		n.grew.Store(0)
		return len(data), c.overwrite(n, data, off)
	}
	n.content.RUnlock()
	if !flush && !c.fs.reserve.refilled() {
		return 0, unix.ENOSPC
	}
	if err := c.sealAhead(n, data, off); err != nil {
		return 0, err
	}
	defer func() { c.ahead = ahead{} }()
	if large {
		return len(data), c.append(n, data, off)
	}
	if err := c.own(n); err != nil {
		return 0, err
	}
	defer n.content.Unlock()
	size := n.size
	err := c.writeGrowing(n, data, off)
	if err != nil && !flush && off >= size {
		return c.appended(n, off, err)
	}
	return len(data), err
}

// append writes a large piece of a flush that grows the file, and that has entered the
// seams: what the piece before it or behind it has of a block that they share is stored
// once.
func (c *call) append(n *node, data []byte, off int64) error {
	end := off + int64(len(data))
	last, inLast := seal.BlockAt(end)
	rest := data[len(data)-inLast:]
	c.left = c.fs.seams.follow(n, off)
	defer func() { c.left = nil }()
	if err := c.own(n); err != nil {
		return err
	}
	apart := inLast > 0 && last*block >= n.lower // nothing of the last block is there yet
	var err error
	if apart {
		err = c.writeGrowing(n, data[:len(data)-inLast], off)
	} else {
		err = c.writeGrowing(n, data, off)
	}
	c.fs.seams.settle(n, off, err == nil)
	left := apart && err == nil && c.fs.seams.leave(n, end, rest)
	if apart && err == nil && !left {
		err = c.writeGrowing(n, rest, end-int64(inLast))
	}
	n.content.Unlock()
	c.fs.seams.pass(n, end)
	if !left || c.fs.seams.settled(n, end) {
		return err
	}
	if err := c.own(n); err != nil {
		return err
	}
	defer n.content.Unlock()
	return c.writeGrowing(n, rest, end-int64(inLast))
}

// writeGrowing writes data, with n.content held alone.
func (c *call) writeGrowing(n *node, data []byte, off int64) error {
	lower := n.lower
	err := c.writePlain(n, data, off)
	if err != nil || n.lower > lower {
		n.grew.Store(c.fs.reserve.shortage())
	}
	return err
}

// appended returns how much of an append that failed with err is in the file: the
// rest of the block that was the last, when the next found no space. The file is
// as long as that, so the caller must know.
func (c *call) appended(n *node, off int64, err error) (int, error) {
	if c.load(n) != nil || n.size <= off {
		return 0, err
	}
	return int(n.size - off), nil
}

func (c *call) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n := c.use(in.NodeId)
	c.cached = n
	if in.Offset+in.Length > seal.MaxFileSize || in.Offset+in.Length < in.Offset {
		return c.fail(unix.EFBIG)
	}
	if err := c.own(n); err != nil {
		return c.fail(err)
	}
	defer n.content.Unlock()
	return c.fail(c.fallocate(n, in.Mode, int64(in.Offset), int64(in.Length)))
}

func (c *call) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := c.use(in.NodeId)
	if err := c.openLower(n); err != nil {
		return c.fail(err)
	}
	const dataOnly = 1 // FUSE_FSYNC_FDATASYNC
	if _, err := c.fs.handles.getOf(in.Fh, func() (*handle, error) {
		c.fs.nodes.opened(n)
		return &handle{node: n, writes: true}, nil
	}, c.giveUp); err != nil {
		return c.fail(err)
	}
	told := c.tookBefore()
	// Its failure is recorded, for this handle too.
	_ = c.fs.sync(n, in.FsyncFlags&dataOnly != 0)
	if err := c.fs.handles.failed(in.Fh, c.record); err != nil {
		return c.fail(err)
	}
	return c.fail(told)
}

// FLUSH, which would come with each close(2), is not implemented: the kernel
// writes dirty pages back before it would ask and tells what failed then; a sync
// that failed below is told by fsync. The answer ENOSYS spares a round trip for
// each close after the first.

func (c *call) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if h := c.fs.handles.remove(in.Fh); h != nil {
		c.fs.nodes.closed(h.node)
	}
}

// Lseek: with the writeback cache the kernel does not flush before it asks
// where data is, so the answer would be wrong for what is dirty; without an
// answer it takes the whole file for data, which is right (docs/CONFORMANCE.md,
// "Decided otherwise than ext4, on purpose").
func (c *call) Lseek(<-chan struct{}, *fuse.LseekIn, *fuse.LseekOut) fuse.Status { return fuse.ENOSYS }

// Ioctl is never passed down: with the daemon's rights it could shut the lower
// filesystem down.
func (c *call) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}
