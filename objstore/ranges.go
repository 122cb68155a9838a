package objstore

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/byokd/byokd/internal/seal"
)

// rangeWant is a Range header or partNumber before the object's length is known.
type rangeWant struct {
	from, to int64 // inclusive; to -1 is the end; from -1 means the last `to` bytes
	part     int   // partNumber, from 1; 0 for a Range
	header   string
}

// plainRange is a range that lies inside an object.
type plainRange struct {
	off, n int64
	byPart bool
}

// wantedRange parses what part of the object a request is for; nil is all of it.
// A Range that is malformed, or names several ranges, is ignored as S3 does.
func wantedRange(c *call) (*rangeWant, error) {
	if v := c.arg("partNumber"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > seal.MaxParts {
			return nil, invalidArgument("partNumber", v, "Part number must be an integer between 1 and 10000, inclusive.")
		}
		if c.r.Header.Get("Range") != "" {
			return nil, refuse(http.StatusBadRequest, "InvalidRequest", "Cannot specify both Range header and partNumber query parameter")
		}
		return &rangeWant{part: n}, nil
	}
	want := parseRange(c.r.Header.Get("Range"))
	if want != nil {
		want.header = c.r.Header.Get("Range")
	}
	return want, nil
}

// parseRange parses "bytes=a-b", "bytes=a-" and "bytes=-n".
func parseRange(header string) *rangeWant {
	spec, found := strings.CutPrefix(header, "bytes=")
	if !found {
		return nil
	}
	a, b, found := strings.Cut(spec, "-")
	if !found {
		return nil
	}
	from, okFrom := parseOffset(a)
	to, okTo := parseOffset(b)
	switch {
	case !okFrom || !okTo || a == "" && b == "":
		return nil
	case a == "":
		return &rangeWant{from: -1, to: to}
	case b == "":
		return &rangeWant{from: from, to: -1}
	case to < from:
		return nil
	}
	return &rangeWant{from: from, to: to}
}

// parseOffset accepts digits only; numbers beyond int64 are as good as its end.
func parseOffset(s string) (int64, bool) {
	for _, ch := range s {
		if ch < '0' || ch > '9' {
			return 0, false
		}
	}
	if s == "" {
		return 0, true
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 1<<63 - 1, true
	}
	return n, true
}

// resolve places a wanted range in an object.
func (w *rangeWant) resolve(lay *layout) (*plainRange, error) {
	if w.part > 0 {
		return w.resolvePart(lay)
	}
	size := lay.plain
	if size == 0 && w.from < 0 && w.to > 0 {
		return &plainRange{}, nil // as S3: the last bytes of nothing are all of it
	}
	off, end := w.from, w.to // end inclusive
	switch {
	case w.from < 0:
		off, end = max(0, size-w.to), size-1
	case w.to < 0 || w.to >= size:
		end = size - 1
	}
	if off >= size || end < off {
		return nil, refuse(http.StatusRequestedRangeNotSatisfiable, "InvalidRange", "The requested range is not satisfiable").
			with("RangeRequested", w.header).with("ActualObjectSize", strconv.FormatInt(size, 10))
	}
	return &plainRange{off: off, n: end - off + 1}, nil
}

func (w *rangeWant) resolvePart(lay *layout) (*plainRange, error) {
	if w.part > lay.count {
		return nil, refuse(http.StatusRequestedRangeNotSatisfiable, "InvalidPartNumber", "The requested partnumber is not satisfiable.").
			with("ActualPartCount", strconv.Itoa(lay.count)).with("PartNumberRequested", strconv.Itoa(w.part))
	}
	if lay.count == 1 {
		return &plainRange{n: lay.plain, byPart: true}, nil
	}
	if lay.unread != nil {
		return nil, lay.unread
	}
	s := lay.part(w.part - 1)
	return &plainRange{off: s.plainFrom, n: s.plainSize, byPart: true}, nil
}
