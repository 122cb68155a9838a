package fs

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Looking ahead. The length of a file is in its last block, so the first look at each
// of many files is a read from the disk, and who looks at them one after the other
// waits for one read after the other. So the last blocks of the files that will
// probably be next are asked for before: the rest of what is being listed, and,
// where files are looked up in the order in which they were made, the next ones.
//
// What is read ahead stays sealed, in the lower page cache: no key is needed, and
// nothing of it can leave.

const (
	// sightsInRow is how many cold files are looked up, each a little behind the one
	// before, until the next ones are read ahead.
	sightsInRow = 4
	// sightGap is how far apart, in inode numbers, they may be: calls of several
	// threads overtake each other, and some inodes are other files'.
	sightGap = 16
	// aheadAtOnce bounds how many files are read ahead beyond the last that was looked
	// up: what nobody asks for then costs that many reads, once.
	aheadAtOnce = 64
	// aheadListing bounds the lower directory, in bytes, that is listed for it.
	aheadListing = 512 << 10
)

// lookahead follows the lookups of cold files, one row of them at a time.
type lookahead struct {
	mu   sync.Mutex
	busy bool   // somebody reads ahead, and dir and files stay as they are; guarded by mu, as what follows
	dir  uint64 // node id of the directory
	last uint64 // inode number of the file that was looked up last
	row  int    // cold files that were looked up, each near the one before

	listed bool      // since the row began
	files  []sibling // of dir, by inode number; none where dir is too large
	next   int       // the first of files that is to be read ahead
}

// sibling is a regular file of a lower directory.
type sibling struct {
	ino  uint64
	name string // sealed
}

// sighted is told of a lookup for which the length of a file was read, and says
// whether to call advance, in the background.
func (a *lookahead) sighted(dir, ino uint64, cold bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if dir != a.dir || ino+sightGap < a.last || a.last+sightGap < ino {
		if a.busy {
			return false
		}
		a.dir, a.listed, a.files, a.next, a.row = dir, false, nil, 0, 0
	}
	a.last = ino
	if cold {
		a.row++
	}
	if a.busy || a.row < sightsInRow {
		return false
	}
	if a.listed {
		n := len(a.batch())
		if n == 0 || n < aheadAtOnce/2 && a.next+n < len(a.files) {
			return false
		}
	}
	a.busy = true
	return true
}

// batch returns the files to be read ahead now; mu is held.
func (a *lookahead) batch() []sibling {
	after, found := slices.BinarySearchFunc(a.files, a.last, func(s sibling, ino uint64) int { return cmp.Compare(s.ino, ino) })
	if found {
		after++
	}
	if a.next < after {
		a.next = after
	}
	return a.files[a.next:max(a.next, min(after+aheadAtOnce, len(a.files)))]
}

// advance reads the next files ahead. It is called by one at a time, whom sighted has
// told to.
func (f *Filesystem) advance(dir uint64) {
	a := &f.lookahead
	defer func() {
		a.mu.Lock()
		a.busy = false
		a.mu.Unlock()
	}()
	fd, err := f.nodes.ids.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return // removed meanwhile
	}
	defer unix.Close(fd)
	a.mu.Lock()
	listed := a.listed
	a.mu.Unlock()
	var files []sibling
	if !listed {
		files = siblings(fd)
	}
	a.mu.Lock()
	if !listed {
		a.listed, a.files = true, files
	}
	batch := a.batch()
	a.next += len(batch)
	a.mu.Unlock()
	for _, s := range batch {
		readAhead(fd, s.name)
	}
}

// siblings returns the regular files of a lower directory by inode number, none where
// it is too large.
func siblings(dir int) (files []sibling) {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil || st.Size > aheadListing {
		return nil
	}
	buf := make([]byte, direntBytes)
	for {
		got, err := ignoringEINTR(func() (int, error) { return unix.Getdents(dir, buf) })
		if err != nil || got == 0 {
			slices.SortFunc(files, func(a, b sibling) int { return cmp.Compare(a.ino, b.ino) })
			return files
		}
		for rest := buf[:got]; len(rest) > 0; {
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			if e.Mode == unix.S_IFREG {
				files = append(files, sibling{e.Ino, e.Name})
			}
		}
	}
}

// listedAhead reads the files ahead that are being listed, in a goroutine of its own.
type listedAhead struct {
	begun   bool
	enough  atomic.Bool
	reading sync.WaitGroup
}

// begin reads the files of entries ahead, as getdents64 gave them, but for the first.
func (a *listedAhead) begin(dir int, entries []byte) {
	a.begun = true
	a.enough.Store(false)
	a.reading.Go(func() {
		for first := true; len(entries) > 0 && !a.enough.Load(); first = false {
			var e fuse.DirEntry
			entries = entries[e.Parse(entries):]
			if e.Mode == unix.S_IFREG && !first {
				readAhead(dir, e.Name)
			}
		}
	})
}

// end stops it and waits for it.
func (a *listedAhead) end() {
	a.enough.Store(true)
	a.reading.Wait()
	a.begun = false
}

// readAhead has the kernel read the last block of a lower file, and does not wait
// for it. What cannot be read is left to who asks for it.
func readAhead(dir int, sealed string) {
	fd, err := unix.Openat(dir, sealed, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size >= block {
		_ = unix.Fadvise(fd, st.Size-st.Size%block-block, block, unix.FADV_WILLNEED)
	}
}
