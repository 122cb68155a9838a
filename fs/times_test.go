package fs

import (
	"os"
	"testing"

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
