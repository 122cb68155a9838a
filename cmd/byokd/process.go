package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"runtime/debug"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// memoryLimit is the soft limit of the Go heap when GOMEMLIMIT does not say otherwise: the promise is
// 256 MiB resident under load, of which about an eighth is not the heap's (stacks, binary, FUSE buffers).
const memoryLimit = 224 << 20

// harden keeps keys out of core dumps, other processes' reach and swap, as far as this process may.
func harden(log *zap.Logger) {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		log.Warn("core dumps cannot be switched off: PR_SET_DUMPABLE", zap.Error(err))
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		log.Warn("core dumps cannot be switched off: RLIMIT_CORE", zap.Error(err))
	}
	if err := lockMemory(); err != nil {
		log.Info("pages with keys may be swapped out; allow locked memory (ulimit -l unlimited, or CAP_IPC_LOCK) or switch swap off", zap.Error(err))
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

// lockMemory keeps every page in memory from its first use on, when this machine can swap at all: MCL_ONFAULT,
// since the Go runtime reserves far more address space than it ever touches. It is not done without need,
// because the runtime cannot give locked pages back after a peak. It is not done either where the limit on
// locked memory is finite: a heap that outgrew it could then not grow at all.
func lockMemory() error {
	swaps, err := os.ReadFile("/proc/swaps")
	if err == nil && bytes.Count(swaps, []byte("\n")) <= 1 { // the heading only
		return nil
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err
	}
	if limit.Cur != math.MaxUint64 && unix.Geteuid() != 0 {
		return fmt.Errorf("the limit on locked memory is %d bytes", limit.Cur)
	}
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}
