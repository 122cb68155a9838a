package objstore_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// plainKeys asks the KMS of a world directly, each time.
type plainKeys struct{ kms *memoryKMS }

func (k plainKeys) Use(ctx context.Context, id seal.KeyID, arn string, wrapped []byte, f func(*seal.Root) error) error {
	if arn != k.kms.ARN() && arn != "" {
		return fmt.Errorf("the header names %s", arn)
	}
	_, err := k.kms.Unwrap(ctx, wrapped, documentsBinding, func(plain []byte) error {
		root, err := seal.NewRoot(id, plain)
		if err != nil {
			return err
		}
		return f(root)
	})
	return err
}

func TestRestore(t *testing.T) {
	w := newWorld(t, worldOptions{})
	bodies := map[string][]byte{"m": w.upload("m", 2*segment, segment, 3*segment, 7)}
	for i, n := range []int{0, 1, segment - 1, segment, segment + 1, 8 * segment, 8*segment + 1, 20*segment + 9} {
		key := fmt.Sprint(i)
		bodies[key] = pattern(n, i)
		w.put(key, bodies[key])
	}
	for key, want := range bodies {
		var out bytes.Buffer
		sealed := w.up.Object("acme-documents", key).Data
		done, err := objstore.Restore(t.Context(), bytes.NewReader(sealed), &out, plainKeys{w.kms}, 0)
		if err != nil || !bytes.Equal(out.Bytes(), want) || done.Plain != int64(len(want)) || done.Multipart != (key == "m") {
			t.Errorf("%s: %+v, %v", key, done, err)
		}
		w.restoreCut(key, sealed, want)
	}
}

// restoreCut cuts sealed bytes at every interesting place and flips a bit of each
// region. What is written must be a beginning of the object, and never a success,
// but at the edge of a part, which the number of parts tells.
func (w *world) restoreCut(key string, sealed, want []byte) {
	w.t.Helper()
	try := func(what string, damaged []byte, parts int) {
		var out bytes.Buffer
		_, err := objstore.Restore(w.t.Context(), bytes.NewReader(damaged), &out, plainKeys{w.kms}, parts)
		if err == nil {
			w.t.Errorf("%s %s: restored %d of %d bytes", key, what, out.Len(), len(want))
		}
		// Parts may be numbered with gaps, so a missing one is noticed at the end only.
		if !bytes.HasPrefix(want, out.Bytes()) && !strings.HasPrefix(what, "a part dropped") && !strings.HasPrefix(what, "parts swapped") {
			w.t.Errorf("%s %s: wrong bytes", key, what)
		}
		if err != nil && !objstore.Damaged(err) && !strings.Contains(err.Error(), "the header names") && !strings.Contains(err.Error(), "InvalidCiphertext") {
			w.t.Errorf("%s %s: %v is not told as damage", key, what, err)
		}
	}
	parts := 1
	if key == "m" {
		parts = 4
	}
	for cut := 0; cut < len(sealed); cut += 1 + len(sealed)/97 {
		try(fmt.Sprintf("cut at %d", cut), sealed[:cut], parts)
		flipped := bytes.Clone(sealed)
		flipped[cut] ^= 4
		try(fmt.Sprintf("bit in %d", cut), flipped, parts)
	}
	try("cut by one", sealed[:len(sealed)-1], parts)
	try("extended", append(bytes.Clone(sealed), 0), parts)
	try("doubled", append(bytes.Clone(sealed), sealed...), parts)
	edge := int(seal.SealedObjectSize(2 * segment))
	if key == "m" {
		try("a part dropped", append(bytes.Clone(sealed[:edge]), sealed[edge+int(seal.SealedObjectSize(segment)):]...), parts)
		try("cut at a part", sealed[:edge], parts)
		swapped := append(bytes.Clone(sealed[:edge]), sealed[edge+int(seal.SealedObjectSize(segment)):]...)
		try("parts swapped", append(swapped, sealed[edge:edge+int(seal.SealedObjectSize(segment))]...), parts)
	}
}

func TestRestoreForeign(t *testing.T) {
	w := newWorld(t, worldOptions{})
	random := make([]byte, 5000)
	rand.Read(random)
	for _, foreign := range [][]byte{nil, []byte("x"), []byte("plain text"), random, bytes.Repeat([]byte{0}, 70000)} {
		var out bytes.Buffer
		if _, err := objstore.Restore(t.Context(), bytes.NewReader(foreign), &out, plainKeys{w.kms}, 0); !errors.Is(err, seal.ErrNotSealed) || out.Len() > 0 {
			t.Errorf("%d foreign bytes: %v", len(foreign), err)
		}
	}
}

// memoryTarget is a RestoreTarget in memory.
type memoryTarget struct {
	bytes.Buffer
	commit func([]byte)
}

func (m *memoryTarget) Commit() error { m.commit(m.Bytes()); return nil }
func (m *memoryTarget) Abort()        {}

// TestRestoreAll restores a prefix over an upstream that breaks reads off, with
// one damaged and one foreign object among them.
func TestRestoreAll(t *testing.T) {
	w := newWorld(t, worldOptions{})
	want := map[string][]byte{}
	for i := range 12 {
		key := fmt.Sprintf("backup/%02d", i)
		want[key] = pattern(i*segment+i, i)
		w.put(key, want[key])
	}
	w.put("elsewhere", []byte("x"))
	want["backup/m"] = w.upload("backup/m", segment, segment, 3)
	damaged := w.up.Object("acme-documents", "backup/05")
	damaged.Data[len(damaged.Data)-9] ^= 1
	w.up.Replace("acme-documents", "backup/05", damaged)
	cut := w.up.Object("acme-documents", "backup/m")
	cut.Data = cut.Data[:2*seal.SealedObjectSize(segment)]
	w.up.Replace("acme-documents", "backup/m", cut)
	w.up.Replace("acme-documents", "backup/plain", &s3test.Stored{Data: []byte("plain"), ETag: `"0123456789abcdef0123456789abcdef"`, Header: http.Header{}})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool {
		return r.Method == http.MethodGet && r.Header.Get("Range") == "" && strings.Contains(r.URL.Path, "backup/")
	}, CutAt: segment + 77})

	var mu sync.Mutex
	got := map[string][]byte{}
	var last objstore.RestoreProgress
	progress, failures, err := objstore.RestoreAll(t.Context(), objstore.RestoreAllOptions{
		Upstream: w.upstream(), Prefix: "backup/", Keys: plainKeys{w.kms},
		Target: func(e objstore.Entry) (objstore.RestoreTarget, error) {
			if e.Key == "backup/07" {
				return nil, nil
			}
			return &memoryTarget{commit: func(b []byte) {
				mu.Lock()
				defer mu.Unlock()
				got[e.Key] = b
			}}, nil
		},
		Progress: func(p objstore.RestoreProgress) { last = p },
	})
	if err != nil || progress != last || progress.Objects != 10 || progress.Skipped != 1 || progress.Failed != 3 || len(failures) != 3 {
		t.Fatalf("%+v, %+v, %v", progress, failures, err)
	}
	for _, f := range failures {
		if !objstore.Damaged(f.Err) {
			t.Errorf("%s: %v", f.Key, f.Err)
		}
	}
	for key, b := range got {
		if !bytes.Equal(b, want[key]) {
			t.Errorf("%s differs", key)
		}
	}
	if len(got) != 10 {
		t.Errorf("%d objects", len(got))
	}
	// An upstream that is down for good is an error, not an end.
	w.up.Heal()
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return r.Header.Get("Range") != "" }, Status: 403, Code: "AccessDenied"})
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "backup/08") }, CutAt: segment})
	if done, err := objstore.RestoreObject(t.Context(), w.upstream(), objstore.Ref{Key: "backup/08"}, io.Discard, plainKeys{w.kms}); err == nil || objstore.Damaged(err) {
		t.Errorf("%+v, %v", done, err)
	}
}
