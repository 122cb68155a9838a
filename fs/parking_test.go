package fs

import (
	"os"
	"os/exec"
	"reflect"
	"sync"
	"testing"
)

func TestBeingKilled(t *testing.T) {
	if beingKilled(uint32(os.Getpid())) {
		t.Error("this process is not being killed")
	}
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !beingKilled(uint32(cmd.Process.Pid)) {
		t.Error("a process that is gone needs no answer")
	}
}

func TestSigkillIn(t *testing.T) {
	for text, want := range map[string]bool{
		"Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0\n":             true,
		"Name:\tx\nSigPnd:\t0000000000000200\nShdPnd:\t0\n":             false,
		"Name:\tSigPnd:\t0000000000000100\nSigPnd:\t0000000000000000\n": false, // a thread may call itself anything
		"":                            false,
		"\nSigPnd:\tnot a number\n":   false,
		"\nSigPnd:\tffffffffffffffff": true,
	} {
		if got := sigkillIn([]byte(text), "\nSigPnd:\t"); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestExiting(t *testing.T) {
	for text, want := range map[string]bool{
		"12 (a) b) R 1 1 1 0 -1 4 0 0":  true, // ") " in the name
		"12 (x) R 1 1 1 0 -1 4194304 0": false,
		"12 (x) R 1 1":                  false,
		"":                              false,
		"12 x R 1 1 1 0 -1 4":           false,
	} {
		if got := exiting([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestGaps(t *testing.T) {
	for _, c := range []struct{ locked, want []span }{
		{nil, []span{{0, 0}}},
		{[]span{{0, 4096}}, []span{{4096, 4096}}},
		{[]span{{8192, 12288}}, []span{{0, 8192}, {12288, 12288}}},
		{[]span{{20480, 24576}, {8000, 12289}}, []span{{0, 4096}, {16384, 20480}, {24576, 24576}}},
		{[]span{{4096, 12288}, {8192, 16384}}, []span{{0, 4096}, {16384, 16384}}},
	} {
		if got := gaps(c.locked); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: %v, want %v", c.locked, got, c.want)
		}
	}
}

// TestBlockRanges: who holds blocks alone holds them alone, others do not wait.
func TestBlockRanges(t *testing.T) {
	var r blockRanges
	var blocks [8]int // written by those who hold them alone: the race detector looks on
	var wait sync.WaitGroup
	for g := range 8 {
		wait.Go(func() {
			for i := range 500 {
				first := int64((g + i) % len(blocks))
				last := min(first+int64(i%3), int64(len(blocks)-1))
				alone := i%4 != 0
				r.lock(first, last, alone)
				for b := first; b <= last; b++ {
					if alone {
						blocks[b]++
					} else if blocks[b] < 0 {
						t.Error("impossible")
					}
				}
				r.unlock(first, last, alone)
			}
		})
	}
	wait.Wait()
	r.lock(0, 3, true)
	r.lock(4, 7, true) // does not wait
	if r.taken(3, 3, false) != true || r.taken(8, 9, true) != false {
		t.Error("wrong about what is held")
	}
	r.unlock(0, 3, true)
	r.unlock(4, 7, true)
	if len(r.held) != 0 {
		t.Errorf("%v is still held", r.held)
	}
}
