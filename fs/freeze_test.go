package fs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sort"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writePattern fills a file with bytes that depend on their place.
func writePattern(t testing.TB, path string, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i*7 + i>>12)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return data
}

// ofOtherTests are victims that do more than one call.
var ofOtherTests = []string{"many-stats", "sync-many", "read-many", "read-forever", "write-gigabyte", "make-open", "differential", "semantics", "append-lines", "try-locks", "fill", "fill-verify", "make-sparse", "remains", "failing-sync", "dirty-mappings"}

func operations() []string {
	ops := slices.Collect(maps.Keys(calls))
	for op := range victimOps {
		if !slices.Contains(ofOtherTests, op) {
			ops = append(ops, op)
		}
	}
	sort.Strings(ops)
	return ops
}

// thawBound is promise 2 of the design.
const thawBound = 2 * time.Second

// frozenForEnv is for how long the matrix stays frozen, beside the moment that it
// takes to see all calls hang: a Go duration, such as 5m.
const frozenForEnv = "BYOKD_FROZEN_FOR"

// TestFreezeMatrix: every kind of call hangs while frozen, on what was cached,
// mapped and open before, and goes on by itself afterwards, with the right
// result.
func TestFreezeMatrix(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		var victims []*victim
		for _, op := range operations() {
			file := v.path("file-" + op)
			writePattern(t, file, 16*pageSize)
			if err := os.Mkdir(v.path("dir-"+op), 0o755); err != nil {
				t.Fatal(err)
			}
			victims = append(victims, newVictim(t, op, v.path("dir-"+op), file))
		}
		v.freeze()
		for _, p := range victims {
			p.start()
		}
		for _, p := range victims {
			p.hangs()
		}
		if s := v.fs.Stats(); s.Parked == 0 {
			t.Error("no call is parked")
		}
		if long, err := time.ParseDuration(os.Getenv(frozenForEnv)); err == nil {
			time.Sleep(long) // that nothing happens for so long is the test
		}
		v.kms.disable(false)
		thawed := time.Now()
		for _, p := range victims {
			word := p.finishes(10 * time.Second)
			if took := time.Since(thawed); took > thawBound {
				t.Errorf("%s went on %v after the key came back, promised %v", p.op, took, thawBound)
			}
			t.Logf("%s: %s", p.op, word)
		}
	})
}

// TestFrozenRoot: the root is answered for while frozen, and with the owner and mode
// that it was given last. With older ones the kernel would refuse callers who are to
// wait.
func TestFrozenRoot(t *testing.T) {
	for _, ownership := range []Ownership{OwnershipLower, OwnershipSealed} {
		t.Run(ownership.String(), func(t *testing.T) {
			t.Setenv(ownershipVariable, ownership.String())
			v := newVolume(t, Options{})
			const uid, gid, mode = 1000, 2000, 0o2750
			if err := errors.Join(unix.Chown(v.mount, uid, gid), unix.Chmod(v.mount, mode)); err != nil {
				t.Fatal(err)
			}
			check := func(when string) {
				t.Helper()
				v.freeze()
				var st unix.Stat_t
				if err := unix.Stat(v.mount, &st); err != nil {
					t.Fatal(err)
				}
				if st.Uid != uid || st.Gid != gid || st.Mode&0o7777 != mode {
					t.Errorf("%s: the root belongs to %d:%d with mode %o, was given to %d:%d with %o", when, st.Uid, st.Gid, st.Mode&0o7777, uid, gid, mode)
				}
				v.thaw()
			}
			check("just given")
			v.remount()
			check("before anybody has asked")
		})
	}
}

// TestFrozenKill: a frozen caller can be killed, and a signal it handles does
// not disturb it.
func TestFrozenKill(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		var victims []*victim
		for _, op := range operations() {
			file := v.path("file-" + op)
			writePattern(t, file, 16*pageSize)
			if err := os.Mkdir(v.path("dir-"+op), 0o755); err != nil {
				t.Fatal(err)
			}
			victims = append(victims, newVictim(t, op, v.path("dir-"+op), file))
		}
		v.freeze()
		for _, p := range victims {
			p.start()
		}
		for _, p := range victims {
			p.hangs()
			if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			p.hangs()
		}
		for _, p := range victims {
			if err := p.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range victims {
			ended := make(chan struct{})
			go func() { _ = p.cmd.Wait(); close(ended) }()
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				t.Errorf("%s survives SIGKILL for 10 s, standing in %q", p.op, p.wchan())
			}
		}
		v.thaw()
	})
}

// cachedPages asks the kernel what it holds of an open file, without asking us:
// cachestat(2).
func cachedPages(t testing.TB, fd int) (cached, dirty uint64) {
	t.Helper()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Fatal(err)
	}
	return stat.Cache, stat.Dirty + stat.Writeback
}

const mappedFiles = 200

// dirtyMappings makes files dirty by their mappings and by writes, and stays; in a
// process of its own, since a fault that waits for this one's answer holds the
// lock that this one's next allocation needs.
func dirtyMappings(dir, _ string) (func() (string, error), error) {
	return func() (string, error) {
		for i := range mappedFiles {
			fd, err := unix.Open(fmt.Sprint(dir, "/file", i), unix.O_RDWR, 0)
			if err != nil {
				return "", err
			}
			m, err := unix.Mmap(fd, 0, 4*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return "", err
			}
			m[2*pageSize] = 'D'
			if _, err := unix.Pwrite(fd, []byte("dirty"), 100); err != nil {
				return "", err
			}
		}
		fmt.Println("dirty")
		_, err := bufio.NewReader(os.Stdin).ReadString('\n') // never comes
		return "", err
	}, nil
}

// TestFreezeLeavesNoPage: what was cached, mapped or dirty is gone from the
// kernel's cache, and what was dirty is not lost.
func TestFreezeLeavesNoPage(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		var fds []int
		var want [][]byte
		for i := range mappedFiles {
			path := v.path(fmt.Sprint("file", i))
			data := writePattern(t, path, 4*pageSize+i)
			fd, err := unix.Open(path, unix.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			data[2*pageSize] = 'D'
			copy(data[100:], "dirty")
			fds, want = append(fds, fd), append(want, data)
		}
		p := newVictim(t, "dirty-mappings", v.mount, "")
		p.start()
		if line := p.line(20 * time.Second); line != "dirty" {
			t.Fatal(line)
		}
		v.freeze()
		for i, fd := range fds {
			if cached, dirty := cachedPages(t, fd); cached != 0 || dirty != 0 {
				t.Errorf("file %d: %d pages cached, %d dirty while frozen", i, cached, dirty)
			}
		}
		v.thaw()
		for i, fd := range fds {
			got := make([]byte, len(want[i]))
			if _, err := unix.Pread(fd, got, 0); err != nil || !bytes.Equal(got, want[i]) {
				t.Errorf("file %d after the thaw: equal %v, %v", i, bytes.Equal(got, want[i]), err)
			}
		}
	})
}

// readForever reads a large file here and there: some of its READs are at the
// gate in the middle of the file when it closes.
func readForever(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		b := make([]byte, 64<<10)
		for {
			off := rand.Int64N(60<<20) &^ (pageSize - 1)
			if n, err := unix.Pread(fd, b, off); err != nil || n != len(b) {
				return "", fmt.Errorf("read %d at %d: %v", n, off, err)
			}
			if err := unix.Fadvise(fd, off, 64<<10, unix.FADV_DONTNEED); err != nil {
				return "", err
			}
		}
	}, nil
}

func writeGigabyte(_, file string) (func() (string, error), error) {
	fd, err := unix.Open(file, unix.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	b := page(gigabyte)
	for i := 0; i < len(b); i += pageSize {
		b[i] = byte(i >> 12)
	}
	return func() (string, error) {
		for done := 0; done < len(b); {
			n, err := unix.Pwrite(fd, b[done:], int64(done))
			if err != nil {
				return "", err
			}
			done += n
		}
		return "written", nil
	}, nil
}

const gigabyte = 1 << 30

// TestFreezeUnderReaders: READs that wait in the middle of a file hold their
// pages locked; everything around them is dropped all the same.
func TestFreezeUnderReaders(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		const size = 64 << 20
		writePattern(t, v.path("large"), size)
		fd, err := unix.Open(v.path("large"), unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		var readers []*victim
		for range 4 {
			p := newVictim(t, "read-forever", v.mount, v.path("large"))
			p.start()
			readers = append(readers, p)
		}
		for round := range 10 {
			// Something cached behind the readers.
			if _, err := unix.Pread(fd, make([]byte, 1<<20), 60<<20); err != nil {
				t.Fatal(err)
			}
			v.freeze()
			for _, p := range readers {
				p.hangs()
			}
			locked := uint64(0)
			v.fs.parking.mu.Lock()
			for p := range v.fs.parking.parked {
				locked += uint64((p.size + pageSize - 1) / pageSize)
			}
			v.fs.parking.mu.Unlock()
			if cached, _ := cachedPages(t, fd); cached > locked {
				t.Errorf("round %d: %d pages cached while frozen, %d of them held by waiting READs", round, cached, locked)
			}
			v.thaw()
		}
	})
}

// TestFreezeDuringGigabyteWrite: a freeze in the middle of one large write(2)
// keeps its bound, and the write completes after the thaw.
func TestFreezeDuringGigabyteWrite(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		path := v.path("gigabyte")
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		p := newVictim(t, "write-gigabyte", v.mount, path)
		before := v.fs.Stats().Requests
		p.start()
		for v.fs.Stats().Requests < before+20 { // it is in the middle of it
			select {
			case line := <-p.lines:
				t.Fatalf("%q before the freeze", line)
			case <-time.After(time.Millisecond):
			}
		}
		asked := time.Now()
		v.freeze()
		t.Logf("frozen and erased %v after the key was disabled (probe interval 100 ms)", time.Since(asked))
		p.hangs()
		v.thaw()
		if word := p.finishes(60 * time.Second); word != "written" {
			t.Fatal(word)
		}
		v.remount()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1<<20)
		zeros := make([]byte, pageSize-1)
		for off := 0; off < gigabyte; off += len(b) {
			if _, err := f.ReadAt(b, int64(off)); err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(b); i += pageSize {
				if b[i] != byte((off+i)>>12) || !slices.Equal(b[i+1:i+pageSize], zeros) {
					t.Fatalf("wrong byte at %d", off+i)
				}
			}
		}
	})
}

// TestFreezeFlushes: as much as the kernel lets be dirty, in pages all over a file, is
// written back before the gate closes.
func TestFreezeFlushes(t *testing.T) {
	v := newVolume(t, Options{})
	fd, err := unix.Open(v.path("f"), unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const pages = 8192
	for i := range pages {
		b := bytes.Repeat([]byte{byte(i)}, pageSize)
		if _, err := unix.Pwrite(fd, b, int64(i)*2*pageSize); err != nil {
			t.Fatal(err)
		}
	}
	_, before := cachedPages(t, fd)
	asked := time.Now()
	v.freeze()
	cached, dirty := cachedPages(t, fd)
	t.Logf("%d pages dirty before; frozen %v after the key was disabled (probe interval 100 ms); %d cached, %d dirty", before, time.Since(asked), cached, dirty)
	if cached != 0 {
		t.Errorf("%d pages cached while frozen, %d of them dirty", cached, dirty)
	}
	v.thaw()
	b := make([]byte, pageSize)
	for i := range pages {
		if _, err := unix.Pread(fd, b, int64(i)*2*pageSize); err != nil || b[0] != byte(i) || b[pageSize-1] != byte(i) {
			t.Fatalf("page %d: %x, %v", i, b[0], err)
		}
	}
}
