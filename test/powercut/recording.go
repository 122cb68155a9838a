//go:build linux

package powercut

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// workload writes into a directory of its own, remembers what was acknowledged
// and when, and compares.
type workload interface {
	name() string
	// run works below w.dir until ctx ends, or shorter.
	run(ctx context.Context, w *world) error
	// check compares what is in dir with what had to be there, and with what may
	// be, when the power was cut at that place of the log.
	check(dir string, cut int) error
}

// world is what a workload works in.
type world struct {
	dir  string
	rand *rand.Rand
	now  func() int // the place in the log where what happens next will stand
}

// recording is what workloads did to a disk.
type recording struct {
	lower  lowerKind
	view   view
	seed   uint64
	loads  []workload
	events []event
	log    []byte // what the events' data is in
	start  int    // where the workloads began

	looking sync.Mutex
	moments []int // where a workload looked at the log: what was acknowledged then has just become durable; guarded by looking

	// inspect, if set, looks at the lower filesystem when the workloads are over
	// and everything is still mounted.
	inspect func(lower string) error
}

// forget gives back the memory of the log.
func (r *recording) forget() {
	_ = unix.Munmap(r.log)
	r.log, r.events = nil, nil
}

// bench is where recordings and their points are mounted: directories that
// nothing else uses.
type bench struct {
	dir  string // the lower filesystem's mount point, while something is mounted
	disk string // the recorder's
}

func newBench(dir string) (bench, error) {
	b := bench{dir + "/lower", dir + "/disk"}
	return b, errors.Join(os.Mkdir(b.dir, 0o755), os.Mkdir(b.disk, 0o755))
}

// record runs the workloads on a fresh filesystem for some time. Between is
// called again and again meanwhile: it freezes the volume, or does nothing.
func (b bench) record(r *recording, length time.Duration, between func(context.Context) error) (err error) {
	d, err := startDisk(b.disk, append(r.view.mounts(), b.dir), r.lower.size)
	if err != nil {
		return err
	}
	defer func() {
		stopped := d.stop()
		var read error
		r.log, r.events, read = d.events()
		err = errors.Join(err, stopped, read, d.close())
	}()
	backing, err := os.OpenFile(b.disk+"/"+diskName, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, backing.Close()) }()
	// Direct: requests go side by side, as to a real disk.
	loop, err := attach(backing, unix.LO_FLAGS_DIRECT_IO|unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.detach()) }()
	if err := r.lower.format(loop.path); err != nil {
		return err
	}
	if err := r.lower.mount(loop.path, b.dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(b.dir)) }()
	if err := r.view.create(b.dir); err != nil {
		return err
	}
	dir, closeView, err := r.view.open(b.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeView()) }()
	if err := r.work(d, dir, length, between); err != nil || r.inspect == nil {
		return err
	}
	return r.inspect(b.dir)
}

// work runs the workloads side by side.
func (r *recording) work(d *disk, dir string, length time.Duration, between func(context.Context) error) error {
	for _, l := range r.loads {
		if err := os.Mkdir(filepath.Join(dir, l.name()), 0o777); err != nil {
			return err
		}
	}
	if err := syncPath(dir); err != nil {
		return err
	}
	r.start = d.now()
	now := func() int {
		at := d.now()
		r.looking.Lock()
		r.moments = append(r.moments, at)
		r.looking.Unlock()
		return at
	}
	runtime.LockOSThread() // for what burn starts
	defer runtime.UnlockOSThread()
	idle, err := burn()
	if err != nil {
		return err
	}
	defer idle()
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	failed := make([]error, len(r.loads)+1)
	var working sync.WaitGroup
	for i, l := range r.loads {
		w := &world{filepath.Join(dir, l.name()), rand.New(rand.NewPCG(r.seed, uint64(i))), now}
		working.Go(func() {
			runtime.LockOSThread() // the programs that it starts are to die with this thread, and not before
			defer runtime.UnlockOSThread()
			if err := l.run(ctx, w); err != nil {
				failed[i] = fmt.Errorf("%s: %w", l.name(), err)
				cancel()
			}
		})
	}
	working.Go(func() {
		for ctx.Err() == nil && failed[len(r.loads)] == nil {
			failed[len(r.loads)] = between(ctx)
		}
	})
	working.Wait()
	return errors.Join(failed...)
}

// loss is a point at which something was wrong.
type loss struct {
	seed            uint64
	point, cut, end int // end is the length of the log
	err             error
}

func (l loss) String() string {
	return fmt.Sprintf("seed %d, point %d, cut at event %d of %d: %.1000v", l.seed, l.point, l.cut, l.end, l.err)
}

// verify makes points and returns those at which something was lost. keepDir,
// if not empty, gets the images of the first few.
func (b bench) verify(r *recording, points int, keepDir string) ([]loss, error) {
	runtime.LockOSThread() // as in work
	defer runtime.UnlockOSThread()
	m, err := newMedium(r.lower.size, r.events)
	if err != nil {
		return nil, err
	}
	defer m.close()
	choice := rand.New(rand.NewPCG(r.seed, 99))
	var lost []loss
	for i, c := range r.cuts(choice, points) {
		cut := c.at
		m.advance(cut)
		rule := subset(choice, len(m.pending))
		if c.bare {
			rule = func() bool { return false }
		}
		kept := draw(rule, len(m.pending))
		if err := m.cutAt(cut, kept); err != nil {
			return lost, err
		}
		image, err := m.keep(keepDir, fmt.Sprintf("%s-%d-%d.img", r.lower.name, r.seed, i), len(lost))
		if err != nil {
			return lost, err
		}
		if err := b.point(r, m, cut); err != nil {
			lost = append(lost, loss{r.seed, i, cut, len(r.events), errors.Join(b.again(r, cut, kept), err)})
		} else if image != "" {
			_ = os.Remove(image)
		}
	}
	return lost, nil
}

// cut is a place to cut the power at. A bare one leaves nothing on the medium that
// no flush has made durable.
type cut struct {
	at   int
	bare bool
}

// cuts chooses places, in ascending order: half of them anywhere, half where a
// workload has just been acknowledged something, or was about to begin. What was
// acknowledged too early is missing until the next flush, which is soon; so these
// are the places where it shows, most of all if nothing else has survived.
func (r *recording) cuts(choice *rand.Rand, points int) []cut {
	cuts := make([]cut, points)
	slices.Sort(r.moments)
	for i := range cuts {
		if i%2 == 0 || len(r.moments) == 0 {
			cuts[i].at = r.start + choice.IntN(len(r.events)-r.start+1)
			continue
		}
		cuts[i] = cut{r.moments[choice.IntN(len(r.moments))], choice.IntN(3) > 0}
	}
	slices.SortFunc(cuts, func(a, b cut) int { return cmp.Compare(a.at, b.at) })
	return cuts
}

// again makes a state anew that had lost something, on a medium that has seen no
// other, so that what the harness itself had left there is told from a loss.
func (b bench) again(r *recording, cut int, kept []bool) error {
	m, err := newMedium(r.lower.size, r.events)
	if err != nil {
		return err
	}
	defer m.close()
	if err := m.cutAt(cut, kept); err != nil {
		return err
	}
	if err := b.point(r, m, cut); err == nil {
		return errors.New("but not when the same state is made on a fresh medium: look for the fault in the harness")
	}
	return nil
}

// point mounts the state in the medium and compares.
func (b bench) point(r *recording, m *medium, cut int) (err error) {
	loop, err := attach(m.file, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.detach()) }()
	if err := r.lower.mount(loop.path, b.dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(b.dir)) }()
	dir, closeView, err := r.view.open(b.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeView()) }()
	var wrong []error
	for _, l := range r.loads {
		if err := l.check(filepath.Join(dir, l.name()), cut); err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %w", l.name(), err))
		}
	}
	return errors.Join(wrong...)
}

// syncPath makes a file durable, or the names in a directory.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
