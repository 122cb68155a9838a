package objstore

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// plainSource is a body to be sealed. finish is called once all bytes were read
// and says whether they may become an object.
type plainSource interface {
	io.Reader
	finish() error
}

// sealing is a reader of the sealed form of a plain source of known length: the
// upstream client pulls, and each pull that finds nothing left reads and seals
// one batch. The last segment is withheld until the source's finish said yes; an
// error ends the sealed stream early, so that the upstream cannot complete.
//
// The upstream client may still be inside Read when it has already returned an
// error; therefore the buffers go back only when both are through.
type sealing struct {
	ctx    context.Context // of the request; ends the wait of a frozen Read
	bucket *bucket
	lane   uint32
	key    dataKey
	src    plainSource
	pool   *bufferPool
	header seal.ObjectHeader // complete after the first batch
	stop   func()            // makes a Read of src that waits for the client return; may be nil

	// Owned by Read.
	left int64  // plain bytes to come
	next uint64 // index of the next segment
	out  []byte // sealed bytes not handed on yet
	done bool   // the last segment is in out, or was
	buf  *buffers

	mu        sync.Mutex
	busy      bool  // guarded by mu: a Read is under way
	abandoned bool  // guarded by mu: release was called
	err       error // guarded by mu: why Read failed
	complete  bool  // guarded by mu: everything was handed on
	cut       bool  // guarded by mu: the upstream answered before it had everything
}

// newSealing prepares the sealed form of n bytes of src, and owns src from here. object is zero for a
// simple object, whose id is random.
func (p *Proxy) newSealing(ctx context.Context, c *call, src plainSource, n int64, object seal.ObjectID, part int32) (*sealing, error) {
	var key dataKey
	err := p.within(ctx, c.bucket, func(ctx context.Context) (err error) {
		key, err = c.bucket.writing.take(ctx)
		return err
	})
	if err != nil {
		releaseSource(src)
		return nil, err
	}
	if object.IsZero() {
		object = seal.NewID()
	}
	var stop func()
	if c.body != nil && c.body.lent {
		stop = func() { c.body.interrupt(c.w) }
	}
	return &sealing{
		ctx: ctx, stop: stop, bucket: c.bucket, lane: c.lane, key: key, src: src, pool: &p.pool, left: n, buf: p.pool.get(n),
		header: seal.ObjectHeader{
			Object: object, Part: uint32(part), PlainSize: uint64(n),
			KeyARN: c.bucket.keyARN, WrappedKey: key.wrapped,
		},
	}, nil
}

// size is the length of the sealed form.
func (s *sealing) size() int64 { return seal.SealedObjectSize(int64(s.header.PlainSize)) }

// Read implements io.Reader for the upstream client.
func (s *sealing) Read(p []byte) (int, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	n, err := s.read(p)
	s.leave(err)
	return n, err
}

func (s *sealing) read(p []byte) (int, error) {
	if len(s.out) == 0 {
		if s.done {
			return 0, io.EOF
		}
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.out)
	s.out = s.out[n:]
	return n, nil
}

// fill seals one batch into out.
func (s *sealing) fill() error {
	n := min(s.left, int64(len(s.buf.plain)))
	plain := s.buf.plain[:n]
	if _, err := io.ReadFull(s.src, plain); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errShortBody
		}
		return err
	}
	s.left -= n
	if s.left == 0 {
		if err := s.src.finish(); err != nil {
			return err
		}
	}
	err := s.sealBatch(plain)
	clear(plain)
	return err
}

// sealBatch is run until one pass saw it through: a batch that a freeze cut
// short is sealed again, with fresh nonces.
func (s *sealing) sealBatch(plain []byte) error {
	for {
		var out []byte
		header := s.header
		_, err := s.bucket.withKey(s.ctx, s.lane, s.key, func(root *seal.Root) (err error) {
			out, header, err = s.sealUnder(root, plain)
			return err
		})
		if err != nil && !isFrozen(err) {
			return err
		}
		if err != nil && len(out) == 0 {
			continue
		}
		// Sealed bytes may leave also when the epoch ended meanwhile.
		s.header, s.out = header, out
		s.next += uint64(segmentsOf(len(plain)))
		s.done = s.left == 0
		return nil
	}
}

// sealUnder seals one batch, with the header before it if it is the first.
func (s *sealing) sealUnder(root *seal.Root, plain []byte) ([]byte, seal.ObjectHeader, error) {
	out, header := s.buf.sealed[:0], s.header
	var cipher *seal.ObjectCipher
	var err error
	if s.next == 0 {
		if header, cipher, err = root.NewObject(header); err != nil {
			return nil, header, err
		}
		raw, err := header.Marshal()
		if err != nil {
			return nil, header, err
		}
		out = append(out, raw...)
	} else if cipher, err = root.OpenObject(header); err != nil {
		return nil, header, err
	}
	count := segmentsOf(len(plain))
	for i := range count {
		piece := plain[i*seal.SegmentSize : min((i+1)*seal.SegmentSize, len(plain))]
		out = cipher.SealSegment(out, piece, s.next+uint64(i), s.left == 0 && i == count-1)
	}
	return out, header, nil
}

// segmentsOf counts the segments of one batch of n plain bytes.
func segmentsOf(n int) int { return int(seal.SegmentCount(int64(n))) }

func (s *sealing) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned || s.busy {
		return io.ErrClosedPipe
	}
	if s.err != nil {
		return s.err
	}
	s.busy = true
	return nil
}

func (s *sealing) leave(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = false
	if err != nil && err != io.EOF {
		s.err = err
	}
	s.complete = s.done && len(s.out) == 0
	if s.abandoned {
		s.free()
	}
}

// answerGrace is how long a client that is in the midst of a batch may take to
// finish it when the upstream has refused already. One that sends does so within
// milliseconds, and can then be answered in good order; one that does not would
// keep its own answer from being sent.
const answerGrace = 300 * time.Millisecond

// answered is called when the upstream has answered or failed. If it has not got
// everything, the answer is a refusal, and nothing more of the source is wanted.
func (s *sealing) answered() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.complete || s.err != nil {
		return
	}
	s.cut = true
	if s.stop != nil && s.busy {
		time.AfterFunc(answerGrace, s.stopReading)
	}
}

// stopReading ends a Read that is still under way.
func (s *sealing) stopReading() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy {
		s.stop()
	}
}

// outcome returns the error that counts after the upstream call returned
// upstreamErr: a failure on the client's side comes first, for it is the cause.
func (s *sealing) outcome(upstreamErr error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.cut && upstreamErr != nil:
		return upstreamErr
	case s.err != nil:
		return s.err
	case upstreamErr != nil:
		return upstreamErr
	case !s.complete:
		return errors.New("objstore: the upstream acknowledged an upload that it had not read to its end")
	}
	return nil
}

// release gives the buffers back, now or when the Read under way is through.
func (s *sealing) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned {
		return
	}
	s.abandoned = true
	if !s.busy {
		s.free()
	}
}

// free is called once, with mu held.
func (s *sealing) free() {
	s.pool.put(s.buf)
	s.buf, s.out = nil, nil
	releaseSource(s.src)
}

// isFrozen reports whether a pass ended under its user.
func isFrozen(err error) bool { return errors.Is(err, keyguard.ErrFrozen) }
