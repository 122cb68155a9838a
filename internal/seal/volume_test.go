package seal

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func testVolumeHeader(t testing.TB) (*Root, VolumeHeader) {
	t.Helper()
	id := VolumeID{0xaa, 0xbb}
	r := testRoot(t, id)
	h, err := r.SignVolumeHeader(VolumeHeader{
		Volume:      id,
		Generation:  3,
		KeyARN:      "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		Binding:     map[string]string{"byokd:resource": id.String(), "byokd:cluster": "acme-prod", "byokd:tenant": "Größe = 1"},
		WrappedRoot: bytes.Repeat([]byte{1}, 184),
		Probe:       bytes.Repeat([]byte{2}, 184),
	})
	if err != nil {
		t.Fatal(err)
	}
	return r, h
}

func marshalVolume(t testing.TB, h VolumeHeader) []byte {
	t.Helper()
	text, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestVolumeHeader(t *testing.T) {
	r, h := testVolumeHeader(t)
	text := marshalVolume(t, h)
	got, err := ParseVolumeHeader(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, h) {
		t.Fatalf("got %+v, want %+v", got, h)
	}
	if err := r.VerifyVolumeHeader(got); err != nil {
		t.Fatal(err)
	}
	if err := testRoot(t, NewID()).VerifyVolumeHeader(got); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another root: %v", err)
	}
	otherSecret, err := NewRoot(h.Volume, make([]byte, RootSize))
	if err != nil {
		t.Fatal(err)
	}
	if err := otherSecret.VerifyVolumeHeader(got); !errors.Is(err, ErrTampered) {
		t.Errorf("another secret: %v", err)
	}
}

// Whatever is changed in the text, it is either refused when read or found when
// verified.
func TestVolumeHeaderTampered(t *testing.T) {
	r, h := testVolumeHeader(t)
	text := marshalVolume(t, h)
	for i := range text {
		for _, bit := range []byte{1, 0x20, 0x80} {
			changed := bytes.Clone(text)
			changed[i] ^= bit
			got, err := ParseVolumeHeader(changed)
			if err == nil {
				err = r.VerifyVolumeHeader(got)
			}
			if err == nil {
				t.Fatalf("byte %d (%q) changed: accepted", i, text[i])
			}
		}
		if _, err := ParseVolumeHeader(text[:i]); err == nil {
			t.Fatalf("the first %d bytes: accepted", i)
		}
	}
	for name, change := range map[string]func(h *VolumeHeader){
		"generation":   func(h *VolumeHeader) { h.Generation-- },
		"key":          func(h *VolumeHeader) { h.KeyARN = strings.Replace(h.KeyARN, "1234", "4321", 1) },
		"binding":      func(h *VolumeHeader) { h.Binding["byokd:cluster"] = "evil" },
		"less binding": func(h *VolumeHeader) { delete(h.Binding, "byokd:cluster") },
		"more binding": func(h *VolumeHeader) { h.Binding["byokd:more"] = "" },
		"root":         func(h *VolumeHeader) { h.WrappedRoot[0] ^= 1 },
		"probe":        func(h *VolumeHeader) { h.Probe[0] ^= 1 },
		"no probe":     func(h *VolumeHeader) { h.Probe = nil },
		"a next form":  func(h *VolumeHeader) { h.Next = &KeyForm{KeyARN: "k", WrappedRoot: []byte("w")} },
		"mac":          func(h *VolumeHeader) { h.MAC[0] ^= 1 },
	} {
		parsed, err := ParseVolumeHeader(text)
		if err != nil {
			t.Fatal(err)
		}
		change(&parsed)
		again, err := ParseVolumeHeader(marshalVolume(t, parsed))
		if err != nil {
			t.Errorf("%s changed: does not parse: %v", name, err)
			continue
		}
		if err := r.VerifyVolumeHeader(again); !errors.Is(err, ErrTampered) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
}

func TestVolumeHeaderIsStrict(t *testing.T) {
	_, h := testVolumeHeader(t)
	text := string(marshalVolume(t, h))
	lines := strings.SplitAfter(text, "\n")
	edit := func(old, new string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("%q is not in the header", old)
		}
		return strings.Replace(text, old, new, 1)
	}
	for name, tc := range map[string]struct {
		text string
		want error
	}{
		"empty":             {"", ErrNotSealed},
		"foreign":           {"hello\n", ErrNotSealed},
		"future":            {edit("volume 1\n", "volume 2\n"), ErrUnknownVersion},
		"padded version":    {edit("volume 1\n", "volume 01\n"), ErrUnknownVersion},
		"only magic":        {"byokd volume 1", ErrTruncated},
		"no fields":         {"byokd volume 1\n", ErrTruncated},
		"no mac":            {strings.Join(lines[:len(lines)-2], ""), ErrTruncated},
		"order":             {lines[0] + lines[2] + lines[1] + strings.Join(lines[3:], ""), ErrTampered},
		"repeated":          {lines[0] + lines[1] + lines[1] + strings.Join(lines[2:], ""), ErrTampered},
		"unknown":           {edit("root:", "more: x\nroot:"), ErrTampered},
		"blank line":        {edit("root:", "\nroot:"), ErrTampered},
		"line ends":         {strings.ReplaceAll(text, "\n", "\r\n"), ErrUnknownVersion},
		"one line end":      {edit("3\n", "3\r\n"), ErrTampered},
		"no last line end":  {strings.TrimSuffix(text, "\n"), ErrTampered},
		"more at the end":   {text + "\n", ErrTampered},
		"two spaces":        {edit("generation: 3", "generation:  3"), ErrTampered},
		"padded number":     {edit("generation: 3", "generation: 03"), ErrTampered},
		"signed number":     {edit("generation: 3", "generation: +3"), ErrTampered},
		"too large number":  {edit("generation: 3", "generation: 18446744073709551616"), ErrTampered},
		"upper case":        {edit("volume: aabb", "volume: AABB"), ErrTampered},
		"unsorted binding":  {edit("byokd:cluster=", "byokd:z="), ErrTampered},
		"binding without =": {edit("byokd:cluster=", "byokd:cluster"), ErrTampered},
		"control character": {edit("acme-prod", "acme\tprod"), ErrTampered},
		"not UTF-8":         {edit("acme-prod", "acme\xffprod"), ErrTampered},
		"too long":          {text + strings.Repeat("x", VolumeHeaderMax), ErrNotSealed},
	} {
		if _, err := ParseVolumeHeader([]byte(tc.text)); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func TestVolumeHeaderRefusedBeforeWriting(t *testing.T) {
	r, signed := testVolumeHeader(t)
	for name, change := range map[string]func(h *VolumeHeader){
		"no key":        func(h *VolumeHeader) { h.KeyARN = "" },
		"key of lines":  func(h *VolumeHeader) { h.KeyARN = "a\nb" },
		"long key":      func(h *VolumeHeader) { h.KeyARN = strings.Repeat("a", maxARN+1) },
		"no root":       func(h *VolumeHeader) { h.WrappedRoot = nil },
		"long root":     func(h *VolumeHeader) { h.WrappedRoot = make([]byte, maxWrapped+1) },
		"long probe":    func(h *VolumeHeader) { h.Probe = make([]byte, maxWrapped+1) },
		"future":        func(h *VolumeHeader) { h.Version = 2 },
		"same key":      func(h *VolumeHeader) { h.Next = &KeyForm{KeyARN: h.KeyARN, WrappedRoot: []byte("w")} },
		"next no root":  func(h *VolumeHeader) { h.Next = &KeyForm{KeyARN: "k"} },
		"next no key":   func(h *VolumeHeader) { h.Next = &KeyForm{WrappedRoot: []byte("w")} },
		"binding =":     func(h *VolumeHeader) { h.Binding = map[string]string{"a=b": ""} },
		"no binding":    func(h *VolumeHeader) { h.Binding = map[string]string{"": "x"} },
		"binding lines": func(h *VolumeHeader) { h.Binding = map[string]string{"a": "x\ny"} },
		"long binding":  func(h *VolumeHeader) { h.Binding = map[string]string{"a": strings.Repeat("x", maxBinding)} },
		"many bindings": func(h *VolumeHeader) {
			h.Binding = map[string]string{}
			for i := range maxBindings + 1 {
				h.Binding[fmt.Sprint(i)] = "x"
			}
		},
	} {
		h := signed
		change(&h)
		if _, err := r.SignVolumeHeader(h); err == nil && name != "future" {
			t.Errorf("%s: signed", name)
		}
		if _, err := h.Marshal(); err == nil {
			t.Errorf("%s: marshalled", name)
		}
	}
	unsigned := signed
	unsigned.MAC = nil
	if _, err := unsigned.Marshal(); err == nil {
		t.Error("an unsigned header was marshalled")
	}
	huge := signed
	huge.WrappedRoot, huge.Probe = make([]byte, maxWrapped), make([]byte, maxWrapped)
	huge.Binding = map[string]string{}
	for i := range maxBindings {
		huge.Binding[fmt.Sprint(i)] = strings.Repeat("x", maxBinding-2)
	}
	if _, err := huge.Marshal(); !errors.Is(err, ErrTooLong) {
		t.Errorf("a header larger than ParseVolumeHeader reads: %v", err)
	}
}
