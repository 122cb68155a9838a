//go:build linux

package powercut

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// naiveJournal is what the harness has to catch: an encrypted file whose blocks
// are not aligned and whose last block is as short as its content, as other
// products have it. A rewritten last block and the new size of the file reach
// the disk apart from each other, and then the block does not open.
type naiveJournal struct {
	model
	aead cipher.AEAD
}

const (
	naivePlain    = 4096
	naiveOverhead = 28
)

func newNaiveJournal() (*naiveJournal, error) {
	key, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(key)
	return &naiveJournal{aead: aead}, err
}

func (*naiveJournal) name() string { return "naive" }

func (l *naiveJournal) run(ctx context.Context, w *world) error {
	fd, err := unix.Open(w.dir+"/file", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Fsync(fd), syncPath(w.dir)); err != nil {
		return err
	}
	l.acknowledge(w.now(), 0)
	var content []byte
	for tag := uint64(1); ctx.Err() == nil; tag++ {
		o := fileOp{kind: opWrite, begin: w.now(), off: int64(len(content)), n: w.rand.Int64N(700) + 1, tag: tag}
		l.begin(o)
		first := len(content) / naivePlain
		content = o.apply(content)
		for i := first; i*naivePlain < len(content); i++ {
			plain := content[i*naivePlain : min((i+1)*naivePlain, len(content))]
			if _, err := unix.Pwrite(fd, l.aead.Seal(nil, nil, plain, nil), int64(i)*(naivePlain+naiveOverhead)); err != nil {
				return err
			}
		}
		l.end()
		if err := unix.Fdatasync(fd); err != nil {
			return err
		}
		l.acknowledge(w.now(), l.returned())
	}
	return nil
}

func (l *naiveJournal) check(dir string, cut int) error {
	sealed, err := os.ReadFile(dir + "/file")
	if err != nil {
		return err
	}
	acked, _, _ := l.at(cut)
	var got []byte
	for len(sealed) > 0 && len(got) < len(acked) {
		n := min(len(sealed), naivePlain+naiveOverhead)
		plain, err := l.aead.Open(nil, nil, sealed[:n], nil)
		if err != nil {
			return fmt.Errorf("block at %d of %d acknowledged bytes: %w", len(got), len(acked), err)
		}
		got, sealed = append(got, plain...), sealed[n:]
	}
	if !bytes.HasPrefix(got, acked) {
		return fmt.Errorf("%d of %d acknowledged bytes are there", len(got), len(acked))
	}
	return nil
}

// naiveRewriter rewrites a sealed block through the page cache of the lower
// filesystem while others sync.
type naiveRewriter struct{ *naiveJournal }

func (naiveRewriter) name() string { return "naive-rewriter" }

func (l naiveRewriter) run(ctx context.Context, w *world) error {
	return hotBlock(ctx, w, func(fd int) error {
		plain := make([]byte, sector-naiveOverhead)
		rand.Read(plain)
		_, err := unix.Pwrite(fd, l.aead.Seal(nil, nil, plain, nil), 0)
		return err
	})
}

func (naiveRewriter) check(string, int) error { return nil }
