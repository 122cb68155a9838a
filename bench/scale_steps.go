//go:build linux

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// restarts is how often a start is measured.
const restarts = 5

// start measures how long byokd takes to start and to stop, on an empty volume; the
// million files measure it again.
func (s *scaleRun) start(p *peer) error { return s.restart(p, 0) }

// restart stops and starts the server of a volume of so many files.
func (s *scaleRun) restart(p *peer, files int) error {
	if p.admin == "" {
		return nil
	}
	var stop, start []float64
	for i := range restarts {
		s.say(p, fmt.Sprintf("start %d of %d with %d files", i+1, restarts, files))
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		stopped, started, err := p.restart()
		if err != nil {
			return err
		}
		stop, start = append(stop, milliseconds(stopped)), append(start, milliseconds(started))
	}
	s.fact("with %d files in the volume: from the start of the process to the first answer of the mount %.0f ms, from SIGTERM to its end %.0f ms (medians of %d)", files, middle(start), middle(stop), restarts)
	s.extend("start", p.name, "files", "ms", point{float64(files), middle(start)})
	return nil
}

// extend adds a point to a curve.
func (s *scaleRun) extend(name, peer, across, unit string, at point) {
	for i := range s.found.Curves {
		if c := &s.found.Curves[i]; c.Name == name && c.Peer == peer {
			c.Points = append(c.Points, at)
			return
		}
	}
	s.add(name, peer, across, unit, []point{at})
}

// restart ends the peer's server and starts it again.
func (p *peer) restart() (stopped, started time.Duration, err error) {
	old := p.server[len(p.server)-1]
	began := time.Now()
	if err := old.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, 0, err
	}
	if err := old.Wait(); err != nil {
		return 0, 0, fmt.Errorf("the server's end: %w", err)
	}
	stopped = time.Since(began)
	cmd := exec.Command(old.Path, old.Args[1:]...)
	cmd.Env, cmd.Stderr, cmd.SysProcAttr = old.Env, os.Stderr, old.SysProcAttr
	began = time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	p.server[len(p.server)-1] = cmd
	if err := p.awaitMount(); err != nil {
		return 0, 0, err
	}
	if err := lstat(filepath.Join(p.dir, "no such name")); err != unix.ENOENT { // it answers
		return 0, 0, fmt.Errorf("the mount after a restart: %w", err)
	}
	return stopped, time.Since(began), nil
}

const (
	tebibyte    = 1 << 40
	sparseCalls = 20_000
)

// sparse works all over a file of 1 TiB, and over one of 1 GiB to compare.
func (s *scaleRun) sparse(p *peer) error {
	dir, err := below(p, "sparse")
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		size int64
	}{{"1 GiB", 1 << 30}, {"1 TiB", tebibyte}} {
		if err := s.sparseFile(p, filepath.Join(dir, "sparse"), f.name, f.size); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return os.RemoveAll(dir)
}

func (s *scaleRun) sparseFile(p *peer, file, named string, size int64) error {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Ftruncate(fd, size), unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM)); err != nil {
		return err
	}
	text, got := filled(small), make([]byte, small)
	r := rand.New(rand.NewPCG(1, uint64(size)))
	places := make([]int64, sparseCalls)
	for i := range places {
		places[i] = r.Int64N(size/small) * small
	}
	for _, step := range []struct {
		name  string
		drops bool
		op    func(i int) error
	}{
		{"write 4 KiB at random", false, func(i int) error { _, err := unix.Pwrite(fd, text, places[i]); return err }},
		{"fsync", false, nil},
		{"read 4 KiB at random, cold", true, func(i int) error { _, err := unix.Pread(fd, got, places[i]); return err }},
		{"read 4 KiB in a hole", false, func(i int) error { _, err := unix.Pread(fd, got, r.Int64N(size/small)*small); return err }},
		{"stat", false, func(i int) error { return lstat(file) }},
		{"punch 64 KiB at random", false, func(i int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, places[i]&^(64<<10-1), 64<<10)
		}},
	} {
		s.say(p, named+": "+step.name)
		if step.op == nil {
			began := time.Now()
			if err := unix.Fsync(fd); err != nil {
				return err
			}
			s.fact("%s: fsync after %d random writes all over %s took %.0f ms", p.name, sparseCalls, named, milliseconds(time.Since(began)))
			continue
		}
		if step.drops {
			if err := forget(p.dir, s.dir); err != nil {
				return err
			}
		}
		took, err := paced(s.ctx, sparseCalls, step.op)
		s.add("in a file of "+named+": "+step.name, p.name, "calls", "µs", took)
		if err != nil {
			return err
		}
	}
	return nil
}

// openFiles holds many files open, reads and writes all of them, and closes them.
func (s *scaleRun) openFiles(p *peer) error {
	if err := mayOpen(s.open + 100); err != nil {
		return err
	}
	dir, err := below(p, "open")
	if err != nil {
		return err
	}
	text, got := filled(small), make([]byte, small)
	fds := make([]int, s.open)
	before, _ := p.usage()
	for _, step := range []struct {
		name string
		op   func(i int) error
	}{
		{"create and keep open", func(i int) (err error) {
			fds[i], err = unix.Open(filepath.Join(dir, fmt.Sprint(i)), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
			return err
		}},
		{"write 4 KiB to each", func(i int) error { _, err := unix.Pwrite(fds[i], text, 0); return err }},
		{"fdatasync of each", func(i int) error { return unix.Fdatasync(fds[i]) }},
		{"write again and fdatasync", func(i int) error {
			_, err := unix.Pwrite(fds[i], text, 0)
			return errors.Join(err, unix.Fdatasync(fds[i]))
		}},
		{"read 4 KiB of each", func(i int) error { _, err := unix.Pread(fds[i], got, 0); return err }},
		{"close", func(i int) error { return unix.Close(fds[i]) }},
	} {
		s.say(p, fmt.Sprintf("%d open files: %s", s.open, step.name))
		if step.name == "close" {
			if u, ok := p.usage(); ok {
				s.fact("%d open files: %s has %d descriptors (%d before), %.0f MiB resident (%.0f before), %d threads", s.open, p.name, u.descriptors, before.descriptors, u.resident, before.resident, u.threads)
			}
		}
		took, err := paced(s.ctx, s.open, step.op)
		s.add("open files: "+step.name, p.name, "open files", "µs", took)
		if err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// mayOpen raises this process's limit of open files.
func mayOpen(files int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Cur >= uint64(files) {
		return nil
	}
	limit.Cur, limit.Max = uint64(files), max(limit.Max, uint64(files))
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("a limit of %d open files: %w", files, err)
	}
	return nil
}

const (
	mostWriters = 64
	writerFile  = 8 << 20
)

// writers measures what up to 64 of them write together, each to a file of its own,
// and all to one.
func (s *scaleRun) writers(p *peer) error {
	dir, err := below(p, "writers")
	if err != nil {
		return err
	}
	for _, shared := range []bool{false, true} {
		for _, synced := range []bool{false, true} {
			name := map[bool]string{false: "write 4 KiB at random, a file each", true: "write 4 KiB at random, one file"}[shared] + map[bool]string{true: " + fdatasync"}[synced]
			var found []point
			for n := 1; n <= mostWriters; n *= 2 {
				s.say(p, fmt.Sprintf("%d writers: %s", n, name))
				rate, err := writeTogether(dir, n, shared, synced)
				if err != nil {
					return err
				}
				if s.ctx.Err() != nil {
					return s.ctx.Err()
				}
				found = append(found, point{float64(n), rate})
			}
			s.add(name, p.name, "writers", "op/s", found)
			best := 0.0
			for _, at := range found {
				best = max(best, at.Value)
			}
			s.fact("%s: %s: %d writers have %.2f of the best rate", p.name, name, mostWriters, found[len(found)-1].Value/best)
		}
	}
	return os.RemoveAll(dir)
}

// writeTogether returns the writes per second of n writers.
func writeTogether(dir string, n int, shared, synced bool) (float64, error) {
	fds := make([]int, n)
	for i := range fds {
		name := filepath.Join(dir, fmt.Sprint(i))
		if shared {
			name = filepath.Join(dir, "shared")
		}
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		fds[i] = fd
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return 0, err
		}
		if st.Size < writerFile {
			if _, err := unix.Pwrite(fd, filled(writerFile), 0); err != nil {
				return 0, err
			}
		}
		if err := unix.Fsync(fd); err != nil {
			return 0, err
		}
	}
	var done atomic.Int64
	failures := make([]error, n)
	var all sync.WaitGroup
	began := time.Now()
	for i, fd := range fds {
		all.Go(func() {
			r, text := rand.New(rand.NewPCG(uint64(i), 5)), filled(small)
			for failures[i] == nil && time.Since(began) < limit {
				_, failures[i] = unix.Pwrite(fd, text, r.Int64N(writerFile/small)*small)
				if synced && failures[i] == nil {
					failures[i] = unix.Fdatasync(fd)
				}
				done.Add(1)
			}
			if failures[i] == nil && !synced {
				failures[i] = unix.Fdatasync(fd)
			}
		})
	}
	all.Wait()
	return float64(done.Load()) / time.Since(began).Seconds(), errors.Join(failures...)
}
