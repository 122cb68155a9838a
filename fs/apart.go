package fs

import (
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
)

// apart runs work in a goroutine on a thread of its own that shares no
// descriptor with the process but those of Go's runtime and the standard
// streams, and returns at once. work gets a clone of the FUSE device dev; with
// dev < 0 none.
//
// It is for calls that the kernel may hold uninterruptibly until we answer a
// request: a notification behind a locked page, syncfs behind writeback. Were
// the process killed meanwhile, such a thread would keep the process's
// descriptors and with them the FUSE device open, so the connection would not
// end, so the page would stay locked, so the thread would stay: neither the
// daemon nor anybody who uses the mount could ever be killed. With a table of
// its own it does not hold the device that requests are read from; the kernel
// ends what was read from that one (fs/fuse/dev.c, fuse_dev_release), and the
// thread comes free.
//
// work uses no descriptor of the process and leaves none behind for it.
func (f *Filesystem) apart(dev int, work func(dev int)) {
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its table too
		if unix.Gettid() == unix.Getpid() {
			// Not the process's first thread: it does not end, and what it has
			// open is what /proc/PID/fd shows. While it is held here, the work
			// finds another.
			defer runtime.UnlockOSThread()
			f.apart(dev, work)
			close(started)
			return
		}
		close(started)
		// A signal that came in the middle of a cipher has left round keys on this
		// thread's signal stack. The collector has it wiped by a signal that does
		// nothing, which a thread that hangs does not take: so now, and the name
		// tells the guard that it need not wait for this one.
		_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGURG)
		name := append([]byte(keyguard.HangingThread), 0)
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
		work(ownDescriptors(dev, f.runtimeFDs))
	}()
	<-started
}

// runtimeDescriptors returns the descriptors that Go's scheduler may use on any
// thread, in order: its epoll instance and the eventfd that wakes it. They are
// made once, before the first wait for a file or a time.
func runtimeDescriptors() ([]int, error) {
	r, w, err := os.Pipe() // sees to it that they are made
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || !strings.HasPrefix(target, "anon_inode:[event") {
			continue
		}
		if fd, err := strconv.Atoi(e.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	slices.Sort(fds)
	return fds, nil
}

// fuseDevIOCClone is FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t).
const fuseDevIOCClone = 0x8004e500

// ownDescriptors gives the calling thread a descriptor table of its own, with
// nothing in it but the standard streams, the descriptors to keep, and a clone
// of dev, which it returns. Where the kernel or a container refuses, or it is
// not known what to keep, the thread works with what it shares.
func ownDescriptors(dev int, keep []int) int {
	if len(keep) == 0 || unix.Unshare(unix.CLONE_FILES) != nil {
		return dev
	}
	clone := dev
	if dev >= 0 {
		var err error
		if clone, err = cloneDevice(dev); err != nil {
			clone = dev // and nothing else of the process is kept, its locks least of all
		}
		keep = append(slices.Clone(keep), clone)
		slices.Sort(keep)
	}
	from := uint(3) // after the standard streams
	for _, fd := range keep {
		if uint(fd) > from {
			_ = unix.CloseRange(from, uint(fd-1), 0)
		}
		from = max(from, uint(fd+1))
	}
	_ = unix.CloseRange(from, math.MaxUint32, 0)
	return clone
}

// cloneDevice opens another device of dev's connection.
func cloneDevice(dev int) (int, error) {
	clone, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.IoctlSetPointerInt(clone, fuseDevIOCClone, dev); err != nil {
		unix.Close(clone)
		return -1, err
	}
	return clone, nil
}
