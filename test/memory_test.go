//go:build linux

package test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/aws/aws-sdk-go-v2/service/kms"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// What must not be in a frozen daemon's memory: the volume's root key and the
// buckets' data keys, everything derived from them, and the forms in which
// ciphers hold them. The keys are asked of KMS by its administrator; the
// derivations follow docs/FORMAT.md and not the code under test.

// secret is a root key or data key as KMS unwraps it.
type secret struct {
	name string
	id   seal.KeyID
	key  []byte
}

// needles are 16-byte pieces to look for, by their first 8 bytes.
type needles struct {
	byHead map[uint64][]needle
	filter []uint64 // a bit for each hash of a head: most of memory is passed over by it
	count  int
}

type needle struct {
	tail uint64
	name string
}

const (
	needleSize = 16
	filterBits = 22
)

func newNeedles() *needles {
	return &needles{byHead: map[uint64][]needle{}, filter: make([]uint64, 1<<filterBits/64)}
}

func bucketOf(head uint64) uint64 { return head * 0x9e3779b97f4a7c15 >> (64 - filterBits) }

// add takes each 16-byte piece of a secret byte string.
func (n *needles) add(name string, b []byte) {
	for ; len(b) >= needleSize; b = b[needleSize:] {
		n.addPiece(name, b[:needleSize])
	}
}

func (n *needles) addPiece(name string, piece []byte) {
	if plain(piece) {
		return
	}
	head, tail := binary.NativeEndian.Uint64(piece), binary.NativeEndian.Uint64(piece[8:])
	for _, known := range n.byHead[head] {
		if known.tail == tail {
			return
		}
	}
	n.byHead[head] = append(n.byHead[head], needle{tail, name})
	bucket := bucketOf(head)
	n.filter[bucket/64] |= 1 << (bucket % 64)
	n.count++
}

// plain tells pieces that mean nothing: counters, pointers, zeros.
func plain(piece []byte) bool {
	different := map[byte]bool{}
	for _, b := range piece {
		different[b] = true
	}
	return len(different) < 9 // 16 random bytes have fewer once in 10^8
}

// addSecret adds 32 bytes as they are and as text: KMS answers in base64.
func (n *needles) addSecret(name string, key []byte) {
	n.add(name, key)
	n.add(name+" in base64", []byte(base64.StdEncoding.EncodeToString(key)))
	n.add(name+" in hex", []byte(hex.EncodeToString(key)))
}

// addCipher adds an AES key with its key schedule and GHASH table, as this
// version of Go lays them out: read from a cipher made here of the same key.
func (n *needles) addCipher(name string, key []byte) {
	n.add(name, key)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	n.add(name+", key schedule", memoryOf(block))
	n.add(name+", GCM state", memoryOf(aead))
}

// memoryOf returns the bytes of the structure behind an interface value.
func memoryOf(v any) []byte {
	p := reflect.ValueOf(v)
	return bytes.Clone(unsafe.Slice((*byte)(p.UnsafePointer()), p.Elem().Type().Size()))
}

// addMAC adds an HMAC-SHA256 key and the two states of SHA-256 that stand for it.
func (n *needles) addMAC(name string, key []byte) {
	n.add(name, key)
	for _, pad := range []byte{0x36, 0x5c} {
		var first [sha256.BlockSize]byte
		copy(first[:], key)
		for i := range first {
			first[i] ^= pad
		}
		h := sha256.New()
		h.Write(first[:])
		state, err := h.(interface{ AppendBinary([]byte) ([]byte, error) }).AppendBinary(nil)
		if err != nil {
			panic(err)
		}
		state = state[4:][:sha256.Size] // after the magic; big-endian words
		n.add(name+", HMAC state", state)
		native := make([]byte, 0, sha256.Size)
		for i := 0; i < sha256.Size; i += 4 {
			native = binary.NativeEndian.AppendUint32(native, binary.BigEndian.Uint32(state[i:]))
		}
		n.add(name+", HMAC state", native)
	}
}

// derive is the derivation of docs/FORMAT.md, section 1.
func (s secret) derive(size int, info ...string) []byte {
	key, err := hkdf.Key(sha256.New, s.key, s.id[:], strings.Join(info, ""), size)
	if err != nil {
		panic(err)
	}
	return key
}

// addRoot adds a root and everything that every root derives.
func (n *needles) addRoot(s secret) {
	n.addSecret(s.name, s.key)
	extract, err := hkdf.Extract(sha256.New, s.key, s.id[:])
	if err != nil {
		panic(err)
	}
	n.addMAC(s.name+": HKDF extract", extract)
	names := s.derive(64, "byokd/v1/name")
	n.addCipher(s.name+": name key, CMAC half", names[:32])
	n.addCipher(s.name+": name key, CTR half", names[32:])
	n.addCipher(s.name+": symlink key", s.derive(32, "byokd/v1/symlink"))
	n.addCipher(s.name+": metadata key", s.derive(32, "byokd/v1/meta"))
	n.addMAC(s.name+": volume header key", s.derive(32, "byokd/v1/volume-header", string(s.id[:])))
	n.addCipher(s.name+": attribute key of directories", s.derive(32, "byokd/v1/xattr", string(make([]byte, 16))))
}

// addFiles adds the keys of every file below a volume's root.
func (n *needles) addFiles(s secret, lower string) (files int, err error) {
	err = filepath.WalkDir(lower, func(path string, d iofs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == seal.VolumeHeaderName {
			return ignoreGone(err)
		}
		var value [seal.AttributesMax]byte
		if size, err := unix.Lgetxattr(path, seal.IDAttribute, value[:]); err == nil && size > seal.IDSize+3 {
			n.addCipher("key of owners and modes", s.derive(32, "byokd/v1/attributes", string(value[seal.IDSize+1:][:2])))
		}
		text, err := os.ReadFile(path)
		if err != nil || len(text) < seal.BlockSize || seal.IsHole(text[:seal.BlockSize]) {
			return ignoreGone(err)
		}
		id, err := seal.ParseFileHeader(text[:seal.BlockSize])
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		files++
		n.addCipher("attribute key of a file", s.derive(32, "byokd/v1/xattr", string(id[:])))
		selectors := map[string]bool{}
		for block := text; len(block) >= seal.BlockSize; block = block[seal.BlockSize:] {
			at := 0
			if len(block) == len(text) {
				at = seal.FileHeaderSize
			}
			if !seal.IsHole(block[:seal.BlockSize]) {
				selectors[string(block[at:at+2])] = true
			}
		}
		for selector := range selectors {
			n.addCipher("key of blocks", s.derive(32, "byokd/v1/block", selector))
		}
		return nil
	})
	return files, err
}

func ignoreGone(err error) error {
	if errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	return err
}

// addObjects adds the keys of every object and part below dir, given their data keys.
func (n *needles) addObjects(keys map[seal.KeyID]secret, dir string) (parts int, err error) {
	err = eachObject(dir, func(h seal.ObjectHeader) error {
		s, ok := keys[h.Key]
		if !ok {
			return fmt.Errorf("an object names the unknown data key %v", h.Key)
		}
		parts++
		n.addCipher("key of an object", s.derive(32, "byokd/v1/object/segments", string(h.Salt[:])))
		n.addMAC("header key of an object", s.derive(32, "byokd/v1/object/header", string(h.Salt[:])))
		return nil
	})
	return parts, err
}

// eachObject calls f with the header of every sealed object and part in files below dir.
func eachObject(dir string, f func(seal.ObjectHeader) error) error {
	return filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return ignoreGone(err)
		}
		file, err := os.Open(path)
		if err != nil {
			return ignoreGone(err)
		}
		defer file.Close()
		raw := make([]byte, seal.ObjectHeaderSize)
		for at := int64(0); ; {
			if _, err := file.ReadAt(raw, at); err != nil {
				return nil // the end, or an upload under way
			}
			h, err := seal.ParseObjectHeader(raw)
			if err != nil {
				return nil
			}
			if err := f(h); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			at += seal.SealedObjectSize(int64(h.PlainSize))
		}
	})
}

// secrets asks KMS for the volume's root key and the data keys of every object
// there is. The key must be enabled.
func (s *stack) secrets() (root secret, data map[seal.KeyID]secret) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.lower, seal.VolumeHeaderName))
	if err != nil {
		s.t.Fatal(err)
	}
	header, err := seal.ParseVolumeHeader(text)
	if err != nil {
		s.t.Fatal(err)
	}
	root = secret{"the volume's root key", header.Volume, s.unwrap(header.WrappedRoot, header.Binding)}
	data = map[seal.KeyID]secret{}
	err = eachObject(s.objects(), func(h seal.ObjectHeader) error {
		if _, known := data[h.Key]; !known {
			data[h.Key] = secret{"a data key", h.Key, s.unwrap(h.WrappedKey, map[string]string{"byokd:cluster": "acme-test", "byokd:resource": "bucket/acme-documents"})}
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return root, data
}

// objects is the directory of devcloud in which the sealed objects lie.
func (s *stack) objects() string {
	return filepath.Join(s.dir, "cloud", "s3", "data", "acme-documents")
}

func (s *stack) unwrap(wrapped []byte, binding map[string]string) []byte {
	s.t.Helper()
	out, err := s.kms.Decrypt(context.Background(), &kms.DecryptInput{CiphertextBlob: wrapped, EncryptionContext: binding, KeyId: &s.arn})
	if err != nil {
		s.t.Fatal(err)
	}
	return out.Plaintext
}

// needles are all keys that byokd may hold or have held for what lies below the seal now.
func (s *stack) needles(root secret, data map[seal.KeyID]secret) *needles {
	s.t.Helper()
	n := newNeedles()
	n.addRoot(root)
	for _, d := range data {
		n.addRoot(d)
	}
	files, err := n.addFiles(root, s.lower)
	if err != nil {
		s.t.Fatal(err)
	}
	parts, err := n.addObjects(data, s.objects())
	if err != nil {
		s.t.Fatal(err)
	}
	if files == 0 || parts == 0 || len(data) == 0 {
		s.t.Fatalf("keys of %d files and %d parts under %d data keys: the scan would prove nothing", files, parts, len(data))
	}
	return n
}

// findings are the copies that a scan has found.
type findings struct {
	scanned int64 // bytes
	copies  int
	byName  map[string]int
	places  []string // where some of them lie
}

// maxPlaces bounds the places that are told: one cipher holds 60 pieces.
const maxPlaces = 10

func (f *findings) note(name, mapping string, address uint64) {
	if f.byName == nil {
		f.byName = map[string]int{}
	}
	f.byName[name]++
	f.copies++
	if len(f.places) < maxPlaces {
		f.places = append(f.places, fmt.Sprintf("%s at %x in %s", name, address, mapping))
	}
}

// String lists the findings by name.
func (f *findings) String() string {
	lines := []string{}
	for _, name := range slices.Sorted(maps.Keys(f.byName)) {
		lines = append(lines, fmt.Sprintf("%d × %s", f.byName[name], name))
	}
	return fmt.Sprintf("%d copies in %d MiB: %s", f.copies, f.scanned>>20, strings.Join(lines, "; "))
}

// scan looks for the needles in byokd: in every readable mapping and in the
// registers of its threads; and in its keeper, with what that holds, if it has one.
func (s *stack) scan(n *needles) *findings {
	s.t.Helper()
	f := &findings{}
	s.scanProcess(n, s.workerPid(), f)
	n.scanBytes(s.registers(), 0, "registers", f)
	if s.keeper {
		s.scanProcess(n, s.daemon.pid(), f)
		s.scanJournal(n, f)
	}
	return f
}

func (s *stack) scanProcess(n *needles, pid int, f *findings) {
	s.t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		s.t.Fatal(err)
	}
	defer mem.Close()
	mappings, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		s.t.Fatal(err)
	}
	resident := openPagemap(s.t, pid)
	defer resident.Close()
	window := make([]byte, 1<<20)
	for mapping := range strings.Lines(string(mappings)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(mapping, "%x-%x %s", &from, &to, &mode); err != nil {
			s.t.Fatal(err)
		}
		if mode[0] != 'r' || strings.Contains(mapping, "[vvar") || strings.Contains(mapping, "[vsyscall]") {
			continue // the kernel's own
		}
		for _, run := range resident.runs(s.t, from, to) {
			n.scanRange(mem, run, window, strings.TrimSpace(mapping), f)
		}
	}
}

func (n *needles) scanRange(mem io.ReaderAt, r addressRange, window []byte, mapping string, f *findings) {
	for at := r.from; at < r.to; {
		got, _ := mem.ReadAt(window[:min(uint64(len(window)), r.to-at)], int64(at)) // a page may go meanwhile
		if got < needleSize {
			return
		}
		n.scanBytes(window[:got], at, mapping, f)
		at += uint64(got)
		if at < r.to {
			at -= needleSize - 1 // what straddles two windows
		}
	}
}

// scanBytes looks through memory that lies at an address.
func (n *needles) scanBytes(b []byte, address uint64, mapping string, f *findings) {
	f.scanned += int64(len(b))
	for i := 0; i+needleSize <= len(b); i++ {
		head := binary.NativeEndian.Uint64(b[i:])
		bucket := bucketOf(head)
		if n.filter[bucket/64]&(1<<(bucket%64)) == 0 {
			continue
		}
		for _, candidate := range n.byHead[head] {
			if candidate.tail == binary.NativeEndian.Uint64(b[i+8:]) {
				f.note(candidate.name, mapping, address+uint64(i))
			}
		}
	}
}

// The control of everything above: without the experiment that erases, the same
// scan of a daemon that is frozen in the same way finds what Go left behind.
func TestScannerSeesALeakyBuild(t *testing.T) {
	if !erasing {
		t.Skip("this platform has no runtimesecret")
	}
	s := newStack(t, leaky)
	l := s.startLoad()
	s.awaitProgress(l)
	root, data := s.secrets()
	s.key(kmstest.KeyCommand{Do: "disable"})
	s.awaitGate(keyguard.Frozen)
	s.awaitErased()
	report, _ := s.report()
	if report.Erasure != "best_effort" {
		t.Errorf("a build without the experiment calls its erasure %q", report.Erasure)
	}
	n := s.needles(root, data)
	f := s.scan(n)
	if f.copies == 0 {
		t.Errorf("%v: a clean scan would prove nothing", f)
	}
	t.Logf("%d pieces of keys looked for, %v", n.count, f)
	s.key(kmstest.KeyCommand{Do: "enable"})
	s.awaitProgress(l)
	s.retire(l.workers)
	s.retireClients(l.clients)
}

// The scanner finds every kind of needle in this process, wherever it lies, and
// nothing that is not there.
func TestScannerFindsNeedles(t *testing.T) {
	key := bytes.Repeat([]byte("a test's key, "), 3)[:32]
	s := secret{"root", seal.NewID(), key}
	n := newNeedles()
	n.addRoot(s)
	block, err := aes.NewCipher(s.derive(32, "byokd/v1/symlink"))
	if err != nil {
		t.Fatal(err)
	}
	held := memoryOf(block)
	text := append([]byte("x"), base64.StdEncoding.EncodeToString(key)...)
	f := &findings{}
	n.scanBytes(slices.Concat(make([]byte, 5), held, text), 0, "here", f)
	if f.byName["root: symlink key, key schedule"] == 0 || f.byName["root in base64"] != 2 {
		t.Error(f)
	}
	other := newNeedles()
	other.addRoot(secret{"other", seal.NewID(), bytes.Repeat([]byte("another one; "), 3)[:32]})
	f = &findings{}
	if other.scanBytes(slices.Concat(held, text), 0, "here", f); f.copies > 0 {
		t.Errorf("found what is not there: %v", f)
	}
}
