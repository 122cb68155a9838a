package main

import (
	"context"

	"github.com/byokd/byokd/internal/volumeread"
)

// volumeCheck reads every block of one volume and makes the report.
type volumeCheck struct {
	volume *volumeread.Volume
	report checkReport
	done   func(bytes int64) // told often, of plain bytes
	seen   map[uint64]bool   // inodes with several names that were read
}

func newVolumeCheck(lower string, v *volumeread.Volume, done func(bytes int64)) *volumeCheck {
	return &volumeCheck{volume: v, done: done, seen: map[uint64]bool{},
		report: checkReport{Lower: lower, Volume: v.Header().Volume.String(), KeyARN: v.Header().KeyARN, Faults: []checkFault{}}}
}

// run walks the volume. The report is also there beside an error.
func (c *volumeCheck) run(ctx context.Context) error {
	err := c.volume.Walk(ctx, c)
	c.report.Changed = c.volume.Changed()
	c.report.Complete = err == nil
	c.report.Sound = err == nil && c.report.FaultCount == 0
	return err
}

// Enter implements volumeread.Visitor.
func (c *volumeCheck) Enter(*volumeread.Entry) error { c.report.Directories++; return nil }

// Leave implements volumeread.Visitor.
func (c *volumeCheck) Leave(*volumeread.Entry) error { return nil }

// Other implements volumeread.Visitor.
func (c *volumeCheck) Other(*volumeread.Entry) error { c.report.Others++; return nil }

// File implements volumeread.Visitor: it reads the file once, by whichever name comes first.
func (c *volumeCheck) File(e *volumeread.Entry, f *volumeread.File) error {
	if e.Stat.Nlink > 1 {
		if c.seen[e.Stat.Ino] {
			return nil
		}
		c.seen[e.Stat.Ino] = true
	}
	c.report.Files++
	var opened int64
	faulty := c.report.FaultyBytes
	_, err := f.Blocks(func(_ int64, plain []byte) error {
		opened += int64(len(plain))
		c.report.Bytes += int64(len(plain))
		c.done(c.report.Bytes + c.report.Holes)
		return nil
	})
	c.report.Holes += max(0, f.Size()-opened-(c.report.FaultyBytes-faulty))
	return err
}

// Fault implements volumeread.Visitor. Blocks that follow one another are one fault.
func (c *volumeCheck) Fault(f volumeread.Fault) error {
	c.report.FaultyBytes += f.Length
	if n := len(c.report.Faults); n > 0 && f.Length > 0 {
		last := &c.report.Faults[n-1]
		if last.Lower == f.Lower && last.Reason == f.Reason && last.Length > 0 && last.Offset+last.Length == f.Offset {
			last.Length += f.Length
			return nil
		}
	}
	c.report.FaultCount++
	if len(c.report.Faults) < maxCheckFaults {
		c.report.Faults = append(c.report.Faults, checkFault{f, nextStep(f.Reason)})
	}
	return nil
}
