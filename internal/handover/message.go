package handover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Version is the protocol's. Both sides must have the same.
const Version = 1

const (
	messageMax = 64 << 10
	// fdsMax is how many descriptors go with one message; the kernel takes 253
	// (SCM_MAX_FD).
	fdsMax = 200
)

// errLostDescriptors: the kernel could not give us all descriptors of a message.
var errLostDescriptors = errors.New("handover: descriptors of a message are lost: this process may not have as many open, or there were too many")

// request is what a client asks. Op decides which of the other fields are set.
type request struct {
	ID      uint64   `json:"id"`
	Op      string   `json:"op"`
	Version int      `json:"version,omitempty"` // hello
	Name    string   `json:"name,omitempty"`    // hold, release
	From    int      `json:"from,omitempty"`    // held: how many the client has
	Bytes   int64    `json:"bytes,omitempty"`   // limit
	Threads []uint32 `json:"threads,omitempty"` // killed
}

// The operations.
const (
	opHello   = "hello"   // who is there; answered with Mount
	opHeld    = "held"    // the descriptors that are held, fdsMax at a time
	opHold    = "hold"    // keep the descriptor that comes with it
	opRelease = "release" // give it up
	opLimit   = "limit"   // Mounter.LimitDirty
	opFlush   = "flush"   // Mounter.Flush
	opStir    = "stir"    // Mounter.Stir
	opKilled  = "killed"  // Mounter.Killed
)

// reply answers the request of the same number.
type reply struct {
	ID      uint64   `json:"id"`
	Error   string   `json:"error,omitempty"`
	Mount   string   `json:"mount,omitempty"`   // hello: what is served, for people
	Names   []string `json:"names,omitempty"`   // held: of the descriptors that come with it
	More    bool     `json:"more,omitempty"`    // held
	Threads []uint32 `json:"threads,omitempty"` // killed
}

// send writes one message.
func send(c *net.UnixConn, message any, fds ...int) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(text) > messageMax {
		return fmt.Errorf("handover: a message of %d bytes", len(text))
	}
	_, _, err = c.WriteMsgUnix(text, unix.UnixRights(fds...), nil)
	return err
}

// receive reads one message, with the descriptors that came with it, which become
// the caller's.
func receive(c *net.UnixConn, message any) ([]int, error) {
	text, control := make([]byte, messageMax+1), make([]byte, unix.CmsgSpace(4*fdsMax))
	n, oobn, flags, _, failed := c.ReadMsgUnix(text, control)
	// An empty message is taken for the end, and may have brought some all the same.
	fds, err := descriptors(control[:oobn])
	switch {
	case failed != nil:
		err = failed
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = errLostDescriptors
	case flags&unix.MSG_TRUNC != 0 || n > messageMax:
		err = errors.New("handover: a message was cut short")
	default:
		d := json.NewDecoder(bytes.NewReader(text[:n]))
		d.DisallowUnknownFields()
		err = d.Decode(message)
	}
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	return fds, nil
}

// descriptors takes the descriptors out of a control message; they are not inherited
// by programs that are started (the net package receives them so).
func descriptors(control []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, os.NewSyscallError("parse control message", err)
	}
	var all []int
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			closeAll(all)
			return nil, os.NewSyscallError("parse descriptors", err)
		}
		all = append(all, fds...)
	}
	return all, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
