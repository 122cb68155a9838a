//go:build linux

package powercut

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// mappedLoad stores into a shared mapping and calls msync, as Zeebe's journal
// does. The mapping is in a process of its own: a thread of Go's that waits in a
// page fault keeps the whole program from collecting garbage, and here that
// program serves the mount which the fault waits for.
type mappedLoad struct{ fileLoad }

const (
	mapVariable  = "BYOKD_POWERCUT_MAP" // tells this program to map: the file
	mappedLength = 256 << 10
)

func (*mappedLoad) name() string { return "mapped" }

func (l *mappedLoad) run(ctx context.Context, w *world) error {
	fd, err := l.create(w)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	f := &openFile{fileLoad: &l.fileLoad, fd: fd, rand: w.rand, now: w.now}
	if err := errors.Join(f.fallocate(0, 0, mappedLength), f.sync()); err != nil {
		return err
	}
	store, stop, err := startMapping(w.dir + "/file")
	if err != nil {
		return err
	}
	for at := int64(0); ctx.Err() == nil && err == nil; {
		n := min(f.upTo(4000), mappedLength-at)
		f.tag++
		f.begin(fileOp{kind: opWrite, begin: w.now(), off: at, n: n, tag: f.tag})
		err = store(f.tag, at, n)
		f.end()
		if err == nil {
			f.acknowledge(w.now(), f.returned())
		}
		if at += n; at == mappedLength {
			at = 0
		}
	}
	return errors.Join(err, stop())
}

// startMapping starts the process that maps the file. store stores one pattern
// and returns after msync.
func startMapping(file string) (store func(tag uint64, off, n int64) error, stop func() error, err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), mapVariable+"="+file)
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	answers := bufio.NewReader(output)
	store = func(tag uint64, off, n int64) error {
		if _, err := fmt.Fprintln(input, tag, off, n); err != nil {
			return err
		}
		if answer, err := answers.ReadString('\n'); err != nil || answer != "durable\n" {
			return fmt.Errorf("the process that maps says %q: %w", answer, err)
		}
		return nil
	}
	return store, func() error { input.Close(); return cmd.Wait() }, nil
}

// serveMapping is the whole of that process: it stores what its standard input
// says.
func serveMapping() error {
	fd, err := unix.Open(os.Getenv(mapVariable), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, mappedLength, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for in := bufio.NewReader(os.Stdin); ; {
		var tag uint64
		var off, n int64
		if _, err := fmt.Fscanln(in, &tag, &off, &n); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		pattern(b[off:off+n], tag, off)
		if err := unix.Msync(b, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync: %w", err)
		}
		fmt.Println("durable")
	}
}
