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
	parts  []string // of the comparison: fs, s3
	large  int64    // GiB of an object whose transfer is watched, 0 for none
	keep   bool     // do not stop: for a profiler
	core   int      // processor of the proxy, -1 for any
	json   string   // file for the report
	svg    string   // file for its picture
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 1 {
		switch args[0] {
		case "load": // a child of ours
			return runLoad(args[1], args[2], stdout)
		case "s3load":
			return runS3Load(ctx, args[1:], stdout)
		case "loopback":
			return serveLoopback(args[1], args[2])
		}
	}
	var o options
	var loads, peers, parts string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.dir, "dir", "", "directory for all data; its filesystem is the raw peer (default: a new one in TMPDIR)")
	flags.StringVar(&o.bin, "bin", "bin", "directory of byokd and devcloud")
	flags.IntVar(&o.rounds, "rounds", 3, "interleaved rounds")
	flags.StringVar(&loads, "loads", ".", "regular expression of the loads to run")
	flags.StringVar(&peers, "peers", "raw,byokd,loopback,gocryptfs", "peers; what is not installed is left out")
	flags.StringVar(&parts, "parts", "fs,s3", "parts of the comparison: the filesystem, the S3 proxy")
	flags.Int64Var(&o.large, "large", 0, "put and get an object of so many GiB first, and tell how much memory byokd took (5 at most)")
	flags.BoolVar(&o.keep, "keep", false, "leave the mounts up until Ctrl-C")
	flags.IntVar(&o.core, "core", -1, "run the S3 proxy on this processor; with the rest on another by taskset -c, byokd has one of its own")
	flags.StringVar(&o.json, "json", "", "file to write the figures to as JSON")
	flags.StringVar(&o.svg, "svg", "", "file to write a picture of the ratios to")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var err error
	if o.loads, err = regexp.Compile(loads); err != nil {
		return err
	}
	o.peers, o.parts = strings.Split(peers, ","), strings.Split(parts, ",")
	if os.Geteuid() != 0 && slices.Contains(o.parts, "fs") {
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
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r := report{Machine: describe(o), Rounds: o.rounds}
	fmt.Fprintf(stdout, "%v; medians of up to %d interleaved rounds\n\n", r.Machine, o.rounds)
	if slices.Contains(o.parts, "fs") {
		var s section
		s, err = compareFS(ctx, o, self, stdout, stderr)
		r.Sections = append(r.Sections, s)
	}
	if err == nil && slices.Contains(o.parts, "s3") && ctx.Err() == nil {
		var s section
		s, err = compareS3(ctx, o, self, stdout, stderr)
		r.Sections = append(r.Sections, s)
	}
	return errors.Join(err, r.write(o.json, o.svg))
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
	fmt.Fprintf(stderr, "\r%-60s\r", "")
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.name
	}
	r.print(stdout, loads, names) // also what there is when it was interrupted
	if o.keep && err == nil {
		fmt.Fprintln(stderr, "mounts are up under", o.dir, "until Ctrl-C")
		<-ctx.Done()
	}
	return r.section("filesystem", loads, names), err
}

func measureAll(ctx context.Context, o options, self string, peers []peer, r results, stderr io.Writer) error {
	for round := range o.rounds {
		for _, l := range loads {
			if !o.loads.MatchString(l.name) || !l.possible() {
				continue
			}
			fmt.Fprintf(stderr, "\rround %d of %d: %-40s", round+1, o.rounds, l.name)
			for i := range peers {
				p := peers[(i+round)%len(peers)]
				before := p.cpuSeconds()
				rate, err := measure(ctx, self, l, p)
				if err != nil {
					return fmt.Errorf("%s on %s: %w", l.name, p.name, err)
				}
				r.rates.add(l.name, p.name, rate)
				r.cpu.add(l.name, p.name, p.cpuSeconds()-before)
			}
		}
	}
	return nil
}

// measure runs one load on one peer, in a process of its own.
func measure(ctx context.Context, self string, l load, p peer) (float64, error) {
	dir := filepath.Join(p.dir, "bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	return measureChild(ctx, self, "load", l.name, dir)
}

// describe says on what the figures were measured.
func describe(o options) machine {
	var name unix.Utsname
	var st unix.Statfs_t
	_ = unix.Uname(&name)
	_ = unix.Statfs(o.dir, &st)
	kind := fmt.Sprintf("%#x", st.Type)
	if known, ok := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.TMPFS_MAGIC: "tmpfs", unix.BTRFS_SUPER_MAGIC: "btrfs"}[st.Type]; ok {
		kind = known
	}
	processor := "?"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if found := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(text); found != nil {
			processor = string(found[1])
		}
	}
	var cpus unix.CPUSet
	_ = unix.SchedGetaffinity(0, &cpus)
	load, _ := os.ReadFile("/proc/loadavg")
	return machine{unix.ByteSliceToString(name.Release[:]), cpus.Count(), processor, kind, strings.Join(strings.Fields(string(load))[:3], " ")}
}
