package seal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
)

func TestBlockRoundTrip(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	for _, index := range []uint64{0, 1, 2, 1 << 40, 1<<64 - 1} {
		payload := BlockPayload
		if index == 0 {
			payload = FirstPayload
		}
		for _, n := range []int{0, 1, 15, 16, 17, payload - 1, payload} {
			plain := randomBytes(n)
			block := randomBytes(BlockSize)
			c.SealBlock(block, index, plain)
			dst := bytes.Repeat([]byte{0xff}, BlockSize)
			got, err := c.OpenBlock(dst[:0], index, block)
			if err != nil || got != n || !bytes.Equal(dst[:n], plain) {
				t.Fatalf("block %d of %d bytes: got %d, %v", index, n, got, err)
			}
			if !IsHole(dst[n:payload]) {
				t.Fatalf("block %d of %d bytes: the rest is not zero", index, n)
			}
			if !bytes.Equal(dst[payload:], bytes.Repeat([]byte{0xff}, BlockSize-payload)) {
				t.Fatalf("block %d: wrote behind its payload", index)
			}
			if n > 8 && bytes.Contains(block, plain[:8]) {
				t.Fatalf("block %d of %d bytes holds plaintext", index, n)
			}
		}
	}
}

// Each byte of a block is covered by something: header, selector, nonce,
// length and data, tag.
func TestBlockTampered(t *testing.T) {
	id := FileID{1, 2, 3}
	c := testFile(t, testRoot(t, NewID()), id)
	for _, index := range []uint64{0, 5} {
		block := make([]byte, BlockSize)
		c.SealBlock(block, index, randomBytes(1000))
		dst := make([]byte, BlockPayload)
		for i := range block {
			_, err := c.OpenBlock(dst, index, flipped(block, i))
			want := ErrTampered
			switch {
			case index == 0 && i < 8:
				want = ErrNotSealed
			case index == 0 && i < 10:
				want = ErrUnknownVersion
			}
			if !errors.Is(err, want) {
				t.Fatalf("block %d, byte %d flipped: %v, want %v", index, i, err, want)
			}
		}
		if !IsHole(dst) {
			t.Fatal("a block that failed authentication left bytes in dst")
		}
		if n, err := c.OpenBlock(dst, index, block); err != nil || n != 1000 {
			t.Fatalf("the block itself: %d, %v", n, err)
		}
	}
}

func TestBlockElsewhere(t *testing.T) {
	root, id := NewID(), NewID()
	r := testRoot(t, root)
	c := testFile(t, r, id)
	other := testFile(t, r, NewID())
	otherRoot := testFile(t, testRoot(t, NewID()), id)
	dst := make([]byte, BlockPayload)
	first, later := make([]byte, BlockSize), make([]byte, BlockSize)
	c.SealBlock(first, 0, []byte("first"))
	c.SealBlock(later, 7, []byte("later"))
	// A header of the right file in front of a later block must not make it first.
	dressed := bytes.Clone(later)
	copy(dressed, first[:FileHeaderSize])
	cases := []struct {
		name  string
		c     FileCipher
		index uint64
		block []byte
		want  error
	}{
		{"later block at another index", c, 8, later, ErrTampered},
		{"first block as a later one", c, 7, first, ErrTampered},
		{"later block as the first", c, 0, later, ErrNotSealed},
		{"later block dressed as the first", c, 0, dressed, ErrTampered},
		{"later block in another file", other, 7, later, ErrTampered},
		{"first block in another file", other, 0, first, ErrTampered},
		{"block under another root", otherRoot, 7, later, ErrTampered},
		{"truncated", c, 7, later[:BlockSize-1], ErrTruncated},
		{"extended", c, 7, append(bytes.Clone(later), 0), ErrTruncated},
		{"nothing", c, 0, nil, ErrTruncated},
		{"hole", c, 7, make([]byte, BlockSize), ErrTampered},
	}
	for _, tc := range cases {
		if _, err := tc.c.OpenBlock(dst, tc.index, tc.block); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

// Nobody but a holder of the key can make a block whose length is too large;
// it must be refused all the same, and leave no plaintext behind.
func TestBlockLengthTooLarge(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	sub := c.keys.sealer(1)
	text := bytes.Repeat([]byte{'p'}, lengthSize+BlockPayload)
	binary.BigEndian.PutUint16(text, BlockPayload+1)
	var s blockScratch
	body := sub.aead.Seal([]byte{0, 0}, nil, text, s.bind(&c.id, 1, sub.selector))
	if _, err := s.open(s.data[:], sub, &c.id, 1, body); !errors.Is(err, ErrTampered) || !IsHole(s.data[:]) {
		t.Fatalf("length %d: %v, scratch clear %t", BlockPayload+1, err, IsHole(s.data[:]))
	}
	body[20] ^= 1
	if _, err := s.open(s.data[:], sub, &c.id, 1, body); !errors.Is(err, ErrTampered) || !IsHole(s.data[:]) {
		t.Fatalf("after a failed authentication: %v, scratch clear %t", err, IsHole(s.data[:]))
	}
	binary.BigEndian.PutUint16(text, BlockPayload)
	body = sub.aead.Seal([]byte{0, 0}, nil, text, s.bind(&c.id, 1, sub.selector))
	if n, err := s.open(s.data[:], sub, &c.id, 1, body); err != nil || n != BlockPayload {
		t.Fatalf("length %d: %d, %v", BlockPayload, n, err)
	}
}

// What OpenBlock leaves in its pool holds no plaintext.
func TestBlockScratchIsCleared(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool drops items at random under the race detector")
	}
	c := testFile(t, testRoot(t, NewID()), NewID())
	block, dst := make([]byte, BlockSize), make([]byte, BlockPayload)
	c.SealBlock(block, 1, bytes.Repeat([]byte{'p'}, BlockPayload))
	same := false
	for range 100 { // until the pool gives back what it was given
		marked := blockScratches.Get().(*blockScratch)
		blockScratches.Put(marked)
		if _, err := c.OpenBlock(dst, 1, block); err != nil {
			t.Fatal(err)
		}
		after := blockScratches.Get().(*blockScratch)
		same = same || after == marked
		if !IsHole(after.data[:]) {
			t.Fatal("plaintext in the pool")
		}
		blockScratches.Put(after)
	}
	if !same {
		t.Fatal("the test never saw the scratch that OpenBlock used")
	}
}

func TestOpenBlocks(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	for _, start := range []uint64{0, 1, 9} {
		for count := 1; count <= 6; count++ {
			var sealed, want []byte
			for i := range count {
				index := start + uint64(i)
				n := PayloadOf(int64(index))
				plain := make([]byte, n)
				block := make([]byte, BlockSize)
				switch (i + count) % 4 {
				case 0: // a hole
				case 1: // a short block
					c.SealBlock(block, index, append(plain[:0], "short"...))
				default:
					copy(plain, randomBytes(n))
					c.SealBlock(block, index, plain)
				}
				sealed, want = append(sealed, block...), append(want, plain...)
			}
			around := bytes.Repeat([]byte{0xff}, len(want)+20)
			dst := around[10 : 10+len(want)]
			if bad, err := c.OpenBlocks(dst, start, sealed); err != nil || !bytes.Equal(dst, want) {
				t.Fatalf("%d blocks from %d: block %d, %v", count, start, bad, err)
			}
			if edge := bytes.Repeat([]byte{0xff}, 10); !bytes.Equal(around[:10], edge) || !bytes.Equal(around[10+len(want):], edge) {
				t.Fatalf("%d blocks from %d: wrote around dst", count, start)
			}
			for i := range count {
				broken := bytes.Clone(sealed)
				broken[i*BlockSize+1000] ^= 1
				bad, err := c.OpenBlocks(dst, start, broken)
				if !errors.Is(err, ErrTampered) && !(start == 0 && i == 0 && errors.Is(err, ErrNotSealed)) || bad != start+uint64(i) || !IsHole(dst) {
					t.Fatalf("%d blocks from %d, block %d flipped: block %d, %v", count, start, i, bad, err)
				}
			}
		}
	}
	if _, err := c.OpenBlocks(nil, 1, make([]byte, BlockSize+1)); !errors.Is(err, ErrTruncated) {
		t.Errorf("a block and a byte: %v", err)
	}
	if !panics(func() { c.OpenBlocks(make([]byte, 2*BlockPayload), 0, make([]byte, 2*BlockSize)) }) {
		t.Error("no panic on a dst that does not fit")
	}
}

func TestBlockPanics(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	block := make([]byte, BlockSize)
	c.SealBlock(block, 1, nil)
	for name, f := range map[string]func(){
		"short dst":     func() { c.SealBlock(block[:BlockSize-1], 1, nil) },
		"long dst":      func() { c.SealBlock(make([]byte, BlockSize+1), 1, nil) },
		"long plain":    func() { c.SealBlock(block, 1, make([]byte, BlockPayload+1)) },
		"long first":    func() { c.SealBlock(block, 0, make([]byte, FirstPayload+1)) },
		"open into few": func() { c.OpenBlock(make([]byte, BlockPayload-1), 1, block) },
	} {
		if !panics(f) {
			t.Errorf("%s: no panic", name)
		}
	}
}

func panics(f func()) (did bool) {
	defer func() { did = recover() != nil }()
	f()
	return false
}

// The writer turns to another selector before one key nears the limit of
// random nonces, and blocks of the old one still open.
func TestSelectorTurns(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	before, after := make([]byte, BlockSize), make([]byte, BlockSize)
	c.SealBlock(before, 1, []byte("before"))
	first := c.keys.writer.Load()
	first.seals.Store(sealsPerSelector - 1)
	c.SealBlock(after, 1, nil)
	if c.keys.writer.Load() != first {
		t.Fatal("turned one seal early")
	}
	c.SealBlock(after, 2, []byte("after"))
	second := c.keys.writer.Load()
	if second == first || second.selector == first.selector || second.seals.Load() != 1 {
		t.Fatalf("did not turn: selectors %d, %d", first.selector, second.selector)
	}
	if bytes.Equal(before[:selectorSize], after[:selectorSize]) {
		t.Fatal("blocks carry the same selector")
	}
	dst := make([]byte, BlockPayload)
	for range 2 { // derived, then cached
		if n, err := c.OpenBlock(dst, 1, before); err != nil || string(dst[:n]) != "before" {
			t.Fatal(err)
		}
		if n, err := c.OpenBlock(dst, 2, after); err != nil || string(dst[:n]) != "after" {
			t.Fatal(err)
		}
	}
}

func TestSelectorDrawnPerRoot(t *testing.T) {
	id, key := NewID(), NewID()
	seen := map[uint16]bool{}
	block := make([]byte, BlockSize)
	for range 20 {
		testFile(t, testRoot(t, key), id).SealBlock(block, 1, nil)
		seen[binary.BigEndian.Uint16(block)] = true
	}
	if len(seen) < 15 { // fewer than 15 of 20 out of 65536: less than 1 in 10^15
		t.Fatalf("20 openings drew %d selectors", len(seen))
	}
}

// Selectors that an attacker invents cost a derivation each, but neither
// memory nor the cached ones.
func TestSelectorFlood(t *testing.T) {
	key, id := NewID(), NewID()
	block := make([]byte, BlockSize)
	testFile(t, testRoot(t, key), id).SealBlock(block, 1, []byte("real"))
	r := testRoot(t, key)
	c := testFile(t, r, id)
	dst := make([]byte, BlockPayload)
	if _, err := c.OpenBlock(dst, 1, block); err != nil {
		t.Fatal(err)
	}
	slot := &c.keys.reader[binary.BigEndian.Uint16(block)%openSlots]
	cached := slot.Load()
	if cached == nil {
		t.Fatal("a key that opened a block is not cached")
	}
	forged := bytes.Clone(block)
	for selector := range 4096 {
		if uint16(selector) == cached.selector {
			continue
		}
		binary.BigEndian.PutUint16(forged, uint16(selector))
		if _, err := c.OpenBlock(dst, 1, forged); !errors.Is(err, ErrTampered) {
			t.Fatalf("selector %d: %v", selector, err)
		}
	}
	for i := range c.keys.reader {
		if got := c.keys.reader[i].Load(); got != nil && got != cached {
			t.Fatalf("a forged selector was cached in slot %d", i)
		}
	}
	if slot.Load() != cached {
		t.Fatal("a forged selector displaced the real one")
	}
}

func TestFileHeader(t *testing.T) {
	c := testFile(t, testRoot(t, NewID()), NewID())
	block := make([]byte, BlockSize)
	c.SealBlock(block, 0, nil)
	if id, err := ParseFileHeader(block); err != nil || id != c.id {
		t.Fatalf("%s, %v", id, err)
	}
	reserved := flipped(block, 12)
	for name, tc := range map[string]struct {
		block []byte
		want  error
	}{
		"hole":     {make([]byte, BlockSize), ErrNotSealed},
		"foreign":  {bytes.Repeat([]byte("plain"), 100), ErrNotSealed},
		"short":    {block[:FileHeaderSize-1], ErrTruncated},
		"future":   {flipped(block, 9), ErrUnknownVersion},
		"reserved": {reserved, ErrTampered},
	} {
		if _, err := ParseFileHeader(tc.block); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func TestIsHole(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 9, 100, BlockSize} {
		block := make([]byte, n)
		if !IsHole(block) {
			t.Fatalf("%d zero bytes are no hole", n)
		}
		for i := range block {
			block[i] = 0x80
			if IsHole(block) {
				t.Fatalf("%d bytes, byte %d set: a hole", n, i)
			}
			block[i] = 0
		}
		if n > 0 && IsHole(bytes.Repeat([]byte{1}, n)) {
			t.Fatalf("%d equal bytes are a hole", n)
		}
	}
}

func TestBlocksDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool drops items at random under the race detector")
	}
	r := testRoot(t, NewID())
	c := testFile(t, r, NewID())
	block, plain := make([]byte, BlockSize), make([]byte, BlockPayload)
	plains, blocks := make([]byte, 4*BlockPayload), make([]byte, 4*BlockSize)
	for i := range 4 {
		c.SealBlock(blocks[i*BlockSize:][:BlockSize], uint64(i+1), plain)
	}
	id := c.id
	for name, f := range map[string]func(){
		"SealBlock first": func() { c.SealBlock(block, 0, plain[:FirstPayload]) },
		"SealBlock":       func() { c.SealBlock(block, 1, plain) },
		"OpenBlock":       func() { c.SealBlock(block, 1, plain); c.OpenBlock(plain, 1, block) },
		"OpenBlocks":      func() { c.OpenBlocks(plains, 1, blocks) },
		"File":            func() { r.File(id) },
		"IsHole":          func() { IsHole(block) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

// Many goroutines seal and open blocks of a few files of one Root, while
// selectors are turned.
func TestFilesConcurrently(t *testing.T) {
	r := testRoot(t, NewID())
	ids := []FileID{NewID(), NewID(), NewID()}
	var group sync.WaitGroup
	failed := make(chan error, 8)
	for worker := range 8 {
		group.Go(func() {
			block, dst := make([]byte, BlockSize), make([]byte, BlockPayload)
			for i := range 300 {
				id := ids[(worker+i)%len(ids)]
				plain := fmt.Appendf(nil, "%d/%d", worker, i)
				c, err := r.File(id)
				if err != nil {
					failed <- err
					return
				}
				c.SealBlock(block, uint64(i), plain)
				if i%50 == 11 {
					c.keys.writer.Load().seals.Store(sealsPerSelector)
				}
				again, err := r.File(id)
				if err != nil {
					failed <- err
					return
				}
				if n, err := again.OpenBlock(dst, uint64(i), block); err != nil || !bytes.Equal(dst[:n], plain) {
					failed <- fmt.Errorf("block %d: %q, %w", i, dst[:n], err)
					return
				}
			}
		})
	}
	group.Wait()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
}

// TestSealBlocks: a run sealed at once opens as the same blocks sealed one by
// one, and its source is as it was.
func TestSealBlocks(t *testing.T) {
	root := testRoot(t, NewID())
	c, err := root.File(NewID())
	if err != nil {
		t.Fatal(err)
	}
	for _, count := range []int{0, 1, 2, 7} {
		text := make([]byte, lengthSize+count*BlockPayload)
		for i := range text {
			text[i] = byte(i*7 + i>>8)
		}
		before := bytes.Clone(text)
		sealed := make([]byte, count*BlockSize)
		c.SealBlocks(sealed, 3, text)
		if !bytes.Equal(text, before) {
			t.Fatalf("%d blocks: the source was changed", count)
		}
		got := make([]byte, BlockPayload)
		for i := range count {
			n, err := c.OpenBlock(got, uint64(3+i), sealed[i*BlockSize:][:BlockSize])
			if err != nil || n != BlockPayload || !bytes.Equal(got, text[lengthSize+i*BlockPayload:][:BlockPayload]) {
				t.Fatalf("block %d of %d: %d bytes, %v", i, count, n, err)
			}
		}
	}
}
