//go:build linux

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pagemap tells which pages of a process are in memory, so that a scan does not
// touch what Go has only reserved.
type pagemap struct{ *os.File }

func openPagemap(t *testing.T, pid int) pagemap {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	return pagemap{f}
}

type addressRange struct{ from, to uint64 }

// runs returns the parts of a mapping that are present or swapped out.
func (p pagemap) runs(t *testing.T, from, to uint64) []addressRange {
	t.Helper()
	const entry, present, swapped = 8, 1 << 63, 1 << 62
	size := uint64(os.Getpagesize())
	var all []addressRange
	buf := make([]byte, 64<<10)
	for at := from; at < to; {
		n := min(uint64(len(buf))/entry, (to-at)/size)
		if _, err := p.ReadAt(buf[:n*entry], int64(at/size*entry)); err != nil {
			t.Fatalf("pagemap of %x-%x: %v", from, to, err)
		}
		for i := range n {
			if binary.NativeEndian.Uint64(buf[i*entry:])&(present|swapped) == 0 {
				continue
			}
			page := at + i*size
			if last := len(all) - 1; last >= 0 && all[last].to == page {
				all[last].to += size
			} else {
				all = append(all, addressRange{page, page + size})
			}
		}
		at += n * size
	}
	return all
}

// Register sets of PTRACE_GETREGSET, include/uapi/linux/elf.h.
const (
	ntPrstatus  = 1
	ntPrfpreg   = 2
	ntX86XState = 0x202
)

// threadRegisters returns the general and the vector registers of every thread
// of a process. It stops each for a moment.
func threadRegisters(t *testing.T, pid int) [][]byte {
	t.Helper()
	runtime.LockOSThread() // ptrace belongs to a thread
	defer runtime.UnlockOSThread()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	sets := []uintptr{ntPrstatus, ntPrfpreg}
	if runtime.GOARCH == "amd64" {
		sets = []uintptr{ntPrstatus, ntX86XState}
	}
	var all [][]byte
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		if err != nil {
			t.Fatal(err)
		}
		registers, err := registersOf(tid, sets)
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			t.Fatalf("registers of thread %d: %v", tid, err)
		}
		all = append(all, registers...)
	}
	if len(all) == 0 {
		t.Fatal("no thread's registers could be read")
	}
	return all
}

func registersOf(tid int, sets []uintptr) (all [][]byte, err error) {
	if err := unix.PtraceSeize(tid); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.PtraceDetach(tid)) }()
	if err := unix.PtraceInterrupt(tid); err != nil {
		return nil, err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(tid, &status, unix.WALL, nil); err != nil {
		return nil, err
	}
	for _, set := range sets {
		buf := make([]byte, 16<<10) // the extended state with AVX-512 and AMX takes 11 KiB
		v := unix.Iovec{Base: &buf[0]}
		v.SetLen(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(tid), set, uintptr(unsafe.Pointer(&v)), 0, 0)
		if errno != 0 {
			return nil, errno
		}
		all = append(all, buf[:v.Len])
	}
	return all, nil
}
