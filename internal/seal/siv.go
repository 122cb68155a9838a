package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// siv is AES-SIV (RFC 5297) of one empty component of associated data, which is what
// Tink's is with empty associated data. Tink's expands the key and allocates at each
// call, and inside Do allocations are dear: 11 µs a name. This one keeps the expanded
// keys, which are erased with it, allocates nothing, and takes 0.2 µs. Tests hold it
// against Tink's.
//
// It is safe for concurrent use, and must be made and used inside Do.
type siv struct {
	mac, ctr     cipher.Block
	whole, short sivBlock // CMAC's subkeys, for a last block of 16 bytes and for a shorter one
	associated   sivBlock // what S2V has made of the associated data
}

type sivBlock [aes.BlockSize]byte

// sivScratch is what a call needs besides its arguments. It is zero while in the pool.
type sivScratch struct {
	text         []byte // of which S2V takes the CMAC
	sum, counter sivBlock
	stream       sivBlock
}

var sivScratches = sync.Pool{New: func() any { return &sivScratch{text: make([]byte, 0, NameMax)} }}

// newAESSIV makes one of its two halves' ciphers: CMAC's, and the counter mode's.
func newAESSIV(mac, ctr cipher.Block) *siv {
	s := &siv{mac: mac, ctr: ctr}
	mac.Encrypt(s.short[:], s.short[:])
	s.short.double()
	s.whole = s.short
	s.short.double()

	// S2V of an empty component: dbl(CMAC(zeros)) ⊕ CMAC(nothing).
	x := sivScratches.Get().(*sivScratch)
	x.text = append(x.text[:0], make([]byte, aes.BlockSize)...)
	s.cmac(x)
	s.associated = x.sum
	s.associated.double()
	x.text = x.text[:0]
	s.cmac(x)
	s.associated.add(&x.sum)
	x.back()
	return s
}

// back returns a scratch to the pool.
func (x *sivScratch) back() {
	clear(x.text[:cap(x.text)])
	*x = sivScratch{text: x.text[:0]}
	sivScratches.Put(x)
}

// seal appends SIV and ciphertext of plain to dst, which must not overlap it.
func (s *siv) seal(dst, plain []byte) []byte {
	x := sivScratches.Get().(*sivScratch)
	s.s2v(x, plain)
	at := len(dst)
	dst = append(append(dst, x.sum[:]...), plain...)
	s.crypt(x, dst[at+sivSize:])
	x.back()
	return dst
}

// open opens sealed, SIV and ciphertext, in place. Where it does not authenticate
// the plaintext is cleared.
func (s *siv) open(sealed []byte) (plain []byte, ok bool) {
	if len(sealed) < sivSize {
		return nil, false
	}
	x := sivScratches.Get().(*sivScratch)
	plain = sealed[sivSize:]
	x.sum = sivBlock(sealed)
	s.crypt(x, plain)
	s.s2v(x, plain)
	ok = subtle.ConstantTimeCompare(x.sum[:], sealed[:sivSize]) == 1
	x.back()
	if !ok {
		clear(plain)
		return nil, false
	}
	return plain, true
}

// s2v leaves S2V of plain in x.sum.
func (s *siv) s2v(x *sivScratch, plain []byte) {
	d := s.associated
	if len(plain) < aes.BlockSize { // CMAC(dbl(d) ⊕ pad(plain))
		d.double()
		subtle.XORBytes(d[:], d[:], plain)
		d[len(plain)] ^= 0x80
		x.text = append(x.text[:0], d[:]...)
	} else { // CMAC(plain, with d added to its end)
		x.text = append(x.text[:0], plain...)
		end := x.text[len(plain)-aes.BlockSize:]
		subtle.XORBytes(end, end, d[:])
	}
	s.cmac(x)
}

// cmac leaves the CMAC (RFC 4493) of x.text in x.sum.
func (s *siv) cmac(x *sivScratch) {
	x.sum = sivBlock{}
	rest := x.text
	for ; len(rest) > aes.BlockSize; rest = rest[aes.BlockSize:] {
		subtle.XORBytes(x.sum[:], x.sum[:], rest[:aes.BlockSize])
		s.mac.Encrypt(x.sum[:], x.sum[:])
	}
	subtle.XORBytes(x.sum[:], x.sum[:], rest)
	if len(rest) == aes.BlockSize {
		x.sum.add(&s.whole)
	} else {
		x.sum[len(rest)] ^= 0x80
		x.sum.add(&s.short)
	}
	s.mac.Encrypt(x.sum[:], x.sum[:])
}

// crypt adds to text the key stream that the SIV in x.sum begins.
func (s *siv) crypt(x *sivScratch, text []byte) {
	x.counter = x.sum
	x.counter[8] &= 0x7f
	x.counter[12] &= 0x7f // so that counting never carries beyond the last four bytes
	for len(text) > 0 {
		s.ctr.Encrypt(x.stream[:], x.counter[:])
		n := subtle.XORBytes(text, text, x.stream[:min(len(text), aes.BlockSize)])
		text = text[n:]
		low := x.counter[12:]
		binary.BigEndian.PutUint32(low, binary.BigEndian.Uint32(low)+1)
	}
}

// double multiplies by x in GF(2^128).
func (b *sivBlock) double() {
	high, low := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	carry := -(high >> 63) & 0x87
	binary.BigEndian.PutUint64(b[:8], high<<1|low>>63)
	binary.BigEndian.PutUint64(b[8:], low<<1^carry)
}

func (b *sivBlock) add(other *sivBlock) { subtle.XORBytes(b[:], b[:], other[:]) }
