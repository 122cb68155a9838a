package fs

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// CacheMode says who holds back writes.
type CacheMode uint8

const (
	// Writeback lets the kernel gather small writes; a freeze flushes them.
	Writeback CacheMode = iota
	// Writethrough sends each write at once: at a freeze nothing is dirty but
	// what was stored through shared mappings.
	Writethrough
)

func (m CacheMode) String() string {
	if m == Writethrough {
		return "writethrough"
	}
	return "writeback"
}

// Observer is told of every operation that the gate let through; it must be
// quick and safe for concurrent use.
type Observer interface {
	// Done: op is a FUSE operation in lower case; bytes of data moved; took
	// includes waiting at the gate; errno 0 is success.
	Done(op string, bytes int, took time.Duration, errno syscall.Errno)
	// Damaged: a block, or a sealed owner and mode, failed authentication and was not returned.
	Damaged()
}

// Options of a Filesystem. The zero value is right.
type Options struct {
	Cache CacheMode
	// DirtyLimit is the most bytes that the kernel may hold dirty, and so what a
	// freeze has to flush; 0 is DefaultDirtyLimit.
	DirtyLimit int64
	Observer   Observer    // may be nil
	Keep       *Keep       // nil where the mount ends with this process
	Logger     *zap.Logger // may be nil

	tableOfIDs bool // in tests: as if lower files could not be opened by handle
}

// Filesystem is one volume. It may be mounted once.
type Filesystem struct {
	guard   *keyguard.Guard
	lower   string
	header  seal.VolumeHeader // as it was at the start; set by Unlock
	form    seal.KeyForm      // that of the header which the guard's KMS key opens; set by Unlock
	binding keyguard.Binding  // encryption context of the root key; set by Unlock
	options Options
	log     *zap.Logger

	root       int // the lower directory, locked
	nodes      *nodeTable
	handles    *handleTable
	turns      turns
	seams      *seams
	reserve    *reserve
	failures   lowerFailures
	lowerFree  atomic.Uint64 // bytes, when the lower filesystem was last asked
	refilling  atomic.Bool   // refill is at work
	hot        hotBlocks
	crypting   atomic.Int32   // calls that seal or open
	cores      int            // that may do so
	background sync.WaitGroup // syncs of our own, and reading ahead
	lookahead  lookahead
	idleDrop   idleDrop
	inherited  inherited
	stable     bool       // pages under writeback do not change below
	privileged bool       // may give files to other users
	owner      fuse.Owner // of this process, and so of what it makes
	umask      uint32     // of this process: what it takes from a caller's mode is given back

	unlocked chan struct{}   // closed by Unlock
	serving  context.Context // ends when waiting calls must go
	dismiss  context.CancelFunc
	parking  parking
	loop     atomic.Pointer[loop]
	bdi      atomic.Pointer[bdi]
	services atomic.Pointer[Services] // of the mount

	rewrapping sync.Mutex // one Rewrap at a time
	generation uint64     // guarded by rewrapping: the header's newest generation seen

	mountMu    sync.Mutex             // one Mount, Serve or Unmount at a time
	passed     bool                   // the mount was made by somebody else; set by Serve
	runtimeFDs []int                  // set by Mount, before there is anything to freeze
	mountpoint atomic.Pointer[string] // changed under mountMu
	unwatch    func()

	// closed and holdReads follow the guard; set by its transitions alone, and
	// by who takes a mount over, before the first.
	closed    atomic.Bool
	holdReads atomic.Bool
	reading   atomic.Int64  // READs let in although reads may be held back next
	ending    atomic.Uint64 // the epoch that is being frozen, or was last
	frozenAt  atomic.Int64  // when the gate was last closed, by kernelsNow; before the first time, when we began; while it drains, never

	// spanMu is held by each step of a freeze that the thaw takes back, and by the thaw.
	spanMu sync.Mutex
	opened uint64 // guarded by spanMu: the newest epoch that has begun

	damagedBlocks atomic.Uint64
	foreignNames  atomic.Uint64
	undrained     atomic.Uint64
	dropping      atomic.Int32  // threads that drop nodes, those that hang included
	leftover      atomic.Int64  // files of which the last freeze left pages in the kernel
	flushed       atomic.Uint64 // WRITEs of the kernel's own, by which a drain sees progress
	requests      atomic.Uint64
	lackTold      atomic.Int64 // when a lack of descriptors was last logged, Unix nanoseconds
}

// OpenLocked locks the lower directory against other daemons, until Close, and asks for
// no key. What is mounted of it answers INIT, STATFS and the attributes of the root; every
// other call waits for Unlock. There need not be a volume in the directory yet, see Create.
func OpenLocked(lower string, g *keyguard.Guard, o Options) (*Filesystem, error) {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.DirtyLimit == 0 {
		o.DirtyLimit = DefaultDirtyLimit
	}
	root, err := openLower(lower)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		unix.Close(root)
		return nil, err
	}
	f := &Filesystem{
		guard: g, lower: lower, options: o, log: o.Logger, unlocked: make(chan struct{}), unwatch: func() {},
		root: root, nodes: newNodeTable(newLowerIDs(root, o.tableOfIDs, o.Keep != nil), root), handles: newHandleTable(), turns: newTurns(), seams: newSeams(),
		stable: stablePages(&st), cores: runtime.GOMAXPROCS(0), privileged: unix.Geteuid() == 0, umask: processUmask(),
		owner: fuse.Owner{Uid: uint32(unix.Geteuid()), Gid: uint32(unix.Getegid())},
	}
	f.nodes.keep, f.nodes.untracked = o.Keep, !tracksBlocks(root)
	f.bdi.Store(&bdi{})
	f.closed.Store(true)
	f.holdReads.Store(true)
	f.frozenAt.Store(kernelsNow())
	f.serving, f.dismiss = context.WithCancel(context.Background())
	f.openReserve()
	f.statfs() // what Stats tells until WatchLower looks
	return f, nil
}

// Unlock verifies the volume's header with its root key and lets the calls in that
// wait for it. b is the encryption context of the root key and must be the header's.
// It waits while the key is not usable, until ctx ends. It is called once.
func (f *Filesystem) Unlock(ctx context.Context, b keyguard.Binding) error {
	header, err := ReadHeader(f.lower)
	if err != nil {
		return err
	}
	if err := sameBinding(f.lower, header, b); err != nil {
		return err
	}
	form, err := FormUnder(header, f.guard.Status().KeyARN)
	if err != nil {
		return err
	}
	// Load and verify first: a pinned root that KMS cannot open would hold up
	// every thaw.
	unmarked, err := authenticate(ctx, f.guard, f.lower, header, form, b)
	if err != nil {
		return err
	}
	if unmarked != nil {
		f.log.Warn("the disk below is full, and the newest generation of the volume's header could not be noted: until the next start an older header that is put back may not be noticed",
			zap.String("file", seal.VolumeMarkName), zap.Error(unmarked))
	}
	f.guard.Pin(header.Volume, form.WrappedRoot, b)
	f.header, f.form, f.generation, f.binding = header, form, header.Generation, b
	if f.sealsOwners() {
		if err := withRoot(ctx, f.guard, header.Volume, form.WrappedRoot, b, f.learnRoot); err != nil {
			return err
		}
	}
	f.follow()
	close(f.unlocked)
	return nil
}

// sameBinding refuses a volume of another encryption context than b.
func sameBinding(lower string, header seal.VolumeHeader, b keyguard.Binding) error {
	if maps.Equal(header.Binding, b.Context()) {
		return nil
	}
	return fmt.Errorf("the volume in %s was made for the encryption context %v, the configuration says %v: set cluster, tenant and role as they were", lower, header.Binding, b.Context())
}

// isUnlocked reports whether Unlock has returned: what it set may be read.
func (f *Filesystem) isUnlocked() bool {
	select {
	case <-f.unlocked:
		return true
	default:
		return false
	}
}

// authenticate verifies the header with the root key that it wraps, refuses one
// that is older than one seen before, and remembers it when it is newer. A full disk
// is no reason to refuse it: unmarked says then that it is not remembered.
func authenticate(ctx context.Context, g *keyguard.Guard, lower string, header seal.VolumeHeader, form seal.KeyForm, b keyguard.Binding) (unmarked, err error) {
	mark, err := readMark(lower)
	if err != nil {
		return nil, err
	}
	newest := seal.VolumeMark{Volume: header.Volume, Generation: header.Generation}
	err = withRoot(ctx, g, header.Volume, form.WrappedRoot, b, func(r *seal.Root) error {
		if err := checkMark(r, header, mark); err != nil {
			return err
		}
		newest, err = r.SignVolumeMark(newest)
		return err
	})
	if err != nil || mark != nil && mark.Generation == newest.Generation {
		return nil, err
	}
	err = writeMark(lower, newest)
	if diskFull(err) {
		return err, nil
	}
	return nil, err
}

// follow subscribes to the guard, and takes over its present state: a
// transition that comes between the two speaks later and so last.
func (f *Filesystem) follow() {
	first := &firstState{fs: f}
	f.unwatch = f.guard.Subscribe(first)
	first.mu.Lock()
	defer first.mu.Unlock()
	if !first.told && f.guard.Status().Gate.Admits() {
		f.Thawed(keyguard.Transition{})
	}
}

// firstState passes the guard's transitions on and remembers that there was one.
type firstState struct {
	fs   *Filesystem
	mu   sync.Mutex
	told bool // guarded by mu
}

func (s *firstState) tell() {
	s.mu.Lock()
	s.told = true
	s.mu.Unlock()
}

func (s *firstState) Draining(ctx context.Context, t keyguard.Transition) {
	s.tell()
	s.fs.Draining(ctx, t)
}

func (s *firstState) DrainLate(ctx context.Context) { s.fs.DrainLate(ctx) }

func (s *firstState) Frozen(ctx context.Context, t keyguard.Transition) {
	s.tell()
	s.fs.Frozen(ctx, t)
}

func (s *firstState) Thawed(t keyguard.Transition) {
	s.tell()
	s.fs.Thawed(t)
}

// Header is the volume's header.
func (f *Filesystem) Header() seal.VolumeHeader { return f.header }

// Stats is what a status page shows.
type Stats struct {
	Mounted        bool
	Mountpoint     string
	Writeback      bool   // the kernel granted the writeback cache
	Parked         int    // calls waiting at the gate
	Requests       uint64 // served since the mount
	DamagedBlocks  uint64 // blocks, and sealed owners and modes, that failed authentication
	ForeignNames   uint64 // lower names that byokd did not write, met while listing
	Undrained      uint64 // files of which a freeze could not take every page away in time, since the mount
	Inodes         int    // known to the kernel
	LowerFreeBytes uint64 // when WatchLower last looked
	ReserveMissing int64  // bytes that the reserve for a full disk lacks; new data is refused while it lacks any
}

// mountedAt returns the mount point, "" when there is none.
func (f *Filesystem) mountedAt() string {
	if dir := f.mountpoint.Load(); dir != nil {
		return *dir
	}
	return ""
}

// Stats waits for nobody: neither for the gate nor for the lower filesystem.
func (f *Filesystem) Stats() Stats {
	s := Stats{
		Parked: f.parking.count(), Requests: f.requests.Load(),
		DamagedBlocks: f.damagedBlocks.Load(), ForeignNames: f.foreignNames.Load(), Undrained: f.undrained.Load(),
	}
	s.Mountpoint = f.mountedAt()
	if l := f.loop.Load(); l != nil {
		s.Mounted = true
		s.Writeback = l.granted()&fuse.CAP_WRITEBACK_CACHE != 0
	}
	s.Inodes = f.nodes.known()
	s.LowerFreeBytes = f.lowerFree.Load()
	s.ReserveMissing = f.reserve.missing()
	return s
}

// statfs asks the lower filesystem, which needs no key. The space is what is
// left for plain bytes; the reserve is none of it.
func (f *Filesystem) statfs() fuse.StatfsOut {
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.root, &st); err != nil {
		f.log.Warn("statfs of the lower directory", zap.Error(err))
		return fuse.StatfsOut{Bsize: block, Frsize: block, NameLen: seal.NameMax}
	}
	f.lowerFree.Store(st.Bavail * uint64(st.Frsize))
	plain := func(blocks uint64) uint64 {
		return blocks * uint64(st.Frsize) / block * seal.BlockPayload / block
	}
	owed := uint64(f.reserve.missing()) / uint64(st.Frsize)
	free := func(blocks uint64) uint64 { return plain(blocks - min(blocks, owed)) }
	return fuse.StatfsOut{
		Blocks: plain(st.Blocks), Bfree: free(st.Bfree), Bavail: free(st.Bavail),
		Files: st.Files, Ffree: st.Ffree, Bsize: block, Frsize: block, NameLen: seal.NameMax,
	}
}

func (f *Filesystem) observe(op string, c *call, took time.Duration) {
	f.requests.Add(1)
	if f.options.Observer != nil {
		f.options.Observer.Done(op, c.bytes, took, syscall.Errno(c.errno))
	}
}

// damaged tells of a block that could not be opened or sealed.
func (f *Filesystem) damaged(n *node, index int64, err error) {
	if !errors.Is(err, seal.ErrTampered) && !errors.Is(err, seal.ErrTruncated) && !errors.Is(err, seal.ErrUnknownVersion) && !errors.Is(err, seal.ErrNotSealed) {
		f.log.Error("sealed block", zap.Stringer("file", n.fileID), zap.Int64("block", index), zap.Error(err))
		return
	}
	f.damagedBlocks.Add(1)
	if f.options.Observer != nil {
		f.options.Observer.Damaged()
	}
	f.log.Error("damaged block: reads of it fail with EIO, the rest of the file is served",
		zap.Stringer("file", n.fileID), zap.Uint64("inode", n.id), zap.Int64("block", index),
		zap.Int64("offset", seal.BlockStart(index)), zap.String("reason", err.Error()))
}

// foreignName counts a name that is not sealed, unless it is one that belongs to the
// root of a lower directory.
func (f *Filesystem) foreignName(dir *node, sealed string) {
	if dir.id == fuse.FUSE_ROOT_ID && (seal.IsOwnFile(sealed) || sealed == "lost+found") {
		return
	}
	if f.foreignNames.Add(1) == 1 {
		f.log.Warn("the lower directory holds a name that byokd did not write; it is not shown",
			zap.String("lower name, base64", base64.StdEncoding.EncodeToString([]byte(sealed))))
	}
}

// Close ends the use of the lower directory. Unmount comes first.
func (f *Filesystem) Close() error {
	f.unwatch()
	f.dismiss()
	f.background.Wait()
	f.handles.close()
	f.nodes.close()
	f.reserve.close()
	return unix.Close(f.root)
}
