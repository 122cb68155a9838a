package fs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// Notifications, include/uapi/linux/fuse.h. They are written raw: the protocol
// server has none, and go-fuse's Server does not know INC_EPOCH.
const (
	notifyInvalInode = 2
	notifyIncEpoch   = 8
)

// notify writes a notification to dev, the loop's device or a clone of it.
func notify(dev int, code int32, payload []byte) error {
	b := make([]byte, outHeaderSize, outHeaderSize+len(payload))
	b = append(b, payload...)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(code))
	for {
		if _, err := unix.Write(dev, b); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// incEpoch makes every cached name be looked up again: 1 µs and no lock.
func incEpoch(dev int) error { return notify(dev, notifyIncEpoch, nil) }

// invalidate drops what the kernel caches of an inode: with off < 0 its
// attributes only, else also its pages from off on (length 0: to the end), for
// which it may hang behind a locked or dirty page: only apart.
func invalidate(dev int, id uint64, off, length int64) error {
	var b [24]byte
	binary.NativeEndian.PutUint64(b[0:], id)
	binary.NativeEndian.PutUint64(b[8:], uint64(off))
	binary.NativeEndian.PutUint64(b[16:], uint64(length))
	return notify(dev, notifyInvalInode, b[:])
}
