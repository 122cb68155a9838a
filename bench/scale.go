//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The scale part asks what an operation costs as there is more of everything: a
// million files, a file of 1 TiB, ten thousand open files, 64 writers, and what
// starting takes then. It measures curves, on the raw filesystem and on byokd, or on
// the peers that were asked for: it is their being flat that counts, not their height.

// curve is what something costs, or takes, as a number grows.
type curve struct {
	Name   string  `json:"name"`
	Peer   string  `json:"peer"`
	Across string  `json:"across"` // what grows
	Unit   string  `json:"unit"`
	Points []point `json:"points"`
}

type point struct {
	At    float64 `json:"at"`
	Value float64 `json:"value"`
}

// scaled is the scale part of the report.
type scaled struct {
	Curves []curve  `json:"curves"`
	Facts  []string `json:"facts"` // in words, in order
}

// points is how many a curve has.
const points = 40

// paced calls op(i) for each i < n and records what a call took in each stretch
// of the calls, in microseconds.
func paced(ctx context.Context, n int, op func(i int) error) ([]point, error) {
	var all []point
	began, first := time.Now(), 0
	for i := range n {
		if err := errors.Join(op(i), ctx.Err()); err != nil {
			return all, err
		}
		if done := i + 1; done*points/n > len(all) || done == n && len(all) < points {
			now := time.Now()
			all = append(all, point{float64(done), now.Sub(began).Seconds() * 1e6 / float64(done-first)})
			began, first = now, done
		}
	}
	return all, nil
}

// growth is the last quarter of a curve in parts of its first quarter, medians
// both: 1 where it is flat.
func (c curve) growth() float64 {
	quarter := len(c.Points) / 4
	if quarter == 0 {
		return 1
	}
	first, last := median(c.Points[:quarter]), median(c.Points[len(c.Points)-quarter:])
	if first == 0 {
		return 1
	}
	return last / first
}

func median(p []point) float64 {
	var values []float64
	for _, each := range p {
		values = append(values, each.Value)
	}
	slices.Sort(values)
	return (values[len(values)/2] + values[(len(values)-1)/2]) / 2
}

// scaleRun is the scale part at work.
type scaleRun struct {
	options
	ctx    context.Context
	stdout io.Writer
	found  scaled
}

func (s *scaleRun) add(name, peer, across, unit string, p []point) {
	if len(p) > 0 {
		s.found.Curves = append(s.found.Curves, curve{name, peer, across, unit, p})
	}
}

func (s *scaleRun) fact(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.found.Facts = append(s.found.Facts, text)
	fmt.Fprintln(s.stdout, "-", text) // at once: a million files take their time
}

// scaleSteps is how often say is called, about.
const scaleSteps = 120

func (s *scaleRun) say(p *peer, what string) { s.progress.step("scale: %s: %s", p.name, what) }

// compareScale measures the scale part and prints it.
func compareScale(ctx context.Context, o options, stdout, stderr io.Writer) (_ *scaled, err error) {
	if !o.chosen { // curves are of the raw filesystem and byokd; the others tell what a growth comes from
		o.peers = []string{"raw", subject}
	}
	peers, err := startPeers(ctx, o, stderr)
	defer func() {
		for i := range slices.Backward(peers) {
			err = errors.Join(err, peers[i].stop())
		}
	}()
	if err != nil {
		return nil, err
	}
	s := &scaleRun{options: o, ctx: ctx, stdout: stdout}
	for _, part := range []struct {
		name string
		run  func(*peer) error
	}{{"start", s.start}, {"files", s.manyFiles}, {"sparse", s.sparse}, {"open", s.openFiles}, {"writers", s.writers}} {
		if !o.scale.MatchString(part.name) {
			continue
		}
		for i := range peers {
			if err = part.run(&peers[i]); err != nil {
				err = fmt.Errorf("scale, %s on %s: %w", part.name, peers[i].name, err)
				break
			}
		}
		if err != nil {
			break
		}
	}
	s.found.print(stdout)
	if ctx.Err() != nil {
		err = nil // what there is was printed
	}
	return &s.found, err
}

func (s scaled) print(w io.Writer) {
	fmt.Fprint(w, "\nScale: first and last are medians of the first and the last quarter of the curve; growth is their ratio\n\n")
	rows := heading([]string{"what", "across", "peer", "unit", "first", "last", "growth"})
	for _, c := range s.Curves {
		quarter := max(1, len(c.Points)/4)
		rows = append(rows, []string{c.Name, c.Across, c.Peer, c.Unit,
			figures(median(c.Points[:quarter])), figures(median(c.Points[len(c.Points)-quarter:])), fmt.Sprintf("%.2f", c.growth())})
	}
	table(w, rows)
}

// below makes a directory of the scale part's on a peer.
func below(p *peer, name string) (string, error) {
	dir := filepath.Join(p.dir, "scale-"+name)
	return dir, os.MkdirAll(dir, 0o755)
}

const (
	scaleDir    = 1000    // files of a directory
	scaleSample = 200_000 // files that are looked at and removed, of all over the volume
)

func scaleName(dir string, i int) string {
	return fmt.Sprintf("%s/%04d/f%06d", dir, i/scaleDir, i)
}

// manyFiles makes, looks at, lists and removes files, and between watches what
// byokd needs while the kernel knows all of them.
func (s *scaleRun) manyFiles(p *peer) error {
	dir, err := below(p, "files")
	if err != nil {
		return err
	}
	across := "files"
	memory := []point{}
	text := filled(512)
	s.say(p, fmt.Sprintf("creating %d files", s.files))
	made, err := paced(s.ctx, s.files, func(i int) error {
		if i%scaleDir == 0 {
			if err := os.MkdirAll(filepath.Dir(scaleName(dir, i)), 0o755); err != nil {
				return err
			}
			if u, ok := p.usage(); ok && i*points/s.files > len(memory) {
				memory = append(memory, point{float64(i), u.resident})
			}
		}
		return writeNew(scaleName(dir, i), text)
	})
	s.add("create + write 512 B", p.name, across, "µs", made)
	if err != nil {
		return err
	}
	if err := s.known(p, memory, across); err != nil {
		return err
	}
	stride := max(1, s.files/scaleSample)
	for _, step := range []struct {
		name  string
		drops bool
		apart int // files from one call to the next
		each  int // files that a call is about
		op    func(i int) error
	}{
		{"stat, cold", true, stride, 1, func(i int) error { return lstat(scaleName(dir, i*stride)) }},
		{"stat, warm", false, stride, 1, func(i int) error { return lstat(scaleName(dir, i*stride)) }},
		{"readdir, an entry", true, stride * scaleDir, scaleDir, func(i int) error { return s.list(fmt.Sprintf("%s/%04d", dir, i*stride)) }},
		{"unlink", false, stride, 1, func(i int) error { return unix.Unlink(scaleName(dir, i*stride)) }},
	} {
		s.say(p, step.name)
		if step.drops {
			if err := forget(p.dir, s.dir); err != nil {
				return err
			}
		}
		took, err := paced(s.ctx, s.files/step.apart, step.op)
		for i := range took {
			took[i].At, took[i].Value = took[i].At*float64(step.apart), took[i].Value/float64(step.each)
		}
		s.add(step.name, p.name, across, "µs", took)
		if err != nil {
			return err
		}
	}
	return nil // what is left goes with the lower directory
}

// known watches a server whose kernel knows every file: memory, idle processor
// time, a freeze, a restart; and what is left of it when the kernel has forgotten.
func (s *scaleRun) known(p *peer, memory []point, across string) error {
	u, ok := p.usage()
	if !ok || p.admin == "" {
		return nil
	}
	s.add("memory", p.name, across, "MiB", append(memory, point{float64(s.files), u.resident}))
	s.fact("%d inodes known to the kernel: %s has %.0f MiB resident (%.0f MiB at its peak) and %d descriptors", s.files, p.name, u.resident, u.peak, u.descriptors)
	s.say(p, "idle")
	busy, err := p.idle(s.ctx)
	if err != nil {
		return err
	}
	s.fact("idle with %d inodes known: %.2f %% of a core", s.files, 100*busy)
	s.say(p, "freeze")
	f, err := p.freezeOnce(s.ctx)
	if err != nil {
		return err
	}
	s.fact("freeze with %d inodes known: %s", s.files, f)
	s.say(p, "forgetting")
	if err := forget(p.dir, s.dir); err != nil {
		return err
	}
	if u, ok = p.usage(); ok {
		s.fact("when the kernel has forgotten them: %.0f MiB resident, %d descriptors", u.resident, u.descriptors)
	}
	return s.restart(p, s.files)
}

func writeNew(name string, text []byte) error {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	if _, err = unix.Write(fd, text); err != nil {
		unix.Close(fd)
		return err
	}
	return unix.Close(fd)
}

func lstat(name string) error {
	var st unix.Stat_t
	return unix.Lstat(name, &st)
}

// list reads a directory of scaleDir files to its end.
func (s *scaleRun) list(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buffer := make([]byte, 64<<10)
	for count := 0; ; {
		n, err := unix.Getdents(fd, buffer)
		if err != nil {
			return err
		}
		if n == 0 {
			if count != min(scaleDir, s.files) {
				return fmt.Errorf("%s: %d entries", dir, count)
			}
			return nil
		}
		_, got, _ := unix.ParseDirent(buffer[:n], -1, nil)
		count += got
	}
}
