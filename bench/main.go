//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	dir    string // where all peers have their lower directories
	bin    string // of byokd and devcloud
	rounds int
	loads  *regexp.Regexp
	peers  []string
	chosen bool     // the peers were named
	parts  []string // of the comparison: fs, s3
	large  int64    // GiB of an object whose transfer is watched, 0 for none
	keep   bool     // do not stop: for a profiler
	core   int      // processor of the proxy, -1 for any
	json   string   // file for the report
	svg    string   // file for its picture
	plot   string   // file for the curves of the scale part

	progress *progress

	freezes int            // of the freeze part
	scale   *regexp.Regexp // parts of the scale part
	files   int            // of the scale part
	open    int            // files that it opens at once
	dirty   int64          // MiB that byokd's mounts and loopback's, or the raw peer's device, may hold dirty, 0 for their own limits
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 1 {
		switch args[0] {
		case "load": // a child of ours
			return runLoad(args[1], args[2], stdout)
		case "s3load":
			return runS3Load(ctx, args[1:], stdout)
		case "stress":
			return runStress(args[1], args[2])
		case "loopback":
			return serveLoopback(args[1], args[2])
		}
	}
	var o options
	var loads, peers, parts, scale string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.dir, "dir", "", "directory for all data; its filesystem is the raw peer (default: a new one in TMPDIR)")
	flags.StringVar(&o.bin, "bin", "bin", "directory of byokd and devcloud")
	flags.IntVar(&o.rounds, "rounds", 3, "interleaved rounds")
	flags.StringVar(&loads, "loads", ".", "regular expression of the loads to run")
	flags.StringVar(&peers, "peers", "raw,byokd,loopback,gocryptfs,encfs,cryfs,rclone", "peers; what is not installed is told and left out")
	flags.StringVar(&parts, "parts", "fs,s3,gate,freeze", "parts: fs and s3 (the comparisons), gate, freeze (under load), limits (byokd without cryptography), memlimits (on a disk in memory), s3limits (of the S3 proxy), scale")
	flags.Int64Var(&o.large, "large", 0, "put and get an object of so many GiB first, and tell how much memory byokd took (5 at most)")
	flags.BoolVar(&o.keep, "keep", false, "leave the mounts up until Ctrl-C")
	flags.IntVar(&o.core, "core", -1, "run the S3 proxy on this processor; with the rest on another by taskset -c, byokd has one of its own")
	flags.StringVar(&o.json, "json", "", "file to write the figures to as JSON")
	flags.StringVar(&o.svg, "svg", "", "file to write a picture of the ratios to")
	flags.StringVar(&o.plot, "plot", "", "file to write a picture of the curves of the scale part to")
	flags.IntVar(&o.freezes, "freezes", 20, "freezes and thaws of the freeze part")
	flags.StringVar(&scale, "scale", ".", "regular expression of the steps of the scale part: start, files, sparse, open, writers")
	flags.IntVar(&o.files, "files", 1_000_000, "files of the scale part")
	flags.IntVar(&o.open, "open", 10_000, "files that the scale part has open at once")
	flags.Int64Var(&o.dirty, "dirty", 0, "MiB that the kernel may hold dirty of byokd's mounts and of loopback's, and of the device of the raw peer where that is the only one (default: their own limits)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	flags.Visit(func(f *flag.Flag) { o.chosen = o.chosen || f.Name == "peers" })
	var err error
	if o.loads, err = regexp.Compile(loads); err != nil {
		return err
	}
	if o.scale, err = regexp.Compile(scale); err != nil {
		return err
	}
	o.peers, o.parts = strings.Split(peers, ","), strings.Split(parts, ",")
	mounts := func(part string) bool { return part == "fs" || part == "freeze" || part == "scale" }
	if os.Geteuid() != 0 && slices.ContainsFunc(o.parts, mounts) {
		return errors.New("mounting and dropping caches need root")
	}
	return compare(ctx, o, stdout, stderr)
}

// compare runs everything and prints the table.
func compare(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "byokd-bench"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil { // mounts are looked for by their whole path
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r := report{Machine: describe(o.dir), Rounds: o.rounds}
	fmt.Fprintf(stdout, "%v; medians of up to %d interleaved rounds\n", r.Machine, o.rounds)
	if warning := r.Machine.warning(); warning != "" {
		fmt.Fprintln(stdout, warning)
	}
	o.progress = newProgress(stderr)
	parts := []part{
		{"fs", o.fsSteps(), func() error { return r.section(compareFS(ctx, o, self, stdout, stderr)) }},
		{"s3", o.s3Steps(), func() error { return r.section(compareS3(ctx, o, self, stdout, stderr)) }},
		{"gate", 1, func() (err error) { r.Gate, err = measureGate(ctx, o, stdout); return err }},
		{"freeze", o.freezes, func() (err error) { r.Freeze, err = measureFreezes(ctx, o, self, stdout, stderr); return err }},
		{"limits", o.limitsSteps(), func() error {
			return r.section(compareLimits(ctx, o, self, "limits, on the disk", stdout, stderr))
		}},
		{"memlimits", o.limitsSteps(), func() error { return r.section(compareMemoryLimits(ctx, o, self, stdout, stderr)) }},
		{"s3limits", o.s3Steps(), func() error { return r.section(compareS3Limits(ctx, o, self, stdout, stderr)) }},
		{"scale", scaleSteps, func() (err error) { r.Scale, err = compareScale(ctx, o, stdout, stderr); return err }},
	}
	parts = slices.DeleteFunc(parts, func(p part) bool { return !slices.Contains(o.parts, p.name) })
	for _, p := range parts {
		o.progress.plan(p.steps)
	}
	for _, p := range parts {
		if err == nil && ctx.Err() == nil {
			end := o.progress.begin(p.steps)
			err = p.run()
			end()
		}
	}
	return errors.Join(err, r.write(o))
}

// part of the comparison.
type part struct {
	name  string
	steps int // at most, for the progress
	run   func() error
}

// compareFS measures the filesystem's section and prints its table.
func compareFS(ctx context.Context, o options, self string, stdout, stderr io.Writer) (s section, err error) {
	peers, err := startPeers(ctx, o, stderr)
	defer func() {
		for _, p := range slices.Backward(peers) {
			err = errors.Join(err, p.stop())
		}
	}()
	if err != nil {
		return s, err
	}
	r := newResults()
	err = measureAll(ctx, o, self, peers, r, stderr)
	if err != nil && ctx.Err() == nil {
		return s, err
	}
	names := namesOf(peers)
	fmt.Fprintf(stdout, "\nFilesystem\n\n")
	r.print(stdout, loads, names) // also what there is when it was interrupted
	r.printUsage(stdout, loads, names)
	if o.keep && err == nil {
		fmt.Fprintln(stderr, "mounts are up under", o.dir, "until Ctrl-C")
		<-ctx.Done()
	}
	return r.section("filesystem", loads, names), err
}

func namesOf(peers []peer) []string {
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.name
	}
	return names
}

// fsSteps are the measurements of the filesystem's part, were all peers there.
func (o options) fsSteps() int {
	loads, steps := len(loadsOf(o)), 0
	for _, name := range o.peers {
		if slow(name) {
			steps += loads
		} else {
			steps += loads * o.rounds
		}
	}
	return steps
}

// loadsOf are the loads that were asked for and can run here.
func loadsOf(o options) []load {
	return slices.DeleteFunc(slices.Clone(loads), func(l load) bool { return !o.loads.MatchString(l.name) || !l.possible() })
}

// measureAll runs every load on every peer, round by round. Peers that are slow are
// measured once, and what they cannot do is left out; the others must be able.
func measureAll(ctx context.Context, o options, self string, peers []peer, r results, stderr io.Writer) error {
	for round := range o.rounds {
		for _, l := range loadsOf(o) {
			for i := range peers {
				p := &peers[(i+round)%len(peers)]
				if slow(p.name) && round > 0 {
					continue
				}
				o.progress.step("round %d of %d: %s: %s", round+1, o.rounds, l.name, p.name)
				err := measure(ctx, self, l, p, r)
				if err != nil && slow(p.name) && ctx.Err() == nil {
					fmt.Fprintf(stderr, "\r%-100s\r%s: %s: %v\n", "", p.name, l.name, err)
				} else if err != nil {
					return fmt.Errorf("%s on %s: %w", l.name, p.name, err)
				}
			}
		}
	}
	return nil
}

// slowLimit is what a slow peer may take for a load.
const slowLimit = 30 * time.Second

// measure runs one load on one peer, in a process of its own.
func measure(ctx context.Context, self string, l load, p *peer, r results) error {
	if slow(p.name) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, slowLimit)
		defer cancel()
	}
	dir := filepath.Join(p.dir, "bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	p.resetPeak()
	before := p.cpuSeconds()
	rate, err := measureChild(ctx, self, "load", l.name, dir)
	if err != nil {
		return err
	}
	r.rates.add(l.name, p.name, rate)
	r.cpu.add(l.name, p.name, p.cpuSeconds()-before)
	if u, ok := p.usage(); ok {
		r.peak.add(l.name, p.name, u.peak)
	}
	return nil
}
