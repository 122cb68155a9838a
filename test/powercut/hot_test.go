//go:build linux

package powercut

import (
	"context"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// TestRewritesDuringWriteback: whatever of a hot block is sent to the disk is one
// sealing of it, never a mixture of two.
func TestRewritesDuringWriteback(t *testing.T) {
	requireDisks(t)
	k := newTestKey(t)
	for _, lower := range []lowerKind{ext4, xfs} {
		t.Run(lower.name, func(t *testing.T) {
			r := &recording{lower: lower, view: sealed{k, fs.Writethrough, t.TempDir()}, loads: []workload{hotLoad{}}}
			var cipher func(index int64, block []byte) error
			places := recordHot(t, r, func(lower string) (path string) {
				path, cipher = sealedFile(t, k, below(lower))
				return path
			})
			writes, torn, err := r.torn(places, cipher)
			t.Logf("%d writes of the hot block, %d torn", writes, torn)
			if writes < 100 {
				t.Errorf("%d writes of the hot block only: the load is not what it should be", writes)
			}
			if torn > 0 {
				t.Errorf("%d of %d writes do not open, e.g. %.300v", torn, writes, err)
			}
		})
		t.Run(lower.name+"/naive", func(t *testing.T) {
			l, err := newNaiveJournal()
			if err != nil {
				t.Fatal(err)
			}
			writes, torn := 0, 0
			for began := time.Now(); torn == 0; { // a block is met in the moment of its copying once in a hundred times
				if time.Since(began) > time.Minute {
					t.Fatalf("rewrites through the page cache tear no block in %d writes: the harness does not see what it is for", writes)
				}
				r := &recording{lower: lower, view: bare{}, loads: []workload{naiveRewriter{l}}}
				places := recordHot(t, r, func(lower string) string { return lower + "/naive-rewriter/file" })
				more, bad, _ := r.torn(places, func(_ int64, block []byte) error {
					_, err := l.aead.Open(nil, nil, block, nil)
					return err
				})
				writes, torn = writes+more, torn+bad
			}
			t.Logf("%d writes of a hot block, %d torn", writes, torn)
		})
	}
}

// recordHot records r with a flusher beside it and returns where the blocks of
// its file are.
func recordHot(t *testing.T, r *recording, fileOn func(lower string) string) map[int64]int64 {
	t.Helper()
	b, err := newBench(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const length = 2 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	var places map[int64]int64
	r.inspect = func(lower string) error {
		places, err = placesOf(fileOn(lower))
		return err
	}
	if err := b.record(r, length, func(context.Context) error { return flusher(ctx, b.dir) }); err != nil {
		t.Fatal(err)
	}
	return places
}

// sealedFile returns the only file of a volume and what opens its blocks.
func sealedFile(t *testing.T, k *key, lower string) (string, func(index int64, block []byte) error) {
	t.Helper()
	var path string
	err := filepath.WalkDir(lower, func(p string, d iofs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && filepath.Dir(p) != lower { // those in the root are byokd's own
			path = p
		}
		return err
	})
	if err != nil || path == "" {
		t.Fatalf("no file below %s: %v", lower, err)
	}
	header, err := fs.ReadHeader(lower)
	if err != nil {
		t.Fatal(err)
	}
	id := fileID(t, path)
	return path, func(index int64, block []byte) error {
		pass, err := k.guard.Enter(context.Background(), keyguard.Work, 0)
		if err != nil {
			return err
		}
		defer pass.Exit()
		seal.Do(func() {
			var c seal.FileCipher
			if c, err = pass.Keys().Root(header.Volume).File(id); err == nil {
				var plain [seal.BlockPayload]byte
				_, err = c.OpenBlock(plain[:], uint64(index), block)
			}
		})
		return err
	}
}

func fileID(t *testing.T, path string) seal.FileID {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, seal.FileHeaderSize)
	if _, err := io.ReadFull(f, head); err != nil {
		t.Fatal(err)
	}
	id, err := seal.ParseFileHeader(head)
	if err != nil {
		t.Fatal(err)
	}
	return id
}
