package seal

import (
	"encoding/binary"
	"fmt"
	"testing"
)

// inDo runs the loop inside one Do, as a request does with its blocks.
func inDo(b *testing.B, n int64, f func()) {
	b.Helper()
	b.ReportAllocs()
	b.SetBytes(n)
	b.ResetTimer()
	Do(func() {
		for i := 0; i < b.N; i++ {
			f()
		}
	})
}

func benchFile(b *testing.B) (*Root, FileCipher) {
	b.Helper()
	r := testRoot(b, NewID())
	c, err := r.File(NewID())
	if err != nil {
		b.Fatal(err)
	}
	return r, c
}

func BenchmarkSealBlock(b *testing.B) {
	_, c := benchFile(b)
	dst, plain := make([]byte, BlockSize), make([]byte, BlockPayload)
	inDo(b, BlockPayload, func() { c.SealBlock(dst, 1, plain) })
}

func BenchmarkSealBlocks(b *testing.B) {
	_, c := benchFile(b)
	const count = 64
	dst, text := make([]byte, count*BlockSize), make([]byte, lengthSize+count*BlockPayload)
	inDo(b, count*BlockPayload, func() { c.SealBlocks(dst, 1, text) })
}

func BenchmarkOpenBlock(b *testing.B) {
	_, c := benchFile(b)
	block, plain := make([]byte, BlockSize), make([]byte, BlockPayload)
	c.SealBlock(block, 1, plain)
	inDo(b, BlockPayload, func() {
		if _, err := c.OpenBlock(plain, 1, block); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkOpenBlocks(b *testing.B) {
	_, c := benchFile(b)
	const count = 64
	sealed, plain := make([]byte, count*BlockSize), make([]byte, count*BlockPayload)
	for i := range count {
		c.SealBlock(sealed[i*BlockSize:][:BlockSize], uint64(i+1), plain[:BlockPayload])
	}
	inDo(b, count*BlockPayload, func() {
		if _, err := c.OpenBlocks(plain, 1, sealed); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkSealBlockParallel(b *testing.B) {
	_, c := benchFile(b)
	b.ReportAllocs()
	b.SetBytes(BlockPayload)
	b.RunParallel(func(pb *testing.PB) {
		dst, plain := make([]byte, BlockSize), make([]byte, BlockPayload)
		for pb.Next() {
			c.SealBlock(dst, 1, plain)
		}
	})
}

// BenchmarkLayout is the arithmetic of a request: which blocks it touches.
func BenchmarkLayout(b *testing.B) {
	b.ReportAllocs()
	sum := int64(0)
	for i := 0; b.Loop(); i++ {
		off := int64(i) * 4096 % (1 << 40)
		first, skip := BlockAt(off)
		last, _ := BlockAt(off + 131_071)
		sum += BlockStart(last+1) - BlockStart(first) + int64(skip+PayloadOf(first))
	}
	if sum == 0 {
		b.Fatal("nothing was computed")
	}
}

func BenchmarkIsHole(b *testing.B) {
	block := make([]byte, BlockSize)
	for _, last := range []byte{0, 1} {
		block[0] = last
		b.Run(fmt.Sprintf("hole=%t", last == 0), func(b *testing.B) {
			for b.Loop() {
				if IsHole(block) != (last == 0) {
					b.Fatal("wrong")
				}
			}
		})
	}
}

func BenchmarkFileWarm(b *testing.B) {
	r, c := benchFile(b)
	id := c.id
	inDo(b, 0, func() { r.File(id) })
}

func BenchmarkFileCold(b *testing.B) {
	r, _ := benchFile(b)
	var id FileID
	var n uint64
	block, plain := make([]byte, BlockSize), make([]byte, 16)
	b.ReportAllocs()
	for b.Loop() {
		Do(func() {
			n++
			binary.BigEndian.PutUint64(id[:], n*0x9e3779b97f4a7c15)
			c, err := r.File(id)
			if err != nil {
				b.Fatal(err)
			}
			c.SealBlock(block, 1, plain)
		})
	}
}

func BenchmarkNames(b *testing.B) {
	r, _ := benchFile(b)
	names, sealed := manyNames(b, r, nameSets*nameWays)
	const warm = 100
	c := testNameCipher(b, r)
	i := 0 // goes on from one to the next, lest they find what the last one put
	for name, bench := range map[string]struct {
		n int
		f func(i int) (string, error)
	}{
		"seal/warm": {warm, func(i int) (string, error) { return r.SealName(names[i]) }},
		"open/warm": {warm, func(i int) (string, error) { return r.OpenName(sealed[i]) }},
		"seal/cold": {len(names), func(i int) (string, error) { return r.SealName(names[i]) }},
		"open/cold": {len(names), func(i int) (string, error) { return r.OpenName(sealed[i]) }},
		"seal/bare": {len(names), func(i int) (string, error) { return c.seal(names[i]) }}, // without the memo
		"open/bare": {len(names), func(i int) (string, error) { return c.open(sealed[i]) }},
	} {
		b.Run(name, func(b *testing.B) {
			inDo(b, 0, func() {
				if bench.n == len(names) && i%bench.n == 0 {
					c.memo = newNameMemo()
				}
				if _, err := bench.f(i % bench.n); err != nil {
					b.Fatal(err)
				}
				i++
			})
		})
	}
}

func BenchmarkNamesParallel(b *testing.B) {
	r, _ := benchFile(b)
	names, _ := manyNames(b, r, 100)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		Do(func() {
			for i := 0; pb.Next(); i++ {
				r.SealName(names[i%len(names)])
			}
		})
	})
}

func BenchmarkSegment(b *testing.B) {
	r, _ := benchFile(b)
	_, c, err := r.NewObject(ObjectHeader{Object: NewID()})
	if err != nil {
		b.Fatal(err)
	}
	plain := make([]byte, SegmentSize)
	sealed := c.SealSegment(nil, plain, 0, false)
	dst := make([]byte, 0, len(sealed))
	b.Run("seal", func(b *testing.B) { inDo(b, SegmentSize, func() { c.SealSegment(dst, plain, 0, false) }) })
	b.Run("open", func(b *testing.B) { inDo(b, SegmentSize, func() { c.OpenSegment(dst, sealed, 0, false) }) })
}

func BenchmarkNewObject(b *testing.B) {
	r, _ := benchFile(b)
	b.ReportAllocs()
	for b.Loop() {
		Do(func() {
			if _, _, err := r.NewObject(ObjectHeader{}); err != nil {
				b.Fatal(err)
			}
		})
	}
}
