package seal

import (
	"bytes"
	"errors"
	"testing"
)

// seeds adds the sealed side of every vector of a kind.
func seeds(f *testing.F, kind string, add func(v vector)) *Root {
	f.Helper()
	r, file := readVectors(f, kind)
	for _, v := range file.Cases {
		add(v)
	}
	return r
}

// known fails the test unless err is nil or one of the errors a decoder may give.
func known(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, sentinel := range sentinels() {
		if errors.Is(err, sentinel) {
			return
		}
	}
	t.Fatalf("an error outside the vocabulary: %v", err)
}

func FuzzParseFileHeader(f *testing.F) {
	seeds(f, "blocks", func(v vector) { f.Add(v.Sealed[:FileHeaderSize]) })
	f.Fuzz(func(t *testing.T, raw []byte) {
		id, err := ParseFileHeader(raw)
		known(t, err)
		if err != nil {
			return
		}
		again := make([]byte, FileHeaderSize)
		putFileHeader(again, &id)
		if !bytes.Equal(again, raw[:FileHeaderSize]) {
			t.Fatalf("%x writes back as %x", raw[:FileHeaderSize], again)
		}
	})
}

func FuzzOpenBlock(f *testing.F) {
	r := seeds(f, "blocks", func(v vector) { f.Add(v.Index, v.Sealed) })
	_, file := readVectors(f, "blocks")
	id, err := ParseID(file.Cases[0].ID)
	if err != nil {
		f.Fatal(err)
	}
	c := testFile(f, r, id)
	f.Fuzz(func(t *testing.T, index uint64, block []byte) {
		dst := make([]byte, BlockPayload)
		n, err := c.OpenBlock(dst, index, block)
		known(t, err)
		if err != nil && (n != 0 || !IsHole(dst)) {
			t.Fatalf("%d bytes with %v", n, err)
		}
		if err == nil && !isVector(file, index, block) {
			t.Fatalf("a block nobody sealed opens as block %d", index)
		}
	})
}

func isVector(file vectors, index uint64, sealed []byte) bool {
	for _, v := range file.Cases {
		if v.Error == "" && v.Index == index && bytes.Equal(v.Sealed, sealed) {
			return true
		}
	}
	return false
}

func FuzzOpenName(f *testing.F) {
	r := seeds(f, "names", func(v vector) { f.Add(string(v.Sealed)) })
	unremembered := testNameCipher(f, r)
	f.Fuzz(func(t *testing.T, sealed string) {
		name, err := r.OpenName(sealed)
		known(t, err)
		if err != nil {
			return
		}
		if again, err := unremembered.seal(name); err != nil || again != sealed {
			t.Fatalf("%q opens as %q, which seals to %q, %v", sealed, name, again, err)
		}
	})
}

func FuzzSealName(f *testing.F) {
	r := seeds(f, "names", func(v vector) { f.Add(string(v.Plain)) })
	unremembered := testNameCipher(f, r)
	f.Fuzz(func(t *testing.T, name string) {
		sealed, err := r.SealName(name)
		if err != nil {
			if !errors.Is(err, ErrBadName) && !errors.Is(err, ErrNameTooLong) {
				t.Fatal(err)
			}
			return
		}
		if got, err := unremembered.open(sealed); err != nil || got != name {
			t.Fatalf("%q comes back as %q, %v", name, got, err)
		}
		if got, err := r.OpenName(sealed); err != nil || got != name {
			t.Fatalf("%q is remembered as %q, %v", name, got, err)
		}
	})
}

func FuzzOpenTarget(f *testing.F) {
	r := seeds(f, "symlinks", func(v vector) { f.Add(v.Sealed) })
	f.Fuzz(func(t *testing.T, sealed []byte) {
		_, err := r.OpenTarget(sealed)
		known(t, err)
	})
}

func FuzzOpenXattr(f *testing.F) {
	r := seeds(f, "xattrs", func(v vector) { f.Add(v.Place, v.Sealed) })
	id := FileID([]byte("file-id-00000001"))
	f.Fuzz(func(t *testing.T, name string, sealed []byte) {
		value, err := r.OpenXattr(id, name, sealed)
		known(t, err)
		if err == nil && len(value) != len(sealed)-XattrOverhead {
			t.Fatalf("%d bytes open to %d", len(sealed), len(value))
		}
	})
}

func FuzzOpenAttributes(f *testing.F) {
	r := seeds(f, "attributes", func(v vector) { f.Add(v.Sealed, false); f.Add(v.Sealed, true) })
	f.Fuzz(func(t *testing.T, value []byte, sealed bool) {
		if sealed { // what is behind the authentication is read as strictly
			value = sealInode(t, r, value)
		}
		id, a, err := r.OpenAttributes(value)
		known(t, err)
		if err != nil {
			if a != (Attributes{}) {
				t.Fatalf("%+v with %v", a, err)
			}
			return
		}
		again, err := r.SealAttributes(id, a)
		if err != nil || len(again) != len(value) {
			t.Fatalf("%+v seals to %d bytes instead of %d, %v", a, len(again), len(value), err)
		}
	})
}

func FuzzOpenMeta(f *testing.F) {
	r := seeds(f, "meta", func(v vector) { f.Add(v.Place, string(v.Sealed)) })
	f.Fuzz(func(t *testing.T, place, text string) {
		_, err := r.OpenMeta(place, text)
		known(t, err)
		_, keyErr := MetaKey(text)
		known(t, keyErr)
		if err == nil && keyErr != nil {
			t.Fatalf("opens, but has no key: %v", keyErr)
		}
	})
}

func FuzzParseVolumeHeader(f *testing.F) {
	seeds(f, "volumes", func(v vector) { f.Add(v.Sealed) })
	seeds(f, "owned-volumes", func(v vector) { f.Add(v.Sealed) })
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := ParseVolumeHeader(text)
		known(t, err)
		if err != nil {
			return
		}
		if again, err := h.Marshal(); err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q writes back as %q, %v", text, again, err)
		}
	})
}

func FuzzOpenPacked(f *testing.F) {
	r := seeds(f, "packed", func(v vector) { f.Add(v.Sealed) })
	_, file := readVectors(f, "packed")
	f.Fuzz(func(t *testing.T, sealed []byte) {
		_, err := openPackedVector(r, vector{Sealed: sealed})
		known(t, err)
		if err != nil {
			return
		}
		for _, v := range file.Cases {
			if v.Error == "" && bytes.HasPrefix(sealed, v.Sealed) {
				return
			}
		}
		t.Fatal("a part that nobody sealed opens")
	})
}

func FuzzParseKeyring(f *testing.F) {
	r := seeds(f, "keyrings", func(v vector) { f.Add(v.Sealed) })
	_, file := readVectors(f, "keyrings")
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := ParseKeyring(text)
		known(t, err)
		if err != nil {
			return
		}
		if again, err := k.Marshal(); err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q writes back as %q, %v", text, again, err)
		}
		err = r.VerifyKeyring(k)
		known(t, err)
		if err == nil && !isVector(file, 0, text) {
			t.Fatalf("a keyring nobody signed is authentic: %q", text)
		}
	})
}

func FuzzParseObjectHeader(f *testing.F) {
	r := seeds(f, "headers", func(v vector) { f.Add(v.Sealed) })
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := ParseObjectHeader(raw)
		known(t, err)
		if err != nil {
			return
		}
		if again, err := h.Marshal(); err != nil || !bytes.Equal(again, raw[:ObjectHeaderSize]) {
			t.Fatalf("writes back otherwise: %v", err)
		}
		_, err = r.OpenObject(h)
		known(t, err)
	})
}

func FuzzOpenSegment(f *testing.F) {
	var header []byte
	r := seeds(f, "segments", func(v vector) {
		f.Add(v.Sealed, v.Index, v.Last)
		if header == nil {
			header = v.Header
		}
	})
	h, err := ParseObjectHeader(header)
	if err != nil {
		f.Fatal(err)
	}
	c, err := r.OpenObject(h)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, sealed []byte, index uint64, last bool) {
		out, err := c.OpenSegment([]byte("kept"), sealed, index, last)
		known(t, err)
		if !bytes.HasPrefix(out, []byte("kept")) || err != nil && len(out) != 4 || err == nil && len(out) != 4+len(sealed)-SegmentOverhead {
			t.Fatalf("%d bytes, %v", len(out), err)
		}
	})
}

func FuzzParseID(f *testing.F) {
	f.Add("000102030405060708090a0b0c0d0e0f")
	f.Add("000102030405060708090A0B0C0D0E0F")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		known(t, err)
		if err == nil && id.String() != s {
			t.Fatalf("%q is %s", s, id)
		}
	})
}

func FuzzObjectSizes(f *testing.F) {
	f.Add(int64(1052), 1)
	f.Add(int64(2*1024+2*65564), 2)
	f.Fuzz(func(t *testing.T, sealed int64, parts int) {
		plain, err := PlainObjectSize(sealed, parts)
		known(t, err)
		if err != nil {
			return
		}
		if plain < 0 || plain >= sealed {
			t.Fatalf("%d sealed bytes in %d parts hold %d", sealed, parts, plain)
		}
		if parts == 1 && SealedObjectSize(plain) != sealed {
			t.Fatalf("%d seals to %d, not %d", plain, SealedObjectSize(plain), sealed)
		}
	})
}
