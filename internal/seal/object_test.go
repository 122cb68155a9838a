package seal

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
)

func testObject(t testing.TB, r *Root, h ObjectHeader) (ObjectHeader, *ObjectCipher) {
	t.Helper()
	h, c, err := r.NewObject(h)
	if err != nil {
		t.Fatal(err)
	}
	return h, c
}

func marshalObject(t testing.TB, h ObjectHeader) []byte {
	t.Helper()
	raw, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// sealObject seals a whole object the way a caller does.
func sealObject(t testing.TB, r *Root, h ObjectHeader, plain []byte) []byte {
	t.Helper()
	h.PlainSize = uint64(len(plain))
	h, c := testObject(t, r, h)
	out := marshalObject(t, h)
	for index, count := int64(0), SegmentCount(int64(len(plain))); index < count; index++ {
		n := min(len(plain), SegmentSize)
		out = c.SealSegment(out, plain[:n], uint64(index), index == count-1)
		plain = plain[n:]
	}
	return out
}

// openRange opens plain[off:off+n] of a sealed object the way a caller does.
func openRange(t testing.TB, r *Root, sealed []byte, off, n int64) []byte {
	t.Helper()
	h, err := ParseObjectHeader(sealed)
	if err != nil {
		t.Fatal(err)
	}
	c, err := r.OpenObject(h)
	if err != nil {
		t.Fatal(err)
	}
	size, err := PlainObjectSize(int64(len(sealed)), 1)
	if err != nil || uint64(size) != h.PlainSize {
		t.Fatalf("%d, %v, header says %d", size, err, h.PlainSize)
	}
	first, last, from, to, skip := SegmentSpan(off, n, size)
	var plain []byte
	part := sealed[from:to]
	for index := first; index <= last; index++ {
		m := min(len(part), sealedSegment)
		plain, err = c.OpenSegment(plain, part[:m], uint64(index), index == SegmentCount(size)-1)
		if err != nil {
			t.Fatal(err)
		}
		part = part[m:]
	}
	return plain[skip:][:min(n, size-off)]
}

func TestObjects(t *testing.T) {
	r := testRoot(t, NewID())
	for _, n := range []int{0, 1, SegmentSize - 1, SegmentSize, SegmentSize + 1, 3 * SegmentSize, 200000} {
		plain := randomBytes(n)
		sealed := sealObject(t, r, ObjectHeader{Object: NewID(), KeyARN: "arn:aws:kms:x", WrappedKey: []byte("wrapped")}, plain)
		if int64(len(sealed)) != SealedObjectSize(int64(n)) {
			t.Fatalf("%d bytes seal to %d, arithmetic says %d", n, len(sealed), SealedObjectSize(int64(n)))
		}
		if got := openRange(t, r, sealed, 0, int64(n)); !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes do not come back", n)
		}
		for _, off := range []int64{0, 1, SegmentSize - 1, SegmentSize, 100000} {
			for _, length := range []int64{1, 2, SegmentSize, 70000} {
				if off >= int64(n) {
					continue
				}
				want := plain[off:min(off+length, int64(n))]
				if got := openRange(t, r, sealed, off, length); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes at %d of %d do not come back", length, off, n)
				}
			}
		}
	}
}

func TestObjectHeader(t *testing.T) {
	r := testRoot(t, NewID())
	for _, h := range []ObjectHeader{
		{},
		{Object: NewID(), Part: 1, PlainSize: 5 << 30},
		{Object: NewID(), Part: MaxParts, PlainSize: PlainSizeUnknown, KeyARN: strings.Repeat("a", maxARN), WrappedKey: randomBytes(MaxWrappedKey - maxARN)},
		{PlainSize: MaxObjectSize, WrappedKey: randomBytes(MaxWrappedKey)},
	} {
		sealed, _ := testObject(t, r, h)
		raw := marshalObject(t, sealed)
		got, err := ParseObjectHeader(append(raw, "segments follow"...))
		if err != nil {
			t.Fatal(err)
		}
		if again := marshalObject(t, got); !bytes.Equal(again, raw) {
			t.Fatal("parsed header marshals to other bytes")
		}
		if got.Suite != SuiteAES256GCM || got.Key != r.ID() || got.Object != h.Object || got.Part != h.Part ||
			got.PlainSize != h.PlainSize || got.KeyARN != h.KeyARN || !bytes.Equal(got.WrappedKey, h.WrappedKey) {
			t.Fatalf("got %+v, want %+v", got, h)
		}
		if _, err := r.OpenObject(got); err != nil {
			t.Fatal(err)
		}
	}
	for name, h := range map[string]ObjectHeader{
		"long key":  {WrappedKey: make([]byte, MaxWrappedKey+1)},
		"long both": {KeyARN: "a", WrappedKey: make([]byte, MaxWrappedKey)},
		"long arn":  {KeyARN: strings.Repeat("a", maxARN+1)},
		"part":      {Part: MaxParts + 1},
		"size":      {PlainSize: MaxObjectSize + 1},
		"suite":     {Suite: SuiteZstd},
	} {
		if _, _, err := r.NewObject(h); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if name != "suite" {
			h.Suite = SuiteAES256GCM
		}
		if _, err := h.Marshal(); err == nil {
			t.Errorf("%s: marshalled", name)
		}
	}
}

// Every byte of the header is either strict or authenticated.
func TestObjectHeaderTampered(t *testing.T) {
	r := testRoot(t, NewID())
	h, _ := testObject(t, r, ObjectHeader{Object: NewID(), Part: 2, PlainSize: 1000, KeyARN: "arn:aws:kms:x", WrappedKey: randomBytes(184)})
	raw := marshalObject(t, h)
	for i := range raw {
		got, err := ParseObjectHeader(flipped(raw, i))
		if err == nil {
			_, err = r.OpenObject(got)
		}
		want := []error{ErrTampered}
		switch {
		case i < 8:
			want = []error{ErrNotSealed}
		case i < 11:
			want = []error{ErrUnknownVersion}
		case i >= 16 && i < 24:
			want = []error{ErrTampered, ErrImpossibleSize}
		case i >= 40 && i < 120: // key id, salt, commitment
			want = []error{ErrWrongKey}
		}
		found := false
		for _, w := range want {
			found = found || errors.Is(err, w)
		}
		if !found {
			t.Fatalf("byte %d flipped: %v, want %v", i, err, want)
		}
	}
	if _, err := ParseObjectHeader(raw[:ObjectHeaderSize-1]); !errors.Is(err, ErrTruncated) {
		t.Errorf("truncated: %v", err)
	}
	sameID, err := NewRoot(r.ID(), make([]byte, RootSize))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sameID.OpenObject(h); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another secret of the same id: %v", err)
	}
}

func TestSegmentsElsewhere(t *testing.T) {
	r := testRoot(t, NewID())
	object := NewID()
	h, c := testObject(t, r, ObjectHeader{Object: object, Part: 1})
	full, tail := randomBytes(SegmentSize), randomBytes(100)
	middle := c.SealSegment(nil, full, 1, false)
	last := c.SealSegment(nil, tail, 2, true)
	lastFull := c.SealSegment(nil, full, 2, true)
	// The same salt and key in another part or object, as a splice would have it.
	otherPart, otherObject := *c, *c
	otherPart.part++
	otherObject.object[0]++
	_, retry := testObject(t, r, h)
	cases := []struct {
		name   string
		c      *ObjectCipher
		sealed []byte
		index  uint64
		last   bool
		want   error
	}{
		{"another index", c, middle, 2, false, ErrTampered},
		{"middle as last", c, middle, 1, true, ErrTampered},
		{"last as middle", c, lastFull, 2, false, ErrTampered},
		{"short one as middle", c, last, 2, false, ErrTampered},
		{"another part", &otherPart, middle, 1, false, ErrTampered},
		{"another object", &otherObject, middle, 1, false, ErrTampered},
		{"another attempt", retry, middle, 1, false, ErrTampered},
		{"truncated", c, last[:SegmentOverhead-1], 2, true, ErrTruncated},
		{"cut", c, last[:len(last)-1], 2, true, ErrTampered},
		{"extended", c, append(bytes.Clone(last), 0), 2, true, ErrTampered},
		{"extended beyond a segment", c, append(bytes.Clone(lastFull), 0), 2, true, ErrTampered},
		{"empty at the end", c, last[:SegmentOverhead], 2, true, ErrTampered},
	}
	for _, tc := range cases {
		dst := []byte("kept")
		out, err := tc.c.OpenSegment(dst, tc.sealed, tc.index, tc.last)
		if !errors.Is(err, tc.want) || string(out) != "kept" {
			t.Errorf("%s: %q, %v, want %v", tc.name, out, err, tc.want)
		}
	}
	for i := range last {
		if _, err := c.OpenSegment(nil, flipped(last, i), 2, true); !errors.Is(err, ErrTampered) {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
	}
	if got, err := c.OpenSegment([]byte("before "), last, 2, true); err != nil || !bytes.Equal(got, append([]byte("before "), tail...)) {
		t.Fatalf("the segment itself: %v", err)
	}
}

func TestSegmentPanics(t *testing.T) {
	_, c := testObject(t, testRoot(t, NewID()), ObjectHeader{})
	for name, f := range map[string]func(){
		"short middle": func() { c.SealSegment(nil, make([]byte, SegmentSize-1), 0, false) },
		"too long":     func() { c.SealSegment(nil, make([]byte, SegmentSize+1), 0, true) },
		"too many":     func() { c.SealSegment(nil, make([]byte, SegmentSize), maxSegments, false) },
		"empty last":   func() { c.SealSegment(nil, nil, 1, true) },
	} {
		if !panics(f) {
			t.Errorf("%s: no panic", name)
		}
	}
}

func TestEveryAttemptHasItsOwnKey(t *testing.T) {
	r := testRoot(t, NewID())
	h, _ := testObject(t, r, ObjectHeader{})
	again, _ := testObject(t, r, h)
	if h.Salt == again.Salt || h.Commitment == again.Commitment || h.Salt == [SaltSize]byte{} {
		t.Fatal("a second attempt has the first one's salt")
	}
}

func TestUploadObjectID(t *testing.T) {
	for _, upload := range []string{"", "a", "b"} {
		sum := sha256.Sum256([]byte("byokd/v1/upload\x00" + upload))
		if got := UploadObjectID(upload); !bytes.Equal(got[:], sum[:IDSize]) {
			t.Errorf("upload %q is object %s, want %x", upload, got, sum[:IDSize])
		}
	}
}

func TestSegmentsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool drops items at random under the race detector")
	}
	_, c := testObject(t, testRoot(t, NewID()), ObjectHeader{})
	plain := make([]byte, SegmentSize)
	sealed := c.SealSegment(nil, plain, 0, false)
	dst := make([]byte, 0, sealedSegment)
	for name, f := range map[string]func(){
		"SealSegment": func() { c.SealSegment(dst, plain, 0, false) },
		"OpenSegment": func() { c.OpenSegment(dst, sealed, 0, false) },
	} {
		if n := testing.AllocsPerRun(50, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}
