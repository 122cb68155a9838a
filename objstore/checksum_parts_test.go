package objstore

import (
	"bytes"
	"encoding/base64"
	"math/rand/v2"
	"strconv"
	"testing"
)

// TestCombinedChecksums: the CRC of an object computed from those of its parts is the
// one computed from its bytes, for every way to cut it.
func TestCombinedChecksums(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, algorithm := range []string{"crc32", "crc32c", "crc64nvme"} {
		for _, cuts := range [][]int{{1}, {0, 5}, {7, 0}, {1, 1, 1}, {5 << 20, 3}, {100000, 65536, 12345, 1}} {
			whole := newDigest(algorithm)
			var parts []partSum
			var lengths []int64
			for _, n := range cuts {
				body := make([]byte, n)
				for i := range body {
					body[i] = byte(random.Uint32())
				}
				whole.Write(body)
				part := newDigest(algorithm)
				part.Write(body)
				parts, lengths = append(parts, partSum{algorithm, part.Sum(nil)}), append(lengths, int64(n))
			}
			if got := combined(algorithm, parts, lengths); !bytes.Equal(got, whole.Sum(nil)) {
				t.Errorf("%s of parts of %v bytes: %x, not %x", algorithm, cuts, got, whole.Sum(nil))
			}
		}
	}
}

func TestPartETags(t *testing.T) {
	const md5 = "9dabf81d1dbabfd597ceb91664d9b480"
	sum := partSum{"crc32", []byte{0x1c, 0x8f, 0xa0, 0x3b}}
	etag := partETag(`"`+md5+`"`, sum)
	if want := `"` + md5 + `-0-crc32-1c8fa03b"`; etag != want {
		t.Fatalf("%s, not %s", etag, want)
	}
	for _, given := range []string{etag, etag[1 : len(etag)-1]} { // clients take the quotes off
		if bare, got := splitPartETag(given); upstreamETag(bare) != `"`+md5+`"` || got.algorithm != "crc32" || !bytes.Equal(got.value, sum.value) {
			t.Errorf("%s is split into %s and %v", given, bare, got)
		}
	}
	for _, other := range []string{partETag(`"`+md5+`"`, partSum{}), `"` + md5 + `"`, md5, md5 + "-0-crc32-1c8fa0", md5 + "-0-crc99-1c8fa03b", md5 + "-7", "a-0-b", ""} {
		if bare, got := splitPartETag(other); bare != other || got.algorithm != "" {
			t.Errorf("%s is split into %s and %v", other, bare, got)
		}
	}
}

// TestRecentIsBounded: two generations are all that is remembered.
func TestRecentIsBounded(t *testing.T) {
	var r recent[UploadID, int]
	for i := range 3*maxRecent + 1 {
		r.put(UploadID(strconv.Itoa(i)), i)
	}
	if n := len(r.now) + len(r.old); n > 2*maxRecent {
		t.Errorf("%d are remembered", n)
	}
	if _, newest := r.get(UploadID(strconv.Itoa(3 * maxRecent))); !newest {
		t.Error("the newest is forgotten")
	}
	if _, oldest := r.get("0"); oldest {
		t.Error("the oldest is not forgotten")
	}
}

func TestWholeSums(t *testing.T) {
	of := func(algorithm, text string) partSum {
		d := newDigest(algorithm)
		d.Write([]byte(text))
		return partSum{algorithm, d.Sum(nil)}
	}
	full := base64.StdEncoding.EncodeToString(of("crc32", "ab").value)
	composite := newDigest("crc32")
	composite.Write(append(of("crc32", "a").value, of("crc32", "b").value...))
	both := base64.StdEncoding.EncodeToString(composite.Sum(nil)) + "-2"
	crcs, lengths := []partSum{of("crc32", "a"), of("crc32", "b")}, []int64{1, 1}
	for name, x := range map[string]struct {
		named wholeSum
		parts []partSum
		want  string
		fails bool
	}{
		"full object":             {wholeSum{kind: "FULL_OBJECT"}, crcs, full, false},
		"full object, by value":   {wholeSum{algorithm: "crc32", value: full}, crcs, full, false},
		"composite":               {wholeSum{kind: "COMPOSITE", algorithm: "crc32", value: both}, crcs, both, false},
		"not said which":          {wholeSum{}, crcs, "", false},
		"another value":           {wholeSum{kind: "FULL_OBJECT", algorithm: "crc32", value: both}, crcs, "", true},
		"another algorithm":       {wholeSum{algorithm: "sha256", value: "x"}, crcs, "", false},
		"one is unknown":          {wholeSum{kind: "FULL_OBJECT"}, []partSum{crcs[0], {}}, "", false},
		"one is of another kind":  {wholeSum{kind: "FULL_OBJECT"}, []partSum{crcs[0], of("crc32c", "b")}, "", false},
		"a hash cannot be merged": {wholeSum{kind: "FULL_OBJECT"}, []partSum{of("sha256", "a"), of("sha256", "b")}, "", true},
	} {
		if x.want != "" && x.named.algorithm == "" && x.named.kind == "" {
			t.Fatal(name)
		}
		got, err := x.named.resolve(x.parts, lengths)
		if (err != nil) != x.fails || err == nil && got.value != x.want {
			t.Errorf("%s: %v %v, not %s", name, got, err, x.want)
		}
	}
	if got, err := (wholeSum{kind: "FULL_OBJECT"}).resolve(crcs, nil); err != nil || got.algorithm != "" {
		t.Errorf("of parts of unknown lengths: %v %v", got, err)
	}
}
