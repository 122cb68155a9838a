package objstore

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/byokd/byokd/internal/seal"
)

const (
	metaHeader = "X-Amz-Meta-"
	// metaEntry is the one metadata entry that byokd stores upstream. It holds a
	// text of seal.SealMeta, a dot and the wrapped data key; or metaClear when the
	// other entries are clear (there may be none).
	metaEntry = "byokd"
	metaClear = "clear"
	// maxMeta is S3's limit on names and values of user metadata together.
	maxMeta = 2048
)

// metadataOf collects the user metadata of a request.
func metadataOf(h http.Header) (map[string]string, error) {
	m := map[string]string{}
	for name, values := range h {
		if key, found := strings.CutPrefix(name, metaHeader); found {
			m[strings.ToLower(key)] = strings.Join(values, ",")
		}
	}
	for _, own := range []string{metaEntry, packedEntry} {
		if _, taken := m[own]; taken {
			return nil, refuse(http.StatusBadRequest, "InvalidArgument", "The metadata name %s is byokd's own.", own)
		}
	}
	return m, nil
}

// sealMetadata turns user metadata into what is stored upstream.
func (b *bucket) sealMetadata(ctx context.Context, lane uint32, m map[string]string) (map[string]string, error) {
	if len(m) == 0 || b.ClearMetadata {
		out := maps.Clone(m)
		if out == nil {
			out = map[string]string{}
		}
		takeChecksums(out) // which must not be clear
		out[metaEntry] = metaClear
		return out, checkMetaSize(out)
	}
	key, err := b.writing.take(ctx)
	if err != nil {
		return nil, err
	}
	plain := packMetadata(m)
	var text string
	for {
		_, err = b.withKey(ctx, lane, key, func(root *seal.Root) (err error) {
			text, err = root.SealMeta(b.Binding.Resource, plain)
			return err
		})
		if !isFrozen(err) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	out := map[string]string{metaEntry: text + "." + base64.RawURLEncoding.EncodeToString(key.wrapped)}
	err = checkMetaSize(out)
	if err != nil && len(takeChecksums(m)) > 0 {
		return b.sealMetadata(ctx, lane, m) // the client's own entries come first
	}
	return out, err
}

func checkMetaSize(m map[string]string) error {
	n := 0
	for name, value := range m {
		n += len(name) + len(value)
	}
	if n > maxMeta {
		return refuse(http.StatusBadRequest, "MetadataTooLarge", "Your metadata headers exceed the maximum allowed metadata size").
			with("Size", strconv.Itoa(n)).with("MaxSizeAllowed", strconv.Itoa(maxMeta)).hint("Sealed they take %d bytes of %d: about 1300 bytes of names and values fit.", n, maxMeta)
	}
	return nil
}

// openMetadata returns the user metadata of an object, given what is stored
// upstream.
func (b *bucket) openMetadata(ctx context.Context, lane uint32, stored map[string]string) (map[string]string, error) {
	text, key, err := sealedMetadata(stored)
	if err != nil || text == "" {
		return clearMetadata(stored), err
	}
	for {
		var plain []byte
		_, err := b.withKey(ctx, lane, key, func(root *seal.Root) (err error) {
			plain, err = root.OpenMeta(b.Binding.Resource, text)
			return err
		})
		if isFrozen(err) {
			clear(plain)
			continue
		}
		if err != nil {
			return nil, err
		}
		return unpackMetadata(plain)
	}
}

// clearMetadata is what is stored without byokd's own entries.
func clearMetadata(stored map[string]string) map[string]string {
	out := maps.Clone(stored)
	delete(out, metaEntry)
	delete(out, packedEntry)
	return out
}

// sealedMetadata returns the sealed text of stored metadata and its key, or "" for
// metadata that is clear.
func sealedMetadata(stored map[string]string) (string, dataKey, error) {
	entry := stored[metaEntry]
	if entry == "" || entry == metaClear {
		return "", dataKey{}, nil
	}
	text, tail, _ := strings.Cut(entry, ".")
	id, err := seal.MetaKey(text)
	if errors.Is(err, seal.ErrNotSealed) {
		err = fmt.Errorf("%w: metadata entry: %w", seal.ErrTampered, err) // the entry is ours by its name
	}
	if err != nil {
		return "", dataKey{}, err
	}
	wrapped, err := base64.RawURLEncoding.DecodeString(tail)
	if err != nil {
		return "", dataKey{}, fmt.Errorf("%w: wrapped key of the metadata", seal.ErrTampered)
	}
	return text, dataKey{id: id, wrapped: wrapped}, nil
}

// packMetadata encodes names and values, which may hold any byte, each with its
// length before it.
func packMetadata(m map[string]string) []byte {
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(m)) {
		for _, s := range []string{name, m[name]} {
			out = binary.AppendUvarint(out, uint64(len(s)))
			out = append(out, s...)
		}
	}
	return out
}

func unpackMetadata(packed []byte) (map[string]string, error) {
	m := map[string]string{}
	take := func() (string, bool) {
		n, used := binary.Uvarint(packed)
		if used <= 0 || n > uint64(len(packed)-used) {
			return "", false
		}
		s := string(packed[used : used+int(n)])
		packed = packed[used+int(n):]
		return s, true
	}
	for len(packed) > 0 {
		name, ok1 := take()
		value, ok2 := take()
		if !ok1 || !ok2 {
			return nil, fmt.Errorf("%w: packing of the metadata", seal.ErrTampered)
		}
		m[name] = value
	}
	return m, nil
}
