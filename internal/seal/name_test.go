package seal

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

func TestNames(t *testing.T) {
	r := testRoot(t, NewID())
	for _, name := range []string{
		"a", "...", ".hidden", "..x", "hello.txt", "with space", "umlaut-ä", "not\xffutf8", "new\nline",
		"fifteen-bytes-x", "sixteen-bytes-xx", "seventeen-bytes-x", strings.Repeat("x", NameMax),
	} {
		sealed, err := r.SealName(name)
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if len(sealed) > sealedNameMax || strings.ContainsAny(sealed, "/.=+\x00") {
			t.Errorf("%q seals to %q", name, sealed)
		}
		if again, _ := r.SealName(name); again != sealed {
			t.Errorf("%q seals to %q and %q", name, sealed, again)
		}
		if got, err := r.OpenName(sealed); err != nil || got != name {
			t.Errorf("%q opens as %q, %v", name, got, err)
		}
		if _, err := testRoot(t, NewID()).OpenName(sealed); !errors.Is(err, ErrTampered) {
			t.Errorf("%q opens under another root: %v", name, err)
		}
	}
	if longest, _ := r.SealName(strings.Repeat("x", NameMax)); len(longest) != sealedNameMax {
		t.Errorf("the longest name seals to %d bytes", len(longest))
	}
}

func TestNamesRefused(t *testing.T) {
	r := testRoot(t, NewID())
	for name, want := range map[string]error{
		"": ErrBadName, ".": ErrBadName, "..": ErrBadName, "a/b": ErrBadName, "/": ErrBadName, "a\x00": ErrBadName,
		strings.Repeat("x", NameMax+1): ErrNameTooLong,
	} {
		if sealed, err := r.SealName(name); !errors.Is(err, want) || sealed != "" {
			t.Errorf("SealName(%q) = %q, %v", name, sealed, err)
		}
	}
}

// Someone with the key, or a bug of ours, may have sealed what no directory
// entry can be called: opening it must not lead out of the directory.
func TestSealedNamesThatLeadElsewhere(t *testing.T) {
	r := testRoot(t, NewID())
	c, err := r.nameCipher()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "..", "a/b", "../x", "/", "a\x00"} {
		var s nameScratch
		sealed := sealedText.EncodeToString(c.seal(&s, copy(s.raw[sivSize:], name)))
		if got, err := r.OpenName(sealed); !errors.Is(err, ErrTampered) || got != "" {
			t.Errorf("%q opens as %q, %v", name, got, err)
		}
	}
	var s nameScratch
	if _, err := r.OpenName(sealedText.EncodeToString(c.seal(&s, 0))); !errors.Is(err, ErrNotSealed) {
		t.Errorf("the empty name: %v", err)
	}
}

func TestNamesTampered(t *testing.T) {
	r := testRoot(t, NewID())
	sealed, err := r.SealName("hello.txt")
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := base64.RawURLEncoding.DecodeString(sealed)
	for i := range raw {
		if _, err := r.OpenName(base64.RawURLEncoding.EncodeToString(flipped(raw, i))); !errors.Is(err, ErrTampered) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	for what, name := range map[string]string{
		"foreign":         "lost+found",
		"volume header":   VolumeHeaderName,
		"empty":           "",
		"padded":          sealed + "=",
		"line end":        sealed[:4] + "\n" + sealed[4:],
		"carriage return": sealed + "\r",
		"short":           sealed[:10],
		"only an iv":      base64.RawURLEncoding.EncodeToString(raw[:sivSize]),
		"too long":        strings.Repeat("A", sealedNameMax+1),
		"dot":             ".", "dots": "..",
	} {
		if _, err := r.OpenName(name); !errors.Is(err, ErrNotSealed) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Two spellings of one sealed name would be two lower files for one plain name.
func TestNamesDecodeCanonically(t *testing.T) {
	r := testRoot(t, NewID())
	for _, name := range []string{"12", "123", "1234"} { // 18, 19 and 20 bytes: every remainder by 3
		sealed, err := r.SealName(name)
		if err != nil {
			t.Fatal(err)
		}
		spellings := 0
		for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
			if got, err := r.OpenName(sealed[:len(sealed)-1] + string(c)); err == nil && got == name {
				spellings++
			}
		}
		if spellings != 1 {
			t.Errorf("%q has %d spellings", name, spellings)
		}
	}
}

func TestNamesAreTinks(t *testing.T) {
	key := randomBytes(nameKeyLen)
	ours, err := newNameCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	tinks, err := subtle.NewAESSIV(key)
	if err != nil {
		t.Fatal(err)
	}
	for n := range NameMax + 1 {
		plain := randomBytes(n)
		want, err := tinks.EncryptDeterministically(plain, nil)
		if err != nil {
			t.Fatal(err)
		}
		var s nameScratch
		got := ours.seal(&s, copy(s.raw[sivSize:], plain))
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: sealed differs from Tink's", n)
		}
		if name, ok := ours.open(&s, len(want)); !ok || !bytes.Equal(name, plain) {
			t.Fatalf("%d bytes: does not open", n)
		}
	}
}

func TestNamesDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool drops items at random under the race detector")
	}
	r := testRoot(t, NewID())
	sealed, err := r.SealName("hello.txt")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 0, sealedNameMax)
	for name, f := range map[string]func(){
		"AppendSealName": func() { r.AppendSealName(buf, "hello.txt") },
		"AppendOpenName": func() { r.AppendOpenName(buf, sealed) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
	if out, _ := r.AppendSealName([]byte("dir/"), "hello.txt"); string(out) != "dir/"+sealed {
		t.Errorf("AppendSealName gives %q", out)
	}
}
