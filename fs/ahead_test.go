package fs

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"testing"
)

// TestLargeWrites compares a file with a model under writes of many blocks that
// begin and end anywhere, also behind the end and into an empty file: whole
// blocks are sealed before the file is held alone, and their neighbours after.
func TestLargeWrites(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		f, err := os.Create(v.path("f"))
		if err != nil {
			t.Fatal(err)
		}
		var model []byte
		for step := range 150 {
			if step%25 == 0 {
				n := r.IntN(2) * r.IntN(200_000)
				if err := f.Truncate(int64(n)); err != nil {
					t.Fatal(err)
				}
				model = append(model[:min(n, len(model))], make([]byte, max(0, n-len(model)))...)
			}
			off, data := r.IntN(len(model)+50_000), make([]byte, 1+r.IntN(400_000))
			if r.IntN(3) == 0 {
				off = len(model) // an append
			}
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			if _, err := f.WriteAt(data, int64(off)); err != nil {
				t.Fatal(err)
			}
			model = append(model, make([]byte, max(0, off+len(data)-len(model)))...)
			copy(model[off:], data)
			if step%10 == 9 {
				f.Close()
				v.remount()
				if f, err = os.OpenFile(v.path("f"), os.O_RDWR, 0); err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, model) {
					t.Fatalf("step %d: %d bytes, want %d; first difference at %d", step, len(got), len(model), firstDifference(got, model))
				}
			}
		}
		f.Close()
	})
}
