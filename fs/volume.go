package fs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"golang.org/x/sys/unix"
)

// ReadHeader reads the volume header of a lower directory. It returns
// ErrNotInitialised for a directory without header that holds nothing (but
// ext4's lost+found), and ErrForeign, naming what it found, for any other.
func ReadHeader(lower string) (seal.VolumeHeader, error) {
	text, err := durable.ReadFile(filepath.Join(lower, seal.VolumeHeaderName), seal.VolumeHeaderMax)
	if errors.Is(err, fs.ErrNotExist) {
		return seal.VolumeHeader{}, emptyOrForeign(lower)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return seal.VolumeHeader{}, fmt.Errorf("%s is not a directory", lower)
	}
	if err != nil {
		return seal.VolumeHeader{}, err
	}
	header, err := seal.ParseVolumeHeader(text)
	if err != nil {
		return seal.VolumeHeader{}, fmt.Errorf("%s: %w", filepath.Join(lower, seal.VolumeHeaderName), err)
	}
	return header, nil
}

// emptyOrForeign says why there is no header. A temporary header of a run that
// was killed while it made the volume counts as nothing.
func emptyOrForeign(lower string) error {
	entries, err := os.ReadDir(lower)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: is its disk mounted? For a new volume, type: mkdir -p %s", err, lower)
	}
	if err != nil {
		return err
	}
	const show = 3
	var foreign []string
	for _, e := range entries {
		if e.Name() == "lost+found" || e.Name() == durable.TempName(seal.VolumeHeaderName) {
			continue
		}
		if len(foreign) == show {
			foreign = append(foreign, "…")
			break
		}
		foreign = append(foreign, e.Name())
	}
	if len(foreign) == 0 {
		return fmt.Errorf("%w: %s", ErrNotInitialised, lower)
	}
	return fmt.Errorf("%w: %s holds %s but no %s. Give byokd an empty directory of its own, or move these files away and copy them in through the mount",
		ErrForeign, lower, strings.Join(foreign, ", "), seal.VolumeHeaderName)
}

// Ownership says where a volume keeps owners, groups and modes. It is chosen when
// the volume is made.
type Ownership uint8

const (
	// OwnershipLower has them on the lower files, which takes the privileges to give
	// files away and to open those of others.
	OwnershipLower Ownership = iota
	// OwnershipSealed has them sealed beside lower files that are all byokd's own,
	// which takes none.
	OwnershipSealed
)

func (o Ownership) String() string {
	if o == OwnershipSealed {
		return "sealed"
	}
	return "lower"
}

// OwnershipOf is that of a volume.
func OwnershipOf(h seal.VolumeHeader) Ownership {
	if h.SealedOwnership {
		return OwnershipSealed
	}
	return OwnershipLower
}

// Create makes a volume of the lower directory, which is empty: a new root key,
// wrapped by the guard's KMS key under binding b, in a header that is durable
// when Create returns. It waits while the key is not usable, and nobody else can make
// one meanwhile, for the directory is locked: of two headers one would replace the key
// under which the other's files are sealed. A directory that is not empty is refused
// (ErrForeign). It comes before Unlock.
func (f *Filesystem) Create(ctx context.Context, b keyguard.Binding, o Ownership) (seal.VolumeHeader, error) {
	lower, g := f.lower, f.guard
	_, err := ReadHeader(lower)
	if err == nil {
		return seal.VolumeHeader{}, fmt.Errorf("%s is a byokd volume already", lower)
	}
	if !errors.Is(err, ErrNotInitialised) {
		return seal.VolumeHeader{}, err
	}
	id, wrapped, err := g.Create(ctx, b)
	if err != nil {
		return seal.VolumeHeader{}, err
	}
	header := seal.VolumeHeader{
		Volume:          id,
		Generation:      1,
		SealedOwnership: o == OwnershipSealed,
		KeyARN:          g.Status().KeyARN,
		Binding:         b.Context(),
		WrappedRoot:     wrapped,
		Probe:           g.ProbeCiphertext(),
	}
	mark := seal.VolumeMark{Volume: id, Generation: header.Generation}
	err = withRoot(ctx, g, id, wrapped, b, func(root *seal.Root) error {
		if header.SealedOwnership { // before there is a header: the root is never without
			if err := sealRootOwnership(root, lower); err != nil {
				return err
			}
		}
		if header, err = root.SignVolumeHeader(header); err != nil {
			return err
		}
		mark, err = root.SignVolumeMark(mark)
		return err
	})
	if err != nil {
		return seal.VolumeHeader{}, err
	}
	text, err := header.Marshal()
	if err != nil {
		return seal.VolumeHeader{}, err
	}
	if err := durable.WriteFile(filepath.Join(lower, seal.VolumeHeaderName), text, 0o600); err != nil {
		return seal.VolumeHeader{}, err
	}
	return header, writeMark(lower, mark)
}

// withRoot runs f, inside seal.Do, with the volume's root key. It waits while
// the key is not usable.
func withRoot(ctx context.Context, g *keyguard.Guard, id seal.VolumeID, wrapped []byte, b keyguard.Binding, f func(*seal.Root) error) error {
	for {
		if err := g.Load(ctx, id, wrapped, b); err != nil {
			return err
		}
		pass, err := g.Enter(ctx, keyguard.Work, 0)
		if err != nil {
			return err
		}
		root := pass.Keys().Root(id)
		if root != nil {
			seal.Do(func() { err = f(root) })
			pass.Exit()
			return err
		}
		pass.Exit() // the epoch ended between: load it into the next
	}
}

// lockFor is how long the lock of a lower directory is waited for. One that was
// given back may be held for a moment more: by a daemon that was killed and is not
// quite gone, by a thread (apart.go) or a child of it that has just been made with a
// copy of its descriptors.
const lockFor = time.Second

// lockLower locks the lower directory; EWOULDBLOCK when another process has it.
func lockLower(fd int) error {
	const pause = time.Millisecond
	for deadline := time.Now().Add(lockFor); ; time.Sleep(pause) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return err
		}
	}
}

// openLower opens the lower directory for this process alone.
func openLower(lower string) (int, error) {
	fd, err := unix.Open(lower, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: lower, Err: err}
	}
	if err := lockLower(fd); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return -1, fmt.Errorf("%w: %s; stop that one first. To see where it is mounted: findmnt -t fuse.byokd", ErrBusy, lower)
		}
		return -1, fmt.Errorf("lock %s: %w", lower, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if st.Bsize < seal.BlockSize {
		unix.Close(fd)
		return -1, fmt.Errorf("%w: %s has blocks of %d", ErrBlockSize, lower, st.Bsize)
	}
	return fd, nil
}
