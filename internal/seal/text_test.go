package seal

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestTargets(t *testing.T) {
	r := testRoot(t, NewID())
	for _, n := range []int{0, 1, 100, TargetMax} {
		target := bytes.Repeat([]byte("/a"), n)[:n]
		sealed, err := r.SealTarget(target)
		if err != nil {
			t.Fatal(err)
		}
		if len(sealed) > sealedTargetMax || bytes.ContainsAny(sealed, "/\x00") {
			t.Errorf("%d bytes seal to %d", n, len(sealed))
		}
		if got, err := r.OpenTarget(sealed); err != nil || !bytes.Equal(got, target) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if again, _ := r.SealTarget(target); bytes.Equal(again, sealed) {
			t.Error("the same target seals to the same text twice")
		}
	}
	if _, err := r.SealTarget(make([]byte, TargetMax+1)); !errors.Is(err, ErrTooLong) {
		t.Errorf("a target too long: %v", err)
	}
	if sealedText.EncodedLen(TargetMax+1+SegmentOverhead) <= sealedTargetMax {
		t.Error("TargetMax is smaller than it could be")
	}
	if sealedText.EncodedLen(740+SegmentOverhead) > 1024 {
		t.Error("XFS does not hold what the comment says")
	}
}

func TestTargetsTampered(t *testing.T) {
	r := testRoot(t, NewID())
	sealed, err := r.SealTarget([]byte("../up"))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := sealedText.DecodeString(string(sealed))
	for i := range raw {
		if _, err := r.OpenTarget(sealedText.AppendEncode(nil, flipped(raw, i))); !errors.Is(err, ErrTampered) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	for what, target := range map[string]string{
		"foreign": "../etc/passwd", "short": "AAAA", "empty": "", "long": strings.Repeat("A", sealedTargetMax+1),
	} {
		if _, err := r.OpenTarget([]byte(target)); !errors.Is(err, ErrNotSealed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := testRoot(t, NewID()).OpenTarget(sealed); !errors.Is(err, ErrTampered) {
		t.Errorf("under another root: %v", err)
	}
	// A sealed name or metadata in the place of a target.
	name, _ := r.SealName("a-long-enough-file-name")
	if _, err := r.OpenTarget([]byte(name)); !errors.Is(err, ErrTampered) {
		t.Errorf("a name as a target: %v", err)
	}
	meta, _ := r.SealMeta("", []byte("m"))
	if _, err := r.OpenTarget([]byte(meta)); !errors.Is(err, ErrTampered) {
		t.Errorf("metadata as a target: %v", err)
	}
}

func TestXattrs(t *testing.T) {
	r, file := testRoot(t, NewID()), NewID()
	for _, n := range []int{0, 1, 4096} {
		value := randomBytes(n)
		sealed, err := r.SealXattr(file, "user.a", value)
		if err != nil || len(sealed) != n+XattrOverhead {
			t.Fatalf("%d bytes seal to %d, %v", n, len(sealed), err)
		}
		if got, err := r.OpenXattr(file, "user.a", sealed); err != nil || !bytes.Equal(got, value) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	sealed, _ := r.SealXattr(file, "user.a", []byte("value"))
	for i := range sealed {
		want := ErrTampered
		if i == 0 {
			want = ErrUnknownVersion
		}
		if _, err := r.OpenXattr(file, "user.a", flipped(sealed, i)); !errors.Is(err, want) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	if _, err := r.OpenXattr(file, "user.b", sealed); !errors.Is(err, ErrTampered) {
		t.Errorf("under another name: %v", err)
	}
	if _, err := r.OpenXattr(NewID(), "user.a", sealed); !errors.Is(err, ErrTampered) {
		t.Errorf("on another file: %v", err)
	}
	if _, err := r.OpenXattr(file, "user.a", sealed[:XattrOverhead-1]); !errors.Is(err, ErrTruncated) {
		t.Errorf("truncated: %v", err)
	}
	if _, err := r.OpenXattr(file, "user.a", sealed[:XattrOverhead]); !errors.Is(err, ErrTampered) {
		t.Errorf("cut: %v", err)
	}
}

func TestMeta(t *testing.T) {
	id := NewID()
	r := testRoot(t, id)
	for _, n := range []int{0, 1, 1400} {
		plain := randomBytes(n)
		text, err := r.SealMeta("documents", plain)
		if err != nil {
			t.Fatal(err)
		}
		if n == 1400 && len(text) > 2000 {
			t.Errorf("1400 bytes take %d of S3's 2048", len(text))
		}
		if got, err := r.OpenMeta("documents", text); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if got, err := MetaKey(text); err != nil || got != id {
			t.Fatalf("MetaKey: %s, %v", got, err)
		}
	}
	if _, err := r.SealMeta("", make([]byte, metaMax)); !errors.Is(err, ErrTooLong) {
		t.Errorf("too much metadata: %v", err)
	}
}

func TestMetaTampered(t *testing.T) {
	r := testRoot(t, NewID())
	text, err := r.SealMeta("documents", []byte("name=report.pdf"))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := sealedText.DecodeString(text)
	for i := range raw {
		want := ErrTampered
		switch {
		case i == 0:
			want = ErrUnknownVersion
		case i < metaPrefix:
			want = ErrWrongKey
		}
		if _, err := r.OpenMeta("documents", sealedText.EncodeToString(flipped(raw, i))); !errors.Is(err, want) {
			t.Errorf("byte %d flipped: %v, want %v", i, err, want)
		}
	}
	if _, err := r.OpenMeta("backups", text); !errors.Is(err, ErrTampered) {
		t.Errorf("in another place: %v", err)
	}
	if _, err := testRoot(t, NewID()).OpenMeta("documents", text); !errors.Is(err, ErrWrongKey) {
		t.Errorf("under another key: %v", err)
	}
	if _, err := r.OpenMeta("documents", text[:20]); !errors.Is(err, ErrTruncated) {
		t.Errorf("truncated: %v", err)
	}
	if _, err := r.OpenMeta("documents", "not base64!"); !errors.Is(err, ErrNotSealed) {
		t.Errorf("foreign: %v", err)
	}
	if _, err := MetaKey(strings.Repeat("A", metaMax+1)); !errors.Is(err, ErrNotSealed) {
		t.Errorf("long: %v", err)
	}
}

func TestIDs(t *testing.T) {
	id := NewID()
	if id.IsZero() || id == NewID() {
		t.Fatal("ids are not random")
	}
	if got, err := ParseID(id.String()); err != nil || got != id {
		t.Fatalf("%s, %v", got, err)
	}
	for _, bad := range []string{"", "00", strings.Repeat("0", 33), strings.Repeat("G", 32), strings.Repeat("AB", 16)} {
		if _, err := ParseID(bad); !errors.Is(err, ErrNotSealed) {
			t.Errorf("ParseID(%q): %v", bad, err)
		}
	}
}

// TestTargetSize: the length of a target is told by that of its sealed form.
func TestTargetSize(t *testing.T) {
	r := testRoot(t, NewID())
	for n := range TargetMax + 1 {
		sealed, err := r.SealTarget(make([]byte, n))
		if err != nil {
			t.Fatal(err)
		}
		if got := TargetSize(int64(len(sealed))); got != int64(n) {
			t.Fatalf("a target of %d bytes is told as %d", n, got)
		}
	}
	for _, sealed := range []int64{-1, 0, 1, 1 << 40} {
		if got := TargetSize(sealed); got < 0 || got > TargetMax+8 {
			t.Errorf("%d sealed bytes: a target of %d", sealed, got)
		}
	}
}
