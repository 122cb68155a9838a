//go:build linux

package powercut

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hotBlock makes a file of one block, syncs it, and has some threads write to it
// while another one syncs. So the block is sealed anew while it is on its way to
// the disk.
func hotBlock(ctx context.Context, w *world, write func(fd int) error) error {
	fd, err := unix.Open(w.dir+"/file", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(write(fd), unix.Fsync(fd), syncPath(w.dir)); err != nil {
		return err
	}
	var working sync.WaitGroup
	failed := make([]error, 5) // of a thread each
	for i := range failed {
		working.Go(func() {
			for ctx.Err() == nil && failed[i] == nil {
				if i > 0 {
					failed[i] = write(fd)
				} else {
					failed[i] = unix.Fdatasync(fd)
				}
			}
		})
	}
	working.Wait()
	return errors.Join(failed...)
}

// hotLoad is hotBlock on a volume.
type hotLoad struct{}

func (hotLoad) name() string { return "hot" }

func (hotLoad) run(ctx context.Context, w *world) error {
	return hotBlock(ctx, w, func(fd int) error {
		b := make([]byte, 300) // a part of it, so that it is read, changed and sealed
		pattern(b, uint64(w.now()), 0)
		_, err := unix.Pwrite(fd, b, 100)
		return err
	})
}

func (hotLoad) check(dir string, _ int) error {
	_, err := os.ReadFile(dir + "/file")
	return err
}

// flusher provokes the writeback of the lower filesystem, as the kernel's own
// flusher does in its own time.
func flusher(ctx context.Context, lower string) error {
	fd, err := unix.Open(lower, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for ctx.Err() == nil {
		if err := unix.Syncfs(fd); err != nil {
			return fmt.Errorf("syncfs: %w", err)
		}
	}
	return nil
}

// FS_IOC_FIEMAP and its structures, include/uapi/linux/fiemap.h.
const (
	fsIocFiemap   = 0xc020660b
	fiemapHead    = 32
	fiemapExtent  = 56
	fiemapExtents = 64
)

// placesOf returns where on the disk the sectors of a file are: sector number by
// offset on the disk.
func placesOf(path string) (map[int64]int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b [fiemapHead + fiemapExtents*fiemapExtent]byte
	binary.NativeEndian.PutUint64(b[8:], 1<<62)          // fm_length
	binary.NativeEndian.PutUint32(b[16:], 1)             // fm_flags: FIEMAP_FLAG_SYNC
	binary.NativeEndian.PutUint32(b[24:], fiemapExtents) // fm_extent_count
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return nil, fmt.Errorf("fiemap of %s: %w", path, errno)
	}
	places := map[int64]int64{}
	for i := range int(binary.NativeEndian.Uint32(b[20:])) { // fm_mapped_extents
		e := b[fiemapHead+i*fiemapExtent:]
		logical, physical, length := binary.NativeEndian.Uint64(e), binary.NativeEndian.Uint64(e[8:]), binary.NativeEndian.Uint64(e[16:])
		for at := uint64(0); at < length; at += sector {
			places[int64(physical+at)] = int64(logical+at) / sector
		}
	}
	return places, nil
}

// torn counts the writes of a recording to these places, and those of them that
// do not open.
func (r *recording) torn(places map[int64]int64, opens func(index int64, sealed []byte) error) (writes, torn int, first error) {
	for _, e := range r.events[r.start:] {
		for _, s := range slivers(e) {
			index, ok := places[s.off]
			if !ok || s.data == nil || s.n != sector {
				continue
			}
			writes++
			if err := opens(index, s.data); err != nil {
				torn++
				first = errors.Join(first, fmt.Errorf("block %d: %w", index, err))
			}
		}
	}
	return writes, torn, first
}
