package keeper

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// oomKills reads how many processes of this process's memory cgroup the kernel has
// ended for want of memory; 0 where it cannot be read.
func oomKills() uint64 {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0
	}
	path, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "0::") // cgroup v2 only
	if !ok {
		return 0
	}
	events, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", path, "memory.events.local"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(events)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
			return n
		}
	}
	return 0
}
