package keyguard

import (
	"sync"
	"testing"

	"github.com/byokd/byokd/internal/seal"
)

func newRoot(t *testing.T) *seal.Root {
	t.Helper()
	var root *seal.Root
	var err error
	seal.Do(func() { root, err = seal.NewRoot(seal.NewID(), make([]byte, seal.RootSize)) })
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestKeysAreBoundedAndKeepWhatIsUsed(t *testing.T) {
	k := newKeys()
	pinned, used, unused := newRoot(t), newRoot(t), newRoot(t)
	k.add(pinned, true)
	k.add(used, false)
	k.add(unused, false)
	for i := range 3 * maxUnpinned {
		if k.Root(used.ID()) != used {
			t.Fatalf("the key in use was displaced after %d others", i)
		}
		k.add(newRoot(t), false)
	}
	if n := k.Len(); n != maxUnpinned+1 {
		t.Errorf("%d roots, want %d", n, maxUnpinned+1)
	}
	if k.Root(pinned.ID()) != pinned {
		t.Error("a pinned root was displaced")
	}
	if k.Root(unused.ID()) != nil {
		t.Error("a root that nobody used is still there")
	}
}

// A pass may still hold a displaced root: it must go on working.
func TestDisplacedRootStaysUsable(t *testing.T) {
	k := newKeys()
	root := newRoot(t)
	k.add(root, false)
	held := k.Root(root.ID())
	for range 3 * maxUnpinned {
		k.add(newRoot(t), false)
	}
	if k.Root(root.ID()) != nil {
		t.Fatal("the root was not displaced")
	}
	var sealed string
	var err error
	seal.Do(func() { sealed, err = held.SealName("name") })
	if err != nil || sealed == "" {
		t.Errorf("a displaced root that is still held: %v", err)
	}
}

func TestPinExemptsFromDisplacement(t *testing.T) {
	k := newKeys()
	root := newRoot(t)
	if k.pin(root.ID()) {
		t.Error("pinned what is not loaded")
	}
	k.add(root, false)
	for range 2 { // again is no error
		if !k.pin(root.ID()) {
			t.Error("could not pin")
		}
	}
	for range 3 * maxUnpinned {
		k.add(newRoot(t), false)
	}
	if k.Root(root.ID()) != root {
		t.Error("a pinned root was displaced")
	}
}

func TestErasedKeysTakeNothing(t *testing.T) {
	k := newKeys()
	root := newRoot(t)
	k.add(root, true)
	k.erase()
	if k.Len() != 0 || k.Root(root.ID()) != nil {
		t.Error("a root survived")
	}
	if k.add(newRoot(t), true) || k.pin(root.ID()) {
		t.Error("took a root after it was erased")
	}
}

func TestRootsAreReadWhileTheyChange(t *testing.T) {
	k := newKeys()
	root := newRoot(t)
	k.add(root, true)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				if k.Root(root.ID()) != root {
					t.Error("lost a root")
					return
				}
			}
		})
	}
	for range 2 * maxUnpinned {
		k.add(newRoot(t), false)
	}
	wg.Wait()
}

func TestRootDoesNotAllocate(t *testing.T) {
	k := newKeys()
	root := newRoot(t)
	k.add(root, true)
	id := root.ID()
	if n := testing.AllocsPerRun(1000, func() { k.Root(id) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
