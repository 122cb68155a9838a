package fs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// bdi sets the limits that the kernel keeps for the mount's dirty pages
// (Documentation/ABI/testing/sysfs-class-bdi). All of it needs root and a
// writable /sys; without, a freeze during heavy writing may not drain in time,
// which is logged.
type bdi struct {
	dir string // /sys/class/bdi/MAJOR:MINOR, "" when there is none

	mu        sync.Mutex
	budget    int64 // bytes; guarded by mu
	throttled bool  // guarded by mu
}

// DefaultDirtyLimit is the most the mount may hold dirty, and so what a freeze has
// to flush within its 500 ms: 8,192 scattered pages at 10 to 20 µs each. With
// 8 MiB, writers wait for the flush in the midst of it (sequential write 0.6
// of the rate, random 0.6). The reserve below (reserve.go) is made for it.
const DefaultDirtyLimit = 32 << 20

const (
	// throttleBytes is the most during a drain: less than a request, so that a
	// writer in the middle of a large write() stops in balance_dirty_pages
	// (drain 300 ms → 30 ms, measured).
	throttleBytes = 64 << 10

	// readAheadKB is the read-ahead window; the default of 128 costs 8 % of
	// sequential reads.
	readAheadKB = "1024"
)

// newBDI sets the limits of the mount at mountpoint, which may hold budget bytes
// dirty.
func newBDI(mountpoint string, budget int64) (*bdi, error) {
	var st unix.Stat_t
	if err := unix.Lstat(mountpoint, &st); err != nil {
		return &bdi{}, err
	}
	dir := fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	b := &bdi{dir: dir, budget: -1}
	if err := b.setBudget(budget); err != nil {
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

// limit writes the bound in force; mu is held.
func (b *bdi) limit() error {
	bytes := max(b.budget, throttleBytes)
	if b.throttled {
		bytes = throttleBytes
	}
	return b.write("max_bytes", strconv.FormatInt(bytes, 10))
}

// setBudget sets what the mount may hold dirty while it is not throttled.
func (b *bdi) setBudget(bytes int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.budget == bytes {
		return nil
	}
	b.budget = bytes
	return b.limit()
}

// throttle stops writers that are inside a write() until restore.
func (b *bdi) throttle() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.throttled = true
	return b.limit()
}

func (b *bdi) restore() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.throttled = false
	return b.limit()
}
