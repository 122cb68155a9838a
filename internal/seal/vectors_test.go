package seal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// vectors is one file in testdata. Nonces and salts are random, so a vector says
// what sealed bytes must open to, or which error they must give.
type vectors struct {
	About  string   `json:"about"`
	RootID string   `json:"root_id"`
	Root   []byte   `json:"root"`
	Cases  []vector `json:"cases"`
}

type vector struct {
	Name   string `json:"name"`
	ID     string `json:"id,omitempty"`     // file or object
	Index  uint64 `json:"index,omitempty"`  // block or segment
	Last   bool   `json:"last,omitempty"`   // segment
	Place  string `json:"place,omitempty"`  // attribute's name, or metadata's place
	Header []byte `json:"header,omitempty"` // object header of a segment
	Sealed []byte `json:"sealed"`
	Plain  []byte `json:"plain,omitempty"`  // what it opens to
	Filler int    `json:"filler,omitempty"` // so many bytes of filler instead
	Error  string `json:"error,omitempty"`  // or the error it gives
}

// filler is n bytes that need not be stored: byte i is 31*i modulo 251.
func filler(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(31 * i % 251)
	}
	return b
}

func (v vector) plain() []byte {
	if v.Filler > 0 {
		return filler(v.Filler)
	}
	return v.Plain
}

// kinds says how the cases of a file open. What they return is compared with
// the plain side of the vector.
func kinds() map[string]func(r *Root, v vector) ([]byte, error) {
	return map[string]func(r *Root, v vector) ([]byte, error){
		"blocks":   openBlockVector,
		"names":    openNameVector,
		"symlinks": func(r *Root, v vector) ([]byte, error) { return r.OpenTarget(v.Sealed) },
		"xattrs": func(r *Root, v vector) ([]byte, error) {
			id, err := ParseID(v.ID)
			if err != nil {
				return nil, err
			}
			return r.OpenXattr(id, v.Place, v.Sealed)
		},
		"meta": func(r *Root, v vector) ([]byte, error) { return r.OpenMeta(v.Place, string(v.Sealed)) },
		"attributes": func(r *Root, v vector) ([]byte, error) {
			_, a, err := r.OpenAttributes(v.Sealed)
			return fmt.Appendf(nil, "%o %d %d %d", a.Mode, a.UID, a.GID, a.Rdev), err
		},
		"volumes":       openVolumeVector,
		"owned-volumes": openVolumeVector,
		"headers":       openHeaderVector,
		"segments":      openSegmentVector,
		"keyrings":      openKeyringVector,
		"packed":        openPackedVector,
	}
}

func openBlockVector(r *Root, v vector) ([]byte, error) {
	id, err := ParseID(v.ID)
	if err != nil {
		return nil, err
	}
	c, err := r.File(id)
	if err != nil {
		return nil, err
	}
	dst := make([]byte, BlockPayload)
	n, err := c.OpenBlock(dst, v.Index, v.Sealed)
	return dst[:n], err
}

func openNameVector(r *Root, v vector) ([]byte, error) {
	name, err := r.OpenName(string(v.Sealed))
	return []byte(name), err
}

func openVolumeVector(r *Root, v vector) ([]byte, error) {
	h, err := ParseVolumeHeader(v.Sealed)
	if err != nil {
		return nil, err
	}
	if err := r.VerifyVolumeHeader(h); err != nil {
		return nil, err
	}
	plain := fmt.Appendf(nil, "%s generation %d key %s binding %v root %q probe %q", h.Volume, h.Generation, h.KeyARN, h.Binding, h.WrappedRoot, h.Probe)
	if h.SealedOwnership {
		plain = append(plain, " ownership sealed"...)
	}
	if h.Next != nil {
		plain = fmt.Appendf(plain, " next %s root %q probe %q", h.Next.KeyARN, h.Next.WrappedRoot, h.Next.Probe)
	}
	return plain, nil
}

// openPackedVector opens a part of packed segments, header first.
func openPackedVector(r *Root, v vector) ([]byte, error) {
	h, err := ParseObjectHeader(v.Sealed)
	if err != nil {
		return nil, err
	}
	c, err := r.OpenObject(h)
	if err != nil {
		return nil, err
	}
	out := fmt.Appendf(nil, "suite %d part %d size %d packed %d", h.Suite, h.Part, h.PlainSize, h.PackedSize)
	rest := v.Sealed[ObjectHeaderSize:]
	count := uint64(SegmentCount(int64(h.PlainSize)))
	for index := range count {
		n, err := PackedLength(rest)
		if err != nil {
			return nil, err
		}
		if rest = rest[PackedPrefix:]; len(rest) < n {
			return nil, ErrTruncated
		}
		content, err := c.OpenPacked(nil, rest[:n], index, index == count-1)
		if err != nil {
			return nil, err
		}
		rest = rest[n:]
		out = fmt.Appendf(out, ", %q", content)
	}
	return out, nil
}

func openKeyringVector(r *Root, v vector) ([]byte, error) {
	k, err := ParseKeyring(v.Sealed)
	if err != nil {
		return nil, err
	}
	if err := r.VerifyKeyring(k); err != nil {
		return nil, err
	}
	out := fmt.Appendf(nil, "generation %d binding %v kms %v", k.Generation, k.Binding, k.KMS())
	for _, e := range append([]KeyringKey{k.Ring}, k.Keys...) {
		out = fmt.Appendf(out, ", %s created %d forms %q", e.ID, e.Created, e.Forms)
	}
	return out, nil
}

func openHeaderVector(r *Root, v vector) ([]byte, error) {
	h, err := ParseObjectHeader(v.Sealed)
	if err != nil {
		return nil, err
	}
	if _, err := r.OpenObject(h); err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "suite %d object %s part %d size %d key %s %s %q", h.Suite, h.Object, h.Part, h.PlainSize, h.Key, h.KeyARN, h.WrappedKey), nil
}

func openSegmentVector(r *Root, v vector) ([]byte, error) {
	h, err := ParseObjectHeader(v.Header)
	if err != nil {
		return nil, err
	}
	c, err := r.OpenObject(h)
	if err != nil {
		return nil, err
	}
	return c.OpenSegment(nil, v.Sealed, v.Index, v.Last)
}

// sentinels are the errors that vectors name.
func sentinels() map[string]error {
	return map[string]error{
		"tampered": ErrTampered, "truncated": ErrTruncated, "unknown version": ErrUnknownVersion,
		"not sealed": ErrNotSealed, "wrong key": ErrWrongKey, "impossible size": ErrImpossibleSize,
	}
}

func vectorPath(kind string) string { return filepath.Join("testdata", kind+".json") }

func readVectors(t testing.TB, kind string) (*Root, vectors) {
	t.Helper()
	raw, err := os.ReadFile(vectorPath(kind))
	if err != nil {
		t.Fatal(err)
	}
	var file vectors
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	id, err := ParseID(file.RootID)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewRoot(id, file.Root)
	if err != nil {
		t.Fatal(err)
	}
	return r, file
}

func TestVectors(t *testing.T) {
	if *update {
		writeMissingVectors(t)
	}
	for kind, open := range kinds() {
		t.Run(kind, func(t *testing.T) {
			r, file := readVectors(t, kind)
			good, bad := 0, 0
			for _, v := range file.Cases {
				got, err := open(r, v)
				if v.Error == "" {
					good++
					if err != nil || !bytes.Equal(got, v.plain()) {
						t.Errorf("%s: %.100q, %v", v.Name, got, err)
					}
					continue
				}
				bad++
				want := sentinels()[v.Error]
				if want == nil {
					t.Fatalf("%s: no error is called %q", v.Name, v.Error)
				}
				if !errors.Is(err, want) {
					t.Errorf("%s: %v, want %v", v.Name, err, want)
				}
			}
			if good < 2 || bad < 3 {
				t.Errorf("only %d good and %d bad vectors", good, bad)
			}
		})
	}
}

// Names are deterministic: the vectors hold in both directions.
func TestNameVectorsSeal(t *testing.T) {
	r, file := readVectors(t, "names")
	for _, v := range file.Cases {
		if v.Error != "" {
			continue
		}
		if got, err := r.SealName(string(v.Plain)); err != nil || got != string(v.Sealed) {
			t.Errorf("%s: %q, %v", v.Name, got, err)
		}
	}
}
