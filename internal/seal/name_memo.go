package seal

import (
	"hash/maphash"
	"math/rand/v2"
	"sync/atomic"
)

const (
	// nameSets × nameWays bounds the names found by each of their sides to 16384.
	// With names of 20 bytes they take 3 MB. At most it is 16 MB: 480 bytes each, and
	// no name that is found by both sides.
	nameSets = 4096
	nameWays = 4
)

// nameMemo remembers names that were sealed or opened, by both of their sides:
// AES-SIV is deterministic, so that each tells the other. It holds plaintext and
// is one with the cipher of the names, so that Wipe drops them together. It takes
// no lock: a race costs an entry, never gives a wrong one.
type nameMemo struct {
	seed  maphash.Seed // so that nobody can choose names that share a set
	sides [2][nameSets]nameSet
}

// nameSide is a side of a name, by which the memo is asked.
type nameSide uint8

const (
	plainSide nameSide = iota
	sealedSide
)

func (s nameSide) other() nameSide { return 1 - s }

// nameSet holds names whose hashes agree.
type nameSet [nameWays]atomic.Pointer[nameEntry]

// nameEntry is immutable but for recent.
type nameEntry struct {
	text   [2]string      // by side; two strings, so that who keeps one does not keep the other
	recent [2]atomic.Bool // by side: found since keep last passed it over
}

func newNameMemo() *nameMemo { return &nameMemo{seed: maphash.MakeSeed()} }

func (m *nameMemo) set(side nameSide, text string) *nameSet {
	return &m.sides[side][maphash.String(m.seed, text)%nameSets]
}

// get returns the other side of a name whose one side is text. Comparing is not
// constant in time: who can ask has the name, and sealed names are no secret.
func (m *nameMemo) get(side nameSide, text string) (other string, ok bool) {
	set := m.set(side, text)
	for i := range set {
		if e := set[i].Load(); e != nil && e.text[side] == text {
			if !e.recent[side].Load() {
				e.recent[side].Store(true)
			}
			return e.text[side.other()], true
		}
	}
	return "", false
}

// put remembers a name, whose sides become the memo's.
func (m *nameMemo) put(plain, sealed string) {
	e := &nameEntry{text: [2]string{plainSide: plain, sealedSide: sealed}}
	m.keep(plainSide, e)
	m.keep(sealedSide, e)
}

// keep files e under one of its sides: in place of its like, else of any that was
// not found again since it was last passed over. So a scan of many names does not
// displace those in use, and one that is too long for the memo, and repeated,
// still finds some.
func (m *nameMemo) keep(side nameSide, e *nameEntry) {
	set := m.set(side, e.text[side])
	for i := range set {
		if old := set[i].Load(); old == nil || old.text[side] == e.text[side] {
			set[i].Store(e)
			return
		}
	}
	way := rand.Uint32() % nameWays // which is no secret
	for range nameWays {
		if !set[way].Load().recent[side].Swap(false) { // a way once taken stays so
			break
		}
		way = (way + 1) % nameWays
	}
	set[way].Store(e)
}
