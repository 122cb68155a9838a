package objstore

import (
	"encoding/base64"
	"hash"
	"net/http"
	"slices"
	"strings"
)

// begunUpload is which checksum, and which lock, an upload in parts was begun with. The service below is
// not told, since what it has are sealed bytes, and so cannot tell: bucket.uploads
// remembers the uploads that this byokd has begun. What concerns one of another byokd, or
// of before a restart, is not checked against how it was begun, and its parts have the checksums that came
// with them.
type begunUpload struct {
	algorithm string // in lower case; "" for none
	kind      string // COMPOSITE or FULL_OBJECT
	// lock are the headers that lock what it becomes; empty for none, nil where unknown.
	lock http.Header
}

// mismatch refuses a part with another checksum than its upload was begun with.
func (u begunUpload) mismatch(actual string) error {
	if actual = strings.ToUpper(actual); actual == "" {
		actual = "null"
	}
	return refuse(http.StatusBadRequest, "InvalidRequest", "Checksum Type mismatch occurred, expected checksum Type: %s, actual checksum Type: %s", strings.ToUpper(u.algorithm), actual)
}

// sumPart prepares the body of a part for the checksum that its upload was begun with:
// one that the client does not send is computed for it, as far as S3 would.
func (u begunUpload) sumPart(in *ingress, h http.Header) error {
	if u.algorithm == "" {
		return nil
	}
	sent := strings.ToLower(h.Get("X-Amz-Sdk-Checksum-Algorithm"))
	for _, d := range in.digests {
		if algorithm, found := strings.CutPrefix(d.name, checksumPrefix); found {
			sent = algorithm
		}
	}
	switch {
	case sent == u.algorithm:
		return nil
	case sent != "" || u.kind == "COMPOSITE":
		return u.mismatch(sent)
	}
	in.digests = append(in.digests, &digest{name: checksumPrefix + u.algorithm, state: newDigest(u.algorithm), computed: true})
	return nil
}

// agree completes what the request to complete an upload names by how it was begun, and
// refuses what differs.
func (u begunUpload) agree(named wholeSum) (wholeSum, error) {
	switch {
	case u.algorithm == "":
		return named, nil
	case named.kind != "" && named.kind != u.kind:
		return named, refuse(http.StatusBadRequest, "InvalidRequest", "The upload was created using the %s checksum mode. The complete request must use the same checksum mode.", u.kind)
	}
	named.kind = u.kind
	return named, nil
}

// spelt are algorithm and kind as documents and headers spell them.
func (u begunUpload) spelt() (algorithm, kind string) {
	return strings.ToUpper(u.algorithm), u.kind
}

// summing is a source that computes a checksum while it is read.
type summing struct {
	plainSource
	state hash.Hash
}

// Read implements io.Reader.
func (s *summing) Read(p []byte) (int, error) {
	n, err := s.plainSource.Read(p)
	s.state.Write(p[:n])
	return n, err
}

func (s *summing) release() { releaseSource(s.plainSource) }

// summed wraps the source of a part that is copied, where its upload has a checksum. The
// function returned tells it once the source was read.
func (u begunUpload) summed(src plainSource) (plainSource, func() partSum) {
	if u.algorithm == "" {
		return src, func() partSum { return partSum{} }
	}
	s := &summing{src, newDigest(u.algorithm)}
	return s, func() partSum { return partSum{u.algorithm, s.state.Sum(nil)} }
}

// fullOnly are the checksums that are of the bytes alone, and so also those of a copy
// that has other parts, or none.
func fullOnly(sums map[string]string) map[string]string {
	full := map[string]string{}
	for algorithm, value := range sums {
		if !isComposite(value) {
			full[algorithm] = value
		}
	}
	return full
}

// isComposite reports whether a checksum is one of the checksums of parts. Base64 has
// no dash.
func isComposite(value string) bool { return strings.Contains(value, "-") }

// kindOf is the type of the checksums of an object.
func kindOf(sums map[string]string) string {
	for _, value := range sums {
		if isComposite(value) {
			return "COMPOSITE"
		}
	}
	return "FULL_OBJECT"
}

// sums are the checksum of the whole by its algorithm.
func (w wholeSum) sums() map[string]string {
	if w.algorithm == "" {
		return nil
	}
	return map[string]string{w.algorithm: w.value}
}

// validSum reports whether a checksum can be one of its algorithm.
func validSum(algorithm, value string) bool {
	sum, _, _ := strings.Cut(value, "-")
	raw, err := base64.StdEncoding.DecodeString(sum)
	return slices.Contains(checksumAlgorithms, algorithm) && err == nil && len(raw) == newDigest(algorithm).Size()
}
