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
	for line := range strings.Lines(string(text)) {
		_, controllers, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(controllers, ":")
		if n, ok := oomKillsIn("/sys/fs/cgroup", controllers, path); ok {
			return n
		}
	}
	return 0
}

// oomKillsIn reads the count of one line of /proc/self/cgroup: of version 2, which
// has no names of controllers, or of version 1's memory. In a container without a
// cgroup namespace the path is the host's, and its own cgroup the root of the mount.
func oomKillsIn(root, controllers, path string) (uint64, bool) {
	dir, file := root, "memory.events.local"
	switch controllers {
	case "":
	case "memory":
		dir, file = filepath.Join(root, "memory"), "memory.oom_control"
	default:
		return 0, false
	}
	for _, own := range []string{path, "/"} {
		text, err := os.ReadFile(filepath.Join(dir, own, file))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
				n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				return n, err == nil
			}
		}
	}
	return 0, false
}
