package objstore

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/byokd/byokd/internal/seal"
)

// Shrink makes the sizes and times small that tests could not reach otherwise.
func (p *Proxy) Shrink(upstreamPut, part int64, keepAlive time.Duration) {
	p.limits.upstreamPut, p.limits.upstreamPart, p.limits.keepAlive = upstreamPut, part, keepAlive
}

// Hurry shortens what a step of a request may take before its answer.
func (p *Proxy) Hurry(step time.Duration) { p.limits.step = step }

// alone is a source whose bytes may become an object.
type alone struct{ io.Reader }

func (alone) finish() error { return nil }

// SealTo writes the sealed form of n bytes of src, for benchmarks.
func (p *Proxy) SealTo(ctx context.Context, w io.Writer, bucket string, src io.Reader, n int64) error {
	s, err := p.newSealing(ctx, &call{bucket: p.buckets[bucket]}, alone{src}, n, seal.ObjectID{}, 0)
	if err != nil {
		return err
	}
	defer s.release()
	_, err = io.Copy(w, struct{ io.Reader }{s})
	return err
}

// OpenTo writes the plain form of an object, for benchmarks.
func (p *Proxy) OpenTo(ctx context.Context, w io.Writer, bucket, key string) error {
	b := p.buckets[bucket]
	obj, err := b.Upstream.Get(ctx, GetRequest{Ref: Ref{Key: key}})
	if err != nil {
		return err
	}
	o, err := p.openWhole(ctx, &call{bucket: b}, Ref{Key: key}, obj)
	if err != nil {
		return err
	}
	plain := &plainReader{ctx: ctx, o: o}
	defer plain.release()
	_, err = io.Copy(w, struct{ io.Reader }{plain})
	return err
}

// Authenticate verifies the signature of a request, for benchmarks.
func (p *Proxy) Authenticate(r *http.Request) error {
	_, err := p.authenticate(r)
	return err
}

// Unchunk takes the aws-chunked framing off the body of a signed request and
// verifies it, for benchmarks.
func (p *Proxy) Unchunk(w io.Writer, r *http.Request) (int64, error) {
	g, err := p.authenticate(r)
	if err != nil {
		return 0, err
	}
	return io.Copy(w, struct{ io.Reader }{newChunkReader(r.Body, g)})
}

// OpenedBytes counts the batches of a bucket that are in memory, and the plain bytes
// in them that are not zero and not being written to a client at this moment.
func (p *Proxy) OpenedBytes(bucket string) (batches, bytes int) {
	s := &p.buckets[bucket].opened
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range s.all {
		b.mu.Lock()
		for i, ch := range b.buf.plain {
			if ch != 0 && !b.opening && (i < b.from || i >= b.to) {
				bytes++
			}
		}
		b.mu.Unlock()
	}
	return len(s.all), bytes
}
