package objstore

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"net/http"
	"strings"
)

const checksumPrefix = "x-amz-checksum-"

// checksumAlgorithms are the suffixes of x-amz-checksum- headers that carry a
// value. XXHASH ones are known to S3 but not to byokd; see newDigest.
var checksumAlgorithms = []string{"crc32", "crc32c", "crc64nvme", "sha1", "sha256", "sha512", "md5", "xxhash64", "xxhash3", "xxhash128"}

// crc64NVME is the reflected polynomial of CRC64NVME; read only.
var crc64NVME = crc64.MakeTable(0x9a6c9329ac4bc9b5)

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
	}
	return nil
}

// digest is one checksum being verified over a body.
type digest struct {
	name  string // header or trailer name, lower case
	want  string // base64; empty until the trailer arrived
	state hash.Hash
}

// digestsOf collects the checksums that a request promises in header or trailer.
func digestsOf(h http.Header) ([]*digest, error) {
	var all []*digest
	if want := h.Get("Content-Md5"); want != "" {
		if raw, err := base64.StdEncoding.DecodeString(want); err != nil || len(raw) != md5.Size {
			return nil, refuse(http.StatusBadRequest, "InvalidDigest", "The Content-MD5 you specified is not valid.")
		}
		all = append(all, &digest{name: "content-md5", want: want, state: md5.New()})
	}
	for _, algorithm := range checksumAlgorithms {
		name := checksumPrefix + algorithm
		want := h.Get(name)
		if want == "" && !announced(h, name) {
			continue
		}
		state := newDigest(algorithm)
		if state == nil {
			return nil, refuse(http.StatusNotImplemented, "NotImplemented", "byokd does not know the checksum %s. Use CRC32, CRC32C, CRC64NVME, SHA-1 or SHA-256.", name)
		}
		if raw, err := base64.StdEncoding.DecodeString(want); want != "" && (err != nil || len(raw) != state.Size()) {
			return nil, refuse(http.StatusBadRequest, "InvalidRequest", "Value for %s header is invalid.", name)
		}
		all = append(all, &digest{name: name, want: want, state: state})
	}
	return all, nil
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

// check compares with what the client promised.
func (d *digest) check() error {
	if d.want == "" {
		return refuse(http.StatusBadRequest, "MalformedTrailerError", "The trailer %s was announced but not sent.", d.name)
	}
	if base64.StdEncoding.EncodeToString(d.state.Sum(nil)) == d.want {
		return nil
	}
	if d.name == "content-md5" {
		return refuse(http.StatusBadRequest, "BadDigest", "The Content-MD5 you specified did not match what we received.")
	}
	return refuse(http.StatusBadRequest, "BadDigest", "The %s you specified did not match the calculated checksum.", strings.ToUpper(strings.TrimPrefix(d.name, checksumPrefix)))
}
