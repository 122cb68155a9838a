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

// checking is one `byokd check`.
type checking struct {
	from    keySource
	output  string
	socket  string      // of the byokd that is to check the volume that it serves
	bucket  bucketCheck // where an s3:// source is given
	environ []string
	stdout  io.Writer
	stderr  io.Writer

	report   checkReport
	progress *progress
}

// checkReport is what `byokd check -o json` prints.
type checkReport struct {
	Lower       string       `json:"lower"`
	Volume      string       `json:"volume"`
	KeyARN      string       `json:"key_arn"`
	Served      bool         `json:"served"`   // a byokd served it meanwhile
	Complete    bool         `json:"complete"` // everything was looked at
	Sound       bool         `json:"sound"`    // … and nothing was wrong
	Changed     int64        `json:"changed"`  // names removed or replaced meanwhile, and left out
	Files       int64        `json:"files"`
	Directories int64        `json:"directories"`
	Others      int64        `json:"others"` // symlinks, pipes, sockets, devices
	Bytes       int64        `json:"bytes"`  // plain bytes that were opened
	Holes       int64        `json:"hole_bytes"`
	FaultyBytes int64        `json:"faulty_bytes"`
	FaultCount  int64        `json:"fault_count"`
	Seconds     float64      `json:"seconds"`
	Faults      []checkFault `json:"faults"` // at most 10,000
}

// checkFault is one fault with what to do about it.
type checkFault struct {
	volumeread.Fault
	Next string `json:"next_step"`
}

func newCheckCommand(environ []string) *cobra.Command {
	c := &checking{environ: environ}
	cmd := &cobra.Command{
		Use: "check [LOWER | s3://BUCKET[/PREFIX]]", Short: "Read every block of a volume, or every object of a bucket, and tell what is damaged", Args: cobra.MaximumNArgs(1),
		Long: "Reads the lower directory of a volume: of one that no byokd serves (stopped, on a snapshot, on a disk that is\n" +
			"mounted read-only), or of one in use, which the byokd that serves it reads then. Every block, name, symlink and\n" +
			"attribute is opened with the key; what is not authentic is told with file, offset, reason and what to do. Nothing\n" +
			"is ever repaired or written. Needs kms:Decrypt on the key, which is given by --config (then LOWER may be left out)\n" +
			"or by --key.\n" +
			"A volume in use: the running byokd is found by admin.socket of --config, or by --socket, which needs nothing else.\n" +
			"It reads beside its work, waits while it is frozen, and holds the writers of a block off before it calls that\n" +
			"block damaged. What the kernel has not yet flushed is not looked at; a file that is renamed or removed meanwhile\n" +
			"may be left out.\n" +
			"s3://BUCKET reads every object of a bucket in all its versions, or those that begin with PREFIX; byokd may serve it\n" +
			"meanwhile. It tells key, part, segment, reason and what to do, and needs s3:GetObject and s3:ListBucket, for a\n" +
			"bucket with versions s3:GetObjectVersion, s3:ListBucketVersions and s3:GetBucketVersioning, too.\n" +
			"Exit code 0 when everything is sound, 9 when something is not or is under another key, 4 when LOWER is no volume or\n" +
			"in use by a byokd that cannot be asked, 10 when KMS refuses the key, 20 when no byokd listens at --socket.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c.stdout, c.stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			lower := ""
			if len(args) == 1 {
				lower = args[0]
			}
			bucket, prefix, remote := cutS3(lower)
			if remote {
				if err := refuseIdle(cmd.Flags().Changed, "a bucket", []string{"socket"}); err != nil {
					return err
				}
				return explainDecrypt(c.runBucket(ctx, bucket, prefix))
			}
			if err := refuseIdle(cmd.Flags().Changed, "a volume", []string{"region", "endpoint", "current", "workers"}); err != nil {
				return err
			}
			return explainDecrypt(c.run(ctx, lower))
		},
	}
	c.from.flags(cmd.Flags())
	cmd.Flags().StringVar(&c.socket, "socket", "", "of a volume in use: control socket of the byokd that serves it")
	cmd.Flags().StringVarP(&c.output, "output", "o", "table", "table or json")
	c.bucket.flags(cmd.Flags())
	return cmd
}

func (c *checking) prepare() error {
	if c.output != "table" && c.output != "json" {
		return exitWith(exitUsage, fmt.Errorf("-o %s: say table or json", c.output))
	}
	return c.from.load(c.environ, c.stderr)
}

func (c *checking) run(ctx context.Context, lower string) error {
	if c.socket != "" {
		if lower != "" || c.from.file != "" || len(c.from.arns) > 0 {
			return exitWith(exitUsage, errors.New("--socket alone says which volume, and the byokd there has its key: leave LOWER, --config and --key out"))
		}
		return c.askServer(ctx, c.socket)
	}
	if err := c.prepare(); err != nil {
		return err
	}
	v, err := openOffline(ctx, lower, &c.from)
	if errors.Is(err, volumeread.ErrBusy) {
		return c.busy(ctx, lower)
	}
	if err != nil {
		return err
	}
	defer v.Close()
	if lower == "" {
		lower = c.from.cfg.Volume.Lower
	}
	began := time.Now()
	c.progress = newProgress(c.stderr, "checking", sizeBelow(lower))
	check := newVolumeCheck(lower, v, c.progress.tell)
	err = check.run(ctx)
	c.progress.finish()
	c.report = check.report
	c.report.Seconds = time.Since(began).Seconds()
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
		if more := r.FaultCount - int64(len(r.Faults)); more > 0 {
			fmt.Fprintf(c.stdout, "and %d faults more\n", more)
		}
		fmt.Fprintf(c.stdout, "%d files, %d directories, %d others; %s opened, %s of holes, in %.1f s\n", r.Files, r.Directories, r.Others, bytesInWords(r.Bytes), bytesInWords(r.Holes), r.Seconds)
		if r.Changed > 0 {
			fmt.Fprintf(c.stdout, "%d names were removed or replaced meanwhile and are left out.\n", r.Changed)
		}
		switch {
		case r.Sound:
			fmt.Fprintf(c.stdout, "The volume %s is sound.\n", r.Volume)
		case !r.Complete:
			fmt.Fprintln(c.stdout, "Not everything was looked at.")
		}
	}
	if r.FaultCount > 0 {
		return exitWith(exitDamaged, fmt.Errorf("faults: %d; plain bytes that cannot be read: %d", r.FaultCount, r.FaultyBytes))
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
	case volumeread.NoOwner:
		return "What is in it can be read. Its owner and mode are lost: it belongs to root and nobody else; as root, chown and chmod it through the mount. If the machine has not just lost power, look who can write to the disk."
	case volumeread.Unreadable:
		return "The disk below does not give it. Look into the kernel's log (dmesg) and replace the disk; restore from a snapshot."
	default:
		return ""
	}
}
