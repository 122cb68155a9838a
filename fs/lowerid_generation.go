package fs

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// generationIDs makes ids of inode numbers of 64 bits, and remembers the generation
// that belongs to each for as long as the kernel knows it: XFS without
// inode32, whose handles have 12 bytes (fs/xfs/xfs_export.h, struct xfs_fid64). It takes
// an entry for each inode, and no descriptor.
//
// A number is not given to another file meanwhile: all names go through us, and who
// takes the last name of an inode that the kernel knows holds it open (nodeTable.pin).
type generationIDs struct {
	root       int
	rootInode  uint64
	generation uint32 // the root's

	mu   sync.Mutex
	gens map[uint64]uint32 // by inode number; guarded by mu
}

const (
	xfsFileid64    = 0x80 | fileidIno32Gen // XFS_FILEID_TYPE_64FLAG
	xfsFileid64Len = 12
)

// newGenerationIDs returns nil where handles are of another kind or may not be opened.
func newGenerationIDs(root int) *generationIDs {
	g := &generationIDs{root: root, gens: map[uint64]uint32{}}
	var err error
	if g.rootInode, g.generation, err = g.handle(root, ""); err != nil {
		return nil
	}
	fd, err := g.open(fuse.FUSE_ROOT_ID, unix.O_PATH)
	if err != nil {
		return nil
	}
	unix.Close(fd)
	return g
}

func (g *generationIDs) handle(fd int, name string) (inode uint64, generation uint32, err error) {
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	h, _, err := unix.NameToHandleAt(fd, name, flags)
	if err != nil {
		return 0, 0, err
	}
	if h.Type() != xfsFileid64 || h.Size() != xfsFileid64Len {
		return 0, 0, fmt.Errorf("lower file handle of type %d and %d bytes", h.Type(), h.Size())
	}
	return binary.NativeEndian.Uint64(h.Bytes()), binary.NativeEndian.Uint32(h.Bytes()[8:]), nil
}

func (g *generationIDs) identify(fd int, name string, _ *unix.Stat_t) (uint64, error) {
	inode, generation, err := g.handle(fd, name)
	switch {
	case err != nil:
		return 0, err
	case inode == g.rootInode:
		return fuse.FUSE_ROOT_ID, nil
	case inode == fuse.FUSE_ROOT_ID:
		return 0, unix.EOVERFLOW // no filesystem gives this number to a file of its users
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if known, ok := g.gens[inode]; ok && known != generation {
		return 0, unix.ESTALE
	}
	g.gens[inode] = generation
	return inode, nil
}

func (g *generationIDs) open(id uint64, flags int) (int, error) {
	inode, generation := g.rootInode, g.generation
	if id != fuse.FUSE_ROOT_ID {
		var ok bool
		g.mu.Lock()
		generation, ok = g.gens[id]
		g.mu.Unlock()
		if !ok {
			return -1, unix.ESTALE
		}
		inode = id
	}
	var b [xfsFileid64Len]byte
	binary.NativeEndian.PutUint64(b[:], inode)
	binary.NativeEndian.PutUint32(b[8:], generation)
	return ignoringEINTR(func() (int, error) {
		return unix.OpenByHandleAt(g.root, unix.NewFileHandle(xfsFileid64, b[:]), flags|unix.O_CLOEXEC)
	})
}

func (g *generationIDs) forget(id uint64) {
	g.mu.Lock()
	delete(g.gens, id)
	g.mu.Unlock()
}

func (g *generationIDs) close() {}
