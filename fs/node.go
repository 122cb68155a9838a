package fs

import (
	"sync"
	"sync/atomic"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A node is what we remember of a lower inode that the kernel knows, or has
// open. All of it can be found again from the lower inode.
type node struct {
	id     uint64
	serial uint64 // no other node has or had it, whereas the id of a file that is gone may be a new one's

	// Changed under nodeTable.mu (using: raised under it), read without.
	lookups atomic.Int64 // the kernel's references by name
	opens   atomic.Int32 // handles
	using   atomic.Int32 // requests at work

	// touched is set when data went to the kernel or came from it, and tells a
	// freeze that the kernel may hold pages of this inode.
	touched atomic.Bool
	unseen  bool // no handle was told of the last of failures yet; guarded by handleTable.mu

	blocks int64 // of the lower file when retellSpace looked; its alone

	// grew is the shortage (reserve.shortages) during which the last write needed
	// lower space that was not the file's, 0 for none.
	grew atomic.Uint32

	// meta guards the opening and closing of the descriptors.
	meta   sync.Mutex
	path   atomic.Int32 // O_PATH descriptor + 1, or 0
	dir    atomic.Bool  // path is kept while the kernel knows the node: it is asked again
	pinned atomic.Bool  // path is kept because the name is gone and the inode must not be
	orphan atomic.Bool  // who has made the mount keeps a descriptor of it, too (passed.go)
	entry  uint32       // in the journal, + 1; 0 when it is in none; guarded by nodeTable.mu
	file   lowerFile

	owner ownership // in volumes with sealed ownership

	ranges blockRanges // of those who share content
	dirty  dirtyBlocks // what of the lower file must not be changed in its page

	// writing is held around a lower write through the page cache, which takes
	// the lower inode's own lock (ext4_buffered_write_iter): who waits here waits
	// without a thread.
	writing sync.Mutex

	// content guards what follows: shared by those who read and who write in
	// place, held alone by those who change a size.
	content sync.RWMutex
	known   bool        // the fields below have been read from the lower file
	fileID  seal.FileID // zero until block 0 or the extended attribute names it
	hasID   bool
	size    int64 // plain bytes
	lower   int64 // lower bytes, a multiple of seal.BlockSize

	failures failures

	// settling is held around a lower sync, until its failure is recorded, and
	// around a change of the lower size. The kernel has one of a caller's at a time;
	// ours in the background would come beside it.
	settling sync.Mutex
}

// failures counts lower fsyncs that failed.
type failures struct {
	mu    sync.Mutex
	seq   uint64
	errno unix.Errno
}

func (f *failures) record(err error) {
	f.mu.Lock()
	f.seq++
	f.errno = errnoOf(err)
	f.mu.Unlock()
}

// since returns the last failure if it is newer than seen, and the number to
// remember.
func (f *failures) since(seen uint64) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seq == seen {
		return seen, nil
	}
	return f.seq, f.errno
}

// nodeTable holds the nodes by id.
type nodeTable struct {
	ids       lowerIDs
	root      *node
	made      atomic.Uint64 // nodes so far
	heldPaths atomic.Int32  // O_PATH descriptors open
	directs   atomic.Int32  // descriptors with O_DIRECT open
	fault     faultBelow    // of new nodes; nil but in tests
	untracked bool          // dirtyBlocks.untracked of new nodes; fixed before requests come
	resumed   bool          // the kernel may know nodes from a predecessor; fixed before requests come

	forgetOrphan func(id uint64) // of a passed mount; fixed before requests come
	journal      *journal        // where nodes that the kernel knows are recorded; nil without, fixed before the mount
	keep         *Keep           // nil without

	mu   sync.RWMutex
	byID map[uint64]*node    // guarded by mu
	idle map[uint64]idleNode // those of the kernel's that are not in byID, see idle.go; guarded by mu
	held bool                // none becomes idle; guarded by mu

	most     int    // nodes, before some become idle: maxNodes but in tests
	mostIdle int    // idle ones since that map was made; guarded by mu
	closing  closer // of descriptors of nodes that the kernel has forgotten
}

func newNodeTable(ids lowerIDs, root int) *nodeTable {
	t := &nodeTable{ids: ids, byID: map[uint64]*node{}, idle: map[uint64]idleNode{}, most: maxNodes}
	r := &node{id: fuse.FUSE_ROOT_ID}
	r.path.Store(int32(root) + 1)
	r.lookups.Store(1)
	r.pinned.Store(true)
	t.byID[fuse.FUSE_ROOT_ID] = r
	t.root = r
	return t
}

func (t *nodeTable) newNode(id uint64) *node {
	n := &node{id: id, serial: t.made.Add(1)}
	n.file.fault, n.file.directs, n.dirty.untracked = t.fault, &t.directs, t.untracked
	return n
}

// look names the lower inode at (dir, name), or dir itself, to the kernel: the
// kernel gains one reference, by the reply in s, which a FORGET gives back.
func (t *nodeTable) look(dir int, name string, st *unix.Stat_t, s *journalSlot) (*node, error) {
	t.mu.Lock()
	n, err := t.meet(dir, name, st)
	var left released
	if err == nil {
		if err = t.record(n); err == nil {
			err = t.give(n, s)
		}
		if err != nil {
			n.using.Add(-1)
			left = t.settle(n)
		}
	}
	t.mu.Unlock()
	if err != nil {
		t.drop(left)
		return nil, err
	}
	return n, nil
}

// hold returns the node of the lower inode that fd is open on without naming it
// to the kernel; done gives it back.
func (t *nodeTable) hold(fd int, st *unix.Stat_t) (*node, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.meet(fd, "", st)
}

// meet returns the node of the lower inode at (dir, name), in use; mu is held.
func (t *nodeTable) meet(dir int, name string, st *unix.Stat_t) (*node, error) {
	id, err := t.ids.identify(dir, name, st)
	if err != nil {
		return nil, err
	}
	n := t.byID[id]
	if n == nil {
		n = t.wake(id)
	}
	n.using.Add(1)
	return n, nil
}

// find returns the node without a new reference for the kernel, or nil: what a
// rename or unlink is about to remove. The kernel may have it from a predecessor
// though nobody has asked for it here.
func (t *nodeTable) find(dir int, name string, st *unix.Stat_t) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	id, err := t.ids.identify(dir, name, st)
	if err != nil {
		return nil
	}
	n := t.byID[id]
	if _, idle := t.idle[id]; idle || n == nil && t.resumed {
		n = t.wake(id)
	}
	if n == nil {
		t.ids.forget(id) // nobody would
		return nil
	}
	n.using.Add(1)
	return n
}

// use returns the node for the length of a request; done gives it back. A node
// that is not known is made anew: its id says where the lower inode is.
func (t *nodeTable) use(id uint64) *node {
	t.mu.RLock()
	n := t.byID[id]
	if n != nil {
		n.using.Add(1)
		t.mu.RUnlock()
		return n
	}
	t.mu.RUnlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if n = t.byID[id]; n == nil {
		n = t.wake(id)
	}
	n.using.Add(1)
	return n
}

// done ends a use. The last user of a file nobody has open closes its
// descriptors.
func (t *nodeTable) done(n *node) {
	if n.using.Add(-1) > 0 || n.opens.Load() > 0 || (n.lookups.Load() > 0 && !n.file.isOpen() && t.keepPath(n)) {
		return
	}
	t.mu.Lock()
	left := t.settle(n)
	t.mu.Unlock()
	t.drop(left)
}

// maxHeldPaths bounds the directory descriptors kept for speed alone.
const maxHeldPaths = 4096

// keepPath says whether the node's O_PATH descriptor, if any, stays open while
// nobody uses the node.
func (t *nodeTable) keepPath(n *node) bool {
	return n.path.Load() == 0 || n.pinned.Load() || n.dir.Load() && t.heldPaths.Load() <= maxHeldPaths
}

// descriptors are what settle took from a node. They are closed once the table
// is free again: the last close of a deleted file gives its blocks back, which
// takes the longer the larger the file was, and everybody needs the table.
type descriptors [3]int32 // each + 1, or 0

func (d descriptors) close() {
	for _, fd := range d {
		if fd != 0 {
			unix.Close(int(fd) - 1)
		}
	}
}

// released is what settle has taken from a node.
type released struct {
	fds    descriptors
	orphan uint64 // id of an inode that who made the mount may give up; 0 for none
}

// drop gives up what is left of a node.
func (t *nodeTable) drop(r released) {
	r.fds.close()
	if r.orphan != 0 {
		t.forgetOrphan(r.orphan)
	}
}

// dropSoon is drop for who is not to wait for the disk.
func (t *nodeTable) dropSoon(r released) {
	t.closing.close(r.fds)
	r.fds = descriptors{}
	t.drop(r)
}

// settle gives up what an unused node need not hold, for the caller to close,
// and drops the node when the kernel does not know it either. mu is held.
func (t *nodeTable) settle(n *node) (left released) {
	if n.using.Load() > 0 || n.opens.Load() > 0 {
		return left
	}
	known := n.lookups.Load() > 0
	n.meta.Lock()
	left.fds[0], left.fds[1] = n.file.take()
	n.dirty.forget()
	if !known || !t.keepPath(n) {
		left.fds[2] = t.takePath(n)
	}
	n.meta.Unlock()
	if known || t.byID[n.id] != n {
		return left
	}
	delete(t.byID, n.id)
	t.ids.forget(n.id)
	if n.orphan.Load() {
		left.orphan = n.id
	}
	t.erase(n.id, n.entry)
	n.entry = 0
	return left
}

// takePath takes the O_PATH descriptor, + 1, away from the node; meta is held.
func (t *nodeTable) takePath(n *node) int32 {
	fd := n.path.Swap(0)
	if fd != 0 {
		t.heldPaths.Add(-1)
	}
	return fd
}

// opened and closed count handles.
func (t *nodeTable) opened(n *node) { n.opens.Add(1) }

func (t *nodeTable) closed(n *node) {
	t.mu.Lock()
	n.opens.Add(-1)
	left := t.settle(n)
	t.mu.Unlock()
	t.drop(left)
}

// forget takes back references of the kernel: the nth FORGET of the request in s.
func (t *nodeTable) forget(id, count uint64, s *journalSlot, nth uint32) {
	if id == fuse.FUSE_ROOT_ID {
		return
	}
	var left released
	t.mu.Lock()
	if t.countForget(id, count, s, nth) {
		left = t.uncount(id, count)
	}
	t.mu.Unlock()
	t.dropSoon(left)
}

// uncount takes references of the kernel off a node; mu is held.
func (t *nodeTable) uncount(id, count uint64) (left released) {
	if n := t.byID[id]; n != nil {
		n.lookups.Store(max(0, n.lookups.Load()-int64(count)))
		return t.settle(n)
	}
	t.forgetIdle(id, count)
	return left
}

// known is how many inodes the kernel knows.
func (t *nodeTable) known() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byID) + len(t.idle)
}

func idsOf(nodes []*node) []uint64 {
	ids := make([]uint64, len(nodes))
	for i, n := range nodes {
		ids[i] = n.id
	}
	return ids
}

// useOpen returns the nodes that somebody has open; done gives each back.
func (t *nodeTable) useOpen() (nodes []*node) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, n := range t.byID {
		if n.opens.Load() > 0 {
			n.using.Add(1)
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// all returns the nodes known now, for a freeze.
func (t *nodeTable) all() []*node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	nodes := make([]*node, 0, len(t.byID))
	for _, n := range t.byID {
		nodes = append(nodes, n)
	}
	return nodes
}

// pathFD returns an O_PATH descriptor of the node's inode, valid while the
// caller uses the node.
func (t *nodeTable) pathFD(n *node) (int, error) {
	if fd := n.path.Load(); fd != 0 {
		return int(fd) - 1, nil
	}
	n.meta.Lock()
	defer n.meta.Unlock()
	if fd := n.path.Load(); fd != 0 {
		return int(fd) - 1, nil
	}
	fd, err := t.ids.open(n.id, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return -1, err
	}
	n.path.Store(int32(fd) + 1)
	t.heldPaths.Add(1)
	return fd, nil
}

// pin keeps the inode of a node whose last name is about to go, for as long as
// the kernel knows the node. The keeper is to keep it, too, where somebody has it
// open or as working directory.
func (t *nodeTable) pin(n *node, inUse bool) {
	fd, err := t.pathFD(n)
	if err != nil {
		return
	}
	n.pinned.Store(true)
	if t.keep != nil && inUse {
		t.entrust(n, fd)
	}
}

// unpin takes pin back, if n is pinned (nil is not): the inode has a name still, or again.
// Nobody else pins or unpins it meanwhile, for the kernel holds its lock.
func (t *nodeTable) unpin(n *node) {
	if n == nil || !n.pinned.Swap(false) {
		return
	}
	t.distrust(n)
	if n.orphan.Swap(false) {
		t.forgetOrphan(n.id)
	}
}

// close closes every descriptor.
func (t *nodeTable) close() {
	t.closing.wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, n := range t.byID {
		n.meta.Lock()
		n.file.close()
		if id != fuse.FUSE_ROOT_ID {
			descriptors{t.takePath(n)}.close()
		}
		n.meta.Unlock()
	}
	t.ids.close()
}
