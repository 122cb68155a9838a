package seal

import (
	"encoding/binary"
	"fmt"
)

const (
	// IDAttribute is the extended attribute of a lower inode that holds its id; in a
	// volume with sealed ownership also its Attributes.
	IDAttribute = "user.byokd.id"

	// TargetAttribute holds, in a volume with sealed ownership, the target of a symlink,
	// as SealXattr gives it.
	TargetAttribute = "user.byokd.target"

	// AttributesMax is the longest value of IDAttribute: that of a device. With its name
	// it fits beside an ext4 inode of 256 bytes, so that it takes no block of its own.
	AttributesMax = attributesHead + nonceSize + attributesSize + rdevSize + tagSize

	attributesVersion = 1
	attributesHead    = IDSize + 1 + selectorSize // id, version, selector: in clear, and authenticated

	attributesSize = 10 // mode 2, uid 4, gid 4
	rdevSize       = 4
)

// Attributes are the owner, group and mode of an inode of a volume with sealed
// ownership, as stat(2) gives them; the lower inode has those of byokd.
type Attributes struct {
	Mode uint32 // type and permissions
	UID  uint32
	GID  uint32
	Rdev uint32 // of a device, else 0; as the kernel gives it to FUSE
}

// Types of Attributes.Mode, as in <sys/stat.h>.
const (
	typeMask  = 0o170000
	typeFIFO  = 0o010000
	typeChar  = 0o020000
	typeDir   = 0o040000
	typeBlock = 0o060000
	typeFile  = 0o100000
	typeLink  = 0o120000
	typeSock  = 0o140000
)

// IsDevice tells whether Rdev has a meaning.
func (a Attributes) IsDevice() bool {
	return a.Mode&typeMask == typeChar || a.Mode&typeMask == typeBlock
}

func (a Attributes) check() error {
	switch a.Mode & typeMask {
	case typeFIFO, typeChar, typeDir, typeBlock, typeFile, typeLink, typeSock:
	default:
		return fmt.Errorf("%w: a mode of %o", ErrTampered, a.Mode)
	}
	if a.Mode>>16 != 0 || !a.IsDevice() && a.Rdev != 0 {
		return fmt.Errorf("%w: a mode of %o with device %d", ErrTampered, a.Mode, a.Rdev)
	}
	return nil
}

// SealAttributes returns the value of IDAttribute of the inode with this id.
// Attributes that no inode can have are a fault of the caller. Errors: ErrWiped.
func (r *Root) SealAttributes(id FileID, a Attributes) ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	keys, err := r.inodeKeys()
	if err != nil {
		return nil, err
	}
	key := keys.sealer(1)
	value := make([]byte, attributesHead, AttributesMax)
	copy(value, id[:])
	value[IDSize] = attributesVersion
	binary.BigEndian.PutUint16(value[IDSize+1:], key.selector)
	var plain [attributesSize + rdevSize]byte
	return key.aead.Seal(value, nil, a.put(&plain), value), nil
}

// put writes the attributes as they are sealed.
func (a Attributes) put(b *[attributesSize + rdevSize]byte) []byte {
	binary.BigEndian.PutUint16(b[0:], uint16(a.Mode))
	binary.BigEndian.PutUint32(b[2:], a.UID)
	binary.BigEndian.PutUint32(b[6:], a.GID)
	binary.BigEndian.PutUint32(b[10:], a.Rdev)
	if a.IsDevice() {
		return b[:]
	}
	return b[:attributesSize]
}

// OpenAttributes opens what SealAttributes returned. The id is returned also where
// the rest does not open; it is authentic where the error is nil. Errors:
// ErrTruncated, ErrUnknownVersion, ErrTampered, ErrWiped.
func (r *Root) OpenAttributes(value []byte) (id FileID, a Attributes, err error) {
	if len(value) < len(id) {
		return id, a, fmt.Errorf("%w: attributes of %d bytes", ErrTruncated, len(value))
	}
	id = FileID(value)
	if len(value) < attributesHead {
		return id, a, fmt.Errorf("%w: attributes of %d bytes", ErrTruncated, len(value))
	}
	if v := value[IDSize]; v != attributesVersion {
		return id, a, fmt.Errorf("%w: attributes of format %d", ErrUnknownVersion, v)
	}
	keys, err := r.inodeKeys()
	if err != nil {
		return id, a, err
	}
	key, err := keys.opener(binary.BigEndian.Uint16(value[IDSize+1:]))
	if err != nil {
		return id, a, err
	}
	var room [attributesSize + rdevSize + tagSize]byte
	plain, err := key.aead.Open(room[:0], nil, value[attributesHead:], value[:attributesHead])
	if err != nil {
		return id, a, ErrTampered
	}
	keys.keep(key)
	a, err = parseAttributes(plain)
	return id, a, err
}

// parseAttributes reads what put wrote, and only that.
func parseAttributes(b []byte) (a Attributes, err error) {
	if len(b) != attributesSize && len(b) != attributesSize+rdevSize {
		return a, fmt.Errorf("%w: attributes of %d bytes", ErrTampered, len(b))
	}
	a = Attributes{Mode: uint32(binary.BigEndian.Uint16(b)), UID: binary.BigEndian.Uint32(b[2:]), GID: binary.BigEndian.Uint32(b[6:])}
	if a.IsDevice() != (len(b) > attributesSize) {
		return Attributes{}, fmt.Errorf("%w: attributes of %d bytes", ErrTampered, len(b))
	}
	if a.IsDevice() {
		a.Rdev = binary.BigEndian.Uint32(b[attributesSize:])
	}
	if err := a.check(); err != nil {
		return Attributes{}, err
	}
	return a, nil
}

// inodeKeys are the keys of attributes.
func (r *Root) inodeKeys() (*blockKeys, error) {
	if keys := r.inodes.Load(); keys != nil {
		return keys, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.prk == nil {
		return nil, ErrWiped
	}
	keys := r.inodes.Load()
	if keys == nil {
		keys = &blockKeys{root: r, label: labelAttributes}
		r.inodes.Store(keys)
	}
	return keys, nil
}
