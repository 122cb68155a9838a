package fs

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// remains is what the victim writes and reads: known to the test, which serves
// the mount, but not in its memory until it looks for it.
func remains(pid int) [sha256.Size]byte {
	return sha256.Sum256(fmt.Appendf(nil, "plaintext of process %d", pid))
}

// leaveRemains writes and reads many pages of it, in requests large and small.
func leaveRemains(_, file string) (func() (string, error), error) {
	return func() (string, error) {
		one := remains(os.Getpid())
		b := page(1 << 20)
		copy(b, bytes.Repeat(one[:], len(b)/len(one)))
		fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT, 0o644)
		for i := 0; i < 64 && err == nil; i++ {
			size := []int{len(b), 4096, 128 << 10}[i%3]
			if _, err = unix.Pwrite(fd, b[:size], int64(i)<<20); err == nil {
				_, err = unix.Pread(fd, b[:size], int64(i)<<20)
			}
		}
		return fmt.Sprint(os.Getpid()), err
	}, nil
}

// TestFrozenMemoryHoldsNoPlaintext: what passed through the mount is not left in
// the daemon's memory when no call waits.
func TestFrozenMemoryHoldsNoPlaintext(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		p := newVictim(t, "remains", v.mount, v.path("f"))
		p.start()
		pid := 0
		if _, err := fmt.Sscan(p.finishes(30*time.Second), &pid); err != nil {
			t.Fatal(err)
		}
		before := len(findRemains(t, pid))
		v.freeze()
		if where := findRemains(t, pid); len(where) > 0 {
			t.Errorf("plaintext in memory while frozen, in %d places (%d before), the first at %#x", len(where), before, where[0])
		}
		if before == 0 {
			t.Error("none was found before the freeze: the test looks for the wrong thing")
		}
		v.thaw()
	})
}

// inARow is how many repetitions are a find: more than the vector registers that
// Go's runtime saves when it interrupts a goroutine in the midst of a copy.
const inARow = 16

// findRemains looks in all writable memory of this process that no file is behind.
func findRemains(t *testing.T, pid int) (where []uint64) {
	t.Helper()
	hidden := remains(pid)
	for i := range hidden {
		hidden[i] ^= 0xff // as it is, it must not be found here
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	memory, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	b := make([]byte, 1<<20)
	defer clear(b) // the next look is not to find what this one found
	own := uint64(uintptr(unsafe.Pointer(&b[0])))
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to, inode uint64
		var flags, offset, device string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s %s %s %d", &from, &to, &flags, &offset, &device, &inode); err != nil {
			t.Fatal(err)
		}
		if inode != 0 || !strings.HasPrefix(flags, "rw") {
			continue
		}
		for at := from; at < to; at += uint64(len(b)) {
			n, _ := memory.ReadAt(b[:min(uint64(len(b)), to-at)], int64(at))
			for i := 0; i+inARow*len(hidden) <= n; i += 8 {
				if place := at + uint64(i); place >= own && place < own+uint64(len(b)) {
					continue // where it is looked for
				}
				found := true
				for k := 0; k < inARow && found; k++ {
					found = same(b[i+k*len(hidden):], hidden)
				}
				if found {
					where = append(where, at+uint64(i))
					i += 4096
				}
			}
		}
	}
	return where
}

func same(b []byte, hidden [sha256.Size]byte) bool {
	for i, h := range hidden {
		if b[i] != ^h {
			return false
		}
	}
	return true
}
