package objstore

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/byokd/byokd/internal/seal"
)

// aheadBatches is how many batches of a download are in memory: one that is being
// written to the client, one that is opened and waits for it, and one that is being
// read meanwhile.
const aheadBatches = 3

// download hands what o reads to the client of c. Nothing is sent before the first
// batch was opened, so that damage there is answered with an error document. cancel
// ends the context that ctx is and that o reads with.
func (p *Proxy) download(ctx context.Context, cancel context.CancelCauseFunc, c *call, o *opening, status int) error {
	first := o.newBatch()
	defer first.release()
	err := p.within(ctx, c.bucket, func(ctx context.Context) error { return o.next(ctx, first) })
	if err != nil && err != io.EOF {
		return err
	}
	c.w.begin(status)
	if err == io.EOF {
		return nil
	}
	if o.left == 0 {
		return writeBatch(ctx, c, first)
	}
	return newReadAhead(ctx, o, first).write(ctx, cancel, c)
}

// writeBatch hands an opened batch to the client, segment by segment, and asks before
// each whether the epoch lasts.
func writeBatch(ctx context.Context, c *call, b *batch) error {
	for b.left > 0 {
		piece, err := b.take(ctx, pieceOf(b.left))
		if err != nil {
			return err
		}
		if _, err := c.w.Write(piece); err != nil {
			return fmt.Errorf("writing to the client: %w", err)
		}
	}
	return nil
}

// maxPiece is how much is handed to the kernel at once, and so what may still leave
// when a freeze begins in the midst of it: a segment less what makes it longer than one
// packet of the loopback interface (65483 bytes), the rest of which would travel alone.
const maxPiece = seal.SegmentSize - 64

// pieceOf is the length of the next piece of n bytes, where all are about as long.
func pieceOf(n int) int {
	pieces := (n + maxPiece - 1) / maxPiece
	return (n + pieces - 1) / pieces
}

// readAhead reads and opens the next batches of a download while the present one is
// written. Batches go round: from the reader through filled to the writer, and back
// through free.
type readAhead struct {
	o      *opening
	filled chan filledBatch
	free   chan *batch
	first  *batch
	others []*batch // the reader's until ended
	ended  sync.WaitGroup
}

// filledBatch is a batch, or why there is none; io.EOF after the last one.
type filledBatch struct {
	*batch
	err error
}

// newReadAhead begins to read behind the first batch, which stays the caller's. It
// ends when o is at its end or fails, or ctx ends.
func newReadAhead(ctx context.Context, o *opening, first *batch) *readAhead {
	a := &readAhead{o: o, first: first, filled: make(chan filledBatch, aheadBatches), free: make(chan *batch, aheadBatches)}
	a.ended.Go(func() { a.read(ctx) })
	return a
}

// read releases nothing: the writer may be in the midst of any batch when ctx ends.
func (a *readAhead) read(ctx context.Context) {
	for {
		var b *batch
		if len(a.others) < aheadBatches-1 {
			b = a.o.newBatch()
			a.others = append(a.others, b)
		} else {
			select {
			case b = <-a.free:
			case <-ctx.Done():
				return
			}
		}
		err := a.o.next(ctx, b)
		a.filled <- filledBatch{b, err}
		if err != nil {
			return
		}
	}
}

// write hands all batches to the client, and ends the reading.
func (a *readAhead) write(ctx context.Context, cancel context.CancelCauseFunc, c *call) error {
	next := filledBatch{batch: a.first}
	for next.err == nil {
		if next.err = writeBatch(ctx, c, next.batch); next.err != nil {
			break
		}
		a.free <- next.batch
		select {
		case next = <-a.filled:
		case <-ctx.Done():
			next = filledBatch{err: context.Cause(ctx)}
		}
	}
	cancel(next.err)
	a.ended.Wait()
	for _, b := range a.others {
		b.release()
	}
	if next.err == io.EOF {
		return nil
	}
	return next.err
}
