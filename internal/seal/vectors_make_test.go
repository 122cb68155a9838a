package seal

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// -update writes the vector files that are missing, and only those: a frozen
// file is never replaced. Delete it by hand to make another.
var update = flag.Bool("update", false, "write missing files in testdata")

func writeMissingVectors(t *testing.T) {
	for kind, generate := range generators() {
		if _, err := os.Stat(vectorPath(kind)); err == nil {
			continue
		}
		file := vectors{
			About:  "byokd format 1: " + kind + ". Byte strings are base64; filler is so many bytes, byte i being 31*i modulo 251.",
			RootID: "000102030405060708090a0b0c0d0e0f",
			Root:   []byte("0123456789abcdef0123456789ABCDEF"),
		}
		id, err := ParseID(file.RootID)
		if err != nil {
			t.Fatal(err)
		}
		r, err := NewRoot(id, file.Root)
		if err != nil {
			t.Fatal(err)
		}
		file.Cases = generate(t, r)
		raw, err := json.MarshalIndent(file, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorPath(kind), append(raw, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func generators() map[string]func(t *testing.T, r *Root) []vector {
	return map[string]func(t *testing.T, r *Root) []vector{
		"blocks": makeBlocks, "names": makeNames, "symlinks": makeSymlinks, "xattrs": makeXattrs, "attributes": makeAttributes, "owned-volumes": makeOwnedVolumes,
		"meta": makeMeta, "volumes": makeVolumes, "headers": makeHeaders, "segments": makeSegments,
		"keyrings": makeKeyrings,
		"packed":   makePacked,
	}
}

// changed returns v as a bad vector.
func (v vector) changed(name, err string, change func(v *vector)) vector {
	v.Sealed = bytes.Clone(v.Sealed)
	v.Header = bytes.Clone(v.Header)
	change(&v)
	v.Name, v.Error, v.Plain, v.Filler = name, err, nil, 0
	return v
}

// flip inverts bit 0 of byte i of the sealed side.
func flip(i int) func(v *vector) { return func(v *vector) { v.Sealed[i] ^= 1 } }

func makeBlocks(t *testing.T, r *Root) []vector {
	id := FileID([]byte("file-id-00000001"))
	c := testFile(t, r, id)
	block := func(name string, index uint64, n int) vector {
		v := vector{Name: name, ID: id.String(), Index: index, Filler: n, Sealed: make([]byte, BlockSize)}
		c.SealBlock(v.Sealed, index, filler(n))
		return v
	}
	first, later := block("full first block", 0, FirstPayload), block("short later block", 7, 100)
	other := FileID([]byte("file-id-00000002")).String()
	return []vector{
		first, later,
		block("full later block", 1, BlockPayload),
		block("empty first block", 0, 0),
		block("block far out", 1<<40, 1),
		later.changed("index swapped", "tampered", func(v *vector) { v.Index = 8 }),
		later.changed("foreign file", "tampered", func(v *vector) { v.ID = other }),
		first.changed("first block of a foreign file", "tampered", func(v *vector) { v.ID = other }),
		later.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:BlockSize-1] }),
		later.changed("extended", "truncated", func(v *vector) { v.Sealed = append(v.Sealed, 0) }),
		first.changed("magic flipped", "not sealed", flip(0)),
		first.changed("version flipped", "unknown version", flip(9)),
		first.changed("reserved byte set", "tampered", flip(10)),
		first.changed("file id flipped", "tampered", flip(31)),
		later.changed("selector flipped", "tampered", flip(1)),
		later.changed("nonce flipped", "tampered", flip(2)),
		later.changed("length flipped", "tampered", flip(15)),
		later.changed("data flipped", "tampered", flip(2000)),
		later.changed("tag flipped", "tampered", flip(BlockSize-1)),
	}
}

func makeNames(t *testing.T, r *Root) []vector {
	name := func(plain string) vector {
		sealed, err := r.SealName(plain)
		if err != nil {
			t.Fatal(err)
		}
		return vector{Name: fmt.Sprintf("%d bytes", len(plain)), Plain: []byte(plain), Sealed: []byte(sealed)}
	}
	hello := name("hello.txt")
	dots, err := testNameCipher(t, r).seal("..")
	if err != nil {
		t.Fatal(err)
	}
	up := hello.changed("sealed ..", "tampered", func(v *vector) { v.Sealed = []byte(dots) })
	return []vector{
		hello, name("a"), name("exactly-16-bytes"), name("000000000000042-7.log"), name(strings.Repeat("n", NameMax)), up,
		hello.changed("flipped", "tampered", flip(3)),
		hello.changed("truncated", "tampered", func(v *vector) { v.Sealed = v.Sealed[:32] }),
		hello.changed("extended", "tampered", func(v *vector) { v.Sealed = append(v.Sealed[:32:32], "AAAA"...) }),
		hello.changed("padded", "not sealed", func(v *vector) { v.Sealed = append(v.Sealed, '=') }),
		hello.changed("foreign", "not sealed", func(v *vector) { v.Sealed = []byte("lost+found") }),
		name("ab").changed("not canonical", "not sealed", func(v *vector) { v.Sealed = append(v.Sealed, 'B') }),
	}
}

func makeSymlinks(t *testing.T, r *Root) []vector {
	link := func(name, target string) vector {
		sealed, err := r.SealTarget([]byte(target))
		if err != nil {
			t.Fatal(err)
		}
		return vector{Name: name, Plain: []byte(target), Sealed: sealed}
	}
	up := link("relative", "../data/current")
	return []vector{
		up, link("absolute", "/data/current"),
		up.changed("flipped", "tampered", flip(20)),
		up.changed("truncated", "tampered", func(v *vector) { v.Sealed = v.Sealed[:40] }),
		up.changed("too short", "not sealed", func(v *vector) { v.Sealed = v.Sealed[:20] }),
		up.changed("foreign", "not sealed", func(v *vector) { v.Sealed = []byte("../data/current") }),
	}
}

func makeXattrs(t *testing.T, r *Root) []vector {
	id := FileID([]byte("file-id-00000001"))
	attr := func(name, value string) vector {
		sealed, err := r.SealXattr(id, name, []byte(value))
		if err != nil {
			t.Fatal(err)
		}
		return vector{Name: name, ID: id.String(), Place: name, Plain: []byte(value), Sealed: sealed}
	}
	a := attr("user.origin", "scanner 7")
	return []vector{
		a, attr("user.empty", ""),
		a.changed("another attribute", "tampered", func(v *vector) { v.Place = "user.other" }),
		a.changed("another file", "tampered", func(v *vector) { v.ID = FileID([]byte("file-id-00000002")).String() }),
		a.changed("version flipped", "unknown version", flip(0)),
		a.changed("flipped", "tampered", flip(20)),
		a.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:20] }),
	}
}

func makeAttributes(t *testing.T, r *Root) []vector {
	attributes := func(name string, a Attributes) vector {
		sealed, err := r.SealAttributes(FileID([]byte("file-id-00000001")), a)
		if err != nil {
			t.Fatal(err)
		}
		return vector{Name: name, Plain: fmt.Appendf(nil, "%o %d %d %d", a.Mode, a.UID, a.GID, a.Rdev), Sealed: sealed}
	}
	bad := func(name, plain string) vector {
		return vector{Name: name, Error: "tampered", Sealed: sealInode(t, r, []byte(plain))}
	}
	file := attributes("file", Attributes{Mode: typeFile | 0o4751, UID: 1001, GID: 1<<32 - 2})
	return []vector{
		file,
		attributes("directory", Attributes{Mode: typeDir | 0o3777, UID: 1000, GID: 7}),
		attributes("symlink", Attributes{Mode: typeLink | 0o777}),
		attributes("pipe", Attributes{Mode: typeFIFO | 0o600, UID: 1}),
		attributes("socket", Attributes{Mode: typeSock | 0o755, GID: 2}),
		attributes("device", Attributes{Mode: typeChar | 0o666, Rdev: 0x103}),
		attributes("block device", Attributes{Mode: typeBlock | 0o660, GID: 6, Rdev: 0x801}),
		file.changed("another file", "tampered", flip(0)),
		file.changed("version flipped", "unknown version", flip(16)),
		file.changed("another selector", "tampered", flip(18)),
		file.changed("flipped", "tampered", flip(40)),
		file.changed("without attributes", "truncated", func(v *vector) { v.Sealed = v.Sealed[:16] }),
		file.changed("without an id", "truncated", func(v *vector) { v.Sealed = v.Sealed[:15] }),
		bad("empty", ""),
		bad("short", "\x81\xa40000000"),
		bad("no type", "\x01\xa400000000"),
		bad("device without a number", "\x21\xa400000000"),
		bad("file with a device's number", "\x81\xa4000000000000"),
	}
}

// sealInode seals what need not be attributes as if it were.
func sealInode(t *testing.T, r *Root, plain []byte) []byte {
	t.Helper()
	keys, err := r.inodeKeys()
	if err != nil {
		t.Fatal(err)
	}
	key := keys.sealer(1)
	head := append([]byte("file-id-00000001"), attributesVersion, byte(key.selector>>8), byte(key.selector))
	return key.aead.Seal(head, nil, plain, head)
}

func makeMeta(t *testing.T, r *Root) []vector {
	meta := func(place, plain string) vector {
		sealed, err := r.SealMeta(place, []byte(plain))
		if err != nil {
			t.Fatal(err)
		}
		return vector{Name: plain, Place: place, Plain: []byte(plain), Sealed: []byte(sealed)}
	}
	report := meta("documents", "name=report.pdf")
	return []vector{
		report, meta("", "placeless"),
		report.changed("another place", "tampered", func(v *vector) { v.Place = "backups" }),
		report.changed("another key", "wrong key", func(v *vector) { v.Sealed[5] ^= 1 }),
		report.changed("flipped", "tampered", flip(60)),
		report.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:40] }),
		report.changed("foreign", "not sealed", func(v *vector) { v.Sealed = []byte("name=report.pdf") }),
	}
}

func makeOwnedVolumes(t *testing.T, r *Root) []vector {
	volume := func(name string, next *KeyForm) vector {
		h, err := r.SignVolumeHeader(VolumeHeader{Volume: r.ID(), Generation: 1, SealedOwnership: true, KeyARN: "k", WrappedRoot: []byte("w"), Next: next})
		if err != nil {
			t.Fatal(err)
		}
		v := vector{Name: name, Sealed: marshalVolume(t, h)}
		if v.Plain, err = openVolumeVector(r, v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	replace := func(old, new string) func(v *vector) {
		return func(v *vector) { v.Sealed = bytes.Replace(v.Sealed, []byte(old), []byte(new), 1) }
	}
	owned := volume("sealed ownership", nil)
	return []vector{
		owned,
		volume("moving to another key", &KeyForm{KeyARN: "k2", WrappedRoot: []byte("w2")}),
		owned.changed("line removed", "tampered", replace("ownership: sealed\n", "")),
		owned.changed("line moved", "tampered", replace("generation: 1\nownership: sealed\n", "ownership: sealed\ngeneration: 1\n")),
		owned.changed("line twice", "tampered", replace("ownership: sealed\n", "ownership: sealed\nownership: sealed\n")),
		owned.changed("another ownership", "unknown version", replace("sealed", "shared")),
		owned.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:bytes.Index(v.Sealed, []byte("mac:"))] }),
	}
}

func makeVolumes(t *testing.T, r *Root) []vector {
	volume := func(name string, h VolumeHeader) vector {
		h.Volume = r.ID()
		h, err := r.SignVolumeHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		v := vector{Name: name, Sealed: marshalVolume(t, h)}
		if v.Plain, err = openVolumeVector(r, v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	full := volume("full", VolumeHeader{
		Generation: 2, KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		Binding:     map[string]string{"byokd:cluster": "acme-prod", "byokd:resource": r.ID().String()},
		WrappedRoot: []byte("wrapped root key"), Probe: []byte("probe"),
	})
	moving := volume("moving to another key", VolumeHeader{
		Generation: 3, KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		Binding:     map[string]string{"byokd:cluster": "acme-prod"},
		WrappedRoot: []byte("wrapped root key"), Probe: []byte("probe"),
		Next: &KeyForm{KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/9999abcd-12ab-34cd-56ef-1234567890ab",
			WrappedRoot: []byte("the same under the second"), Probe: []byte("its probe")},
	})
	replace := func(old, new string) func(v *vector) {
		return func(v *vector) { v.Sealed = bytes.Replace(v.Sealed, []byte(old), []byte(new), 1) }
	}
	return []vector{
		full,
		volume("smallest", VolumeHeader{KeyARN: "k", WrappedRoot: []byte("w")}),
		full.changed("another key", "tampered", replace("1234abcd", "1234abce")),
		full.changed("older generation", "tampered", replace("generation: 2", "generation: 1")),
		full.changed("another volume", "wrong key", replace("volume: 00", "volume: 01")),
		full.changed("unknown field", "tampered", replace("root:", "more: x\nroot:")),
		full.changed("spelt otherwise", "tampered", replace("generation: 2", "generation: 02")),
		full.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:bytes.Index(v.Sealed, []byte("mac:"))] }),
		full.changed("future", "unknown version", replace("volume 1", "volume 2")),
		full.changed("foreign", "not sealed", replace("byokd", "other")),
		moving,
		moving.changed("another next key", "tampered", replace("9999abcd", "9999abce")),
		moving.changed("half a move", "tampered", replace("next-probe", "more-probe")),
	}
}

func makePacked(t *testing.T, r *Root) []vector {
	part := func(name string, size uint64, contents ...string) vector {
		packed := 0
		for _, content := range contents {
			packed += PackedPrefix + len(content) + SegmentOverhead
		}
		h, c := testObject(t, r, ObjectHeader{
			Suite: SuiteZstd, Object: UploadObjectID("upload-1"), Part: 2, PlainSize: size, PackedSize: uint32(packed),
			KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", WrappedKey: []byte("wrapped data key"),
		})
		v := vector{Name: name, Sealed: marshalObject(t, h)}
		for i, content := range contents {
			v.Sealed = c.SealPacked(v.Sealed, []byte(content), uint64(i), i == len(contents)-1)
		}
		if int64(len(v.Sealed)) != h.SealedSize() {
			t.Fatalf("%d bytes, %d announced", len(v.Sealed), h.SealedSize())
		}
		var err error
		if v.Plain, err = openPackedVector(r, v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	two := part("two segments", SegmentSize+9, "\x01compressed", "\x00nine bytes")
	first := ObjectHeaderSize
	return []vector{
		two, part("one byte", 1, "\x00a"),
		two.changed("packed length in the header", "tampered", flip(127)),
		two.changed("no packed length", "tampered", func(v *vector) { clear(v.Sealed[124:128]) }),
		two.changed("suite without packing", "tampered", func(v *vector) { v.Sealed[10] = 1 }),
		two.changed("length of a segment", "tampered", flip(first+3)),
		two.changed("length absurd", "tampered", flip(first)),
		two.changed("content", "tampered", flip(first+30)),
		two.changed("cut", "truncated", func(v *vector) { v.Sealed = v.Sealed[:len(v.Sealed)-1] }),
		two.changed("cut at a segment", "truncated", func(v *vector) { v.Sealed = v.Sealed[:first+4+11+SegmentOverhead] }),
	}
}

func makeKeyrings(t *testing.T, r *Root) []vector {
	entry := func(r *Root, created int64, forms map[string][]byte) KeyringKey {
		check, err := r.KeyringCheck(created)
		if err != nil {
			t.Fatal(err)
		}
		return KeyringKey{ID: r.ID(), Created: created, Check: check, Forms: forms}
	}
	other := func(n byte) *Root {
		id := r.ID()
		id[0] = n
		o, err := NewRoot(id, bytes.Repeat([]byte{n}, RootSize))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	keyring := func(name string, k Keyring) vector {
		k, err := r.SignKeyring(k)
		if err != nil {
			t.Fatal(err)
		}
		v := vector{Name: name}
		if v.Sealed, err = k.Marshal(); err != nil {
			t.Fatal(err)
		}
		if v.Plain, err = openKeyringVector(r, v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	second := "arn:aws:kms:eu-central-1:111122223333:key/9999abcd-12ab-34cd-56ef-1234567890ab"
	moving := keyring("moving to another KMS key", Keyring{
		Generation: 7, Binding: map[string]string{"byokd:cluster": "acme-prod", "byokd:resource": "bucket/acme-documents"},
		Ring: entry(r, 1767225600, map[string][]byte{first: []byte("wrapped ring key"), second: []byte("the same under the second")}),
		Keys: []KeyringKey{
			entry(other(0xa1), 1767225601, map[string][]byte{first: []byte("wrapped key a1"), second: []byte("a1 under the second")}),
			entry(other(0xa2), 1767229201, map[string][]byte{first: []byte("wrapped key a2")}),
		},
	})
	replace := func(old, new string) func(v *vector) {
		return func(v *vector) { v.Sealed = bytes.Replace(v.Sealed, []byte(old), []byte(new), 1) }
	}
	return []vector{
		moving,
		keyring("no data key yet", Keyring{Generation: 1, Ring: entry(r, 0, map[string][]byte{"k": []byte("w")})}),
		moving.changed("older generation", "tampered", replace("generation: 7", "generation: 6")),
		moving.changed("another KMS key", "tampered", replace("9999abcd", "9999abce")),
		moving.changed("another bucket", "tampered", replace("acme-documents", "acme-document5")),
		moving.changed("a key dropped", "tampered", func(v *vector) {
			i := bytes.Index(v.Sealed, []byte("key: a2"))
			v.Sealed = slices.Delete(v.Sealed, i, i+bytes.IndexByte(v.Sealed[i:], '\n')+1)
		}),
		moving.changed("a key twice", "tampered", func(v *vector) {
			i := bytes.Index(v.Sealed, []byte("key: a2"))
			v.Sealed = append(v.Sealed[:i:i], append(bytes.Clone(v.Sealed[i:i+bytes.IndexByte(v.Sealed[i:], '\n')+1]), v.Sealed[i:]...)...)
		}),
		moving.changed("a form changed", "tampered", replace("d3JhcHBlZCBrZXkgYTE=", "d3JhcHBlZCBrZXkgYTI=")),
		moving.changed("a form of no KMS key", "tampered", replace(" 1=", " 2=")),
		moving.changed("made at another time", "wrong key", replace("1767225600", "1767225599")),
		moving.changed("spelt otherwise", "tampered", replace("generation: 7", "generation: 07")),
		moving.changed("unknown field", "tampered", replace("ring:", "more: x\nring:")),
		moving.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:bytes.Index(v.Sealed, []byte("mac:"))] }),
		moving.changed("future", "unknown version", replace("keyring 1", "keyring 2")),
		moving.changed("foreign", "not sealed", replace("byokd", "other")),
	}
}

func vectorObject(t *testing.T, r *Root, part uint32, size uint64) (ObjectHeader, *ObjectCipher) {
	return testObject(t, r, ObjectHeader{
		Object: UploadObjectID("upload-1"), Part: part, PlainSize: size,
		KeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", WrappedKey: []byte("wrapped data key"),
	})
}

func makeHeaders(t *testing.T, r *Root) []vector {
	header := func(name string, part uint32, size uint64) vector {
		h, _ := vectorObject(t, r, part, size)
		v := vector{Name: name, Sealed: marshalObject(t, h)}
		var err error
		if v.Plain, err = openHeaderVector(r, v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	part := header("part of an upload", 3, 5<<20)
	return []vector{
		part, header("simple object of unknown size", 0, PlainSizeUnknown),
		part.changed("magic flipped", "not sealed", flip(0)),
		part.changed("version flipped", "unknown version", flip(9)),
		part.changed("suite flipped", "unknown version", flip(10)),
		part.changed("reserved byte set", "tampered", flip(11)),
		part.changed("part flipped", "tampered", flip(15)),
		part.changed("size flipped", "tampered", flip(23)),
		part.changed("size absurd", "impossible size", flip(16)),
		part.changed("object id flipped", "tampered", flip(24)),
		part.changed("key id flipped", "wrong key", flip(40)),
		part.changed("salt flipped", "wrong key", flip(56)),
		part.changed("commitment flipped", "wrong key", flip(88)),
		part.changed("arn flipped", "tampered", flip(objectStrings)),
		part.changed("padding set", "tampered", flip(objectTag-1)),
		part.changed("tag flipped", "tampered", flip(ObjectHeaderSize-1)),
		part.changed("lengths absurd", "tampered", flip(120)),
		part.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:1000] }),
	}
}

func makeSegments(t *testing.T, r *Root) []vector {
	h, c := vectorObject(t, r, 1, SegmentSize+100)
	other, _ := vectorObject(t, r, 1, SegmentSize+100)
	empty, e := vectorObject(t, r, 0, 0)
	full := vector{
		Name: "first of two", Header: marshalObject(t, h), Index: 0,
		Filler: SegmentSize, Sealed: c.SealSegment(nil, filler(SegmentSize), 0, false),
	}
	last := vector{
		Name: "last of two", Header: full.Header, Index: 1, Last: true,
		Filler: 100, Sealed: c.SealSegment(nil, filler(100), 1, true),
	}
	return []vector{
		full, last,
		{Name: "the only one, empty", Header: marshalObject(t, empty), Last: true, Sealed: e.SealSegment(nil, nil, 0, true)},
		last.changed("index swapped", "tampered", func(v *vector) { v.Index = 2 }),
		last.changed("not marked last", "tampered", func(v *vector) { v.Last = false }),
		last.changed("another attempt's header", "tampered", func(v *vector) { v.Header = marshalObject(t, other) }),
		last.changed("flipped", "tampered", flip(50)),
		last.changed("tag flipped", "tampered", flip(len(last.Sealed)-1)),
		last.changed("cut", "tampered", func(v *vector) { v.Sealed = v.Sealed[:60] }),
		last.changed("extended", "tampered", func(v *vector) { v.Sealed = append(slices.Clip(v.Sealed), 0) }),
		last.changed("truncated", "truncated", func(v *vector) { v.Sealed = v.Sealed[:27] }),
	}
}
