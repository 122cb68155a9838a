package keeper

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// firstProgramFD is above every number that a worker's descriptors have: they take
// the places from 0 on in the child before it runs the program.
const firstProgramFD = 256

// program is a binary that is held open: what is started again is the same file,
// also when another one has been put in its place, which may not suit.
type program struct {
	path string // where it lay
	fd   int
}

// openProgram opens the binary at path.
func openProgram(path string) (program, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return program{}, fmt.Errorf("the worker's program %s: %w", path, err)
	}
	defer unix.Close(fd)
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, firstProgramFD)
	if err != nil {
		return program{}, fmt.Errorf("the worker's program %s: %w", path, err)
	}
	return program{path, high}, nil
}

// link is a path to the program for a child of this process.
func (p program) link() string { return fmt.Sprintf("/proc/self/fd/%d", p.fd) }

func (p program) close() { unix.Close(p.fd) }
