//go:build linux

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"
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

// registers returns the general and the vector registers of every thread of
// byokd. A child reads them: our own Wait for byokd would take the stops that
// ptrace waits for.
func (s *stack) registers() []byte {
	s.t.Helper()
	out := filepath.Join(s.dir, "registers")
	s.once(task{Role: "registers", Dir: out, Pid: s.workerPid()})
	all, err := os.ReadFile(out)
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// threadRegisters writes the registers of a process to a file. It stops each
// thread for a moment.
func (w *worker) threadRegisters() error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", w.Pid))
	if err != nil {
		return err
	}
	sets := []uintptr{ntPrstatus, ntPrfpreg}
	if runtime.GOARCH == "amd64" {
		sets = []uintptr{ntPrstatus, ntX86XState}
	}
	var all []byte
	read := 0
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		if err != nil {
			return err
		}
		registers, err := registersOf(tid, sets)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, errUninterruptible) {
			continue // it has ended, or waits in the kernel where it cannot be stopped
		}
		if err != nil {
			return fmt.Errorf("registers of thread %d: %w", tid, err)
		}
		all = append(all, registers...)
		read++
	}
	if read < len(threads)/2 {
		return fmt.Errorf("the registers of %d of %d threads could be read", read, len(threads))
	}
	return os.WriteFile(w.Dir, all, 0o600)
}

func registersOf(tid int, sets []uintptr) (all []byte, err error) {
	if err := unix.PtraceSeize(tid); err != nil {
		return nil, err
	}
	if err := unix.PtraceInterrupt(tid); err != nil {
		return nil, err
	}
	if err := awaitStop(tid); err != nil {
		return nil, err // the kernel lets go of it when this process ends
	}
	defer func() { err = errors.Join(err, unix.PtraceDetach(tid)) }()
	for _, set := range sets {
		buf := make([]byte, 16<<10) // the extended state with AVX-512 and AMX takes 11 KiB
		v := unix.Iovec{Base: &buf[0]}
		v.SetLen(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(tid), set, uintptr(unsafe.Pointer(&v)), 0, 0)
		if errno != 0 {
			return nil, errno
		}
		all = append(all, buf[:v.Len]...)
	}
	return all, nil
}

var errUninterruptible = errors.New("the thread does not stop")

// awaitStop waits until a thread has stopped. One that waits for a page of the
// kernel's cache (a hung notification to FUSE) does not.
func awaitStop(tid int) error {
	const look, limit = time.Millisecond, 300 * time.Millisecond
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(look) {
		got, err := unix.Wait4(tid, nil, unix.WALL|unix.WNOHANG, nil)
		if err != nil || got == tid {
			return err
		}
	}
	return errUninterruptible
}
