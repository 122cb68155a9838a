package main

import (
	"context"
	"fmt"
	"sync"

	"go.uber.org/zap"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/metrics"
)

// lowerMessage is what people are told of a lower directory: why it is not well, and what to do. Nothing where it is.
func lowerMessage(h fs.LowerHealth, lower string) (cause, nextStep string) {
	switch h.State {
	case fs.LowerFull:
		return fmt.Sprintf("The disk of %s is full: new data is refused with ENOSPC; what is there is read and rewritten.", lower),
			fmt.Sprintf("Delete data in the workload, or make the disk larger. What is left, of space and of inodes: df -h %s; df -i %s", lower, lower)
	case fs.LowerMoved:
		return fmt.Sprintf("%s leads elsewhere than to the directory that is served. Its files go on being read and written, but a byokd that starts anew will not find them.", lower),
			fmt.Sprintf("Put the directory, or the mount of its disk, back at its path. What is there now: findmnt --target %s; ls -ld %s", lower, lower)
	case fs.LowerFailing:
		return fmt.Sprintf("Calls have failed on the disk of %s in the last minute (%v). Its filesystem answers.", lower, h.Err),
			"See what the kernel says of the disk: dmesg -T. byokd_fs_lower_errors_total counts the calls; if there are more of them, move to another disk."
	case fs.LowerReadOnly:
		return fmt.Sprintf("The disk of %s is read-only: what is there is read, every change fails with EROFS.", lower),
			fmt.Sprintf("See why: dmesg -T. After an error of its own a filesystem wants an fsck: stop the workload and byokd, check the disk, mount it anew, start both. What is mounted with which options: findmnt --target %s", lower)
	case fs.LowerRemoved:
		return fmt.Sprintf("%s has been deleted. No file can be made in the volume, and its files are gone when nobody has them open any more.", lower),
			"Copy what the workload still has open, if that is needed; then stop the workload and byokd, restore the directory from a snapshot, and start both."
	case fs.LowerBroken:
		return fmt.Sprintf("The disk of %s answers with an error (%v).", lower, h.Err),
			"See what the kernel says of the disk: dmesg -T. Then stop the workload and byokd, check the disk, mount it anew, start both."
	case fs.LowerSilent:
		return fmt.Sprintf("The disk of %s does not answer: calls on the volume hang.", lower),
			"See what the kernel says of the disk, or of the network to it: dmesg -T. When it answers again everything goes on by itself."
	}
	return "", ""
}

// watchLower has the page, the metrics and the log tell of the lower directory until stop is called. The volume serves.
func (v *volume) watchLower(ctx context.Context, f *fs.Filesystem) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		if err := f.WatchLower(ctx, v.tellLower); err != nil {
			v.log.Warn("the status does not tell how the lower directory is: it cannot be looked at", zap.String("lower", v.cfg.Volume.Lower), zap.Error(err))
		}
	})
	return func() { cancel(); watching.Wait() }
}

// stateOfLower is the state of a volume by its lower directory alone. It decides on readiness: docs/OPERATIONS.md, "The disk
// below", says why as it does.
func stateOfLower(s fs.LowerState) metrics.State {
	switch {
	case s == fs.LowerWell:
		return metrics.StateReady
	case s.Serves():
		return metrics.StateImpaired
	}
	return metrics.StateFailed
}

func (v *volume) tellLower(h fs.LowerHealth) {
	before := fs.LowerState(v.lower.Swap(uint32(h.State)))
	cause, nextStep := lowerMessage(h, v.cfg.Volume.Lower)
	switch stateOfLower(h.State) {
	case metrics.StateReady:
		v.resource.Serving()
	case metrics.StateImpaired:
		v.resource.Impaired(cause, nextStep)
	default:
		v.resource.Failed(cause, nextStep)
	}
	switch {
	case h.State != fs.LowerWell:
		v.log.Error("the lower directory is not well: "+cause, zap.Stringer("state", h.State), zap.String("next step", nextStep))
	case before != fs.LowerWell:
		v.log.Info("the lower directory is well again", zap.String("lower", v.cfg.Volume.Lower))
	}
}
