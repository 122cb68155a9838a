package fs

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSighted: a row of cold files near each other has the next ones read ahead, again
// when half of them were looked up; nothing else has.
func TestSighted(t *testing.T) {
	const dir, other = 7, 8
	var a lookahead
	row := func(dir, from, step uint64, n int, cold bool) (told int) {
		for i := range n {
			if a.sighted(dir, from+uint64(i)*step, cold) {
				told++
			}
		}
		return told
	}
	for what, told := range map[string]int{
		"warm files":              row(dir, 1000, 1, 100, false),
		"too few":                 row(dir, 2000, 1, sightsInRow-1, true),
		"files far apart":         row(dir, 3000, sightGap+1, 100, true),
		"files far apart, behind": row(dir, 9000, ^uint64(sightGap), 100, true),
	} {
		if told != 0 {
			t.Errorf("%s: told to read ahead %d times", what, told)
		}
	}
	for i := range uint64(100) { // in two directories in turns
		if a.sighted(dir, 4000+i, true) || a.sighted(other, 4000+i, true) {
			t.Fatal("told to read ahead by files of two directories")
		}
	}

	if told := row(dir, 5000, 3, sightsInRow, true); told != 1 {
		t.Fatalf("told to read ahead %d times by a row", told)
	}
	if row(dir, 5000+3*sightsInRow, 3, 10, true) != 0 || row(other, 5000, 1, 10, true) != 0 {
		t.Fatal("told to read ahead while somebody does")
	}
	a.listed = true
	for ino := uint64(1); ino < 20_000; ino += 3 {
		a.files = append(a.files, sibling{ino: ino})
	}
	for from := a.last; ; {
		batch := a.batch()
		a.next += len(batch)
		a.busy = false
		if last := a.files[a.next-1].ino; last < from || last > a.last+3*aheadAtOnce {
			t.Fatalf("read ahead to %d, and %d was looked up", last, a.last)
		}
		for from += 3; !a.sighted(dir, from, false); from += 3 {
			if from > a.files[a.next-1].ino {
				if a.next != len(a.files) {
					t.Fatalf("%d was not read ahead", from)
				}
				return
			}
		}
	}
}

// TestLookAhead: lookups of cold files are noticed, and the files beside them come
// into the lower cache; so do the files behind one that is being listed.
func TestLookAhead(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const files = 40
		for i := range files {
			if err := os.WriteFile(v.path(fmt.Sprint(i)), make([]byte, 5000), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		v.remount()
		lower := v.lowerFiles()
		forgetBelow(t, lower)

		a, noticed := &v.fs.lookahead, 0
		for i := range files {
			if _, err := os.Lstat(v.path(fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
			a.mu.Lock()
			noticed = max(noticed, a.row) // inode numbers may jump, and a row ends
			a.mu.Unlock()
		}
		if noticed == 0 {
			t.Error("none of the lookups was noticed to be cold")
		}

		v.remount()
		dir, err := os.Open(v.lower)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		all := siblings(int(dir.Fd()))
		if len(all) < files || !slices.IsSortedFunc(all, func(a, b sibling) int { return int(int64(a.ino) - int64(b.ino)) }) {
			t.Fatalf("siblings: %v", all)
		}
		a = &v.fs.lookahead
		forgetBelow(t, lower)
		a.dir, a.busy = v.fs.nodes.root.id, true
		v.fs.advance(a.dir)
		awaitBelow(t, lower, 0)
		if a.busy {
			t.Error("whoever reads ahead stays busy")
		}

		forgetBelow(t, lower)
		buf := make([]byte, direntBytes)
		if _, err := dir.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
		got, err := unix.Getdents(int(dir.Fd()), buf)
		if err != nil {
			t.Fatal(err)
		}
		var listed listedAhead
		listed.begin(int(dir.Fd()), buf[:got])
		awaitBelow(t, lower, 1)
		listed.end()
	})
}

// forgetBelow has the kernel drop the pages of lower files.
func forgetBelow(t *testing.T, paths []string) {
	t.Helper()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		if cachedBelow(t, path) {
			lacks(t, "a filesystem whose pages can be dropped")
		}
	}
}

// cachedBelow reports whether the last block of a lower file is in the kernel's cache.
func cachedBelow(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var pages unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(st.Size() - block), Len: block}, &pages, 0); err != nil {
		t.Fatal(err)
	}
	return pages.Cache > 0
}

// awaitBelow waits until the last blocks of all but a few of the files are cached.
func awaitBelow(t *testing.T, paths []string, but int) {
	t.Helper()
	count := func() (n int) {
		for _, path := range paths {
			if cachedBelow(t, path) {
				n++
			}
		}
		return n
	}
	await(t, func() string { return fmt.Sprintf("%d of %d files were read ahead", count(), len(paths)) },
		func() bool { return count() >= len(paths)-but })
}
