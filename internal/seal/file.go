package seal

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
)

const (
	fileMagic   = "byokdfil"
	fileVersion = 1

	// sealsPerSelector bounds the blocks sealed under one key by one blockKeys.
	// Random 96-bit nonces are safe for 2^32 seals under one key; a quarter of that
	// leaves room for other epochs of the volume that draw the same one of 65536
	// selectors.
	sealsPerSelector = 1 << 30

	// openSlots bounds the keys cached for reading, 0.8 KB each. A volume holds one
	// for each epoch in which it was written and for each 4 TiB written; a miss
	// costs a derivation, about 20 µs.
	openSlots = 4096
)

// blockKeys are the keys of file blocks, or of the attributes of inodes, by selector.
// All files share them: what binds a block to its file is the associated data. It is safe for concurrent
// use, belongs to the Root it came from, and must be used inside Do.
type blockKeys struct {
	root   *Root
	label  string                              // of their derivation
	writer atomic.Pointer[blockKey]            // the key to seal with; nil before the first seal
	reader [openSlots]atomic.Pointer[blockKey] // keys that have opened a block, by selector modulo openSlots
	mu     sync.Mutex                          // serialises replacing the writer
}

// blockKey is the cipher of one selector.
type blockKey struct {
	selector uint16
	aead     cipher.AEAD
	seals    atomic.Uint64 // blocks sealed with it here
}

// FileCipher seals and opens the blocks of one file. It is a small value, safe
// for concurrent use; it belongs to the Root it came from, and must be used
// inside Do.
type FileCipher struct {
	id   FileID
	keys *blockKeys
}

// blockScratch holds what sealing a block needs besides its arguments, so that
// nothing is allocated. data is zero while in the pool.
type blockScratch struct {
	ad   [blockADSize]byte
	data [lengthSize + BlockPayload]byte
}

const blockADSize = 2 + IDSize + 8 + selectorSize

var blockScratches = sync.Pool{New: func() any { return new(blockScratch) }}

// bind writes the associated data of a block: version, file id, index, selector.
func (s *blockScratch) bind(id *FileID, index uint64, selector uint16) []byte {
	binary.BigEndian.PutUint16(s.ad[0:], fileVersion)
	copy(s.ad[2:], id[:])
	binary.BigEndian.PutUint64(s.ad[18:], index)
	binary.BigEndian.PutUint16(s.ad[26:], selector)
	return s.ad[:]
}

// SealBlock seals plain as block index into dst, which must be BlockSize long
// and must not overlap plain. A plain shorter than PayloadOf(index) is padded
// with zeros; its length is sealed with it. Block 0 gets the file header too.
// It panics on other lengths and when its Root was wiped before the first seal.
// It does not allocate, except about once in 2^30 blocks.
func (c FileCipher) SealBlock(dst []byte, index uint64, plain []byte) {
	if len(dst) != BlockSize {
		panic(fmt.Sprintf("seal: SealBlock into %d bytes", len(dst)))
	}
	body := dst
	if index == 0 {
		putFileHeader(dst, &c.id)
		body = dst[FileHeaderSize:]
	}
	payload := len(body) - blockOverhead
	if len(plain) > payload {
		panic(fmt.Sprintf("seal: SealBlock of %d bytes in block %d", len(plain), index))
	}
	sub := c.keys.sealer(1)
	binary.BigEndian.PutUint16(body, sub.selector)

	// Sealed in place: GCM moves the text behind the nonce, and no scratch buffer
	// ever holds plaintext.
	text := body[selectorSize : selectorSize+lengthSize+payload]
	binary.BigEndian.PutUint16(text, uint16(len(plain)))
	n := copy(text[lengthSize:], plain)
	clear(text[lengthSize+n:])

	s := blockScratches.Get().(*blockScratch)
	sub.aead.Seal(text[:0], nil, text, s.bind(&c.id, index, sub.selector))
	blockScratches.Put(s)
}

// SealBlocks seals text[2:] as the whole of blocks index > 0 and following into
// dst, whose length is BlockSize for each of them and which must not overlap
// text. The first two bytes of text are room that it needs and restores; in the
// course it changes text and restores it, so nobody else may read text
// meanwhile. It copies less than SealBlock for each.
func (c FileCipher) SealBlocks(dst []byte, index uint64, text []byte) {
	count := len(dst) / BlockSize
	if index == 0 || len(dst)%BlockSize != 0 || len(text) != lengthSize+count*BlockPayload {
		panic(fmt.Sprintf("seal: SealBlocks of %d bytes into %d", len(text), len(dst)))
	}
	if count == 0 {
		return
	}
	s := blockScratches.Get().(*blockScratch)
	sub := c.keys.sealer(uint64(count))
	for i := range count {
		// The length is put before the data, over the end of the block before.
		whole := text[i*BlockPayload:][:lengthSize+BlockPayload]
		under := [lengthSize]byte(whole)
		binary.BigEndian.PutUint16(whole, BlockPayload)
		body := dst[i*BlockSize:][:BlockSize]
		binary.BigEndian.PutUint16(body, sub.selector)
		sub.aead.Seal(body[:selectorSize], nil, whole, s.bind(&c.id, index+uint64(i), sub.selector))
		copy(whole, under[:])
	}
	blockScratches.Put(s)
}

// OpenBlock opens block, BlockSize bytes of the lower file, as block index. It
// writes PayloadOf(index) bytes to dst, whose capacity must allow them and which
// must not overlap block, and returns how many of them are content; the rest are
// zeros. On an error dst holds nothing of the block. It returns ErrTruncated for
// a short block, ErrNotSealed or ErrUnknownVersion for a foreign block 0, and
// ErrTampered. Holes are the caller's: ask IsHole first. It does not allocate
// once the block's key is cached.
func (c FileCipher) OpenBlock(dst []byte, index uint64, block []byte) (n int, err error) {
	body, sub, err := c.look(index, block)
	if err != nil {
		return 0, err
	}
	dst = dst[:len(body)-blockOverhead]
	s := blockScratches.Get().(*blockScratch)
	n, err = s.open(s.data[:lengthSize+len(dst)], sub, &c.id, index, body)
	if err == nil {
		copy(dst, s.data[lengthSize:])
		clear(s.data[:])
		c.keys.keep(sub)
	}
	blockScratches.Put(s)
	return n, err
}

// OpenBlocks opens a run of whole blocks, of which index is the first, into dst,
// whose length must be the sum of their payloads and which must not overlap
// sealed. Holes, and what short blocks lack, become zeros. It copies less than
// OpenBlock for each, which takes 4 % more time. If block bad fails, dst is zeros;
// the errors are OpenBlock's.
func (c FileCipher) OpenBlocks(dst []byte, index uint64, sealed []byte) (bad uint64, err error) {
	if len(sealed)%BlockSize != 0 {
		return index, fmt.Errorf("%w: %d bytes of blocks", ErrTruncated, len(sealed))
	}
	count := len(sealed) / BlockSize
	first := BlockPayload
	if index == 0 {
		first = FirstPayload
	}
	if count == 0 || len(dst) != first+(count-1)*BlockPayload {
		panic(fmt.Sprintf("seal: OpenBlocks of %d blocks into %d bytes", count, len(dst)))
	}
	// From the last to the first: the length before a block's data lies over the
	// end of the block before it, which is then still to come.
	end := len(dst)
	for i := count - 1; i > 0; i-- {
		at := index + uint64(i)
		if err := c.openOver(dst[end-BlockPayload-lengthSize:end], at, sealed[i*BlockSize:][:BlockSize]); err != nil {
			clear(dst)
			return at, err
		}
		end -= BlockPayload
	}
	if IsHole(sealed[:BlockSize]) {
		clear(dst[:end])
		return 0, nil
	}
	if _, err := c.OpenBlock(dst[:end:end], index, sealed[:BlockSize]); err != nil {
		clear(dst)
		return index, err
	}
	return 0, nil
}

// openOver opens block index > 0 so that its data fills text behind the first
// lengthSize bytes.
func (c FileCipher) openOver(text []byte, index uint64, block []byte) error {
	if IsHole(block) {
		clear(text)
		return nil
	}
	body, sub, err := c.look(index, block)
	if err != nil {
		return err
	}
	s := blockScratches.Get().(*blockScratch)
	_, err = s.open(text, sub, &c.id, index, body)
	blockScratches.Put(s)
	if err == nil {
		c.keys.keep(sub)
	}
	return err
}

// look returns the sealed body of a block and the key that it names.
func (c FileCipher) look(index uint64, block []byte) (body []byte, sub *blockKey, err error) {
	if len(block) != BlockSize {
		return nil, nil, fmt.Errorf("%w: a block of %d bytes", ErrTruncated, len(block))
	}
	body = block
	if index == 0 {
		id, err := ParseFileHeader(block)
		if err != nil {
			return nil, nil, err
		}
		if id != c.id {
			return nil, nil, fmt.Errorf("%w: block 0 of another file", ErrTampered)
		}
		body = block[FileHeaderSize:]
	}
	sub, err = c.keys.opener(binary.BigEndian.Uint16(body))
	return body, sub, err
}

// open opens the sealed body of a block into text, its length and its data, and
// returns the length. On an error text holds nothing of the block.
func (s *blockScratch) open(text []byte, sub *blockKey, id *FileID, index uint64, body []byte) (n int, err error) {
	_, err = sub.aead.Open(text[:0:len(text)], nil, body[selectorSize:], s.bind(id, index, sub.selector))
	if err != nil {
		clear(text)
		return 0, ErrTampered
	}
	n = int(binary.BigEndian.Uint16(text))
	if n > len(text)-lengthSize {
		clear(text)
		return 0, fmt.Errorf("%w: block length %d", ErrTampered, n)
	}
	return n, nil
}

// sealer returns the key to seal so many more blocks with.
func (k *blockKeys) sealer(blocks uint64) *blockKey {
	key := k.writer.Load()
	if key == nil || key.seals.Add(blocks) > sealsPerSelector {
		return k.turn(key, blocks)
	}
	return key
}

// turn replaces the writer old by one of another random selector.
func (k *blockKeys) turn(old *blockKey, blocks uint64) *blockKey {
	k.mu.Lock()
	defer k.mu.Unlock()
	if key := k.writer.Load(); key != nil && key != old {
		key.seals.Add(blocks)
		return key
	}
	var selector [selectorSize]byte
	for {
		rand.Read(selector[:])
		if old == nil || binary.BigEndian.Uint16(selector[:]) != old.selector {
			break
		}
	}
	key, err := k.derive(binary.BigEndian.Uint16(selector[:]))
	if err != nil {
		panic(err) // sealing after Wipe: our own fault
	}
	key.seals.Add(blocks)
	k.writer.Store(key)
	return key
}

// opener returns the key of a selector. One that had to be derived is not cached
// before it has opened a block: selectors that an attacker invents never displace
// real ones.
func (k *blockKeys) opener(selector uint16) (*blockKey, error) {
	if key := k.reader[selector%openSlots].Load(); key != nil && key.selector == selector {
		return key, nil
	}
	if key := k.writer.Load(); key != nil && key.selector == selector {
		return key, nil
	}
	return k.derive(selector)
}

// keep caches a key that has opened a block.
func (k *blockKeys) keep(key *blockKey) {
	slot := &k.reader[key.selector%openSlots]
	if slot.Load() != key {
		slot.Store(key)
	}
}

// derive returns the cipher of a selector.
func (k *blockKeys) derive(selector uint16) (*blockKey, error) {
	var key [keySize]byte
	defer clear(key[:])
	if err := k.root.derive(key[:], k.label, []byte{byte(selector >> 8), byte(selector)}); err != nil {
		return nil, err
	}
	aead, err := newGCM(key[:])
	if err != nil {
		return nil, err
	}
	return &blockKey{selector: selector, aead: aead}, nil
}

// File returns the cipher of a file, or ErrWiped after Wipe. It costs nothing.
func (r *Root) File(id FileID) (FileCipher, error) {
	keys := r.blocks.Load()
	if keys == nil {
		return FileCipher{}, ErrWiped
	}
	return FileCipher{id: id, keys: keys}, nil
}

func putFileHeader(dst []byte, id *FileID) {
	copy(dst, fileMagic)
	binary.BigEndian.PutUint16(dst[8:], fileVersion)
	clear(dst[10:16])
	copy(dst[16:FileHeaderSize], id[:])
}

// ParseFileHeader reads the clear header at the start of block 0. The id it
// returns is authenticated only when OpenBlock opens block 0 under it.
func ParseFileHeader(block0 []byte) (FileID, error) {
	if len(block0) < FileHeaderSize {
		return FileID{}, fmt.Errorf("%w: a file header of %d bytes", ErrTruncated, len(block0))
	}
	if string(block0[:8]) != fileMagic {
		return FileID{}, fmt.Errorf("%w: no file header", ErrNotSealed)
	}
	if v := binary.BigEndian.Uint16(block0[8:]); v != fileVersion {
		return FileID{}, fmt.Errorf("%w: file format %d", ErrUnknownVersion, v)
	}
	if !IsHole(block0[10:16]) {
		return FileID{}, fmt.Errorf("%w: reserved bytes of the file header", ErrTampered)
	}
	return FileID(block0[16:FileHeaderSize]), nil
}

// IsHole tells whether a block is all zero: never written, or punched.
func IsHole(block []byte) bool {
	if len(block) < 8 {
		for _, b := range block {
			if b != 0 {
				return false
			}
		}
		return true
	}
	// A sealed block almost always ends the question in its first word. The rest
	// is zero if it equals itself shifted by a byte: one vectorised comparison.
	return binary.NativeEndian.Uint64(block) == 0 && bytes.Equal(block[:len(block)-1], block[1:])
}
