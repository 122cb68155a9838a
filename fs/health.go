package fs

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// This file tells whether the directory below a mount can still keep what is
// written to it. A disk that is read-only, full or gone does not touch the key, so
// nothing else would tell.

// LowerState is what there is to say of the lower directory, in one word.
type LowerState uint8

// The states, best first. Of several that hold, the last is told.
const (
	LowerWell     LowerState = iota
	LowerFull                // new data is refused: no space, no inodes, or a quota
	LowerMoved               // its path leads elsewhere: the mount is served, and a byokd that starts anew will not find it
	LowerFailing             // calls failed below in the last minute; the filesystem answers
	LowerReadOnly            // nothing can be written
	LowerRemoved             // the directory was deleted: no file can be made in it
	LowerBroken              // the filesystem answers with an error, which is told
	LowerSilent              // the filesystem does not answer
)

// LowerStates lists every state, best first.
func LowerStates() []LowerState {
	return []LowerState{LowerWell, LowerFull, LowerMoved, LowerFailing, LowerReadOnly, LowerRemoved, LowerBroken, LowerSilent}
}

// String is the state as metrics have it.
func (s LowerState) String() string {
	return [...]string{"well", "full", "moved", "failing", "read_only", "removed", "broken", "silent"}[s]
}

// Serves reports whether reads, and writes where there is room, can be expected to succeed.
func (s LowerState) Serves() bool { return s < LowerReadOnly }

// LowerHealth is a state and what it was seen by.
type LowerHealth struct {
	State LowerState
	Err   error // LowerFailing: of the latest call that failed; LowerBroken: what the filesystem answers
}

// LowerErrors are the errors of lower filesystems that are counted: those that are
// everyday answers to nobody.
func LowerErrors() []unix.Errno {
	return []unix.Errno{unix.EIO, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.ESTALE}
}

const (
	// lowerLookEvery is how often the lower directory is looked at: three system calls
	// that touch no disk.
	lowerLookEvery = time.Second

	// lowerSilentAfter is how long a look may take. Local filesystems answer from memory.
	lowerSilentAfter = 5 * time.Second

	// lowerRemembers is for how long a call that failed below counts.
	lowerRemembers = time.Minute
)

// lowerFailures counts calls that failed below. Safe for concurrent use.
type lowerFailures struct {
	counts [5]atomic.Uint64 // in the order of LowerErrors
	space  atomic.Int64     // when a call last failed for want of space; Unix nanoseconds
	fault  atomic.Int64     // when a call last failed for another reason
	errno  atomic.Uint32    // of the latter
}

// note counts err where the lower filesystem has given it.
func (l *lowerFailures) note(err error) {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return // of our own, such as a block that fails authentication
	}
	i := slices.Index(LowerErrors(), errno)
	if i < 0 {
		return
	}
	l.counts[i].Add(1)
	switch {
	case diskFull(errno):
		l.space.Store(time.Now().UnixNano())
	case errno == unix.ESTALE: // of a single file, as a rule; that of a whole filesystem is seen by a look
	default:
		l.errno.Store(uint32(errno))
		l.fault.Store(time.Now().UnixNano())
	}
}

// LowerFailures is how many calls the lower filesystem has failed since the volume
// was opened, in the order of LowerErrors.
func (f *Filesystem) LowerFailures() []uint64 {
	counts := make([]uint64, len(f.failures.counts))
	for i := range counts {
		counts[i] = f.failures.counts[i].Load()
	}
	return counts
}

// WatchLower looks at the lower directory once a second until ctx ends, and tells
// of its health first and whenever it changes. It does not wait for a filesystem
// that hangs, and needs no key.
func (f *Filesystem) WatchLower(ctx context.Context, tell func(LowerHealth)) error {
	w, err := newLowerWatch(f)
	if err != nil {
		return err
	}
	defer w.leave()
	ticker := time.NewTicker(lowerLookEvery)
	defer ticker.Stop()
	told := LowerHealth{State: LowerSilent + 1}
	for {
		if health := w.health(ctx); ctx.Err() == nil && health != told {
			tell(health)
			told = health
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// lowerWatch looks at a lower directory, one look at a time.
type lowerWatch struct {
	fs      *Filesystem
	device  uint64 // of the directory
	inode   uint64
	looks   chan LowerHealth // of the look under way; holds one
	began   time.Time        // of the look under way; zero when there is none
	suspect bool             // the last look found that nothing can be written

	mu   sync.Mutex // held by a look
	root int        // a descriptor of our own: a look that hangs may outlive the Filesystem
	left bool       // guarded by mu
}

func newLowerWatch(f *Filesystem) (*lowerWatch, error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.root, &st); err != nil {
		return nil, err
	}
	root, err := ignoringEINTR(func() (int, error) {
		return unix.Open(procFD(f.root), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	return &lowerWatch{fs: f, device: st.Dev, inode: st.Ino, looks: make(chan LowerHealth, 1), root: root}, nil
}

// health is what the present look finds, or that it takes too long.
func (w *lowerWatch) health(ctx context.Context) LowerHealth {
	if w.began.IsZero() {
		w.began = time.Now()
		deep := w.suspect || recent(&w.fs.failures.fault)
		go func() { w.looks <- w.look(deep) }()
	}
	limit := time.NewTimer(max(time.Until(w.began.Add(lowerSilentAfter)), lowerLookEvery/10)) // one that has ended is not silent
	defer limit.Stop()
	select {
	case h := <-w.looks:
		w.began = time.Time{}
		w.suspect = !h.State.Serves()
		return h
	case <-limit.C:
		return LowerHealth{State: LowerSilent}
	case <-ctx.Done():
		return LowerHealth{}
	}
}

// leave closes the descriptor, or leaves that to a look that hangs.
func (w *lowerWatch) leave() {
	go func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.left = true
		unix.Close(w.root)
	}()
}

// look asks the lower filesystem. deep also has it sync the directory, which fails
// where it has given up writing without saying so in its flags (ext4 since Linux
// 6.15, XFS, after an error of their own); it costs the disk a flush.
func (w *lowerWatch) look(deep bool) LowerHealth {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.left {
		return LowerHealth{}
	}
	var space unix.Statfs_t
	var dir, named unix.Stat_t
	if err := errors.Join(unix.Fstatfs(w.root, &space), unix.Fstat(w.root, &dir)); err != nil {
		return brokenBelow(err)
	}
	if fault := w.fs.nodes.fault; fault != nil {
		if _, err := fault("look", 0); err != nil {
			return brokenBelow(err)
		}
	}
	w.fs.lowerFree.Store(space.Bavail * uint64(space.Frsize))
	moved := unix.Stat(w.fs.lower, &named) != nil || named.Dev != w.device || named.Ino != w.inode
	switch {
	case dir.Nlink == 0:
		return LowerHealth{State: LowerRemoved}
	case space.Flags&unix.ST_RDONLY != 0:
		return LowerHealth{State: LowerReadOnly}
	}
	if deep {
		if err := unix.Fsync(w.root); err != nil && !errors.Is(err, unix.EINVAL) {
			return brokenBelow(err)
		}
	}
	failures := &w.fs.failures
	switch {
	case recent(&failures.fault):
		return LowerHealth{LowerFailing, unix.Errno(failures.errno.Load())}
	case moved:
		return LowerHealth{State: LowerMoved}
	case space.Bavail == 0, space.Files > 0 && space.Ffree == 0, w.fs.reserve.short.Load(), recent(&failures.space):
		return LowerHealth{State: LowerFull}
	}
	return LowerHealth{}
}

// recent reports whether a moment lies in the last minute.
func recent(moment *atomic.Int64) bool {
	at := moment.Load()
	return at != 0 && time.Since(time.Unix(0, at)) < lowerRemembers
}

// brokenBelow is the state of a filesystem that answers a look with err.
func brokenBelow(err error) LowerHealth {
	var errno unix.Errno
	switch {
	case errors.Is(err, unix.EROFS):
		return LowerHealth{State: LowerReadOnly}
	case errors.As(err, &errno):
		return LowerHealth{LowerBroken, errno} // comparable, so that a change is told once
	}
	return LowerHealth{LowerBroken, err}
}
