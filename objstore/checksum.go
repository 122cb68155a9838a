package objstore

import (
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"net/http"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/zeebo/xxh3"
)

const checksumPrefix = "x-amz-checksum-"

// checksumAlgorithms are the suffixes of x-amz-checksum- headers that carry a
// value.
var checksumAlgorithms = []string{"crc32", "crc32c", "crc64nvme", "sha1", "sha256", "sha512", "md5", "xxhash64", "xxhash3", "xxhash128"}

// crc64NVMEPoly is the reflected polynomial of CRC64NVME.
const crc64NVMEPoly = 0x9a6c9329ac4bc9b5

// crc64NVME is its table; read only.
var crc64NVME = crc64.MakeTable(crc64NVMEPoly)

// castagnoli is the table of CRC32C; read only.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// newDigest returns the hash of an algorithm, or nil if byokd has none.
func newDigest(algorithm string) hash.Hash {
	switch algorithm {
	case "crc32":
		return crc32.NewIEEE()
	case "crc32c":
		return crc32.New(castagnoli)
	case "crc64nvme":
		return crc64.New(crc64NVME)
	case "sha1":
		return sha1.New()
	case "sha256":
		return sha256.New()
	case "sha512":
		return sha512.New()
	case "md5":
		return md5.New()
	case "xxhash64":
		return xxhash.New()
	case "xxhash3":
		return xxh3.New()
	case "xxhash128":
		return xxh3.New128()
	}
	return nil
}

// digest is one checksum being verified over a body.
type digest struct {
	name  string // header or trailer name, lower case
	want  string // base64; empty until the trailer arrived
	state hash.Hash
	// computed: the client sent none, and gets this one.
	computed bool
}

// digestsOf collects the checksums of the body that a request promises in header
// or trailer. Those of CompleteMultipartUpload are of the object, not of its body: see
// namedWhole.
func digestsOf(h http.Header, op Op) ([]*digest, error) {
	var all []*digest
	if values, given := h["Content-Md5"]; given {
		if raw, err := base64.StdEncoding.DecodeString(values[0]); err != nil || len(raw) != md5.Size {
			return nil, refuse(http.StatusBadRequest, "InvalidDigest", "The Content-Md5 you specified is not valid.").with("Content-MD5", values[0])
		}
		all = append(all, &digest{name: "content-md5", want: values[0], state: md5.New()})
	}
	if op == OpCompleteMultipartUpload {
		return all, nil
	}
	given := slices.DeleteFunc(slices.Clone(checksumAlgorithms), func(algorithm string) bool { return len(h.Values(checksumPrefix+algorithm)) == 0 })
	inTrailer := slices.ContainsFunc(checksumAlgorithms, func(algorithm string) bool { return announced(h, checksumPrefix+algorithm) })
	if len(given) > 1 || len(given) == 1 && inTrailer {
		return nil, errManyChecksums
	}
	sums := 0
	for _, algorithm := range checksumAlgorithms {
		d, err := checksumOf(h, algorithm)
		if err != nil {
			return nil, err
		}
		if d != nil {
			all = append(all, d)
			sums++
		}
	}
	if sums > 1 {
		return nil, errManyChecksums
	}
	return all, nil
}

var errManyChecksums = refuse(http.StatusBadRequest, "InvalidRequest", "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.")

// uploadChecksum reads which checksum an upload in parts is to have, in the spelling
// of S3.
func uploadChecksum(h http.Header) (algorithm, kind string, err error) {
	algorithm, kind = strings.ToUpper(h.Get("X-Amz-Checksum-Algorithm")), strings.ToUpper(h.Get("X-Amz-Checksum-Type"))
	switch {
	case kind != "" && kind != "COMPOSITE" && kind != "FULL_OBJECT":
		return "", "", refuse(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
	case algorithm == "" && kind != "":
		return "", "", refuse(http.StatusBadRequest, "InvalidRequest", "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header.")
	case algorithm == "":
		return "", "", nil
	case newDigest(strings.ToLower(algorithm)) == nil:
		return "", "", errChecksumAlgorithm
	}
	crc := strings.HasPrefix(algorithm, "CRC")
	switch {
	case kind == "" && algorithm == "CRC64NVME":
		kind = "FULL_OBJECT"
	case kind == "":
		kind = "COMPOSITE"
	case kind == "FULL_OBJECT" && !crc, kind == "COMPOSITE" && algorithm == "CRC64NVME":
		return "", "", refuse(http.StatusBadRequest, "InvalidRequest", "The %s checksum type cannot be used with the %s checksum algorithm.", kind, strings.ToLower(algorithm))
	}
	return algorithm, kind, nil
}

var errChecksumAlgorithm = refuse(http.StatusBadRequest, "InvalidRequest", "Checksum algorithm provided is unsupported. Please try again with any of the valid types: [CRC32, CRC32C, CRC64NVME, MD5, SHA1, SHA256, SHA512, XXHASH128, XXHASH3, XXHASH64]")

// checksumOf returns the checksum of one algorithm, if it is promised.
func checksumOf(h http.Header, algorithm string) (*digest, error) {
	name := checksumPrefix + algorithm
	want, given := h.Get(name), len(h.Values(name)) > 0
	if !given && !announced(h, name) {
		return nil, nil
	}
	if v := h.Get("X-Amz-Sdk-Checksum-Algorithm"); v != "" && !strings.EqualFold(v, algorithm) {
		return nil, refuse(http.StatusBadRequest, "InvalidRequest", "Value for x-amz-sdk-checksum-algorithm header is invalid.")
	}
	state := newDigest(algorithm)
	if state == nil {
		return nil, errChecksumAlgorithm
	}
	if raw, err := base64.StdEncoding.DecodeString(want); given && (err != nil || len(raw) != state.Size()) {
		return nil, refuse(http.StatusBadRequest, "InvalidRequest", "Value for %s header is invalid.", name)
	}
	return &digest{name: name, want: want, state: state}, nil
}

// announced reports whether x-amz-trailer names a trailer.
func announced(h http.Header, name string) bool {
	for _, v := range h.Values("X-Amz-Trailer") {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), name) {
				return true
			}
		}
	}
	return false
}

func malformedTrailer() *Error {
	return refuse(http.StatusBadRequest, "MalformedTrailerError", "The request contained trailing data that was not well-formed or did not conform to our published schema.")
}

// check compares with what the client promised.
func (d *digest) check() error {
	if d.computed {
		d.want = base64.StdEncoding.EncodeToString(d.state.Sum(nil))
		return nil
	}
	if d.want == "" {
		return malformedTrailer().hint("The trailer %s was announced but not sent.", d.name)
	}
	raw, err := base64.StdEncoding.DecodeString(d.want)
	if err != nil || len(raw) != d.state.Size() { // from a trailer
		return refuse(http.StatusBadRequest, "InvalidRequest", "Value for %s trailing header is invalid.", d.name)
	}
	calculated := d.state.Sum(nil)
	if bytes.Equal(calculated, raw) {
		return nil
	}
	if d.name == "content-md5" {
		return refuse(http.StatusBadRequest, "BadDigest", "The Content-MD5 you specified did not match what we received.").
			with("CalculatedDigest", base64.StdEncoding.EncodeToString(calculated)).with("ExpectedDigest", hex.EncodeToString(raw))
	}
	return refuse(http.StatusBadRequest, "BadDigest", "The %s you specified did not match the calculated checksum.", strings.ToUpper(strings.TrimPrefix(d.name, checksumPrefix)))
}

// A checksum of the plain bytes tells much about short ones, so it is stored with
// the sealed metadata, under a name that no client can send. Metadata goes up before
// the body, so it has to be known by then: from a header, or from the trailer of a
// body that is short enough to be held (bodyToStore).
const checksumEntry = "\x00checksum-"

// awaitsChecksum reports whether a checksum to be kept comes in the trailer.
func (in *ingress) awaitsChecksum() bool {
	return slices.ContainsFunc(in.digests, func(d *digest) bool { return d.want == "" && strings.HasPrefix(d.name, checksumPrefix) })
}

// keepChecksums adds the checksums of an upload that are known before it to its
// metadata. They hold if the upload becomes an object.
func (in *ingress) keepChecksums(meta map[string]string) {
	for _, d := range in.digests {
		if algorithm, found := strings.CutPrefix(d.name, checksumPrefix); found && d.want != "" {
			meta[checksumEntry+algorithm] = d.want
		}
	}
}

// takeChecksums takes the checksums out of opened metadata, by algorithm.
func takeChecksums(meta map[string]string) map[string]string {
	sums := map[string]string{}
	for name, value := range meta {
		if algorithm, found := strings.CutPrefix(name, checksumEntry); found {
			sums[algorithm] = value
			delete(meta, name)
		}
	}
	return sums
}

// putChecksums puts checksums back into metadata that is going to be sealed.
func putChecksums(meta, sums map[string]string) {
	for algorithm, value := range sums {
		meta[checksumEntry+algorithm] = value
	}
}

// describeChecksums sets the checksums of a whole object.
func describeChecksums(h http.Header, sums map[string]string) {
	for algorithm, value := range sums {
		h.Set(checksumPrefix+algorithm, value)
		h.Set("X-Amz-Checksum-Type", kindOf(sums))
	}
}
