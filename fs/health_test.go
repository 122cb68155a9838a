package fs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watched is what WatchLower tells.
type watched struct {
	t    *testing.T
	told chan LowerHealth
	last LowerHealth
}

func watchLower(t *testing.T, v *volume) *watched {
	t.Helper()
	w := &watched{t: t, told: make(chan LowerHealth, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- v.fs.WatchLower(ctx, func(h LowerHealth) { w.told <- h }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

// becomes waits until a state is told.
func (w *watched) becomes(want LowerState) LowerHealth {
	w.t.Helper()
	limit := time.After(20 * time.Second)
	for w.last.State != want || len(w.told) > 0 {
		select {
		case w.last = <-w.told:
			w.t.Log(w.last)
		case <-limit:
			w.t.Fatalf("the lower directory is %v, want %v", w.last, want)
		}
	}
	return w.last
}

// first waits for what is told first, which must be want.
func (w *watched) first(want LowerState) {
	w.t.Helper()
	if w.last = <-w.told; w.last.State != want {
		w.t.Fatalf("the lower directory is %v, want %v", w.last, want)
	}
}

// TestHealthOfFullDisk fills a real filesystem, and frees it.
func TestHealthOfFullDisk(t *testing.T) {
	v := newVolumeIn(t, newDisk(t, 64, 80, "", ""), Options{})
	w := watchLower(t, v)
	w.first(LowerWell)
	full := newVictim(t, "fill", v.mount, v.path("fills"))
	full.start()
	full.finishes(60 * time.Second)
	w.becomes(LowerFull)
	if v.fs.LowerFailures()[2] == 0 {
		t.Errorf("no ENOSPC was counted: %v", v.fs.LowerFailures())
	}
	if err := os.Remove(v.path("fills")); err != nil {
		t.Fatal(err)
	}
	await(t, func() string { return "the reserve is not filled" }, v.fs.reserve.refilled)
	v.fs.failures.space.Store(time.Now().Add(-lowerRemembers).UnixNano()) // a minute later
	w.becomes(LowerWell)
}

// TestHealthTurnedReadOnly: an ext4 that has met an error in itself takes no more
// writes. It says so in its flags or, since Linux 6.15, only to who writes.
func TestHealthTurnedReadOnly(t *testing.T) {
	disk := newDisk(t, 64, 80, "", ",errors=remount-ro")
	v := newVolumeIn(t, disk, Options{Cache: Writethrough})
	w, err := newLowerWatch(v.fs)
	if err != nil {
		t.Fatal(err)
	}
	defer w.leave()
	if h := w.health(t.Context()); h.State != LowerWell {
		t.Fatalf("before: %v", h)
	}
	if err := os.WriteFile(v.path("before"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	triggerError(t, disk)
	if err := os.WriteFile(v.path("after"), []byte("lost"), 0o600); !errors.Is(err, unix.EROFS) {
		t.Fatalf("a write to a filesystem that has met an error: %v", err)
	}
	if h := w.health(t.Context()); h.State != LowerReadOnly || v.fs.LowerFailures()[1] == 0 {
		t.Errorf("%v, counted %v", h, v.fs.LowerFailures())
	}
	v.fs.failures.fault.Store(time.Now().Add(-lowerRemembers).UnixNano())
	for range 2 {
		if h := w.health(t.Context()); h.State != LowerReadOnly {
			t.Errorf("when nobody has written for a minute: %v", h)
		}
	}
	readsOn(t, v.path("before"))
}

// readsOn reads a file of a filesystem that takes no writes, and is refused each kind of write.
func readsOn(t *testing.T, file string) {
	t.Helper()
	if got, err := os.ReadFile(file); err != nil || string(got) != "kept" {
		t.Errorf("what is there cannot be read: %q, %v", got, err)
	}
	if f, err := os.OpenFile(file, os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("opened for writing: %v", err)
		f.Close()
	}
	for what, err := range map[string]error{"truncate": os.Truncate(file, 1), "chmod": os.Chmod(file, 0o644), "remove": os.Remove(file)} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// triggerError has the ext4 of a mount meet an error.
func triggerError(t *testing.T, disk string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(disk, &st); err != nil {
		t.Fatal(err)
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "trigger_fs_error"), []byte("byokd"), 0); err != nil {
		t.Skipf("no ext4 can be made to meet an error: %v", err)
	}
}

// TestHealthMountedReadOnly: what is read-only from the start is told first.
func TestHealthMountedReadOnly(t *testing.T) {
	disk := newDisk(t, 64, 80, "", "")
	v := newVolumeIn(t, disk, Options{})
	if err := os.WriteFile(v.path("before"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	v.close()
	v.start()
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	v.open()
	watchLower(t, v).first(LowerReadOnly)
	readsOn(t, v.path("before"))
}

// TestHealthPulledAway deletes the lower directory, and before renames it.
func TestHealthPulledAway(t *testing.T) {
	v := newVolume(t, Options{})
	w := watchLower(t, v)
	w.first(LowerWell)
	if err := os.Rename(v.lower, v.lower+".elsewhere"); err != nil {
		t.Fatal(err)
	}
	w.becomes(LowerMoved)
	if err := os.WriteFile(v.path("file"), []byte("kept"), 0o600); err != nil {
		t.Errorf("the mount does not serve from a directory that was renamed: %v", err)
	}
	if err := os.Rename(v.lower+".elsewhere", v.lower); err != nil {
		t.Fatal(err)
	}
	w.becomes(LowerWell)
	if err := os.RemoveAll(v.lower); err != nil {
		t.Fatal(err)
	}
	w.becomes(LowerRemoved)
}

// TestHealthFaults has calls below fail, then the looks, and has one hang.
func TestHealthFaults(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	fault := make(chan func(op string) error, 1)
	fault <- func(string) error { return nil }
	v.setFault(func(op string, length int) (int, error) {
		f := <-fault
		fault <- f
		return length, f(op)
	})
	arm := func(op string, err error) {
		<-fault
		fault <- func(got string) error {
			if got != op {
				return nil
			}
			return err
		}
	}
	w := watchLower(t, v)
	w.first(LowerWell)
	arm("write", unix.EIO)
	if err := os.WriteFile(v.path("file"), []byte("lost"), 0o600); !errors.Is(err, unix.EIO) {
		t.Fatalf("the fault is not in the way: %v", err)
	}
	if h := w.becomes(LowerFailing); h.Err != unix.EIO || v.fs.LowerFailures()[0] == 0 {
		t.Errorf("%v, counted %v", h, v.fs.LowerFailures())
	}
	arm("none", nil)
	v.fs.failures.fault.Store(time.Now().Add(-lowerRemembers).UnixNano()) // a minute later
	w.becomes(LowerWell)
	arm("look", unix.ESTALE)
	if h := w.becomes(LowerBroken); h.Err != unix.ESTALE {
		t.Errorf("%v", h)
	}
	arm("none", nil)
	w.becomes(LowerWell)
	hang := make(chan struct{})
	<-fault
	fault <- func(op string) error {
		if op == "look" {
			<-hang
		}
		return nil
	}
	w.becomes(LowerSilent)
	close(hang)
	w.becomes(LowerWell)
}

// TestHealthDamageIsNotItsFault: a block that was tampered with is counted apart.
func TestHealthDamageIsNotItsFault(t *testing.T) {
	var l lowerFailures
	l.note(fmt.Errorf("block 3: %w", ErrNoFileID))
	l.note(unix.ENOENT)
	l.note(nil)
	l.note(fmt.Errorf("pwrite: %w", unix.EDQUOT))
	if recent(&l.fault) || !recent(&l.space) || l.counts[3].Load() != 1 {
		t.Errorf("EDQUOT counted %d, space %v, fault %v", l.counts[3].Load(), recent(&l.space), recent(&l.fault))
	}
	for i := range l.counts {
		if i != 3 && l.counts[i].Load() != 0 {
			t.Errorf("%v was counted", LowerErrors()[i])
		}
	}
	for _, s := range LowerStates() {
		if s.String() == "" || strings.Contains(s.String(), " ") || s.Serves() != (s <= LowerFailing) {
			t.Errorf("%d is %q, serves: %v", s, s, s.Serves())
		}
	}
}
