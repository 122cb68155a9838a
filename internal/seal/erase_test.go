//go:build linux

package seal

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// needles are the first 16 bytes of keys, each XORed with mask, so that looking
// for them does not itself put them into memory.
type needles struct {
	mask  [16]byte
	names []string
	found []int
	at    [][16]byte
}

// add is called inside Do.
func (n *needles) add(name string, key []byte) {
	var at [16]byte
	for i := range at {
		at[i] = key[i] ^ n.mask[i]
	}
	n.names = append(n.names, name)
	n.at = append(n.at, at)
}

// scan counts each needle in every readable mapping of this process. It reads
// through window, which is cleared before each read, so it does not find itself.
func (n *needles) scan(t *testing.T, window []byte) {
	t.Helper()
	n.found = make([]int, len(n.at))
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatal(err)
		}
		if mode[0] != 'r' || strings.HasSuffix(lines.Text(), "[vvar]") || strings.HasSuffix(lines.Text(), "[vsyscall]") {
			continue
		}
		n.scanRange(mem, from, to, window)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	clear(window)
}

func (n *needles) scanRange(mem *os.File, from, to uint64, window []byte) {
	const overlap = 16
	for at := from; at < to; at += uint64(len(window) - overlap) {
		clear(window)
		got, err := mem.ReadAt(window[:min(uint64(len(window)), to-at)], int64(at))
		if err != nil && got == 0 {
			return // a mapping without memory, such as a guard page
		}
		n.scanWindow(window[:got])
	}
}

func (n *needles) scanWindow(window []byte) {
	low, high := binary.NativeEndian.Uint64(n.mask[:]), binary.NativeEndian.Uint64(n.mask[8:])
	for i := 0; i+16 <= len(window); i++ {
		a, b := binary.NativeEndian.Uint64(window[i:])^low, binary.NativeEndian.Uint64(window[i+8:])^high
		for k := range n.at {
			if a == binary.NativeEndian.Uint64(n.at[k][:]) && b == binary.NativeEndian.Uint64(n.at[k][8:]) {
				n.found[k]++
			}
		}
	}
}

// useEverything makes a Root, seals and opens with each kind of key, and notes
// the keys. It returns the Root for the control, and what it sealed names to.
func useEverything(t *testing.T, n *needles) (root *Root, sealed []string) {
	Do(func() {
		secret := make([]byte, RootSize)
		rand.Read(secret)
		id, file := NewID(), NewID()
		r, err := NewRoot(id, secret)
		if err != nil {
			panic(err)
		}
		block, dst := make([]byte, BlockSize), make([]byte, BlockPayload)
		c, err := r.File(file)
		if err != nil {
			panic(err)
		}
		c.SealBlock(block, 1, []byte("content"))
		if _, err := c.OpenBlock(dst, 1, block); err != nil {
			panic(err)
		}
		sealed = useNames(r, n)
		attributes, err := r.SealAttributes(file, Attributes{Mode: typeFile | 0o600})
		if err != nil {
			panic(err)
		}
		if _, _, err := r.OpenAttributes(attributes); err != nil {
			panic(err)
		}
		h, segments, err := r.NewObject(ObjectHeader{PlainSize: memoFrom}) // long enough to be remembered
		if err != nil {
			panic(err)
		}
		if _, err := r.OpenObject(h); err != nil || r.remembered(&h) == nil {
			panic(err)
		}
		segments.SealSegment(nil, []byte("segment"), 0, true)

		n.add("root key", secret)
		for name, info := range map[string]string{
			"block key":  labelBlock + string(block[:selectorSize]),
			"inode key":  labelAttributes + string(attributes[IDSize+1:][:selectorSize]),
			"name key":   labelName,
			"object key": labelObject + string(h.Salt[:]),
		} {
			key, err := hkdf.Key(sha256.New, secret, id[:], info, derivedMax)
			if err != nil {
				panic(err)
			}
			n.add(name, key)
			n.add(name+", second half", key[16:]) // also in the key schedule
			if name == "name key" {
				n.add("name key for CTR", key[keySize:])
			}
			if _, err := aes.NewCipher(key[:keySize]); err != nil {
				panic(err)
			}
			clear(key)
		}
		prk, err := hkdf.Extract(sha256.New, secret, id[:])
		if err != nil {
			panic(err)
		}
		n.add("HKDF extract", prk)
		clear(prk)
		clear(secret)
		root = r
	})
	return root, sealed
}

// useNames seals one name and opens another, so that r remembers both, and notes
// them. It is called inside Do.
func useNames(r *Root, n *needles) (sealed []string) {
	first, second := rand.Text(), rand.Text()
	a, err := r.SealName(first)
	if err != nil {
		panic(err)
	}
	c, err := r.nameCipher()
	if err != nil {
		panic(err)
	}
	b, err := c.seal(second)
	if err != nil {
		panic(err)
	}
	if _, err := r.OpenName(b); err != nil {
		panic(err)
	}
	n.add("name that was sealed", []byte(first))
	n.add("name that was opened", []byte(second))
	return []string{a, b}
}

// After Wipe and three collections no key and no name is left in the process, even
// where somebody keeps the sealed names; before, the same scan finds them.
func TestNothingLeftAfterWipe(t *testing.T) {
	if !ErasureGuaranteed {
		t.Skip("built without GOEXPERIMENT=runtimesecret: erasure is best effort")
	}
	window, err := syscall.Mmap(-1, 0, 1<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Munmap(window)
	n := &needles{}
	rand.Read(n.mask[:])
	root, sealed := useEverything(t, n)
	n.scan(t, window)
	for i, name := range n.names {
		if inUse := name == "block key" || strings.HasPrefix(name, "name"); inUse && n.found[i] == 0 {
			t.Errorf("control: the scan does not find the %s while it is in use", name)
		}
	}
	root.Wipe()
	runtime.KeepAlive(root)
	root = nil
	for range 3 {
		runtime.GC()
	}
	n.scan(t, window)
	for i, name := range n.names {
		if n.found[i] > 0 {
			t.Errorf("%s: %d copies left", name, n.found[i])
		}
	}
	runtime.KeepAlive(sealed)
}
