package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// formatDoc reads docs/FORMAT.md, whose marked tables and examples are held to
// the code.
func formatDoc(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile("../../docs/FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// checkedTable returns the rows after a mark, cells trimmed of blanks and ticks.
func checkedTable(t *testing.T, mark string) (rows [][]string) {
	t.Helper()
	_, rest, found := strings.Cut(formatDoc(t), "<!-- checked: "+mark+" -->\n")
	if !found {
		t.Fatalf("docs/FORMAT.md has no %q", mark)
	}
	head := 0
	for line := range strings.Lines(rest) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		if head++; head <= 2 { // names of columns, and the rule below them
			continue
		}
		var row []string
		for _, cell := range strings.Split(strings.Trim(line, "| \n"), "|") {
			row = append(row, strings.Trim(cell, " `"))
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		t.Fatalf("docs/FORMAT.md: no rows after %q", mark)
	}
	return rows
}

func number(t *testing.T, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// exampleRoot is the root of the page's examples and of the vectors.
func exampleRoot(t *testing.T) *Root {
	t.Helper()
	r, _ := readVectors(t, "names")
	return r
}

func TestFormatLabels(t *testing.T) {
	lengths := map[string]string{}
	for _, row := range checkedTable(t, "labels") {
		lengths[row[0]] = row[2]
	}
	labels := []string{labelBlock, labelAttributes, labelName, labelTarget, labelXattr, labelMeta, labelVolume, labelMark, labelObject, labelObjectCommit, labelObjectHeader, labelKeyring, labelKeyringCheck}
	for _, label := range labels {
		want := keySize
		if label == labelName {
			want = nameKeyLen
		}
		if lengths[label] != strconv.Itoa(want) {
			t.Errorf("%s: the page says length %q, the code %d", label, lengths[label], want)
		}
	}
	if len(lengths) != len(labels) {
		t.Errorf("the page has %d labels, the code %d", len(lengths), len(labels))
	}
}

func TestFormatDerivation(t *testing.T) {
	r := exampleRoot(t)
	key := func(size int, label string, context ...[]byte) []byte {
		out := make([]byte, size)
		if err := r.derive(out, label, context...); err != nil {
			t.Fatal(err)
		}
		return out
	}
	name := key(nameKeyLen, labelName)
	got := map[string][]byte{
		"extract":                   exampleExtract(t),
		"block key of selector 0":   key(keySize, labelBlock, []byte{0, 0}),
		"block key of selector 258": key(keySize, labelBlock, []byte{1, 2}),
		"name key, first half":      name[:keySize],
		"name key, second half":     name[keySize:],
	}
	rows := checkedTable(t, "derivation")
	for _, row := range rows {
		if want := hex.EncodeToString(got[row[0]]); row[1] != want {
			t.Errorf("%s: the page says %s, the code %s", row[0], row[1], want)
		}
	}
	if len(rows) != len(got) {
		t.Errorf("the page has %d keys, the test %d", len(rows), len(got))
	}
}

// sample says what stands in each field of real bytes, as far as it is known.
type sample struct {
	bytes  []byte
	fields map[string][]byte // by the beginning of the field's name
}

func samples(t *testing.T) map[string]sample {
	r := exampleRoot(t)
	id := FileID([]byte("file-id-00000001"))
	c := testFile(t, r, id)
	block, block0 := make([]byte, BlockSize), make([]byte, BlockSize)
	c.SealBlock(block, 0x0102030405, nil)
	c.SealBlock(block0, 0, nil)
	selector := block[:selectorSize]
	var s blockScratch
	s.bind(&id, 0x0102030405, binary.BigEndian.Uint16(selector))

	attributes, err := r.SealAttributes(id, Attributes{Mode: typeFile | 0o640, UID: 1001, GID: 1000})
	if err != nil {
		t.Fatal(err)
	}
	var inode [attributesSize + rdevSize]byte
	inner := Attributes{Mode: typeFile | 0o640, UID: 1001, GID: 1000}.put(&inode)

	arn, wrapped := "arn:aws:kms:x", []byte("wrapped")
	h, oc := testObject(t, r, ObjectHeader{Object: NewID(), Part: 7, PlainSize: 1 << 33, KeyARN: arn, WrappedKey: wrapped})
	raw := marshalObject(t, h)
	var ad [segmentADSize]byte
	oc.bind(&ad, 0x0102030405, true)
	number := func(size int, n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n)[8-size:] }
	return map[string]sample{
		"block": {block, map[string][]byte{"selector": selector}},
		"block0": {block0, map[string][]byte{
			"magic": []byte(fileMagic), "version 1": {0, 1}, "reserved": make([]byte, 6), "file id": id[:], "selector": selector,
		}},
		"blockAD": {s.ad[:], map[string][]byte{
			"version 1": {0, 1}, "file id": id[:], "block index": number(8, 0x0102030405), "selector": selector,
		}},
		"attributes": {attributes, map[string][]byte{"file id": id[:], "version 1": {1}, "selector": attributes[IDSize+1:][:selectorSize]}},
		"inode":      {inner, map[string][]byte{"mode": {0x81, 0xa0}, "uid": {0, 0, 3, 0xe9}, "gid": {0, 0, 3, 0xe8}}},
		"object-header": {raw, map[string][]byte{
			"magic": []byte(objectMagic), "version 1": {0, 1}, "suite": {1}, "reserved": nil, "part": number(4, 7),
			"plain size": number(8, 1<<33), "object id": h.Object[:], "key id": h.Key[:], "salt": h.Salt[:],
			"key commitment": h.Commitment[:], "length a": number(2, uint64(len(arn))), "length w": number(2, uint64(len(wrapped))),
			"key ARN": append([]byte(arn), wrapped...), "tag": h.Tag[:],
		}},
		"segmentAD": {ad[:], map[string][]byte{
			"version 1": {0, 1}, "suite": {1}, "object id": h.Object[:], "part": number(4, 7),
			"segment index": number(8, 0x0102030405), "1 in the last": {1},
		}},
	}
}

// Every layout table adds up, and its fields stand where it says.
func TestFormatLayouts(t *testing.T) {
	for what, s := range samples(t) {
		end, seen := int64(0), 0
		for _, row := range checkedTable(t, fmt.Sprintf("layout %s %d", what, len(s.bytes))) {
			from, length := number(t, row[0]), number(t, row[1])
			if from != end {
				t.Errorf("%s: %s begins at %d, the field before ends at %d", what, row[2], from, end)
			}
			end = from + length
			for field, want := range s.fields {
				if !strings.HasPrefix(row[2], field) {
					continue
				}
				seen++
				got := s.bytes[from:end]
				if want == nil {
					want = make([]byte, length)
				}
				if field != "key ARN" && int64(len(want)) != length || !bytes.HasPrefix(got, want) || !IsHole(got[len(want):]) {
					t.Errorf("%s: %s is %x, want %x", what, row[2], got, want)
				}
			}
		}
		if end != int64(len(s.bytes)) {
			t.Errorf("%s: the table ends at %d of %d", what, end, len(s.bytes))
		}
		if seen < len(s.fields) {
			t.Errorf("%s: only %d of %d known fields are in the table", what, seen, len(s.fields))
		}
	}
}

func TestFormatFiles(t *testing.T) {
	for _, row := range checkedTable(t, "file-sizes") {
		plain := number(t, row[0])
		blocks, last := int64(0), "–"
		if plain > 0 {
			index, skip := BlockAt(plain - 1)
			blocks, last = index+1, strconv.Itoa(skip+1)
		}
		want := []string{row[0], fmt.Sprint(SealedFileSize(plain)), fmt.Sprint(blocks), last}
		if fmt.Sprint(row) != fmt.Sprint(want) {
			t.Errorf("the page says %v, the code %v", row, want)
		}
	}
	for _, row := range checkedTable(t, "file-offsets") {
		index, skip := BlockAt(number(t, row[0]))
		if want := []string{row[0], fmt.Sprint(index), fmt.Sprint(skip)}; fmt.Sprint(row) != fmt.Sprint(want) {
			t.Errorf("the page says %v, the code %v", row, want)
		}
	}
}

func TestFormatNames(t *testing.T) {
	r := exampleRoot(t)
	for _, row := range checkedTable(t, "names") {
		if got, err := r.SealName(row[0]); err != nil || got != row[1] {
			t.Errorf("%s: the page says %s, the code %s, %v", row[0], row[1], got, err)
		}
	}
}

func TestFormatVolumeHeader(t *testing.T) {
	_, rest, _ := strings.Cut(formatDoc(t), "<!-- checked: volume-header -->\n```\n")
	text, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("no example on the page")
	}
	h, err := ParseVolumeHeader([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := exampleRoot(t).VerifyVolumeHeader(h); err != nil {
		t.Error(err)
	}
}

func TestFormatVolumeMark(t *testing.T) {
	_, rest, _ := strings.Cut(formatDoc(t), "<!-- checked: volume-mark -->\n```\n")
	text, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("no example on the page")
	}
	m, err := ParseVolumeMark([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := exampleRoot(t).VerifyVolumeMark(m); err != nil {
		t.Error(err)
	}
}

func TestFormatKeyring(t *testing.T) {
	_, rest, _ := strings.Cut(formatDoc(t), "<!-- checked: keyring -->\n```\n")
	text, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("no example on the page")
	}
	k, err := ParseKeyring([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := exampleRoot(t).VerifyKeyring(k); err != nil {
		t.Error(err)
	}
	if !strings.Contains(formatDoc(t), fmt.Sprintf("at most %d bytes", KeyringMax)) || !strings.Contains(formatDoc(t), fmt.Sprintf("up to %d lines", MaxKeyringKeys)) {
		t.Error("the page and the code differ in the bounds of a keyring")
	}
}

func TestFormatObjects(t *testing.T) {
	for _, row := range checkedTable(t, "object-sizes") {
		var plain, sealed int64
		parts := strings.Split(row[0], ", ")
		for _, part := range parts {
			plain += number(t, part)
			sealed += SealedObjectSize(number(t, part))
		}
		if row[1] != fmt.Sprint(sealed) {
			t.Errorf("%s: the page says %s, the code %d", row[0], row[1], sealed)
		}
		if got, err := PlainObjectSize(sealed, len(parts)); err != nil || got != plain {
			t.Errorf("%s: %d sealed bytes hold %d, %v", row[0], sealed, got, err)
		}
	}
	for _, row := range checkedTable(t, "object-ranges") {
		match := regexp.MustCompile(`^(\d+)-(\d+)$`).FindStringSubmatch(row[0])
		if match == nil {
			t.Fatalf("no range: %q", row[0])
		}
		from, to := number(t, match[1]), number(t, match[2])
		first, last, sealedFrom, sealedTo, skip := SegmentSpan(from, to-from+1, 200000)
		want := []string{row[0], fmt.Sprintf("%d-%d", first, last), fmt.Sprintf("%d-%d", sealedFrom, sealedTo-1), fmt.Sprint(skip)}
		if fmt.Sprint(row) != fmt.Sprint(want) {
			t.Errorf("the page says %v, the code %v", row, want)
		}
	}
}

// exampleExtract is HKDF's extract of the example root.
func exampleExtract(t *testing.T) []byte {
	t.Helper()
	_, file := readVectors(t, "names")
	id, err := ParseID(file.RootID)
	if err != nil {
		t.Fatal(err)
	}
	extract, err := hkdf.Extract(sha256.New, file.Root, id[:])
	if err != nil {
		t.Fatal(err)
	}
	return extract
}
