package seal

import (
	"bytes"
	"crypto/rand"
	"testing"
)

// testRoot returns a Root with a fixed secret.
func testRoot(t testing.TB, id KeyID) *Root {
	t.Helper()
	r, err := NewRoot(id, bytes.Repeat([]byte{7}, RootSize))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func testFile(t testing.TB, r *Root, id FileID) FileCipher {
	t.Helper()
	c, err := r.File(id)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// testNameCipher returns what seals and opens r's names without the memo.
func testNameCipher(t testing.TB, r *Root) *nameCipher {
	t.Helper()
	c, err := r.nameCipher()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// flipped returns b with bit 0 of byte i inverted.
func flipped(b []byte, i int) []byte {
	c := bytes.Clone(b)
	c[i] ^= 1
	return c
}
