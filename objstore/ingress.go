package objstore

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"hash"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// ingress is the plain body of a request. finish says whether the client's
// signature, payload hash, checksums and length all hold; until it has, nobody
// may let the upstream complete.
type ingress struct {
	src    io.Reader
	chunks *chunkReader // nil when the body is not aws-chunked
	size   int64        // plain bytes announced; -1 when unknown
	taken  atomic.Int64 // plain bytes read so far; written by the reader only
	lent   bool         // a sealing owns the body and releases it; set before it does
	// interrupted: the request's context ended because we broke off reading, not
	// because the client left.
	interrupted atomic.Bool
	payload     hash.Hash // nil unless x-amz-content-sha256 is a hash
	want        string    // hex
	digests     []*digest
}

// newIngress prepares the body of a verified request.
func newIngress(c *call, g *grant) (*ingress, error) {
	r, body := c.r, awaited{c.r.Body, &c.waits.taking}
	in := &ingress{src: body, size: r.ContentLength}
	if g.kind.chunked() {
		n, err := strconv.ParseInt(r.Header.Get("X-Amz-Decoded-Content-Length"), 10, 64)
		if err != nil || n < 0 {
			return nil, refuse(http.StatusLengthRequired, "MissingContentLength", "You must provide the Content-Length HTTP header.").hint("An aws-chunked body needs x-amz-decoded-content-length.")
		}
		in.size = n
		in.chunks = newChunkReader(body, g)
		in.src = in.chunks
	}
	if g.kind == payloadHash && in.size != 0 {
		in.payload, in.want = sha256.New(), g.hash
	}
	var err error
	in.digests, err = digestsOf(r.Header, c.op)
	return in, err
}

// Read implements io.Reader. It never yields more than the announced size.
func (in *ingress) Read(p []byte) (int, error) {
	if in.size >= 0 {
		if in.taken.Load() == in.size {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), in.size-in.taken.Load())]
	}
	n, err := in.src.Read(p)
	in.taken.Add(int64(n))
	if in.payload != nil {
		in.payload.Write(p[:n])
	}
	for _, d := range in.digests {
		d.state.Write(p[:n])
	}
	if err == io.EOF && in.size >= 0 && in.taken.Load() < in.size {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = refuse(http.StatusBadRequest, "IncompleteBody", "You did not provide the number of bytes specified by the Content-Length HTTP header")
	}
	return n, err
}

// finish verifies the body once all announced bytes were read.
func (in *ingress) finish() error {
	if in.size >= 0 && in.taken.Load() != in.size {
		panic("objstore: a body is finished before it was read")
	}
	var more [1]byte
	n, err := io.ReadFull(in.src, more[:])
	switch {
	case n > 0:
		return refuse(http.StatusBadRequest, "IncompleteBody", "You did not provide the number of bytes specified by the Content-Length HTTP header").hint("The body is longer than announced.")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse(http.StatusBadRequest, "IncompleteBody", "The request body terminated unexpectedly").hint("The body ended before its last chunk.")
	case err != io.EOF:
		return err
	}
	if in.payload != nil && hex.EncodeToString(in.payload.Sum(nil)) != in.want {
		return refuse(http.StatusBadRequest, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.").
			with("ClientComputedContentSHA256", in.want).with("S3ComputedContentSHA256", hex.EncodeToString(in.payload.Sum(nil)))
	}
	if in.chunks != nil {
		for name := range in.chunks.trailer {
			if strings.HasPrefix(name, checksumPrefix) && !slices.ContainsFunc(in.digests, func(d *digest) bool { return d.name == name }) {
				return malformedTrailer().hint("The trailer %s was not announced in x-amz-trailer.", name)
			}
		}
	}
	for _, d := range in.digests {
		if in.chunks != nil && d.want == "" && !d.computed {
			d.want = in.chunks.trailer[d.name]
		}
		if err := d.check(); err != nil {
			return err
		}
	}
	return nil
}

// checksums returns the verified checksums, for the answer to an upload.
func (in *ingress) checksums(h http.Header) {
	for _, d := range in.digests {
		if strings.HasPrefix(d.name, checksumPrefix) {
			h.Set(d.name, d.want)
			h.Set("X-Amz-Checksum-Type", "FULL_OBJECT")
		}
	}
}

// interrupt ends a Read that waits for the client: net/http answers nobody while
// somebody reads the body. The connection is closed after the answer.
func (in *ingress) interrupt(w *response) {
	in.interrupted.Store(true)
	// Best effort: without deadlines the answer waits for the client's next byte.
	_ = http.NewResponseController(w.w).SetReadDeadline(time.Unix(1, 0))
}

// releaseUnlessLent is release for a body that nobody else reads.
func (in *ingress) releaseUnlessLent() {
	if !in.lent {
		in.release()
	}
}

// release clears what is left of plain bytes.
func (in *ingress) release() {
	if in.chunks != nil {
		clear(in.chunks.in.buf[:])
	}
}

// readAll returns a small, verified body of at most limit bytes.
func (in *ingress) readAll(limit int64) ([]byte, error) {
	tooLarge := refuse(http.StatusBadRequest, "MaxMessageLengthExceeded", "Your request was too big: at most %d bytes.", limit)
	if in.size > limit {
		return nil, tooLarge
	}
	data, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, tooLarge
	}
	return data, in.finish()
}

// readXML parses a small, verified body.
func (in *ingress) readXML(limit int64, into any) error {
	data, err := in.readAll(limit)
	if err != nil {
		return err
	}
	if err := xml.Unmarshal(data, into); err != nil {
		return malformedXML()
	}
	return nil
}
