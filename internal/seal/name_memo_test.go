package seal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"
)

func TestRememberedNamesDoNotAllocate(t *testing.T) {
	r := testRoot(t, NewID())
	sealed, err := r.SealName("sealed first")
	if err != nil {
		t.Fatal(err)
	}
	twin := testRoot(t, r.ID())
	if _, err := twin.OpenName(sealed); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"SealName of a sealed name":  func() { r.SealName("sealed first") },
		"OpenName of a sealed name":  func() { r.OpenName(sealed) },
		"SealName of an opened name": func() { twin.SealName("sealed first") },
		"OpenName of an opened name": func() { twin.OpenName(sealed) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

// A caller's string may lie over a buffer that it uses again, as requests of the
// kernel do.
func TestNamesAreCopied(t *testing.T) {
	r := testRoot(t, NewID())
	buf := []byte("first")
	name := unsafe.String(&buf[0], len(buf))
	first, err := r.SealName(name)
	if err != nil {
		t.Fatal(err)
	}
	copy(buf, "other")
	if got, err := r.OpenName(first); err != nil || got != "first" {
		t.Errorf("remembered as %q, %v", got, err)
	}
	if other, err := r.SealName(name); err != nil || other == first {
		t.Errorf("another name seals likewise: %v", err)
	}

	twin := testRoot(t, r.ID())
	buf = []byte(first)
	lower := unsafe.String(&buf[0], len(buf))
	if _, err := twin.OpenName(lower); err != nil {
		t.Fatal(err)
	}
	clear(buf)
	if got, err := twin.SealName("first"); err != nil || got != first {
		t.Errorf("remembered as %q, %v", got, err)
	}
}

// Names in use stay, from both sides, however many others pass; and the memo
// holds as many as it says.
func TestNameMemoKeepsWhatIsUsed(t *testing.T) {
	m := newNameMemo()
	sides := func(i int) (plain, sealed string) { return fmt.Sprint("plain ", i), fmt.Sprint("sealed ", i) }
	found := func(i int) bool {
		plain, sealed := sides(i)
		toSealed, a := m.get(plainSide, plain)
		toPlain, b := m.get(sealedSide, sealed)
		if a && toSealed != sealed || b && toPlain != plain {
			t.Fatalf("%q is %q, %q is %q", plain, toSealed, sealed, toPlain)
		}
		return a && b
	}
	const hot, others = -1, 2 * nameSets * nameWays
	m.put(sides(hot))
	for i := range others {
		if !found(hot) {
			t.Fatalf("a name in constant use was given up after %d others", i)
		}
		m.put(sides(i))
	}
	if !found(others - 1) {
		t.Error("the last name is not found")
	}
	for side := range m.sides {
		full := 0
		for s := range m.sides[side] {
			for w := range m.sides[side][s] {
				if m.sides[side][s][w].Load() != nil {
					full++
				}
			}
		}
		if full < nameSets*nameWays*9/10 {
			t.Errorf("side %d holds %d names only", side, full)
		}
	}
	if plain, sealed := sides(1); !samePlace(m, plain, sealed) {
		t.Error("a name put twice takes two places")
	}
}

// samePlace puts a name twice and tells whether it stands once.
func samePlace(m *nameMemo, plain, sealed string) bool {
	m.put(plain, sealed)
	m.put(plain, sealed)
	count := 0
	set := m.set(plainSide, plain)
	for w := range set {
		if e := set[w].Load(); e != nil && e.text[plainSide] == plain {
			count++
		}
	}
	return count == 1
}

// Names that are no longer asked for make room, and a scan of more names than the
// memo holds, again and again, finds a part of them.
func TestNameMemoMovesOn(t *testing.T) {
	m := newNameMemo()
	scan := func(prefix string, n int) (hits int) {
		for i := range n {
			name := fmt.Sprint(prefix, i)
			if _, ok := m.get(plainSide, name); ok {
				hits++
			} else {
				m.put(name, "sealed "+name)
			}
		}
		return hits
	}
	const size = nameSets * nameWays
	scan("gone ", 3*size)
	for range 4 {
		scan("used ", size/4)
	}
	if hits := scan("used ", size/4); hits < size/4*9/10 {
		t.Errorf("finds only %d of %d names in use", hits, size/4)
	}
	for range 4 {
		scan("many ", size*5/4)
	}
	if hits := scan("many ", size*5/4); hits < size/4 {
		t.Errorf("finds only %d of %d names of a long scan", hits, size*5/4)
	}
}

// Many at once, with more names than the memo holds, and then a Wipe: a name is
// right or ErrWiped.
func TestNamesConcurrently(t *testing.T) {
	r := testRoot(t, NewID())
	names, sealed := manyNames(t, testRoot(t, r.ID()), nameSets*nameWays*5/4)
	var wiped atomic.Bool
	var group sync.WaitGroup
	for worker := range 4 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(worker)))
			for i := 0; ; i++ {
				if worker == 0 && i == len(names) {
					r.Wipe()
					wiped.Store(true)
				}
				late := wiped.Load()
				n := random.IntN(len(names))
				a, errA := r.SealName(names[n])
				b, errB := r.OpenName(sealed[n])
				if late && (errA == nil || errB == nil) {
					t.Errorf("%q is known after Wipe", names[n])
					return
				}
				if errA == nil && a != sealed[n] || errB == nil && b != names[n] {
					t.Errorf("%q is %q, %q is %q", names[n], a, sealed[n], b)
					return
				}
				if err := errors.Join(errA, errB); err != nil {
					if !errors.Is(err, ErrWiped) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	group.Wait()
	if r.names.Load() != nil {
		t.Error("names are remembered after Wipe")
	}
}

// manyNames returns names and what they seal to.
func manyNames(t testing.TB, r *Root, n int) (names, sealed []string) {
	t.Helper()
	for i := range n {
		name := fmt.Sprintf("%016d-7.log", i)
		s, err := r.SealName(name)
		if err != nil {
			t.Fatal(err)
		}
		names, sealed = append(names, name), append(sealed, s)
	}
	return names, sealed
}
