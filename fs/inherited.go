package fs

import (
	"context"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// What a predecessor has left in the kernel. A byokd that leaves a passed mount takes
// the kernel's pages away (leave). One that was killed does not, and has told nobody
// of which inodes there are some: it may be every one that has a name below, and those
// without one that the mounter keeps. So a successor takes away the pages and
// attributes of all of them once, when it has its key, with which what is dirty can be
// flushed, or when it has waited for that in vain: the key may have been refused while
// nobody was there. A freeze that comes before it is done does it, too.

// inherited are inodes that the kernel may have something of since before we took over.
type inherited struct {
	mu  sync.Mutex
	ids map[uint64]struct{} // guarded by mu
}

func (i *inherited) add(id uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ids == nil {
		i.ids = map[uint64]struct{}{}
	}
	i.ids[id] = struct{}{}
}

func (i *inherited) remove(id uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if delete(i.ids, id); len(i.ids) == 0 {
		i.ids = nil
	}
}

func (i *inherited) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.ids)
}

func (i *inherited) all() []uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	ids := make([]uint64, 0, len(i.ids))
	for id := range i.ids {
		ids = append(ids, id)
	}
	return ids
}

// inherit makes good the ids that the kernel has from a predecessor, and notes them.
// inodes are those without a name, in use from now on.
func (f *Filesystem) inherit(inodes map[uint64]int) error {
	f.inherited.add(fuse.FUSE_ROOT_ID)
	for id := range inodes {
		f.inherited.add(id)
	}
	if t, ok := f.nodes.ids.(*tableIDs); ok {
		if err := t.resume(inodes); err != nil {
			return err
		}
		for id := range t.names.names {
			f.inherited.add(id)
		}
		return nil
	}
	for _, fd := range inodes {
		unix.Close(fd) // a handle suffices while the kernel has the file open below us
	}
	names := &nameIndex{root: f.root, met: func(dir int, name string) {
		if id, err := f.nodes.ids.identify(dir, name, nil); err == nil {
			f.inherited.add(id)
		}
	}}
	return names.walk()
}

// dropInherited takes away what the kernel has of inherited inodes. What hangs, or is
// left when ctx ends, stays noted.
func (f *Filesystem) dropInherited(ctx context.Context, l *loop) {
	f.dropIDs(ctx, l, f.inherited.all(), f.inherited.remove)
}

// disinherit does so until nothing is left.
func (f *Filesystem) disinherit(l *loop) {
	timer, stop := coldTimer()
	defer stop()
	if !f.awaitKey(timer) {
		if f.serving.Err() != nil {
			return
		}
		f.log.Info("the key cannot be used: what the kernel has cached of the mount is taken away")
		if err := incEpoch(l.dev); err != nil {
			f.log.Warn("kernel refused INC_EPOCH: cached names may be answered while frozen", zap.Error(err))
		}
	}
	for left := f.inherited.count(); left > 0; {
		ctx, cancel := context.WithTimeout(f.serving, dropWithin)
		f.dropInherited(ctx, l)
		cancel()
		before := left
		if left = f.inherited.count(); left == before && !f.awaitFlush(l) {
			return
		}
	}
}

// awaitFlush waits until what is dirty can be flushed. It returns false when there is no
// mount any more.
func (f *Filesystem) awaitFlush(l *loop) bool {
	pause := time.NewTimer(dropWithin) // it may be so already, and have taken longer
	defer pause.Stop()
	select {
	case <-pause.C:
		return f.awaitKey(nil)
	case <-l.ended:
	case <-f.serving.Done():
	}
	return false
}
