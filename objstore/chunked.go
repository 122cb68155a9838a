package objstore

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"net/http"
	"strconv"
	"strings"
)

const (
	// maxChunkLine bounds a chunk header: 16 hex digits, ";chunk-signature=" and 64
	// hex digits are 97 bytes.
	maxChunkLine = 256
	// maxTrailerBytes bounds all trailers of a body together; the longest checksum
	// and its signature need about 250 bytes.
	maxTrailerBytes = 4096
)

// errFraming: the aws-chunked framing of a body is not what it should be.
var errFraming = refuse(http.StatusBadRequest, "IncompleteBody", "The request body terminated unexpectedly").hint("The aws-chunked framing of the body is malformed.")

// errChunkSignature: a chunk was changed on its way.
var errChunkSignature = refuse(http.StatusForbidden, "SignatureDoesNotMatch", "A chunk signature does not match.")

// lineReader reads lines and bytes from one source through a buffer that it can
// clear, which a bufio.Reader cannot.
type lineReader struct {
	src        io.Reader
	buf        [4096]byte
	start, end int
}

// fill reads more into an empty buffer.
func (l *lineReader) fill() error {
	l.start, l.end = 0, 0
	for range 100 {
		n, err := l.src.Read(l.buf[:])
		l.end = n
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// line returns the next line without its end, at most limit bytes long.
func (l *lineReader) line(limit int) (string, error) {
	var text []byte
	for {
		if l.start == l.end {
			if err := l.fill(); err != nil {
				if err == io.EOF && len(text) > 0 {
					err = io.ErrUnexpectedEOF
				}
				return "", err
			}
		}
		rest := l.buf[l.start:l.end]
		i := bytes.IndexByte(rest, '\n')
		if i >= 0 {
			rest = rest[:i]
			l.start++ // the line end itself
		}
		if len(text)+len(rest) > limit {
			return "", errFraming
		}
		text = append(text, rest...)
		l.start += len(rest)
		if i >= 0 {
			return strings.TrimSuffix(string(text), "\r"), nil
		}
	}
}

// Read implements io.Reader.
func (l *lineReader) Read(p []byte) (int, error) {
	if l.start < l.end {
		n := copy(p, l.buf[l.start:l.end])
		l.start += n
		return n, nil
	}
	return l.src.Read(p)
}

// chunkReader takes the aws-chunked framing off a body and verifies its
// signatures. It returns io.EOF only after the last chunk and the trailers were
// there and right. Bytes of a chunk are handed on before the chunk's signature is
// known, so nobody may act on them before io.EOF.
type chunkReader struct {
	in        lineReader
	g         *grant
	left      int64  // of the present chunk
	promised  string // signature of the present chunk
	sum       hash.Hash
	signature string // of the chunk before
	open      bool   // inside a chunk
	done      bool
	trailer   map[string]string // lower case names; complete at io.EOF
}

func newChunkReader(src io.Reader, g *grant) *chunkReader {
	return &chunkReader{in: lineReader{src: src}, g: g, sum: sha256.New(), signature: g.signature, trailer: map[string]string{}}
}

// Read implements io.Reader.
func (c *chunkReader) Read(p []byte) (int, error) {
	for c.left == 0 {
		if c.done {
			return 0, io.EOF
		}
		if err := c.next(); err != nil {
			return 0, unexpected(err)
		}
	}
	n, err := c.in.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	if c.g.kind.signed() {
		c.sum.Write(p[:n])
	}
	if err != nil && (c.left > 0 || err != io.EOF) {
		return n, unexpected(err)
	}
	return n, nil
}

// next ends the present chunk and begins the next one, or ends the body.
func (c *chunkReader) next() error {
	if c.open {
		if line, err := c.in.line(maxChunkLine); err != nil || line != "" {
			return orFraming(err)
		}
		if err := c.verify(); err != nil {
			return err
		}
	}
	line, err := c.in.line(maxChunkLine)
	if err != nil {
		return err
	}
	if err := c.begin(line); err != nil {
		return err
	}
	if c.left > 0 {
		return nil
	}
	if err := c.verify(); err != nil { // the last chunk is empty, and signed too
		return err
	}
	c.done = true
	return c.readTrailers()
}

// begin parses "size[;chunk-signature=hex]".
func (c *chunkReader) begin(line string) error {
	size, extension, _ := strings.Cut(line, ";")
	n, err := strconv.ParseUint(size, 16, 62)
	if err != nil || strings.HasPrefix(size, "+") {
		return errFraming
	}
	value, found := strings.CutPrefix(extension, "chunk-signature=")
	if found != c.g.kind.signed() {
		return errFraming
	}
	c.left, c.promised, c.open = int64(n), value, true
	c.sum.Reset()
	return nil
}

// verify checks the signature of the chunk that just ended.
func (c *chunkReader) verify() error {
	if !c.g.kind.signed() {
		return nil
	}
	text := "AWS4-HMAC-SHA256-PAYLOAD\n" + c.g.date + "\n" + c.g.scope + "\n" + c.signature + "\n" + emptyHash + "\n" + hex.EncodeToString(c.sum.Sum(nil))
	want := hex.EncodeToString(sign(c.g.signKey, text))
	if subtle.ConstantTimeCompare([]byte(want), []byte(c.promised)) != 1 {
		return errChunkSignature
	}
	c.signature = want
	return nil
}

// readTrailers reads up to the end of the body. Clients differ in where they put
// blank lines, so those are skipped; what matters is that nothing else follows.
func (c *chunkReader) readTrailers() error {
	var text strings.Builder // as it was signed
	claimed := ""
	for budget := maxTrailerBytes; ; {
		line, err := c.in.line(budget)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if budget -= len(line) + 1; budget <= 0 {
			return errFraming
		}
		if line == "" {
			continue
		}
		name, value, found := strings.Cut(line, ":")
		name, value = strings.ToLower(strings.TrimSpace(name)), strings.TrimSpace(value)
		switch {
		case !found || c.g.kind == payloadChunks:
			return errFraming
		case name == "x-amz-trailer-signature":
			claimed = value
		default:
			c.trailer[name] = value
			text.WriteString(name + ":" + value + "\n")
		}
	}
	if c.g.kind != payloadChunksTrailer {
		return nil
	}
	if text.Len() == 0 {
		return malformedTrailer()
	}
	sum := sha256.Sum256([]byte(text.String()))
	want := hex.EncodeToString(sign(c.g.signKey, "AWS4-HMAC-SHA256-TRAILER\n"+c.g.date+"\n"+c.g.scope+"\n"+c.signature+"\n"+hex.EncodeToString(sum[:])))
	if subtle.ConstantTimeCompare([]byte(want), []byte(claimed)) != 1 {
		return errChunkSignature
	}
	return nil
}

// unexpected turns an end of the body inside its framing into a short body.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// orFraming returns err, or errFraming when something stood where nothing should.
func orFraming(err error) error {
	if err != nil {
		return err
	}
	return errFraming
}
