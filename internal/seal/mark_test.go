package seal

import (
	"bytes"
	"errors"
	"testing"
)

func TestVolumeMark(t *testing.T) {
	id := VolumeID{0xaa, 0xbb}
	r := testRoot(t, id)
	m, err := r.SignVolumeMark(VolumeMark{Volume: id, Generation: 12})
	if err != nil {
		t.Fatal(err)
	}
	text := m.Marshal()
	got, err := ParseVolumeMark(text)
	if err != nil || got.Volume != id || got.Generation != 12 || r.VerifyVolumeMark(got) != nil {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range text {
		for _, bit := range []byte{1, 0x20, 0x80} {
			changed := bytes.Clone(text)
			changed[i] ^= bit
			got, err := ParseVolumeMark(changed)
			if err == nil {
				err = r.VerifyVolumeMark(got)
			}
			if !errors.Is(err, ErrTampered) && !errors.Is(err, ErrNotSealed) && !errors.Is(err, ErrWrongKey) {
				t.Fatalf("byte %d (%q) changed: %v", i, text[i], err)
			}
		}
		if _, err := ParseVolumeMark(text[:i]); err == nil {
			t.Fatalf("the first %d bytes: accepted", i)
		}
	}
	if _, err := ParseVolumeMark(append(text, text...)); err == nil {
		t.Error("twice: accepted")
	}
	if err := testRoot(t, NewID()).VerifyVolumeMark(got); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another volume: %v", err)
	}
}

func FuzzParseVolumeMark(f *testing.F) {
	r := testRoot(f, VolumeID{1})
	m, err := r.SignVolumeMark(VolumeMark{Volume: VolumeID{1}, Generation: 7})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.Marshal())
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseVolumeMark(text)
		known(t, err)
		if err == nil && !bytes.Equal(m.Marshal(), text) {
			t.Fatalf("%q writes back otherwise", text)
		}
	})
}
