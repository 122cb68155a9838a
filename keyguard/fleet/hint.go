package fleet

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"time"
)

const (
	magic    = "byokdH1"
	idSize   = 16
	macSize  = 26
	macFrom  = len(magic) + 2*idSize + 8
	hintSize = macFrom + macSize

	// freshness is how long a hint is good, both ways: clocks of a cluster differ by
	// milliseconds, and a hint replayed within it only repeats a question that is
	// limited to one a second anyway.
	freshness = 5 * time.Second
)

type id [idSize]byte

// idOf names a key without telling its ARN to who listens.
func idOf(keyARN string) (k id) {
	sum := sha256.Sum256([]byte(keyARN))
	copy(k[:], sum[:])
	return k
}

// hint is one message.
type hint struct {
	sender, key id
	at          time.Time
}

// seal writes a hint with its MAC.
func (h hint) seal(secret []byte) []byte {
	b := make([]byte, 0, hintSize)
	b = append(b, magic...)
	b = append(b, h.sender[:]...)
	b = append(b, h.key[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.at.UnixMilli()))
	return append(b, mac(secret, b)...)
}

func mac(secret, b []byte) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write(b)
	return m.Sum(nil)[:macSize]
}

var (
	errForm  = errors.New("not a hint")
	errMAC   = errors.New("not authentic: another secret, or forged")
	errStale = errors.New("too old or from the future: see the clocks")
)

// open checks a datagram and returns its hint.
func open(secret, b []byte, now time.Time) (h hint, err error) {
	if len(b) != hintSize || string(b[:len(magic)]) != magic {
		return h, errForm
	}
	if !hmac.Equal(b[macFrom:], mac(secret, b[:macFrom])) {
		return h, errMAC
	}
	rest := b[len(magic):]
	copy(h.sender[:], rest)
	copy(h.key[:], rest[idSize:])
	h.at = time.UnixMilli(int64(binary.BigEndian.Uint64(rest[2*idSize:])))
	if age := now.Sub(h.at); age > freshness || age < -freshness {
		return h, errStale
	}
	return h, nil
}
