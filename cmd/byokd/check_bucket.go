package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/byokd/byokd/objstore"
)

// maxCheckFaults bounds the faults that a report lists; all are counted.
const maxCheckFaults = 10_000

// bucketCheck is what `byokd check s3://BUCKET` alone knows.
type bucketCheck struct {
	region   string
	endpoint string
	current  bool
	workers  int

	report bucketCheckReport
}

// bucketCheckReport is what `byokd check s3://BUCKET -o json` prints.
type bucketCheckReport struct {
	Bucket     string        `json:"bucket"`
	Prefix     string        `json:"prefix"`
	Complete   bool          `json:"complete"` // everything was looked at
	Sound      bool          `json:"sound"`    // … and nothing was wrong
	Objects    int64         `json:"objects"`  // versions count each
	Bytes      int64         `json:"bytes"`    // plain bytes that were opened
	Sealed     int64         `json:"sealed_bytes"`
	Changed    int64         `json:"changed"` // deleted or replaced meanwhile, and left out
	FaultCount int64         `json:"fault_count"`
	Seconds    float64       `json:"seconds"`
	Faults     []objectFault `json:"faults"` // at most 10,000
}

// objectFault is the first fault of an object with what to do about it.
type objectFault struct {
	Key       string               `json:"key"`
	VersionID string               `json:"version_id,omitempty"`
	Part      int                  `json:"part,omitempty"` // from 1
	Segment   *int64               `json:"segment,omitempty"`
	Offset    int64                `json:"offset"` // plain bytes before it, all authentic
	Reason    objstore.CheckReason `json:"reason"`
	Detail    string               `json:"detail"`
	Next      string               `json:"next_step"`
}

func (b *bucketCheck) flags(flags *pflag.FlagSet) {
	flags.StringVar(&b.region, "region", "", "region of the bucket (default: AWS_REGION, else that of the key)")
	flags.StringVar(&b.endpoint, "endpoint", "", "address of S3 for a store other than AWS")
	flags.BoolVar(&b.current, "current", false, "of a bucket: leave out versions that are not the current ones")
	flags.IntVar(&b.workers, "workers", 8, "of a bucket: objects read at once")
}

func (c *checking) runBucket(ctx context.Context, bucket, prefix string) error {
	b := &c.bucket
	if err := checkWorkers(b.workers); err != nil {
		return err
	}
	if err := c.prepare(); err != nil {
		return err
	}
	up, err := c.from.upstream(ctx, bucket, b.region, b.endpoint)
	if err != nil {
		return err
	}
	began := time.Now()
	b.report = bucketCheckReport{Bucket: bucket, Prefix: prefix, Faults: []objectFault{}}
	options := objstore.CheckOptions{
		Upstream: up, Prefix: prefix, Current: b.current, Place: c.from.binding.Resource, Keys: &c.from, Workers: b.workers,
		Fault:    c.objectFault,
		Progress: func(p objstore.CheckProgress) { c.progress.tell(p.Sealed) },
	}
	_, size, err := objstore.CheckSize(ctx, options)
	if err != nil {
		return err
	}
	c.progress = newProgress(c.stderr, "checking", size)
	done, err := objstore.Check(ctx, options)
	c.progress.finish()
	r := &b.report
	r.Objects, r.Bytes, r.Sealed, r.Changed, r.FaultCount = done.Objects, done.Plain, done.Sealed, done.Changed, done.Faults
	r.Seconds = time.Since(began).Seconds()
	r.Complete = err == nil
	r.Sound = err == nil && done.Faults == 0
	return errors.Join(c.tellBucket(), err)
}

// checkWorkers bounds how many objects of a bucket are worked on at once.
func checkWorkers(n int) error {
	if n < 1 || n > 64 {
		return exitWith(exitUsage, fmt.Errorf("--workers %d: say 1 to 64", n))
	}
	return nil
}

// objectFault notes a fault, and prints it where a person reads along.
func (c *checking) objectFault(f objstore.CheckFault) {
	fault := objectFault{Key: f.Key, VersionID: f.VersionID, Part: f.Part, Offset: f.Offset, Reason: f.Reason, Detail: f.Err.Error(), Next: nextObjectStep(f.Reason)}
	if f.Segment >= 0 {
		fault.Segment = &f.Segment
	}
	if len(c.bucket.report.Faults) < maxCheckFaults {
		c.bucket.report.Faults = append(c.bucket.report.Faults, fault)
	}
	if c.output == "table" {
		c.progress.finish() // a half-written line is not written into
		fmt.Fprintln(c.stdout, fault.text())
	}
}

// tellBucket prints the report and gives the exit code.
func (c *checking) tellBucket() error {
	r := &c.bucket.report
	if c.output == "json" {
		encoder := json.NewEncoder(c.stdout)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(r); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(c.stdout, "%d objects; %s opened, in %.1f s\n", r.Objects, bytesInWords(r.Bytes), r.Seconds)
		if r.Changed > 0 {
			fmt.Fprintf(c.stdout, "%d objects were deleted or replaced meanwhile and are left out.\n", r.Changed)
		}
		switch {
		case r.Sound && r.Objects == 0:
			fmt.Fprintf(c.stdout, "There is no object in s3://%s/%s: nothing was looked at.\n", r.Bucket, r.Prefix)
		case r.Sound:
			fmt.Fprintf(c.stdout, "s3://%s/%s is sound.\n", r.Bucket, r.Prefix)
		case !r.Complete:
			fmt.Fprintln(c.stdout, "Not everything was looked at.")
		}
	}
	if r.FaultCount > 0 {
		return exitWith(exitDamaged, fmt.Errorf("%d of %d objects are not sound", r.FaultCount, r.Objects))
	}
	return nil
}

func (f objectFault) text() string {
	where := "the whole of it"
	switch {
	case f.Segment != nil:
		where = fmt.Sprintf("part %d, segment %d, plain offset %d", f.Part, *f.Segment, f.Offset)
	case f.Part > 0:
		where = fmt.Sprintf("part %d, plain offset %d", f.Part, f.Offset)
	}
	name := fmt.Sprintf("%q", f.Key)
	if f.VersionID != "" {
		name += " version " + f.VersionID
	}
	return fmt.Sprintf("%s: %s: %s (%s)\n  %s", name, where, f.Reason, f.Detail, f.Next)
}

// nextObjectStep says what to do about a fault.
func nextObjectStep(r objstore.CheckReason) string {
	switch r {
	case objstore.CheckDamaged:
		return "What lies before it can be read. Restore the object from an older version or a backup, and look who can write to the bucket."
	case objstore.CheckTruncated:
		return "Bytes or parts are missing at the end, as after a copy that was cut short. Copy it again, or restore an older version."
	case objstore.CheckMixed:
		return "Parts of other uploads or in another order were put together, which S3 does not do by itself: restore an older version, and look who can write to the bucket."
	case objstore.CheckMetadata:
		return "The bytes are sound, user metadata is not. Get them with byokd decrypt and upload them again, or restore an older version."
	case objstore.CheckNotSealed:
		return "byokd did not write it and does not serve it. byokd seal encrypts what was there before byokd; else look who writes around byokd."
	case objstore.CheckWrongKey:
		return "No KMS key that may be asked opens it in this bucket's context: give --key with the former key, or restore an older version if its header is damaged."
	case objstore.CheckUnknownVersion:
		return "Check it with the byokd that wrote it, or a newer one."
	case objstore.CheckUnreadable:
		return "S3 does not give it. With AccessDenied, byokd's role lacks s3:GetObject or s3:GetObjectVersion; with InvalidObjectState it is archived: restore it from the archive first."
	}
	return ""
}
