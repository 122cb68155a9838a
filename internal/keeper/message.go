package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Version is that of the messages and of what the environment says. A keeper and a
// worker of different builds work together if it is the same.
const Version = 1

// kind says what a message is about; it is the first byte.
type kind byte

const (
	deposit  kind = 'D' // name; with a descriptor
	hold     kind = 'H' // number, 8 bytes; with a descriptor
	release  kind = 'R' // number, 8 bytes
	mounted  kind = 'M' // directory
	ready    kind = 'S' // signals are taken in order from now on
	serving  kind = 'V' // the first request was answered
	upgrade  kind = 'U' // somebody has asked the worker for it
	farewell kind = 'E' // exit code, 1 byte: the worker ends in order
)

// maxMessage bounds a message: a directory's name.
const maxMessage = 1 + unix.PathMax

// send sends one message, with fd unless it is negative.
func send(socket int, k kind, body []byte, fd int) error {
	if len(body) >= maxMessage {
		return fmt.Errorf("a message of %d bytes is too long", len(body))
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
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

// receive waits for a message; ok is false when the other end is gone.
func receive(socket int) (m message, ok bool) {
	body, control := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	for {
		n, c, _, _, err := unix.Recvmsg(socket, body, control, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return message{}, false
		}
		return message{kind(body[0]), body[1:n], rightIn(control[:c])}, true
	}
}

// rightIn returns the descriptor in a control message, -1 without.
func rightIn(control []byte) int {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) == 0 {
		return -1
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) == 0 {
		return -1
	}
	return fds[0]
}

func number(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }
