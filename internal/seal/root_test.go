package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

func TestDeriveIsHKDF(t *testing.T) {
	id := NewID()
	secret := bytes.Repeat([]byte{7}, RootSize)
	r := testRoot(t, id)
	for size := 1; size <= derivedMax; size++ {
		context := randomBytes(size % 33)
		want, err := hkdf.Key(sha256.New, secret, id[:], labelObject+string(context), size)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := r.derive(got, labelObject, context); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: %x, want %x, %v", size, got, want, err)
		}
	}
	two := make([]byte, keySize)
	joined := make([]byte, keySize)
	if err := errors.Join(r.derive(two, labelBlock, []byte("a"), []byte("b")), r.derive(joined, labelBlock, []byte("ab"))); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(two, joined) {
		t.Fatal("context is not concatenated")
	}
}

// What follows a label has a fixed length, so different purposes get different
// keys as long as no label begins another.
func TestLabelsAreDistinct(t *testing.T) {
	labels := []string{labelBlock, labelAttributes, labelName, labelTarget, labelXattr, labelMeta, labelVolume, labelObject, labelObjectCommit, labelObjectHeader, labelUpload}
	for i, a := range labels {
		for j, b := range labels {
			if i != j && strings.HasPrefix(a, b) {
				t.Errorf("label %q begins with %q", a, b)
			}
		}
	}
}

func TestKeysDiffer(t *testing.T) {
	r := testRoot(t, KeyID{1})
	other := testRoot(t, KeyID{2})
	seen := map[[keySize]byte]string{}
	add := func(r *Root, name, label string, context ...[]byte) {
		t.Helper()
		var key [keySize]byte
		if err := r.derive(key[:], label, context...); err != nil {
			t.Fatal(err)
		}
		if first := seen[key]; first != "" {
			t.Errorf("%s and %s are the same key", first, name)
		}
		seen[key] = name
	}
	file := FileID{3}
	add(r, "selector 0", labelBlock, []byte{0, 0})
	add(r, "selector 1", labelBlock, []byte{0, 1})
	add(r, "xattr", labelXattr, file[:])
	add(r, "names", labelName)
	add(r, "symlinks", labelTarget)
	add(other, "selector 0 of another root", labelBlock, []byte{0, 0})
	add(other, "names of another root", labelName)
}

func TestNewRootRefusesOtherLengths(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33} {
		if _, err := NewRoot(NewID(), make([]byte, n)); err == nil {
			t.Errorf("a root key of %d bytes was taken", n)
		}
	}
}

func TestNewRootCopies(t *testing.T) {
	id, secret := NewID(), randomBytes(RootSize)
	r, err := NewRoot(id, secret)
	if err != nil {
		t.Fatal(err)
	}
	again, err := NewRoot(id, secret)
	if err != nil {
		t.Fatal(err)
	}
	clear(secret)
	a, err := r.SealName("name")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := again.SealName("name"); err != nil || a != b {
		t.Fatalf("clearing the caller's slice changed a key: %q, %q, %v", a, b, err)
	}
}

func TestWipe(t *testing.T) {
	id := NewID()
	r := testRoot(t, id)
	c := testFile(t, r, NewID())
	block := make([]byte, BlockSize)
	c.SealBlock(block, 1, []byte("before"))
	name, err := r.SealName("name")
	if err != nil {
		t.Fatal(err)
	}
	header, _, err := r.NewObject(ObjectHeader{})
	if err != nil {
		t.Fatal(err)
	}
	meta, err := r.SealMeta("", []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	r.Wipe()
	r.Wipe() // harmless
	checks := map[string]func() error{
		"File":       func() error { _, err := r.File(c.id); return err },
		"SealName":   func() error { _, err := r.SealName("name"); return err },
		"OpenName":   func() error { _, err := r.OpenName(name); return err },
		"SealTarget": func() error { _, err := r.SealTarget([]byte("t")); return err },
		"SealXattr":  func() error { _, err := r.SealXattr(id, "user.a", nil); return err },
		"SealMeta":   func() error { _, err := r.SealMeta("", nil); return err },
		"OpenMeta":   func() error { _, err := r.OpenMeta("", meta); return err },
		"NewObject":  func() error { _, _, err := r.NewObject(ObjectHeader{}); return err },
		"OpenObject": func() error { _, err := r.OpenObject(header); return err },
		"SignVolumeHeader": func() error {
			_, err := r.SignVolumeHeader(VolumeHeader{Volume: id, KeyARN: "a", WrappedRoot: []byte("w")})
			return err
		},
	}
	for name, check := range checks {
		if err := check(); !errors.Is(err, ErrWiped) {
			t.Errorf("%s after Wipe: %v", name, err)
		}
	}
	if r.prk != nil || r.blocks.Load() != nil || r.names.Load() != nil || r.targets.Load() != nil || r.meta.Load() != nil {
		t.Error("Wipe left a reference to a key")
	}
	// A straggler finishes with the right key, and cannot get a new one.
	dst := make([]byte, BlockPayload)
	if n, err := c.OpenBlock(dst, 1, block); err != nil || string(dst[:n]) != "before" {
		t.Errorf("a straggler's cached key: %v", err)
	}
	binary.BigEndian.PutUint16(block, binary.BigEndian.Uint16(block)+1)
	if _, err := c.OpenBlock(dst, 1, block); !errors.Is(err, ErrWiped) {
		t.Errorf("a straggler's new key: %v", err)
	}
	c.keys.writer.Load().seals.Store(sealsPerSelector)
	if !panics(func() { c.SealBlock(block, 1, nil) }) {
		t.Error("a straggler sealed under a new key")
	}
}
