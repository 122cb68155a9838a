package seal

import (
	"bytes"
	"errors"
	"testing"
)

func testRoot(t testing.TB, id KeyID) *Root {
	t.Helper()
	r, err := NewRoot(id, bytes.Repeat([]byte{7}, RootSize))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestBlockRoundTrip(t *testing.T) {
	r := testRoot(t, NewID())
	c, err := r.File(NewID())
	if err != nil {
		t.Fatal(err)
	}
	for _, index := range []uint64{0, 1, 2, 1 << 40} {
		payload := PayloadOf(int64(index))
		for _, n := range []int{0, 1, 15, 16, payload - 1, payload} {
			plain := bytes.Repeat([]byte{byte(n + 1)}, n)
			block := make([]byte, BlockSize)
			c.SealBlock(block, index, plain)
			dst := bytes.Repeat([]byte{0xff}, BlockPayload)
			got, err := c.OpenBlock(dst, index, block)
			if err != nil || got != n || !bytes.Equal(dst[:n], plain) || !IsHole(dst[n:payload]) {
				t.Fatalf("block %d of %d bytes: %d, %v", index, n, got, err)
			}
			block[100] ^= 1
			if _, err := c.OpenBlock(dst, index, block); !errors.Is(err, ErrTampered) {
				t.Fatalf("tampered block %d: %v", index, err)
			}
		}
	}
}

func TestTextRoundTrip(t *testing.T) {
	r := testRoot(t, NewID())
	s, err := r.SealName("hello.txt")
	if err != nil {
		t.Fatal(err)
	}
	if name, err := r.OpenName(s); err != nil || name != "hello.txt" {
		t.Fatal(name, err)
	}
	target, err := r.SealTarget([]byte("../up"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.OpenTarget(target); err != nil || string(got) != "../up" {
		t.Fatal(got, err)
	}
	file := NewID()
	value, err := r.SealXattr(file, "user.a", []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.OpenXattr(file, "user.a", value); err != nil || string(got) != "v" {
		t.Fatal(got, err)
	}
	meta, err := r.SealMeta("bucket", []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.OpenMeta("bucket", meta); err != nil || string(got) != "m" {
		t.Fatal(got, err)
	}
}

func TestHeadersRoundTrip(t *testing.T) {
	id := NewID()
	r := testRoot(t, id)
	h, err := r.SignVolumeHeader(VolumeHeader{Volume: id, KeyARN: "arn:aws:kms:x", WrappedRoot: []byte("w"), Probe: []byte("p"), Binding: map[string]string{"byokd:cluster": "acme"}})
	if err != nil {
		t.Fatal(err)
	}
	text, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ParseVolumeHeader(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.VerifyVolumeHeader(parsed); err != nil {
		t.Fatal(err)
	}
	oh, oc, err := r.NewObject(ObjectHeader{Object: NewID(), PlainSize: 3, KeyARN: "arn", WrappedKey: []byte("wrapped")})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := oh.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	oh2, err := ParseObjectHeader(raw)
	if err != nil {
		t.Fatal(err)
	}
	oc2, err := r.OpenObject(oh2)
	if err != nil {
		t.Fatal(err)
	}
	got, err := oc2.OpenSegment(nil, oc.SealSegment(nil, []byte("abc"), 0, true), 0, true)
	if err != nil || string(got) != "abc" {
		t.Fatal(got, err)
	}
}
