package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/volumeread"
)

// checking is one `byokd check` of a volume.
type checking struct {
	from    keySource
	output  string
	bucket  bucketCheck // where an s3:// source is given
	environ []string
	stdout  io.Writer
	stderr  io.Writer

	report   checkReport
	progress *progress
	seen     map[uint64]bool // inodes with several names that were read
}

// checkReport is what `byokd check -o json` prints.
type checkReport struct {
	Lower       string       `json:"lower"`
	Volume      string       `json:"volume"`
	KeyARN      string       `json:"key_arn"`
	Complete    bool         `json:"complete"` // everything was looked at
	Sound       bool         `json:"sound"`    // … and nothing was wrong
	Files       int64        `json:"files"`
	Directories int64        `json:"directories"`
	Others      int64        `json:"others"` // symlinks, pipes, sockets, devices
	Bytes       int64        `json:"bytes"`  // plain bytes that were opened
	Holes       int64        `json:"hole_bytes"`
	FaultyBytes int64        `json:"faulty_bytes"`
	Seconds     float64      `json:"seconds"`
	Faults      []checkFault `json:"faults"`
}

// checkFault is one fault with what to do about it.
type checkFault struct {
	volumeread.Fault
	Next string `json:"next_step"`
}

func newCheckCommand(environ []string) *cobra.Command {
	c := &checking{environ: environ, seen: map[uint64]bool{}}
	cmd := &cobra.Command{
		Use: "check [LOWER | s3://BUCKET[/PREFIX]]", Short: "Read every block of a volume, or every object of a bucket, and tell what is damaged", Args: cobra.MaximumNArgs(1),
		Long: "Reads the lower directory of a volume that no byokd serves: stopped, on a snapshot, or on a disk that is mounted\n" +
			"read-only. Every block, name, symlink and attribute is opened with the key; what is not authentic is told with\n" +
			"file, offset, reason and what to do. Nothing is ever repaired or written. Needs kms:Decrypt on the key, which is\n" +
			"given by --config (then LOWER may be left out) or by --key.\n" +
			"s3://BUCKET reads every object of a bucket in all its versions, or those that begin with PREFIX; byokd may serve it\n" +
			"meanwhile. It tells key, part, segment, reason and what to do, and needs s3:GetObject and s3:ListBucket, for a\n" +
			"bucket with versions s3:GetObjectVersion, s3:ListBucketVersions and s3:GetBucketVersioning, too.\n" +
			"Exit code 0 when everything is sound, 9 when something is not, 4 when LOWER is no volume or in use, 10 when KMS\n" +
			"refuses the key.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c.stdout, c.stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			lower := ""
			if len(args) == 1 {
				lower = args[0]
			}
			if bucket, prefix, remote := cutS3(lower); remote {
				return explainDecrypt(c.runBucket(ctx, bucket, prefix))
			}
			return explainDecrypt(c.run(ctx, lower))
		},
	}
	c.from.flags(cmd.Flags())
	cmd.Flags().StringVarP(&c.output, "output", "o", "table", "table or json")
	c.bucket.flags(cmd.Flags())
	return cmd
}

func (c *checking) prepare() error {
	if c.output != "table" && c.output != "json" {
		return exitWith(exitUsage, fmt.Errorf("-o %s: say table or json", c.output))
	}
	return c.from.load(c.environ)
}

func (c *checking) run(ctx context.Context, lower string) error {
	if err := c.prepare(); err != nil {
		return err
	}
	v, err := openOffline(ctx, lower, &c.from)
	if err != nil {
		return err
	}
	defer v.Close()
	if lower == "" {
		lower = c.from.cfg.Volume.Lower
	}
	began := time.Now()
	c.report = checkReport{Lower: lower, Volume: v.Header().Volume.String(), KeyARN: v.Header().KeyARN, Faults: []checkFault{}}
	c.progress = newProgress(c.stderr, "checking", sizeBelow(lower))
	err = v.Walk(ctx, c)
	c.progress.finish()
	c.report.Seconds = time.Since(began).Seconds()
	c.report.Complete = err == nil
	c.report.Sound = err == nil && len(c.report.Faults) == 0
	return errors.Join(err, c.tell())
}

// tell prints the report and gives the exit code.
func (c *checking) tell() error {
	r := &c.report
	if c.output == "json" {
		encoder := json.NewEncoder(c.stdout)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(r); err != nil {
			return err
		}
	} else {
		for _, f := range r.Faults {
			fmt.Fprintln(c.stdout, f.text())
		}
		fmt.Fprintf(c.stdout, "%d files, %d directories, %d others; %s opened, %s of holes, in %.1f s\n", r.Files, r.Directories, r.Others, bytesInWords(r.Bytes), bytesInWords(r.Holes), r.Seconds)
		switch {
		case r.Sound:
			fmt.Fprintf(c.stdout, "The volume %s is sound.\n", r.Volume)
		case !r.Complete:
			fmt.Fprintln(c.stdout, "Not everything was looked at.")
		}
	}
	if len(r.Faults) > 0 {
		return exitWith(exitDamaged, fmt.Errorf("%d faults, %d plain bytes cannot be read", len(r.Faults), r.FaultyBytes))
	}
	return nil
}

func (f checkFault) text() string {
	where := "the whole of it"
	if f.Length > 0 {
		where = fmt.Sprintf("%d bytes at offset %d", f.Length, f.Offset)
	}
	return fmt.Sprintf("%q: %s: %s (%s)\n  lower file: %s\n  %s", f.Path, where, f.Reason, f.Detail, f.Lower, f.Next)
}

// nextStep says what to do about a fault.
func nextStep(r volumeread.Reason) string {
	switch r {
	case volumeread.Damaged:
		return "The rest can be read. Restore the file from a backup or snapshot, or write these bytes anew through the mount."
	case volumeread.NoFileID:
		return "Restore the file from a backup or snapshot; its lower file's first 4096 bytes from a snapshot suffice, if they are the only thing that is lost."
	case volumeread.IDMismatch:
		return "Somebody has put another file's first block here: restore the lower file from a snapshot, and look who can write to the disk."
	case volumeread.Foreign:
		return "byokd did not write this name and does not show it. Move it out of the lower directory, and look who can write to the disk."
	case volumeread.Unreadable:
		return "The disk below does not give it. Look into the kernel's log (dmesg) and replace the disk; restore from a snapshot."
	default:
		return ""
	}
}

// Enter implements volumeread.Visitor.
func (c *checking) Enter(*volumeread.Entry) error { c.report.Directories++; return nil }

// Leave implements volumeread.Visitor.
func (c *checking) Leave(*volumeread.Entry) error { return nil }

// Other implements volumeread.Visitor.
func (c *checking) Other(*volumeread.Entry) error { c.report.Others++; return nil }

// File implements volumeread.Visitor: it reads the file once, by whichever name comes first.
func (c *checking) File(e *volumeread.Entry, f *volumeread.File) error {
	if e.Stat.Nlink > 1 {
		if c.seen[e.Stat.Ino] {
			return nil
		}
		c.seen[e.Stat.Ino] = true
	}
	c.report.Files++
	var opened int64
	_, err := f.Blocks(func(_ int64, plain []byte) error {
		opened += int64(len(plain))
		c.report.Bytes += int64(len(plain))
		c.progress.tell(c.report.Bytes + c.report.Holes)
		return nil
	})
	c.report.Holes += max(0, f.Size()-opened)
	return err
}

// Fault implements volumeread.Visitor. Blocks that follow one another are one fault.
func (c *checking) Fault(f volumeread.Fault) error {
	c.report.FaultyBytes += f.Length
	if n := len(c.report.Faults); n > 0 && f.Length > 0 {
		last := &c.report.Faults[n-1]
		if last.Lower == f.Lower && last.Reason == f.Reason && last.Length > 0 && last.Offset+last.Length == f.Offset {
			last.Length += f.Length
			return nil
		}
	}
	c.report.Faults = append(c.report.Faults, checkFault{f, nextStep(f.Reason)})
	return nil
}
