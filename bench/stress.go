//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stressed are the loops that run while the key is taken away, one call at a time
// each.
var stressed = []func(dir string) (call func(i int) error, err error){
	cachedReads, directReads, stats, journal, randomWrites, bulkWrites, creations,
}

// board is what a loop tells, in memory shared with who measures. Times are
// wall-clock nanoseconds.
type board struct {
	done    atomic.Int64 // the end of the last call
	resumed atomic.Int64 // the end of the first call since it was set to 0
	calls   atomic.Uint64
	_       [104]byte // two cache lines each
}

// stress is the load as who measures sees it.
type stress struct {
	boards []board
	cmd    *exec.Cmd
}

// mapBoards maps a board for each loop from a file, which is made if need be.
func mapBoards(file string) ([]board, error) {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	size := len(stressed) * int(unsafe.Sizeof(board{}))
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*board)(unsafe.Pointer(&memory[0])), len(stressed)), nil // mapped until the process ends
}

// progress waits until each loop has gone on, and some more: a freeze is to meet
// them all in the midst of their work.
func (s *stress) progress(ctx context.Context) error {
	const work = 500 * time.Millisecond
	for i := range s.boards {
		b := &s.boards[i]
		before := b.calls.Load()
		if err := await(func() bool { return b.calls.Load() > before || ctx.Err() != nil }); err != nil {
			return fmt.Errorf("loop %d of the load stands still: %w", i, err)
		}
	}
	time.Sleep(work + rand.N(time.Second)) // at any moment between two probes
	return nil
}

// last is when the last call of any loop ended.
func (s *stress) last() time.Time {
	at := int64(0)
	for i := range s.boards {
		at = max(at, s.boards[i].done.Load())
	}
	return time.Unix(0, at)
}

func (s *stress) resume() {
	for i := range s.boards {
		s.boards[i].resumed.Store(0)
	}
}

// first waits for the first call of any loop that ends after resume.
func (s *stress) first(ctx context.Context) (at time.Time, err error) {
	err = await(func() bool {
		for i := range s.boards {
			if back := s.boards[i].resumed.Load(); back > 0 && (at.IsZero() || back < at.UnixNano()) {
				at = time.Unix(0, back)
			}
		}
		return !at.IsZero() || ctx.Err() != nil
	})
	return at, err
}

// end ends the load, and tells if it had ended by itself.
func (s *stress) end() error {
	_ = s.cmd.Process.Kill() // SIGTERM is for whoever started us
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && !exit.Exited() {
		return nil // by the signal
	}
	return errors.Join(errors.New("the load ended before its time"), err)
}

// runStress is the child's side: it runs every loop until it is killed.
func runStress(dir, file string) error {
	boards, err := mapBoards(file)
	if err != nil {
		return err
	}
	failed := make(chan error, len(stressed))
	for i, prepare := range stressed {
		call, err := prepare(dir)
		if err != nil {
			return err
		}
		go func() {
			for n := 0; ; n++ {
				if err := call(n); err != nil {
					failed <- fmt.Errorf("loop %d: %w", i, err)
					return
				}
				now := time.Now().UnixNano()
				boards[i].resumed.CompareAndSwap(0, now)
				boards[i].done.Store(now)
				boards[i].calls.Add(1)
			}
		}()
	}
	return <-failed
}

const stressFile = 64 << 20

// stressOpen opens a file of the load, with stressFile bytes in it.
func stressOpen(dir, name string, flags int) (int, error) {
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, filled(stressFile), 0o644); err != nil {
		return -1, err
	}
	return unix.Open(file, unix.O_RDWR|unix.O_CLOEXEC|flags, 0)
}

func aligned(n int) []byte {
	memory, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return memory
}

func cachedReads(dir string) (func(int) error, error) { return reads(dir, "cached", 0) }
func directReads(dir string) (func(int) error, error) { return reads(dir, "direct", unix.O_DIRECT) }

func reads(dir, name string, flags int) (func(int) error, error) {
	fd, err := stressOpen(dir, name, flags)
	buffer := aligned(64 << 10)
	return func(int) error {
		_, err := unix.Pread(fd, buffer, rand.Int64N(stressFile/int64(len(buffer)))*int64(len(buffer)))
		return err
	}, err
}

func stats(dir string) (func(int) error, error) {
	return func(int) error { return lstat(filepath.Join(dir, "cached")) }, nil
}

func journal(dir string) (func(int) error, error) {
	fd, err := unix.Open(filepath.Join(dir, "journal"), unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND|unix.O_CLOEXEC, 0o644)
	text := filled(512)
	return func(i int) error {
		if i%100_000 == 99_999 {
			if err := unix.Ftruncate(fd, 0); err != nil {
				return err
			}
		}
		if _, err := unix.Write(fd, text); err != nil {
			return err
		}
		return unix.Fdatasync(fd)
	}, err
}

func randomWrites(dir string) (func(int) error, error) {
	fd, err := stressOpen(dir, "random", 0)
	text := filled(small)
	return func(int) error {
		_, err := unix.Pwrite(fd, text, rand.Int64N(stressFile/small)*small)
		return err
	}, err
}

func bulkWrites(dir string) (func(int) error, error) {
	fd, err := stressOpen(dir, "bulk", 0)
	text := filled(4 << 20)
	return func(i int) error {
		_, err := unix.Pwrite(fd, text, int64(i%(stressFile/len(text)))*int64(len(text)))
		return err
	}, err
}

func creations(dir string) (func(int) error, error) {
	text := filled(1024)
	return func(i int) error {
		name := filepath.Join(dir, fmt.Sprint("made-", i))
		if err := writeNew(name, text); err != nil {
			return err
		}
		return unix.Unlink(name)
	}, nil
}
