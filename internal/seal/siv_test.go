package seal

import (
	"bytes"
	"crypto/rand"
	mrand "math/rand/v2"
	"testing"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

// Ours and Tink's AES-SIV give the same for the same, and refuse the same, with keys,
// lengths and damages of any kind.
func TestSIVIsTinks(t *testing.T) {
	for range 300 {
		key := make([]byte, nameKeyLen)
		rand.Read(key)
		tink, err := subtle.NewAESSIV(bytes.Clone(key))
		if err != nil {
			t.Fatal(err)
		}
		ours, err := newSIV(key)
		if err != nil {
			t.Fatal(err)
		}
		plain := make([]byte, mrand.IntN(3*NameMax))
		rand.Read(plain)
		want, err := tink.EncryptDeterministically(plain, nil)
		if err != nil {
			t.Fatal(err)
		}
		before := []byte("before")
		sealed := ours.seal(bytes.Clone(before), plain)
		if !bytes.Equal(sealed, append(before, want...)) {
			t.Fatalf("%d bytes under %x seal to %x, want %x", len(plain), key, sealed, want)
		}
		sealed = sealed[len(before):]
		if got, ok := ours.open(bytes.Clone(sealed)); !ok || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes under %x open to %x, %v", len(plain), key, got, ok)
		}
		sealed[mrand.IntN(len(sealed))] ^= 1 << mrand.IntN(8)
		damaged := bytes.Clone(sealed)
		if got, ok := ours.open(damaged); ok || got != nil || !IsHole(damaged[sivSize:]) {
			t.Fatalf("damaged: opens to %x, %v, and leaves %x", got, ok, damaged)
		}
		if short := sealed[:mrand.IntN(sivSize)]; len(short) > 0 {
			if _, ok := ours.open(short); ok {
				t.Fatalf("%x opens", short)
			}
		}
	}
}

// What a call has left in the pool is nothing.
func TestSIVScratchIsCleared(t *testing.T) {
	key := make([]byte, nameKeyLen)
	rand.Read(key)
	s, err := newSIV(key)
	if err != nil {
		t.Fatal(err)
	}
	x := &sivScratch{text: make([]byte, 0, NameMax)}
	s.s2v(x, bytes.Repeat([]byte{7}, 100))
	s.crypt(x, make([]byte, 100))
	text := x.text[:cap(x.text)]
	x.back()
	if !IsHole(text) || x.sum != (sivBlock{}) || x.counter != (sivBlock{}) || x.stream != (sivBlock{}) {
		t.Errorf("left: %+v, %x", x, text)
	}
}
