//go:build linux

package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// lowerKind is a filesystem that byokd's lower directory may be on.
type lowerKind struct {
	name    string
	size    int64
	mkfs    []string // without the device
	options string   // of the mount
}

// The volumes are small, so that a point costs a few milliseconds, and their
// blocks are those of byokd. The journals are as small as mkfs makes them, so
// that they wrap.
var (
	ext4 = lowerKind{"ext4", 96 << 20, []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "2048", "-J", "size=4", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"}, ""}
	xfs  = lowerKind{"xfs", 128 << 20, []string{"mkfs.xfs", "-q", "-f", "-K", "--unsupported", "-d", "agcount=2", "-l", "size=8m"}, "nouuid"}
)

// loopDevice is a block device over an open file.
type loopDevice struct {
	path string
	file *os.File
}

// attach makes a loop device of a file; flags are unix.LO_FLAGS_*. Others on the
// machine take devices, too: whoever loses the race for one asks for the next.
func attach(backing *os.File, flags uint32) (*loopDevice, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", number)
		device, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: flags}})
		if err == nil {
			return &loopDevice{path, device}, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("loop device %s: %w", path, err)
		}
	}
}

// detach gives the device back and waits until it has let go of its file. What the
// kernel has of it is gone before another file is attached: the last user of a block
// device drops its pages.
func (l *loopDevice) detach() error {
	info, err := unix.IoctlLoopGetStatus64(int(l.file.Fd()))
	if err == nil {
		err = unix.IoctlSetInt(int(l.file.Fd()), unix.LOOP_CLR_FD, 0)
	}
	if err := errors.Join(err, l.file.Close()); err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); l.holds(info); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is still in use %v after its filesystem was unmounted: has somebody a copy of the mount?", l.path, patience)
		}
	}
	return nil
}

// holds tells whether the device lies on the file of which info is.
func (l *loopDevice) holds(info *unix.LoopInfo64) bool {
	file, err := os.Open(l.path)
	if err != nil {
		return false
	}
	defer file.Close()
	now, err := unix.IoctlLoopGetStatus64(int(file.Fd())) // ENXIO: on none
	return err == nil && now.Inode == info.Inode && now.Device == info.Device
}

func (k lowerKind) format(device string) error {
	args := append(k.mkfs[1:len(k.mkfs):len(k.mkfs)], device)
	if text, err := exec.Command(k.mkfs[0], args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", k.mkfs[0], err, text)
	}
	return nil
}

// mount mounts the device, which recovers the journal of its filesystem.
func (k lowerKind) mount(device, dir string) error {
	if err := unix.Mount(device, dir, k.name, 0, k.options); err != nil {
		return fmt.Errorf("mount %s: %w", k.name, err)
	}
	return nil
}

// unmount waits for descriptors that are on their way out: the kernel and the
// threads that a volume flushes with give them back a moment after they have
// answered.
func unmount(dir string) error {
	deadline := time.Now().Add(patience)
	for {
		err := unix.Unmount(dir, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			detached := unix.Unmount(dir, unix.MNT_DETACH)
			return errors.Join(fmt.Errorf("unmount %s: %w", dir, err), detached)
		}
		time.Sleep(time.Millisecond)
	}
}
