package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What grows with a volume, in short forms that hold the structure; how long each
// takes as it grows is measured by `make bench-scale`.

// counts returns how many nodes and idle entries there are.
func (v *volume) counts() (nodes, idle int) {
	t := v.fs.nodes
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byID), len(t.idle)
}

// limitNodes makes nodes idle from fewer on than usual.
func (v *volume) limitNodes(most int) {
	v.fs.nodes.mu.Lock()
	v.fs.nodes.most = most
	v.fs.nodes.mu.Unlock()
}

// TestManyInodes: of inodes that nobody uses there is but an entry, however many the
// kernel knows; they are all there when they are wanted, a freeze takes their pages,
// and when the kernel forgets them nothing is left.
func TestManyInodes(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const files, most = 3000, 200
		v.limitNodes(most)
		name := func(i int) string { return v.path(fmt.Sprint("f", i)) }
		for i := range files {
			if err := os.WriteFile(name(i), []byte(name(i)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		verify := func(when string) {
			t.Helper()
			for i := range files {
				if got, err := os.ReadFile(name(i)); err != nil || string(got) != name(i) {
					t.Fatalf("%s, %s: %q, %v", when, name(i), got, err)
				}
			}
		}
		verify("at once")
		nodes, idle := v.counts()
		if bound := most + files/10; nodes > bound || nodes+idle < files {
			t.Errorf("%d files: %d nodes, at most %d are meant to be, and %d idle", files, nodes, bound, idle)
		}
		if n := countBelow(t, v.lower); n > files/20 {
			t.Errorf("%d descriptors below for %d files that nobody has open", n, files)
		}
		v.freeze()
		await(t, func() string { return fmt.Sprintf("pages of %d idle inodes are left", len(v.fs.nodes.idleIDs(true))) },
			func() bool { return len(v.fs.nodes.idleIDs(true)) == 0 })
		v.thaw()
		verify("after a freeze")
		for i := 0; i < files; i += 2 {
			if err := os.Remove(name(i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
			lacks(t, "a kernel that can be told to forget: %v", err)
		}
		await(t, func() string { return fmt.Sprintf("the kernel still knows %d inodes", v.fs.Stats().Inodes) },
			func() bool { return v.fs.Stats().Inodes < files/10 })
		for i := 1; i < files; i += 2 {
			if got, err := os.ReadFile(name(i)); err != nil || string(got) != name(i) {
				t.Fatalf("forgotten, %s: %q, %v", name(i), got, err)
			}
		}
	})
}

// TestIdleAttributesFreeze: a freeze takes the attributes of idle inodes, too, which can
// be asked for by who has such a directory as its own, or has it open with O_PATH.
func TestIdleAttributesFreeze(t *testing.T) {
	v := newVolume(t, Options{})
	const dirs, files, most = 20, 300, 10
	v.limitNodes(most)
	var held [dirs]int
	for i := range held {
		name := v.path(fmt.Sprint("d", i))
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if held[i], err = unix.Open(name, unix.O_PATH, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(held[i])
	}
	for i := range files {
		if err := os.WriteFile(v.path(fmt.Sprint("f", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, idle := v.counts(); idle < files {
		t.Fatalf("%d idle inodes of %d", idle, dirs+files)
	}
	v.freeze()
	var thawed atomic.Bool
	var asking sync.WaitGroup
	for _, fd := range held {
		asking.Go(func() {
			var st unix.Stat_t
			for !thawed.Load() {
				if err := unix.Fstat(fd, &st); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Millisecond) // a call that is answered from memory is asked again
			}
		})
	}
	await(t, func() string {
		return fmt.Sprintf("of %d calls of fstat, %d wait while frozen", dirs, v.fs.Stats().Parked)
	},
		func() bool { return v.fs.Stats().Parked == dirs })
	thawed.Store(true)
	v.thaw()
	asking.Wait()
}

// TestIdleEntriesAreSmall: they hold nothing that the collector looks at, no more nodes
// stay than are meant to, however many inodes there are, and when most are forgotten
// their memory is given back.
func TestIdleEntriesAreSmall(t *testing.T) {
	table := newNodeTable(&tableIDs{}, -1)
	table.most = 1000
	for id := uint64(2); id < 100_000; id++ {
		n := table.use(id)
		n.lookups.Add(1)
		table.done(n)
	}
	if nodes := len(table.byID); nodes > 2*table.most || nodes+len(table.idle) != 99_999 {
		t.Errorf("%d nodes and %d idle entries of 99,999 inodes", nodes, len(table.idle))
	}
	if size := unsafe.Sizeof(idleNode{}); size > 8 {
		t.Errorf("an entry takes %d bytes", size)
	}
	for i := range reflect.TypeFor[idleNode]().NumField() {
		if f := reflect.TypeFor[idleNode]().Field(i); f.Type.Kind() > reflect.Complex128 {
			t.Errorf("%s is a %s: the collector would look at each entry", f.Name, f.Type.Kind())
		}
	}
	const left = 2000
	for id := uint64(2); id < 100_000-left; id++ {
		table.forget(id, 1, nil, 0)
	}
	if table.mostIdle > 100_000/16 {
		t.Errorf("%d idle entries are left of %d in a map that is as large as before", len(table.idle), table.mostIdle)
	}
	for id := uint64(100_000 - left); id < 100_000; id++ {
		if n, e := table.byID[id], table.idle[id]; n == nil && e.lookups() != 1 {
			t.Fatalf("inode %d is known %d times when others were forgotten, want once", id, e.lookups())
		}
		table.forget(id, 1, nil, 0)
	}
	if nodes := len(table.byID) + len(table.idle); nodes != 1 {
		t.Errorf("%d inodes are left when the kernel has forgotten all but the root", nodes)
	}
}

// countBelow counts our descriptors of files below dir.
func countBelow(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(target, dir) {
			count++
		}
	}
	return count
}

// TestManyOpenFiles: an open file costs one descriptor below, whatever is done with
// it; a bounded number has a second one for rewrites.
func TestManyOpenFiles(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const files = 2 * maxDirects
		const spare = 50 // directories, the reserve
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 3*files+1000 {
			lacks(t, "a higher limit of open files than %d, since mount and user are one process here", limit.Cur)
		}
		fds := make([]int, files)
		page := make([]byte, pageSize)
		for i := range fds {
			fd, err := unix.Open(v.path(fmt.Sprint(i)), unix.O_RDWR|unix.O_CREAT, 0o644)
			if err != nil {
				t.Fatal(err)
			}
			fds[i] = fd
		}
		for round := range 3 { // the first writes are to fresh blocks, the later ones replace them
			for i, fd := range fds {
				binary.BigEndian.PutUint64(page, uint64(round*files+i))
				_, err := unix.Pwrite(fd, page, 0)
				err = errors.Join(err, unix.Fchmod(fd, uint32(0o600+round)), unix.Fsetxattr(fd, "user.round", page[:8], 0))
				if err == nil && (round == 0 || i%4 == 0) {
					err = unix.Fdatasync(fd)
				}
				if err != nil {
					t.Fatalf("round %d, file %d: %v", round, i, err)
				}
			}
		}
		v.freeze() // flushes what is left
		v.thaw()
		if n := countBelow(t, v.lower); n > files+maxDirects+spare {
			t.Errorf("%d open files have %d descriptors below", files, n)
		}
		for i, fd := range fds {
			if _, err := unix.Pread(fd, page, 0); err != nil || binary.BigEndian.Uint64(page) != uint64(2*files+i) {
				t.Fatalf("file %d: %d, %v", i, binary.BigEndian.Uint64(page), err)
			}
			unix.Close(fd)
		}
		await(t, func() string { return fmt.Sprintf("%d descriptors are left below", countBelow(t, v.lower)) },
			func() bool { return countBelow(t, v.lower) <= spare })
		if n := v.fs.nodes.directs.Load(); n != 0 {
			t.Errorf("%d descriptors with O_DIRECT are counted, and none is open", n)
		}
	})
}

// TestTebibyte: a sparse file of 1 TiB takes the space of what is in it, is read and
// punched anywhere, and is the same after a restart.
func TestTebibyte(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const size, places, apart = int64(1) << 40, 256, int64(1) << 32
		fd, err := unix.Open(v.path("huge"), unix.O_RDWR|unix.O_CREAT, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		text := bytes.Repeat([]byte("far out "), pageSize/8)
		at := func(i int) int64 { return int64(i)*apart + int64(i)*3*pageSize }
		for i := range places {
			if _, err := unix.Pwrite(fd, text, at(i)); err != nil {
				t.Fatal(err)
			}
		}
		for i := 2; i < places; i += 2 {
			if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at(i)-pageSize, 3*pageSize); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(unix.Fsync(fd), unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
		v.remount()
		var st unix.Stat_t
		if err := unix.Stat(v.path("huge"), &st); err != nil || st.Size != size {
			t.Fatalf("%d bytes, %v", st.Size, err)
		}
		if kept := int64(places * 4 * pageSize); st.Blocks*512 > kept {
			t.Errorf("%d bytes of space for %d pages", st.Blocks*512, places)
		}
		if fd, err = unix.Open(v.path("huge"), unix.O_RDONLY, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		got := make([]byte, pageSize)
		for i := range places {
			want := text
			if i%2 == 0 && i > 0 {
				want = make([]byte, pageSize)
			}
			if n, err := unix.Pread(fd, got, at(i)); err != nil || n != pageSize || !bytes.Equal(got, want) {
				t.Fatalf("at %d: %d bytes, %q…, %v", at(i), n, got[:8], err)
			}
		}
	})
}

// TestManyWriters: 64 that write to one file and to files of their own at the same
// time lose nothing.
func TestManyWriters(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const writers, pages = 64, 24
		var all sync.WaitGroup
		failures := make([]error, writers)
		for w := range writers {
			all.Go(func() { failures[w] = writeBoth(v.path("shared"), v.path(fmt.Sprint("own", w)), w, writers, pages) })
		}
		all.Wait()
		if err := errors.Join(failures...); err != nil {
			t.Fatal(err)
		}
		v.remount()
		shared, err := os.ReadFile(v.path("shared"))
		if err != nil || len(shared) != writers*pages*pageSize {
			t.Fatalf("%d bytes, %v", len(shared), err)
		}
		for w := range writers {
			own, err := os.ReadFile(v.path(fmt.Sprint("own", w)))
			if err != nil || len(own) != pages*pageSize {
				t.Fatalf("writer %d: %d bytes, %v", w, len(own), err)
			}
			for p := range pages {
				want := uint64(w)<<32 | uint64(p)
				at := (p*writers + w) * pageSize
				if a, b := binary.BigEndian.Uint64(own[p*pageSize:]), binary.BigEndian.Uint64(shared[at:]); a != want || b != want {
					t.Fatalf("writer %d, page %d: %x and %x, want %x", w, p, a, b, want)
				}
			}
		}
	})
}

// writeBoth writes the pages of one writer, interleaved with the others' in the
// shared file.
func writeBoth(shared, own string, writer, writers, pages int) error {
	var fds [2]int
	for i, name := range []string{shared, own} {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT, 0o644)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	page := make([]byte, pageSize)
	for p := range pages {
		binary.BigEndian.PutUint64(page, uint64(writer)<<32|uint64(p))
		_, a := unix.Pwrite(fds[0], page, int64(p*writers+writer)*pageSize)
		_, b := unix.Pwrite(fds[1], page, int64(p)*pageSize)
		if p%4 == 3 {
			a = errors.Join(a, unix.Fdatasync(fds[0]))
		}
		if err := errors.Join(a, b, unix.Fdatasync(fds[1])); err != nil {
			return fmt.Errorf("writer %d, page %d: %w", writer, p, err)
		}
	}
	return nil
}
