package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Version is that of the messages and of what the environment says. A keeper and a
// worker of different builds work together if it is the same.
const Version = 2

// kind says what a message is about; it is the first byte.
type kind byte

const (
	deposit  kind = 'D' // name; with a descriptor
	hold     kind = 'H' // number, 8 bytes; with a descriptor
	release  kind = 'R' // number, 8 bytes
	fetch    kind = 'F' // for what is held: some of it, numbers with descriptors, is the answer; nothing when that was all
	mounted  kind = 'M' // directory
	ready    kind = 'S' // signals are taken in order from now on
	serving  kind = 'V' // the first request was answered
	upgrade  kind = 'U' // somebody has asked the worker for it
	farewell kind = 'E' // exit code, 1 byte: the worker ends in order
)

// maxMessage bounds a message: a directory's name.
const maxMessage = 1 + unix.PathMax

// batch is how many descriptors the kernel passes at once (SCM_MAX_FD).
const batch = 253

// send sends one message, with fd unless it is negative.
func send(socket int, k kind, body []byte, fd int) error {
	if fd < 0 {
		return sendMany(socket, k, body, nil)
	}
	return sendMany(socket, k, body, []int{fd})
}

// sendMany sends one message with up to a batch of descriptors.
func sendMany(socket int, k kind, body []byte, fds []int) error {
	if len(body) >= maxMessage {
		return fmt.Errorf("a message of %d bytes is too long", len(body))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	message := append([]byte{byte(k)}, body...)
	for {
		err := unix.Sendmsg(socket, message, rights, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// message is one that was received; fd is -1 without a descriptor.
type message struct {
	kind kind
	body []byte
	fd   int
}

// inbox receives messages without taking memory: the keeper has none to ask for when it
// runs out.
type inbox struct {
	body    [maxMessage]byte
	control [controlRoom]byte
	iov     unix.Iovec
	header  unix.Msghdr
	take    func(fd uintptr) bool // tryReceive, of which each method value would take memory

	got message
	ok  bool
}

const controlRoom = 24 // unix.CmsgSpace(4): one descriptor

func newInbox() *inbox {
	b := &inbox{}
	b.iov.Base = &b.body[0]
	b.iov.SetLen(len(b.body))
	b.header.Iov, b.header.Control = &b.iov, &b.control[0]
	b.header.SetIovlen(1)
	b.take = b.tryReceive
	return b
}

// receive waits for a message, which is valid until the next one; ok is false when
// the other end is gone.
//
// It waits in Go's poller. A goroutine that waits in a system call keeps its processor
// from others until the runtime looks for such, every 10 ms where little happens: so
// long the answer to a message could take that it has just passed on.
func (b *inbox) receive(socket syscall.RawConn) (m message, ok bool) {
	if err := socket.Read(b.take); err != nil {
		return message{}, false
	}
	return b.got, b.ok
}

// tryReceive reports whether there was a message or is the end. unix.Recvmsg would take
// memory for an address.
func (b *inbox) tryReceive(fd uintptr) (done bool) {
	for {
		b.header.SetControllen(len(b.control))
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&b.header)), unix.MSG_CMSG_CLOEXEC)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			return false
		}
		if b.ok = errno == 0 && n > 0; b.ok {
			b.got = message{kind(b.body[0]), b.body[1:n], rightIn(b.control[:b.header.Controllen])}
		}
		return true
	}
}

// rightIn returns the descriptor in a control message, -1 without.
func rightIn(control []byte) int {
	if len(control) < unix.CmsgLen(4) {
		return -1
	}
	header, data, _, err := unix.ParseOneSocketControlMessage(control)
	if err != nil || header.Level != unix.SOL_SOCKET || header.Type != unix.SCM_RIGHTS || len(data) < 4 {
		return -1
	}
	return int(int32(binary.NativeEndian.Uint32(data)))
}

func number(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }

// receiveHeld receives an answer to fetch.
func receiveHeld(socket int) (numbers []uint64, fds []int, err error) {
	body, control := make([]byte, 1+8*batch), make([]byte, unix.CmsgSpace(4*batch))
	var n, controls, flags int
	for {
		n, controls, flags, _, err = unix.Recvmsg(socket, body, control, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, nil, os.NewSyscallError("recvmsg", err)
	}
	if controls > 0 {
		messages, err := unix.ParseSocketControlMessage(control[:controls])
		if err == nil && len(messages) > 0 {
			fds, err = unix.ParseUnixRights(&messages[0])
		}
		if err != nil {
			return nil, nil, err
		}
	}
	for at := 1; at+8 <= n; at += 8 {
		numbers = append(numbers, binary.NativeEndian.Uint64(body[at:]))
	}
	if n == 0 || kind(body[0]) != fetch || flags&unix.MSG_CTRUNC != 0 || len(numbers) != len(fds) {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, nil, fmt.Errorf("of %d descriptors that the keeper holds %d came: is the limit of open files too low?", len(numbers), len(fds))
	}
	return numbers, fds, nil
}
