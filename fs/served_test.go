package fs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
)

// TestUseKeysWhileFrozen: who reads the lower directory gets no key while frozen, and gets it after the thaw.
func TestUseKeysWhileFrozen(t *testing.T) {
	v := newVolume(t, Options{})
	v.freeze()
	var thawed atomic.Bool
	early := errors.New("a key although frozen")
	ended := make(chan error, 1)
	go func() {
		ended <- v.fs.UseKeys(context.Background(), func(root *seal.Root) error {
			if !thawed.Load() || root == nil {
				return early
			}
			return nil
		})
	}()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { left <- v.fs.UseKeys(ctx, func(*seal.Root) error { return early }) }()
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves is told %v", err)
	}
	thawed.Store(true)
	v.thaw()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestStill: a block that is read while its writers are held off always opens, whatever they do.
func TestStill(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		f, err := os.Create(v.path("hot"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, 20_000)); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		var over atomic.Bool
		var writing sync.WaitGroup
		writing.Go(func() {
			defer f.Close()
			for i := byte(0); !over.Load(); i++ {
				if _, err := f.WriteAt(bytes.Repeat([]byte{i}, 15_000), 1000); err != nil {
					t.Error(err)
					return
				}
				if err := f.Sync(); err != nil {
					t.Error(err)
					return
				}
			}
		})
		lower, err := os.Open(v.lowerFiles()[0])
		if err != nil {
			t.Fatal(err)
		}
		defer lower.Close()
		sealed, plain := make([]byte, block), make([]byte, seal.BlockPayload)
		var raw [len(seal.FileID{})]byte
		if _, err := unix.Fgetxattr(int(lower.Fd()), idAttribute, raw[:]); err != nil {
			t.Fatal(err)
		}
		for round := range 3000 {
			index := int64(round % 3)
			var read error
			err := v.fs.Still(int(lower.Fd()), index, index, func() { _, read = lower.ReadAt(sealed, index*block) })
			if err := errors.Join(err, read); err != nil {
				t.Fatal(err)
			}
			err = v.fs.UseKeys(t.Context(), func(root *seal.Root) error {
				cipher, err := root.File(seal.FileID(raw))
				if err == nil {
					_, err = cipher.OpenBlock(plain, uint64(index), sealed)
				}
				return err
			})
			if err != nil {
				t.Fatalf("round %d, block %d: %v", round, index, err)
			}
		}
		over.Store(true)
		writing.Wait()
	})
}
