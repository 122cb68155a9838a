package fs

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/byokd/byokd/keyguard"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// parking holds the requests that wait at the gate.
//
// A waiting request is let go early for one reason only: its caller is being
// killed. The kernel's INTERRUPT does not tell a SIGKILL from a harmless
// signal, and an EINTR for the latter makes write(2) fail in programs that
// never expect it (a JVM signals its own threads); so INTERRUPT is ignored and
// the callers are looked at instead.
type parking struct {
	killed func(threads []uint32) []uint32 // Services.Killed of the mount; fixed before anything waits

	mu      sync.Mutex
	parked  map[*parkedCall]struct{} // guarded by mu
	looking bool                     // guarded by mu; the goroutine of look runs
}

type parkedCall struct {
	pid       uint32 // the caller's thread, as seen from the mount's pid namespace
	node      uint64
	off, size int64 // of a READ or WRITE, whose pages the kernel holds locked or under writeback; size 0 otherwise
	leave     context.CancelFunc
}

// lookEvery is how often callers are looked at: a killed process is gone within
// this time, and 1,000 parked calls cost about 1 % of a core. Where there are so many
// that a look takes long, it is a tenth of a core.
const lookEvery = 100 * time.Millisecond

// admit enters the gate, waiting while it is closed, and sees to it that the
// volume's root is among the keys: it is pinned, but an epoch that began while
// it was being pinned may be without. It fails when the caller is being killed
// or the filesystem is being unmounted.
func (f *Filesystem) admit(c *call, class keyguard.Class, request []byte) (keyguard.Pass, error) {
	if !f.isUnlocked() {
		err := f.park(c, class, request, func(ctx context.Context) error {
			select {
			case <-f.unlocked:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if err != nil {
			return keyguard.Pass{}, err
		}
	}
	for {
		pass, err := f.admitOnce(c, class, request)
		if err != nil || pass.Keys().Root(f.header.Volume) != nil {
			return pass, err
		}
		pass.Exit()
		if err := f.guard.Load(f.serving, f.header.Volume, f.form.WrappedRoot, f.binding); err != nil {
			return keyguard.Pass{}, err
		}
	}
}

func (f *Filesystem) admitOnce(c *call, class keyguard.Class, request []byte) (keyguard.Pass, error) {
	if pass, ok := f.guard.TryEnter(class, uint32(c.header.NodeId)); ok {
		return pass, nil
	}
	var pass keyguard.Pass
	err := f.park(c, class, request, func(ctx context.Context) (err error) {
		pass, err = f.guard.Enter(ctx, class, uint32(c.header.NodeId))
		return err
	})
	return pass, err
}

// errAside says that a request waits elsewhere, and will be served anew (aside.go).
var errAside = errors.New("fs: the request was set aside")

// park has a request wait, in the sight of those who look after its caller and its
// pages: elsewhere, or, where it cannot, here.
func (f *Filesystem) park(c *call, class keyguard.Class, request []byte, wait func(context.Context) error) error {
	if c.aside(request, class) {
		return errAside
	}
	c.parks()
	c.wipeBehind(len(request))
	ctx, leave := context.WithCancel(f.serving)
	defer leave()
	p := &parkedCall{pid: c.header.Pid, node: c.header.NodeId, leave: leave}
	p.off, p.size = heldPages(c.header.Opcode, request)
	f.parking.add(p)
	defer f.parking.remove(p)
	return wait(ctx)
}

// heldPages returns the range whose pages the kernel holds for a waiting
// request: those that a READ is to fill, those that a flush has under writeback,
// and the last page of any other WRITE where it is written in part
// (fs/fuse/file.c, fuse_fill_write_pages). O_DIRECT holds none.
func heldPages(opcode uint32, request []byte) (off, size int64) {
	switch opcode {
	case opRead:
		in := (*fuse.ReadIn)(unsafe.Pointer(&request[0]))
		if in.Flags&unix.O_DIRECT == 0 {
			return int64(in.Offset), int64(in.Size)
		}
	case opWrite:
		in := (*fuse.WriteIn)(unsafe.Pointer(&request[0]))
		end := int64(in.Offset) + int64(in.Size)
		switch part := end % kernelPage; {
		case in.WriteFlags&fuse.WRITE_CACHE != 0:
			return int64(in.Offset), int64(in.Size)
		case in.Flags&unix.O_DIRECT == 0 && part != 0:
			return end - part, part
		}
	}
	return 0, 0
}

func (k *parking) add(p *parkedCall) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.parked == nil {
		k.parked = map[*parkedCall]struct{}{}
	}
	k.parked[p] = struct{}{}
	if !k.looking {
		k.looking = true
		go k.look()
	}
}

func (k *parking) remove(p *parkedCall) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.parked, p)
}

func (k *parking) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.parked)
}

// held returns the ranges of a node whose pages parked READs and WRITEs hold.
func (k *parking) held(node uint64) []span {
	k.mu.Lock()
	defer k.mu.Unlock()
	var spans []span
	for p := range k.parked {
		if p.node == node && p.size > 0 {
			spans = append(spans, span{p.off, p.off + p.size})
		}
	}
	return spans
}

// look watches the callers until nobody is parked.
func (k *parking) look() {
	timer := time.NewTimer(lookEvery)
	defer timer.Stop()
	for {
		<-timer.C
		began := time.Now()
		k.mu.Lock()
		if len(k.parked) == 0 {
			k.looking = false
			k.mu.Unlock()
			return
		}
		calls := make([]*parkedCall, 0, len(k.parked))
		for p := range k.parked {
			calls = append(calls, p)
		}
		k.mu.Unlock()
		k.letGo(calls)
		timer.Reset(max(lookEvery, 9*time.Since(began)))
	}
}

// letGo lets those calls go whose callers are being killed. Callers that the
// mounter cannot see have no number.
func (k *parking) letGo(calls []*parkedCall) {
	threads := make([]uint32, 0, len(calls))
	for _, p := range calls {
		if p.pid != 0 {
			threads = append(threads, p.pid)
		}
	}
	slices.Sort(threads)
	killed := k.killed(slices.Compact(threads))
	slices.Sort(killed) // of tens of thousands of calls all may be killed at once
	for _, p := range calls {
		if _, found := slices.BinarySearch(killed, p.pid); found {
			p.leave()
		}
	}
}
