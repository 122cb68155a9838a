package keyguard

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// awaitSignals waits until no thread of the process has a SIGURG pending.
//
// A signal that comes in the midst of a cipher makes the kernel store the vector
// registers, and with them round keys, on the thread's signal stack. The
// collector knows which threads that befell and sends each a SIGURG that does
// nothing but overwrite it; it does not wait for its delivery. A thread in a
// system call that cannot be interrupted (the lower filesystem's fsync) takes
// it milliseconds or seconds later: the keys are gone from memory only then.
//
// Threads named HangingThread are left out: they have overwritten their signal
// stack themselves before a call that may hang for as long as the freeze lasts.
func awaitSignals(ctx context.Context) error {
	const first, last = time.Millisecond, 50 * time.Millisecond
	for pause := first; signalPending(); pause = min(2*pause, last) {
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
	return nil
}

// signalPending reports whether some thread has yet to take a SIGURG. Where
// /proc is not mounted nothing can be seen, and nothing is waited for.
func signalPending() bool {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return false
	}
	for _, thread := range threads {
		status, err := os.ReadFile("/proc/self/task/" + thread.Name() + "/status")
		if err == nil && pendingSIGURG(status) { // a thread may have ended
			return true
		}
	}
	return false
}

// pendingSIGURG reads a thread's status: proc_pid_status(5).
func pendingSIGURG(status []byte) bool {
	pending := false
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":\t"))
		switch string(name) {
		case "Name":
			if string(value) == HangingThread {
				return false
			}
		case "SigPnd":
			set, err := strconv.ParseUint(string(value), 16, 64)
			pending = err == nil && set&(1<<(unix.SIGURG-1)) != 0
		}
	}
	return pending
}
