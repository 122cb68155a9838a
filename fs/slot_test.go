package fs

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnusedSlotsGiveMemoryBack: what a burst of requests made resident is given back
// when fewer slots are in use again, and those in use keep theirs.
func TestUnusedSlotsGiveMemoryBack(t *testing.T) {
	for name, kept := range map[string]bool{"alone": false, "with a journal": true} {
		t.Run(name, func(t *testing.T) {
			v := newVolume(t, Options{})
			device, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			var j *journal
			if kept {
				if j, err = newJournal([16]byte{}); err != nil {
					t.Fatal(err)
				}
			}
			l := newLoop(v.fs, device, j)
			use := func(n int) { // at a time
				slots := make([]*slot, n)
				for i := range slots {
					slots[i] = l.take()
					for _, b := range [][]byte{slots[i].in[inHeaderSize:], slots[i].out, slots[i].call.sealed} {
						copy(b, bytes.Repeat([]byte{0xaa}, len(b)))
					}
				}
				for _, s := range slots {
					l.give(s)
				}
			}
			filled := func() (n int) {
				zeros := make([]byte, bufferSize)
				for _, s := range l.free {
					in, out := !bytes.HasPrefix(zeros, s.in), !bytes.HasPrefix(zeros, s.out)
					if in != out {
						t.Errorf("one buffer of a slot was given back, the other was not")
					}
					if in {
						n++
					}
				}
				return n
			}
			const burst, steady = 7, 2
			for _, step := range []struct {
				name           string
				use, want, all int
			}{
				{"in a burst", burst, burst, burst},
				{"after it", steady, steady, burst},
				{"later", steady, steady, burst},
				{"in the next burst", burst + 1, burst + 1, burst + 1},
				{"idle", 0, 0, burst + 1},
			} {
				use(step.use)
				l.trim()
				if got := filled(); got != step.want || len(l.free) != step.all || l.taken != 0 {
					t.Errorf("%s: %d of %d slots hold something, %d are taken; want %d of %d", step.name, got, len(l.free), l.taken, step.want, step.all)
				}
			}
			if err := l.close(); err != nil {
				t.Error(err)
			}
		})
	}
}
