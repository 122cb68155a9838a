package fs

import (
	"os"
	"os/exec"
	"testing"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestTimesSurviveOurOwnReads: times that were set stay set though the daemon
// reads the lower inode afterwards, for the size of a file it meets again or for
// what a caller reads; the lower filesystem would update an atime that is a day
// old.
func TestTimesSurviveOurOwnReads(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		writePattern(t, v.path("file"), 10_000)
		if err := os.Symlink("file", v.path("link")); err != nil {
			t.Fatal(err)
		}
		want := []unix.Timespec{{Sec: 505347945, Nsec: 492522219}, {Sec: -461118687, Nsec: 739067241}}
		for _, name := range []string{"file", "link"} {
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, v.path(name), want, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				t.Fatal(err)
			}
		}
		for _, look := range []string{"at once", "after a remount"} {
			for _, name := range []string{"file", "link"} {
				for range 2 {
					var st unix.Stat_t
					if err := unix.Lstat(v.path(name), &st); err != nil {
						t.Fatal(err)
					}
					if st.Atim != want[0] || st.Mtim != want[1] {
						t.Errorf("%s, %s: atime %v, mtime %v, want %v", name, look, st.Atim, st.Mtim, want)
					}
				}
			}
			if _, err := os.ReadFile(v.path("file")); err != nil { // and its atime stays, as on a mount with noatime
				t.Fatal(err)
			}
			v.remount()
		}
	})
}

// TestFrozenKillAfterFlush: a caller that has changed a file's times before it began to wait
// can be killed also when the kernel has begun to write those back, which it does by itself
// after some half a minute.
func TestFrozenKillAfterFlush(t *testing.T) {
	for _, ownership := range []Ownership{OwnershipLower, OwnershipSealed} {
		t.Run(ownership.String(), func(t *testing.T) {
			t.Setenv(ownershipVariable, ownership.String())
			v := newVolume(t, Options{})
			writePattern(t, v.path("file"), 16*pageSize)
			p := newVictim(t, "allocate", v.mount, v.path("file"))
			v.freeze()
			p.start()
			p.hangs()
			flush := exec.Command("sync", "-f", v.mount)
			if err := flush.Start(); err != nil {
				t.Fatal(err)
			}
			flushed := make(chan error, 1)
			go func() { flushed <- flush.Wait() }()
			select {
			case err := <-flushed:
				if err != nil {
					t.Errorf("the kernel's flush of times: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Error("the kernel's flush of times hangs")
			}
			if err := p.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { _ = p.cmd.Wait(); close(ended) }()
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				t.Errorf("a killed caller survives for 10 s, standing in %q", p.wchan())
			}
			v.thaw()
		})
	}
}

// TestFrozenTimes: a caller who sets mtime alone waits while frozen, whether he has the file open for writing or not, although
// the kernel's write-back of times, which goes on, says almost the same to us; and it is done after the thaw.
func TestFrozenTimes(t *testing.T) {
	v := newVolume(t, Options{})
	writePattern(t, v.path("file"), pageSize)
	f, err := os.OpenFile(v.path("file"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, flags := range []int{os.O_RDWR, os.O_RDONLY} {
		if flags == os.O_RDONLY {
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if f, err = os.Open(v.path("file")); err != nil {
				t.Fatal(err)
			}
		}
		v.freeze()
		set := make(chan error, 1)
		want := unix.Timespec{Sec: int64(1_000_000_000 + flags)}
		go func() {
			set <- unix.UtimesNanoAt(int(f.Fd()), "", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, want}, unix.AT_EMPTY_PATH)
		}()
		await(t, func() string { return "utimensat does not wait" }, func() bool { return v.fs.Stats().Parked > 0 })
		select {
		case err := <-set:
			t.Errorf("utimensat while frozen: %v", err)
		default:
		}
		v.thaw()
		var st unix.Stat_t
		if err := <-set; err != nil {
			t.Errorf("utimensat after the thaw: %v", err)
		}
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mtim != want {
			t.Errorf("mtime is %v after the thaw (%v), want %v", st.Mtim, err, want)
		}
	}
}

// TestFlushesTimes: what tells the kernel's write-back of times from a caller's wish.
func TestFlushesTimes(t *testing.T) {
	const mtime, handle = fuse.FATTR_MTIME | fuse.FATTR_CTIME, fuse.FATTR_FH
	f := &Filesystem{options: Options{Cache: Writeback}}
	f.frozenAt.Store(time.Unix(1000, 500).UnixNano())
	for _, c := range []struct {
		name  string
		valid uint32
		sec   uint64
		nsec  uint32
		want  bool
	}{
		{"open for writing", mtime | handle, 2000, 0, true},
		{"not open, changed before", mtime, 1000, 499, true},
		{"not open, changed long before", mtime, 1, 0, true},
		{"not open, changed since", mtime, 1000, 500, false},
		{"with atime", mtime | handle | fuse.FATTR_ATIME, 1, 0, false},
		{"with a mode", mtime | handle | fuse.FATTR_MODE, 1, 0, false},
		{"without ctime", fuse.FATTR_MTIME | handle, 1, 0, false},
	} {
		in := fuse.SetAttrIn{}
		in.Valid, in.Ctime, in.Ctimensec = c.valid, c.sec, c.nsec
		request := unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in))
		call := &call{fs: f}
		if got := call.flushesTimes(request); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if call.flushesTimes(request[:len(request)-1]) {
			t.Errorf("%s: a request that is cut short passes", c.name)
		}
	}
	f.options.Cache = Writethrough
	in := fuse.SetAttrIn{}
	in.Valid = mtime | handle
	if (&call{fs: f}).flushesTimes(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in))) {
		t.Error("without a writeback cache the kernel writes no times back")
	}
}
