package s3test

import (
	"bufio"
	"crypto/md5"
	"encoding/base64"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// refusal is an answer that a request deserves.
type refusal struct {
	status        int
	code, message string
}

func (r *refusal) Error() string { return r.code }

// checksum is what a request says that the checksum of its body is. A nil one is none.
type checksum struct {
	state   hash.Hash
	name    string // of the header or trailer
	trailer map[string]string
}

const crc32Name = "X-Amz-Checksum-Crc32"

// newChecksum finds the checksum of a body: Content-MD5, or a CRC32 before or after
// it. Others are not known.
func newChecksum(h http.Header) (*checksum, error) {
	switch {
	case h.Get("Content-Md5") != "":
		return &checksum{state: md5.New(), name: "Content-Md5"}, nil
	case h.Get(crc32Name) != "", strings.EqualFold(h.Get("X-Amz-Trailer"), crc32Name):
		return &checksum{state: crc32.NewIEEE(), name: crc32Name}, nil
	case h.Get("X-Amz-Trailer") != "":
		return nil, &refusal{http.StatusNotImplemented, "NotImplemented", "no such trailer is known"}
	}
	return nil, nil
}

// takes reports whether a part has the checksum that its upload was begun for: S3
// takes no other.
func (u *upload) takes(h http.Header) bool {
	sum, err := newChecksum(h)
	if err != nil || sum == nil || sum.name != crc32Name {
		return err == nil
	}
	return u.algorithm == "CRC32"
}

// decodedLength is the announced length of an object's bytes, or -1.
func decodedLength(r *http.Request) int64 {
	if n, err := strconv.ParseInt(r.Header.Get("X-Amz-Decoded-Content-Length"), 10, 64); err == nil {
		return n
	}
	return r.ContentLength
}

// over takes the framing off a body that has a trailer, and sums up what it yields.
func (c *checksum) over(r *http.Request, body io.Reader) io.Reader {
	if r.Header.Get("X-Amz-Content-Sha256") == "STREAMING-UNSIGNED-PAYLOAD-TRAILER" {
		c.trailer = map[string]string{}
		body = &chunks{src: bufio.NewReader(body), trailer: c.trailer}
	}
	if c == nil {
		return body
	}
	return io.TeeReader(body, c.state)
}

// check compares with what the request says, and returns a CRC32.
func (c *checksum) check(r *http.Request) (string, error) {
	if c == nil {
		return "", nil
	}
	want := r.Header.Get(c.name)
	if want == "" {
		want = c.trailer[c.name]
	}
	if base64.StdEncoding.EncodeToString(c.state.Sum(nil)) != want {
		return "", &refusal{http.StatusBadRequest, "BadDigest", "the checksum is another"}
	}
	if c.name != crc32Name {
		return "", nil
	}
	return want, nil
}

// chunks is an aws-chunked body without signatures.
type chunks struct {
	src     *bufio.Reader
	left    int64
	trailer map[string]string // filled at the end
	done    bool
}

// Read implements io.Reader.
func (c *chunks) Read(p []byte) (int, error) {
	if c.left == 0 && !c.done {
		if err := c.begin(); err != nil {
			return 0, err
		}
	}
	if c.done {
		return 0, io.EOF
	}
	n, err := c.src.Read(p[:min(int64(len(p)), c.left)])
	if c.left -= int64(n); c.left == 0 && err == nil {
		_, err = c.line()
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// begin reads the line before a chunk and, where none is left, the trailer.
func (c *chunks) begin() error {
	line, err := c.line()
	if err != nil {
		return err
	}
	if c.left, err = strconv.ParseInt(line, 16, 64); err != nil {
		return fmt.Errorf("length of a chunk: %w", err)
	}
	for c.done = c.left == 0; c.done && line != ""; {
		if line, err = c.line(); err != nil {
			return err
		}
		name, value, _ := strings.Cut(line, ":")
		c.trailer[http.CanonicalHeaderKey(name)] = value
	}
	return nil
}

func (c *chunks) line() (string, error) {
	line, err := c.src.ReadString('\n')
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return strings.TrimRight(line, "\r\n"), err
}
