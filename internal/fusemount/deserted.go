package fusemount

import (
	"encoding/binary"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Numbers of the kernel's protocol, include/uapi/linux/fuse.h.
const (
	notifyResend = 7
	ioctlClone   = 0x8004e500 // FUSE_DEV_IOC_CLONE

	opForget      = 2
	opRelease     = 18
	opInit        = 26
	opReleaseDir  = 29
	opDestroy     = 38
	opBatchForget = 42
)

const (
	inHeaderSize  = 40
	outHeaderSize = 16
	// bodyMax is the largest body, of a WRITE. The kernel wants that much room for every
	// read.
	bodyMax = MaxRead + 4<<10
)

// LetKilledGo lets those callers of a mount go that are being killed while nobody
// serves it. One that was killed after its call had been read waits for the answer,
// whatever it takes, and so does who waits for the call to end: such calls are
// answered with EINTR. All others are left to be read again (FUSE_NOTIFY_RESEND,
// Linux 6.9), and a caller that is killed from then on goes by itself.
//
// Nobody may serve dev meanwhile, and the mount's INIT must have been answered. The
// kernel gives calls as a whole, data that is being written among them; they are
// dropped unread.
func LetKilledGo(dev int) (gone int, err error) {
	// A copy of its own: not waiting for calls is a property of the open device, which
	// whoever serves the mount shares.
	clone, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	defer unix.Close(clone)
	if err := unix.IoctlSetPointerInt(clone, ioctlClone, dev); err != nil {
		return 0, os.NewSyscallError("ioctl FUSE_DEV_IOC_CLONE", err)
	}
	if err := resend(clone); err != nil {
		return 0, err
	}
	// What was read of the copy would end in errors with it.
	defer func() { err = errors.Join(err, resend(clone)) }()
	// Apart from the heap: what was in it goes back to the kernel with it.
	body, err := unix.Mmap(-1, 0, bodyMax, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, os.NewSyscallError("mmap", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(body)) }()
	for {
		head, err := readHead(clone, body)
		if errors.Is(err, unix.EAGAIN) {
			return gone, nil
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue // the call was given up that moment
		}
		if err != nil {
			return gone, err
		}
		if head.waitedFor() && head.pid != 0 && BeingKilled(head.pid) {
			if err := answer(clone, head.unique, unix.EINTR); err != nil && !errors.Is(err, unix.ENOENT) {
				return gone, err
			}
			gone++
		}
	}
}

// requestHead is what is known of a request without its body.
type requestHead struct {
	opcode uint32
	unique uint64
	pid    uint32
}

// waitedFor tells whether there is a caller that waits for the answer.
func (h requestHead) waitedFor() bool {
	switch h.opcode {
	case opForget, opBatchForget, opRelease, opReleaseDir, opInit, opDestroy:
		return false
	}
	return true
}

// readHead takes the next request. Its body goes to where nobody looks.
func readHead(dev int, body []byte) (requestHead, error) {
	var b [inHeaderSize]byte
	if n, err := unix.Readv(dev, [][]byte{b[:], body}); err != nil || n < len(b) {
		return requestHead{}, os.NewSyscallError("read of the FUSE device", err)
	}
	return requestHead{binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint64(b[8:]), binary.NativeEndian.Uint32(b[32:])}, nil
}

func answer(dev int, unique uint64, errno unix.Errno) error {
	return writeHead(dev, -int32(errno), unique)
}

// resend has the kernel make every call that was read and not answered one to be read.
func resend(dev int) error {
	return os.NewSyscallError("FUSE_NOTIFY_RESEND (Linux 6.9)", writeHead(dev, notifyResend, 0))
}

func writeHead(dev int, code int32, unique uint64) error {
	var b [outHeaderSize]byte
	binary.NativeEndian.PutUint32(b[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(b[4:], uint32(code))
	binary.NativeEndian.PutUint64(b[8:], unique)
	_, err := unix.Write(dev, b[:])
	return err
}
