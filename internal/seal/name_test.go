package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/tink-crypto/tink-go/v2/daead/subtle"
)

func TestNames(t *testing.T) {
	r := testRoot(t, NewID())
	twin := testRoot(t, r.ID()) // remembers nothing of what r sealed
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
		for who, r := range map[string]*Root{"another root of the key": twin, "the memo": r} {
			if got, err := r.OpenName(sealed); err != nil || got != name {
				t.Errorf("%q opens by %s as %q, %v", name, who, got, err)
			}
			if again, err := r.SealName(name); err != nil || again != sealed {
				t.Errorf("%q seals to %q and by %s to %q, %v", name, sealed, who, again, err)
			}
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
		for range 2 { // refusals are not remembered as anything else
			if sealed, err := r.SealName(name); !errors.Is(err, want) || sealed != "" {
				t.Errorf("SealName(%q) = %q, %v", name, sealed, err)
			}
		}
	}
}

// Someone with the key, or a bug of ours, may have sealed what no directory
// entry can be called: opening it must not lead out of the directory.
func TestSealedNamesThatLeadElsewhere(t *testing.T) {
	r := testRoot(t, NewID())
	c := testNameCipher(t, r)
	for _, name := range []string{".", "..", "a/b", "../x", "/", "a\x00"} {
		sealed, err := c.seal(name)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // what is refused is not remembered
			if got, err := r.OpenName(sealed); !errors.Is(err, ErrTampered) || got != "" {
				t.Errorf("%q opens as %q, %v", name, got, err)
			}
		}
	}
	empty, err := c.seal("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.OpenName(empty); !errors.Is(err, ErrNotSealed) {
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

// Names are AES-SIV of the derived key with empty associated data, whatever
// their length, and open whoever sealed them.
func TestNamesAreAESSIV(t *testing.T) {
	r := testRoot(t, NewID())
	id := r.ID()
	key, err := hkdf.Key(sha256.New, bytes.Repeat([]byte{7}, RootSize), id[:], labelName, 64)
	if err != nil {
		t.Fatal(err)
	}
	siv, err := subtle.NewAESSIV(key)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= NameMax; n++ {
		name := strings.Repeat(string(rune('a'+n%26)), n)
		raw, err := siv.EncryptDeterministically([]byte(name), []byte{})
		if err != nil {
			t.Fatal(err)
		}
		sealed := base64.RawURLEncoding.EncodeToString(raw)
		if got, err := testRoot(t, r.ID()).OpenName(sealed); err != nil || got != name {
			t.Fatalf("%d bytes: opens as %q, %v", n, got, err)
		}
		if got, err := r.SealName(name); err != nil || got != sealed {
			t.Fatalf("%d bytes: seals to %q, want %q, %v", n, got, sealed, err)
		}
	}
}
