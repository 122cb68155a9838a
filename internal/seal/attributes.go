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
	AttributesMax = IDSize + XattrOverhead + attributesSize + rdevSize

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
// Attributes that no inode can have are a fault of the caller.
func (r *Root) SealAttributes(id FileID, a Attributes) ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	plain := make([]byte, attributesSize, attributesSize+rdevSize)
	binary.BigEndian.PutUint16(plain, uint16(a.Mode))
	binary.BigEndian.PutUint32(plain[2:], a.UID)
	binary.BigEndian.PutUint32(plain[6:], a.GID)
	if a.IsDevice() {
		plain = binary.BigEndian.AppendUint32(plain, a.Rdev)
	}
	sealed, err := r.SealXattr(id, IDAttribute, plain)
	return append(id[:], sealed...), err
}

// OpenAttributes opens what SealAttributes returned. The id is returned also where
// the rest does not open; it is authentic where the error is nil.
func (r *Root) OpenAttributes(value []byte) (id FileID, a Attributes, err error) {
	if len(value) < len(id) {
		return id, a, fmt.Errorf("%w: attributes of %d bytes", ErrTruncated, len(value))
	}
	id = FileID(value)
	plain, err := r.OpenXattr(id, IDAttribute, value[len(id):])
	if err != nil {
		return id, a, err
	}
	if len(plain) != attributesSize && len(plain) != attributesSize+rdevSize {
		return id, a, fmt.Errorf("%w: attributes of %d bytes", ErrTampered, len(plain))
	}
	a = Attributes{Mode: uint32(binary.BigEndian.Uint16(plain)), UID: binary.BigEndian.Uint32(plain[2:]), GID: binary.BigEndian.Uint32(plain[6:])}
	if a.IsDevice() != (len(plain) > attributesSize) {
		return id, Attributes{}, fmt.Errorf("%w: attributes of %d bytes", ErrTampered, len(plain))
	}
	if a.IsDevice() {
		a.Rdev = binary.BigEndian.Uint32(plain[attributesSize:])
	}
	if err := a.check(); err != nil {
		return id, Attributes{}, err
	}
	return id, a, nil
}
