package seal

import (
	"bytes"
	"errors"
	"testing"
)

// TestRememberedObject: an object that was opened before opens again, no header
// that differs in any bit does, and after a Wipe none does.
func TestRememberedObject(t *testing.T) {
	Do(func() {
		r := testRoot(t, NewID())
		for _, size := range []uint64{memoFrom - 1, memoFrom, 1 << 30} {
			h, c, err := r.NewObject(ObjectHeader{Object: NewID(), PlainSize: size, KeyARN: "arn", WrappedKey: []byte("wrapped")})
			if err != nil {
				t.Fatal(err)
			}
			plain := bytes.Repeat([]byte("x"), SegmentSize)
			sealed := c.SealSegment(nil, plain, 0, false)
			for range 3 {
				opened, err := r.OpenObject(h)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := opened.OpenSegment(nil, sealed, 0, false); err != nil || !bytes.Equal(got, plain) {
					t.Fatal(err)
				}
			}
			if kept := r.remembered(&h) != nil; kept != (size >= memoFrom) {
				t.Errorf("%d bytes: remembered %t", size, kept)
			}
			raw, err := h.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			for bit := 0; bit < 8*ObjectHeaderSize; bit += 5 {
				raw[bit/8] ^= 1 << (bit % 8)
				if other, err := ParseObjectHeader(raw); err == nil {
					if _, err = r.OpenObject(other); err == nil {
						t.Fatalf("a header with bit %d changed is opened", bit)
					}
				}
				raw[bit/8] ^= 1 << (bit % 8)
			}
		}
		h, _, err := r.NewObject(ObjectHeader{Object: NewID(), PlainSize: memoFrom})
		if err == nil {
			_, err = r.OpenObject(h)
		}
		if err != nil || r.remembered(&h) == nil {
			t.Fatal(err)
		}
		r.Wipe()
		if _, err := r.OpenObject(h); !errors.Is(err, ErrWiped) {
			t.Errorf("after a wipe: %v", err)
		}
		r.remember(&h, &ObjectCipher{})
		if r.remembered(&h) != nil {
			t.Error("something is remembered after a wipe")
		}
	})
}
