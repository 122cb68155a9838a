package objstore

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"net/http"
	"strconv"
	"strings"
)

// The checksums of an upload's parts are verified when the parts come. Nothing of an
// upload in progress can hold them for CompleteMultipartUpload, whichever byokd it
// goes to, but the client: so the ETag of a part that came with a checksum carries it,
//
//	"9dabf81d1dbabfd597ceb91664d9b480-0-crc32-1c8fa03b"
//
// It says nothing that the client did not say itself, and goes no further. A part whose
// ETag carries none (because it came without, or because ListParts of another byokd
// named it) is completed all the same, and is then not compared.

// partSum is the checksum of a part's plain bytes; without algorithm it is unknown.
type partSum struct {
	algorithm string
	value     []byte
}

// partETag is the ETag that a client gets for a part.
func partETag(upstream string, sum partSum) string {
	etag := clientETag(upstream)
	if sum.algorithm == "" || etag == "" {
		return etag
	}
	return strings.TrimSuffix(etag, `"`) + "-" + sum.algorithm + "-" + hex.EncodeToString(sum.value) + `"`
}

// splitPartETag takes the checksum out of what partETag made. Others stay as they are.
func splitPartETag(etag string) (string, partSum) {
	bare := strings.Trim(etag, `"`)
	head, tail, found := strings.Cut(bare, singleSuffix+"-")
	algorithm, digits, _ := strings.Cut(tail, "-")
	state := newDigest(algorithm)
	value, err := hex.DecodeString(digits)
	if !found || state == nil || err != nil || len(value) != state.Size() {
		return etag, partSum{}
	}
	return `"` + head + singleSuffix + `"`, partSum{algorithm, value}
}

// partSum returns the verified checksum of a part's body.
func (in *ingress) partSum() partSum {
	for _, d := range in.digests {
		if algorithm, found := strings.CutPrefix(d.name, checksumPrefix); found {
			return partSum{algorithm, d.state.Sum(nil)}
		}
	}
	return partSum{}
}

// namedSums are the checksums that the list of parts names for one of them.
func (x *xmlChecksum) namedSums() (all []partSum, text string, err error) {
	for i, value := range []string{x.ChecksumCRC32, x.ChecksumCRC32C, x.ChecksumCRC64NVME, x.ChecksumSHA1, x.ChecksumSHA256, x.ChecksumSHA512, x.ChecksumMD5, x.ChecksumXXHASH64, x.ChecksumXXHASH3, x.ChecksumXXHASH128} {
		if value == "" {
			continue
		}
		algorithm := checksumAlgorithms[i]
		raw, decodeErr := base64.StdEncoding.DecodeString(value)
		if decodeErr != nil || len(raw) != newDigest(algorithm).Size() {
			return nil, "", invalidArgument("Checksum", value, "Invalid Base64 or multiple checksums present in request")
		}
		all, text = append(all, partSum{algorithm, raw}), text+strings.ToUpper(algorithm)+":"+value+";"
	}
	if len(all) > 1 {
		return nil, "", invalidArgument("Checksum", text, "Invalid Base64 or multiple checksums present in request")
	}
	return all, text, nil
}

// checkPart compares the checksum that the client names for a part with the one that
// was verified when it came.
func checkPart(number int32, named *xmlChecksum, known partSum, kind string) error {
	sums, _, err := named.namedSums()
	switch {
	case err != nil || known.algorithm == "":
		return err
	case len(sums) == 0 && kind == "COMPOSITE":
		return refuse(http.StatusBadRequest, "InvalidRequest", "The upload was created using a %s checksum. The complete request must include the checksum for each part. It was missing for part %d in the request.", known.algorithm, number)
	case len(sums) == 0:
		return nil
	case sums[0].algorithm != known.algorithm:
		return refuse(http.StatusBadRequest, "BadDigest", "The %s you specified for part %d did not match what we received.", sums[0].algorithm, number)
	case !bytes.Equal(sums[0].value, known.value):
		return refuse(http.StatusBadRequest, "InvalidPart", "One or more of the specified parts could not be found.  The part may not have been uploaded, or the specified entity tag may not match the part's entity tag.").
			hint("The %s of part %d is another one.", known.algorithm, number)
	}
	return nil
}

// wholeSum is what CompleteMultipartUpload says of the checksum of the whole object.
type wholeSum struct {
	kind      string // COMPOSITE, FULL_OBJECT, or "" where the request does not say
	algorithm string // "" where it names no value
	value     string // base64; of a composite one with "-" and the number of parts
}

// namedWhole reads the checksum of the whole object that a request names.
func namedWhole(h http.Header) (w wholeSum, err error) {
	w.kind = strings.ToUpper(h.Get("X-Amz-Checksum-Type"))
	if w.kind != "" && w.kind != "COMPOSITE" && w.kind != "FULL_OBJECT" {
		return w, refuse(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
	}
	for _, algorithm := range checksumAlgorithms {
		value := h.Get(checksumPrefix + algorithm)
		if value == "" {
			continue
		}
		if w.algorithm != "" {
			return w, errManyChecksums
		}
		sum, count, composite := strings.Cut(value, "-")
		raw, err := base64.StdEncoding.DecodeString(sum)
		_, countErr := strconv.ParseUint(count, 10, 16)
		if err != nil || len(raw) != newDigest(algorithm).Size() || composite && countErr != nil {
			return w, refuse(http.StatusBadRequest, "InvalidRequest", "Value for %s header is invalid.", checksumPrefix+algorithm)
		}
		w.algorithm, w.value = algorithm, value
		if composite && w.kind == "" {
			w.kind = "COMPOSITE"
		}
	}
	return w, nil
}

// resolve computes the checksum of the whole object from those of its parts, whose
// plain lengths are given, and compares it with the one that was named. Where it
// cannot be told it returns no algorithm.
func (w wholeSum) resolve(parts []partSum, lengths []int64) (wholeSum, error) {
	algorithm := parts[0].algorithm
	for _, p := range parts {
		if p.algorithm == "" || p.algorithm != algorithm {
			return wholeSum{}, nil
		}
	}
	if len(parts) > 1 && len(lengths) == 0 {
		return wholeSum{}, nil
	}
	crc := strings.HasPrefix(algorithm, "crc")
	kind := w.kind
	switch {
	case kind != "":
	case algorithm == "crc64nvme" || crc && w.algorithm == algorithm:
		kind = "FULL_OBJECT"
	case !crc:
		kind = "COMPOSITE"
	default: // of the two that a CRC can have, the upload's was said when it began
		return wholeSum{}, nil
	}
	whole := wholeSum{kind: kind, algorithm: algorithm}
	switch {
	case kind == "COMPOSITE" && algorithm != "crc64nvme":
		state := newDigest(algorithm)
		for _, p := range parts {
			state.Write(p.value)
		}
		whole.value = base64.StdEncoding.EncodeToString(state.Sum(nil)) + "-" + strconv.Itoa(len(parts))
	case kind == "FULL_OBJECT" && crc:
		whole.value = base64.StdEncoding.EncodeToString(combined(algorithm, parts, lengths))
	default:
		return wholeSum{}, refuse(http.StatusBadRequest, "InvalidRequest", "The %s checksum type cannot be used with the %s checksum algorithm.", kind, algorithm)
	}
	if w.algorithm == algorithm && w.value != whole.value {
		return whole, refuse(http.StatusBadRequest, "BadDigest", "The %s you specified did not match the calculated checksum.", strings.ToUpper(algorithm))
	}
	return whole, nil
}

// combined is the CRC of the parts in a row.
func combined(algorithm string, parts []partSum, lengths []int64) []byte {
	poly, size := uint64(crc32.IEEE), 4
	switch algorithm {
	case "crc32c":
		poly = crc32.Castagnoli
	case "crc64nvme":
		poly, size = crc64NVMEPoly, 8
	}
	number := func(b []byte) uint64 {
		if size == 4 {
			return uint64(binary.BigEndian.Uint32(b))
		}
		return binary.BigEndian.Uint64(b)
	}
	sum := number(parts[0].value)
	for i, p := range parts[1:] {
		sum = combineCRC(poly, uint(size)*8, sum, number(p.value), lengths[i+1])
	}
	out := binary.BigEndian.AppendUint64(nil, sum)
	return out[8-size:]
}

// combineCRC is the CRC of A followed by the n bytes of B, from those of both. The
// polynomial is reflected, and the CRC inverted before and after, as all three of S3
// are: then it is crc(A)·x^(8n) + crc(B) modulo the polynomial.
func combineCRC(poly uint64, bits uint, a, b uint64, n int64) uint64 {
	one := uint64(1) << (bits - 1) // x^0, reflected
	times := func(p, q uint64) (product uint64) {
		for m := one; m != 0; m >>= 1 {
			if p&m != 0 {
				product ^= q
			}
			if q&1 != 0 {
				q = q>>1 ^ poly
			} else {
				q >>= 1
			}
		}
		return product
	}
	shift := one
	for power := one >> 8; n > 0; n >>= 1 { // x^8, x^16, x^32 …
		if n&1 != 0 {
			shift = times(shift, power)
		}
		power = times(power, power)
	}
	return times(shift, a) ^ b
}

// partName names a part that was uploaded: bucket.sums remembers the checksums of the
// last ones, so that ListParts names the ETags that UploadPart did, as long as it is
// the same byokd.
type partName struct {
	id     UploadID
	number int32
	etag   string // the upstream's
}

// rememberPart notes the checksum of a part, if it has one.
func (b *bucket) rememberPart(name partName, sum partSum) {
	if sum.algorithm != "" {
		b.sums.put(name, sum)
	}
}

// elements are the checksum in the form of a document.
func (s partSum) elements() xmlChecksum {
	if s.algorithm == "" {
		return xmlChecksum{}
	}
	x := *checksumElements(map[string]string{s.algorithm: base64.StdEncoding.EncodeToString(s.value)})
	x.ChecksumType = "" // which a part has none of
	return x
}
