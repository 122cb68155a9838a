package fs

import (
	"reflect"
	"sync"
	"testing"
)

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
