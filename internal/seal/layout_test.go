package seal

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"
)

// fileModel lays a plain file out block by block, the slow and obvious way.
func fileModel(plain int64) (starts []int64, sealed int64) {
	for off := int64(0); off < plain; {
		starts = append(starts, off)
		if len(starts) == 1 {
			off += 4096 - 32 - 2 - 12 - 2 - 16
		} else {
			off += 4096 - 2 - 12 - 2 - 16
		}
		sealed += 4096
	}
	return starts, sealed
}

func TestFileLayout(t *testing.T) {
	if BlockPayload != 4064 || FirstPayload != 4032 {
		t.Fatalf("payloads %d, %d", FirstPayload, BlockPayload)
	}
	random := rand.New(rand.NewPCG(1, 2))
	sizes := []int64{0, 1, 4031, 4032, 4033, 8095, 8096, 8097, 1 << 20}
	for range 300 {
		sizes = append(sizes, random.Int64N(200000))
	}
	for _, plain := range sizes {
		starts, sealed := fileModel(plain)
		if got := SealedFileSize(plain); got != sealed {
			t.Fatalf("SealedFileSize(%d) = %d, want %d", plain, got, sealed)
		}
		for i, start := range starts {
			end := plain
			if i+1 < len(starts) {
				end = starts[i+1]
				if int64(PayloadOf(int64(i))) != end-start {
					t.Fatalf("PayloadOf(%d) = %d", i, PayloadOf(int64(i)))
				}
			}
			if BlockStart(int64(i)) != start {
				t.Fatalf("BlockStart(%d) = %d, want %d", i, BlockStart(int64(i)), start)
			}
			for _, off := range []int64{start, (start + end) / 2, end - 1} {
				if index, skip := BlockAt(off); index != int64(i) || int64(skip) != off-start {
					t.Fatalf("BlockAt(%d) = %d, %d; want %d, %d", off, index, skip, i, off-start)
				}
			}
		}
	}
}

func TestFileLayoutAtTheEdge(t *testing.T) {
	if got := SealedFileSize(MaxFileSize); got != maxSealedFile || got > math.MaxInt64-BlockSize+1 {
		t.Fatalf("SealedFileSize(MaxFileSize) = %d", got)
	}
	if got := SealedFileSize(MaxFileSize - BlockPayload); got != maxSealedFile-BlockSize {
		t.Fatalf("one block less = %d", got)
	}
	for _, plain := range []int64{MaxFileSize + 1, math.MaxInt64} {
		if got := SealedFileSize(plain); got != maxSealedFile {
			t.Fatalf("SealedFileSize(%d) = %d", plain, got)
		}
	}
	if index, skip := BlockAt(math.MaxInt64); BlockStart(index) != math.MaxInt64-int64(skip) {
		t.Fatalf("the last offset is %d in block %d, which begins at %d", skip, index, BlockStart(index))
	}
	if got := SealedFileSize(-1); got != 0 {
		t.Fatalf("SealedFileSize(-1) = %d", got)
	}
}

// sealedParts is the size of an object of parts with these plain sizes.
func sealedParts(plains ...int64) (sealed int64) {
	for _, plain := range plains {
		sealed += 1024
		for first := true; first || plain > 0; first = false {
			sealed += min(plain, 65536) + 12 + 16
			plain -= 65536
		}
	}
	return sealed
}

func TestObjectSizes(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		parts := 1 + random.IntN(6)
		plains := make([]int64, parts)
		var total int64
		for i := range plains {
			switch {
			case i < parts-1:
				plains[i] = 65536 * (1 + random.Int64N(40))
			case random.IntN(4) == 0:
				plains[i] = 65536 * random.Int64N(3) // exact multiples, and nothing
			default:
				plains[i] = random.Int64N(300000)
			}
			total += plains[i]
		}
		sealed := sealedParts(plains...)
		if got, err := PlainObjectSize(sealed, parts); err != nil || got != total {
			t.Fatalf("parts %v seal to %d: %d, %v", plains, sealed, got, err)
		}
		if got := SealedObjectSize(plains[0]); got != sealedParts(plains[0]) {
			t.Fatalf("SealedObjectSize(%d) = %d", plains[0], got)
		}
	}
}

// Every sealed size up to three segments is possible exactly where some plain
// content seals to it.
func TestImpossibleObjectSizes(t *testing.T) {
	const limit = 3 * 65536
	for parts := 1; parts <= 3; parts++ {
		possible := map[int64]int64{}
		var fill func(done []int64)
		fill = func(done []int64) {
			if len(done) == parts-1 {
				for last := int64(0); last <= limit; last++ {
					var total int64
					for _, p := range done {
						total += p
					}
					possible[sealedParts(append(done[:len(done):len(done)], last)...)] = total + last
				}
				return
			}
			for _, p := range []int64{65536, 2 * 65536, 3 * 65536} {
				fill(append(done[:len(done):len(done)], p))
			}
		}
		fill(nil)
		for sealed := int64(-1); sealed <= limit; sealed++ {
			got, err := PlainObjectSize(sealed, parts)
			want, ok := possible[sealed]
			if ok && (err != nil || got != want) {
				t.Fatalf("%d sealed bytes in %d parts: %d, %v; want %d", sealed, parts, got, err, want)
			}
			if !ok && !errors.Is(err, ErrImpossibleSize) {
				t.Fatalf("%d sealed bytes in %d parts: %d, %v; impossible", sealed, parts, got, err)
			}
		}
	}
}

func TestObjectSizesAtTheEdge(t *testing.T) {
	for _, tc := range []struct {
		sealed int64
		parts  int
	}{
		{math.MinInt64, 1}, {math.MaxInt64, 1}, {math.MaxInt64, MaxParts}, {2000, 0}, {2000, -1},
		{2000, MaxParts + 1}, {2000, math.MaxInt}, {SealedObjectSize(MaxObjectSize) + 1, 1},
	} {
		if got, err := PlainObjectSize(tc.sealed, tc.parts); !errors.Is(err, ErrImpossibleSize) {
			t.Errorf("PlainObjectSize(%d, %d) = %d, %v", tc.sealed, tc.parts, got, err)
		}
	}
	if got, err := PlainObjectSize(SealedObjectSize(MaxObjectSize), 1); err != nil || got != MaxObjectSize {
		t.Errorf("the largest object: %d, %v", got, err)
	}
	for plain, want := range map[int64]int64{-1: 1, 0: 1, 1: 1, 65536: 1, 65537: 2, 131072: 2} {
		if got := SegmentCount(plain); got != want {
			t.Errorf("SegmentCount(%d) = %d", plain, got)
		}
	}
}

// segmentModel lists where each segment of an object lies.
type segmentModel struct{ plainFrom, plainTo, sealedFrom, sealedTo int64 }

func segments(plain int64) (out []segmentModel) {
	sealed := int64(1024)
	for off := int64(0); off < plain || len(out) == 0; {
		n := min(65536, plain-off)
		out = append(out, segmentModel{off, off + n, sealed, sealed + n + 28})
		off, sealed = off+n, sealed+n+28
	}
	return out
}

func TestSegmentSpan(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 20000 {
		plain := random.Int64N(5 * 65536)
		if random.IntN(3) == 0 {
			plain = 65536 * random.Int64N(5)
		}
		off, n := random.Int64N(6*65536)-3, random.Int64N(6*65536)-3
		first, last, from, to, skip := SegmentSpan(off, n, plain)
		model := segments(plain)
		if plain == 0 {
			if first != 0 || last != 0 || from != 1024 || to != 1052 || skip != 0 {
				t.Fatalf("empty object: %d %d %d %d %d", first, last, from, to, skip)
			}
			continue
		}
		if off < 0 || n <= 0 || off >= plain {
			if last >= first || from != to {
				t.Fatalf("SegmentSpan(%d, %d, %d): not empty", off, n, plain)
			}
			continue
		}
		end := min(off+n, plain)
		for i, s := range model {
			touched := s.plainFrom < end && s.plainTo > off
			if touched != (int64(i) >= first && int64(i) <= last) {
				t.Fatalf("SegmentSpan(%d, %d, %d) = %d..%d: segment %d", off, n, plain, first, last, i)
			}
		}
		if from != model[first].sealedFrom || to != model[last].sealedTo || int64(skip) != off-model[first].plainFrom {
			t.Fatalf("SegmentSpan(%d, %d, %d) = [%d, %d) skip %d", off, n, plain, from, to, skip)
		}
	}
	if _, last, _, to, _ := SegmentSpan(10, math.MaxInt64, 100); last != 0 || to != 1024+128 {
		t.Fatalf("a range to the end overflows: %d, %d", last, to)
	}
}
