package seal

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// VolumeHeaderName is the file at the root of the lower directory that holds
	// the volume header. No sealed name can equal it: base64url has no dot.
	VolumeHeaderName = "byokd.volume"

	// VolumeHeaderMax bounds a volume header in bytes: read no more of the file.
	VolumeHeaderMax = 32 << 10

	volumeMagic   = "byokd volume "
	volumeVersion = 1

	ownershipSealed = "sealed" // the one value of its line, which is not there otherwise

	maxARN      = 256
	maxBindings = 16
	maxBinding  = 1024 // bytes of one binding's key and value
	maxWrapped  = 6144 // KMS's limit for a ciphertext
	macSize     = sha256.Size
)

// IsOwnFile tells whether a file at the root of a lower directory is byokd's own: the
// volume header, the record of its generation, or what a crash left that was to replace
// one of them. No sealed name is like that: base64url has no dot.
func IsOwnFile(name string) bool { return strings.HasPrefix(name, "byokd.") }

// VolumeHeader describes a volume: which KMS key wraps its root key. It stands
// in clear at the lower root as a few lines of text. It is authenticated under
// the root key that it wraps, so not before that was unwrapped.
type VolumeHeader struct {
	Version         int               // format; 0 stands for the current one
	Volume          VolumeID          // also the id of the root key: NewRoot(h.Volume, …)
	Generation      uint64            // grows with each change of the header
	SealedOwnership bool              // owners and modes are Attributes; else those of the lower inodes
	KeyARN          string            // the KMS key that wraps the root key
	Binding         map[string]string // KMS encryption context of WrappedRoot and Probe
	WrappedRoot     []byte            // the root key as KMS returned it
	Probe           []byte            // ciphertext for asking KMS whether the key may be used
	Next            *KeyForm          // the same under the KMS key that the volume moves to; nil between moves
	MAC             []byte            // set by SignVolumeHeader
}

// KeyForm is a volume's root key as one KMS key wraps it.
type KeyForm struct {
	KeyARN      string
	WrappedRoot []byte
	Probe       []byte
}

// Forms are the one or two wrapped forms of the root key.
func (h VolumeHeader) Forms() []KeyForm {
	forms := []KeyForm{{KeyARN: h.KeyARN, WrappedRoot: h.WrappedRoot, Probe: h.Probe}}
	if h.Next != nil {
		forms = append(forms, *h.Next)
	}
	return forms
}

// SignVolumeHeader returns h with the MAC under r, which must be the volume's
// root key: r.ID() == h.Volume.
func (r *Root) SignVolumeHeader(h VolumeHeader) (VolumeHeader, error) {
	h.Version = volumeVersion
	mac, err := r.volumeMAC(h)
	if err != nil {
		return VolumeHeader{}, err
	}
	h.MAC = mac
	return h, nil
}

// VerifyVolumeHeader returns ErrTampered if h is not as SignVolumeHeader saw it,
// and ErrWrongKey if r is not the root key of this volume by its id.
func (r *Root) VerifyVolumeHeader(h VolumeHeader) error {
	mac, err := r.volumeMAC(h)
	if err != nil {
		return err
	}
	if !hmac.Equal(mac, h.MAC) {
		return fmt.Errorf("%w: the volume header was changed", ErrTampered)
	}
	return nil
}

func (r *Root) volumeMAC(h VolumeHeader) ([]byte, error) {
	if h.Volume != r.id {
		return nil, fmt.Errorf("%w: header of volume %s, key of %s", ErrWrongKey, h.Volume, r.id)
	}
	text, err := h.body()
	if err != nil {
		return nil, err
	}
	var key [keySize]byte
	defer clear(key[:])
	if err := r.derive(key[:], labelVolume, h.Volume[:]); err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, key[:])
	mac.Write(text)
	return mac.Sum(nil), nil
}

// Marshal returns the text of a signed header.
func (h VolumeHeader) Marshal() ([]byte, error) {
	if len(h.MAC) != macSize {
		return nil, fmt.Errorf("seal: the volume header is not signed: see SignVolumeHeader")
	}
	text, err := h.body()
	if err != nil {
		return nil, err
	}
	text = appendField(text, "mac", encodeBinary(h.MAC))
	if len(text) > VolumeHeaderMax {
		return nil, fmt.Errorf("%w: a volume header of %d bytes", ErrTooLong, len(text))
	}
	return text, nil
}

// body returns the lines that the MAC covers: all but its own.
func (h VolumeHeader) body() ([]byte, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	b := []byte(volumeMagic + strconv.Itoa(volumeVersion) + "\n")
	b = appendField(b, "volume", h.Volume.String())
	b = appendField(b, "generation", strconv.FormatUint(h.Generation, 10))
	if h.SealedOwnership {
		b = appendField(b, "ownership", ownershipSealed)
	}
	b = appendField(b, "key", h.KeyARN)
	for _, k := range slices.Sorted(maps.Keys(h.Binding)) {
		b = appendField(b, "binding", k+"="+h.Binding[k])
	}
	b = appendField(b, "root", encodeBinary(h.WrappedRoot))
	b = appendField(b, "probe", encodeBinary(h.Probe))
	if h.Next != nil {
		b = appendField(b, "next-key", h.Next.KeyARN)
		b = appendField(b, "next-root", encodeBinary(h.Next.WrappedRoot))
		b = appendField(b, "next-probe", encodeBinary(h.Next.Probe))
	}
	return b, nil
}

// check refuses what would not come back from ParseVolumeHeader.
func (h VolumeHeader) check() error {
	switch {
	case h.Version != 0 && h.Version != volumeVersion:
		return fmt.Errorf("%w: volume header %d", ErrUnknownVersion, h.Version)
	case len(h.Binding) > maxBindings:
		return fmt.Errorf("%w: volume header", ErrTooLong)
	case h.Next != nil && h.Next.KeyARN == h.KeyARN:
		return fmt.Errorf("seal: the volume header names the same KMS key twice")
	}
	for _, form := range h.Forms() {
		if err := form.check(); err != nil {
			return err
		}
	}
	for k, v := range h.Binding {
		if k == "" || strings.Contains(k, "=") || !isLine(k) || !isLine(v) || len(k)+len(v) > maxBinding {
			return fmt.Errorf("seal: the volume header's binding %q is not one short line of text", k)
		}
	}
	return nil
}

func (f KeyForm) check() error {
	switch {
	case len(f.KeyARN) > maxARN, len(f.WrappedRoot) > maxWrapped, len(f.Probe) > maxWrapped:
		return fmt.Errorf("%w: volume header", ErrTooLong)
	case f.KeyARN == "" || !isLine(f.KeyARN):
		return fmt.Errorf("seal: the volume header's key ARN is not one line of text")
	case len(f.WrappedRoot) == 0:
		return fmt.Errorf("seal: the volume header has no wrapped root key")
	}
	return nil
}

// isLine tells whether s is valid UTF-8 without control characters.
func isLine(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, '\n')
}

func encodeBinary(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// ParseVolumeHeader reads what Marshal wrote, and only that: the same bytes come
// out of Marshal again. The content is not authenticated before
// VerifyVolumeHeader.
func ParseVolumeHeader(text []byte) (VolumeHeader, error) {
	if len(text) > VolumeHeaderMax {
		return VolumeHeader{}, fmt.Errorf("%w: a volume header of %d bytes", ErrNotSealed, len(text))
	}
	rest, err := cutVolumeMagic(string(text))
	if err != nil {
		return VolumeHeader{}, err
	}
	h := VolumeHeader{Version: volumeVersion, Binding: map[string]string{}}
	for line := range strings.Lines(rest) {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if !ok {
			return VolumeHeader{}, fmt.Errorf("%w: volume header line without a name", ErrTampered)
		}
		if err := h.set(name, value); err != nil {
			return VolumeHeader{}, err
		}
	}
	if len(h.MAC) != macSize {
		return VolumeHeader{}, fmt.Errorf("%w: the volume header does not end in its mac", ErrTruncated)
	}
	// Order, repetition, spelling and line ends are all settled by one question.
	again, err := h.Marshal()
	if err != nil || !bytes.Equal(again, text) {
		return VolumeHeader{}, fmt.Errorf("%w: the volume header is not spelt as byokd does", ErrTampered)
	}
	return h, nil
}

// cutVolumeMagic checks the first line and returns the others.
func cutVolumeMagic(text string) (string, error) {
	rest, ok := strings.CutPrefix(text, volumeMagic)
	if !ok {
		return "", fmt.Errorf("%w: no volume header", ErrNotSealed)
	}
	version, rest, ok := strings.Cut(rest, "\n")
	if !ok {
		return "", fmt.Errorf("%w: volume header", ErrTruncated)
	}
	if version != strconv.Itoa(volumeVersion) {
		return "", fmt.Errorf("%w: volume header %.20q", ErrUnknownVersion, version)
	}
	return rest, nil
}

// set takes one line. Repetitions and wrong order are left to the caller.
func (h *VolumeHeader) set(name, value string) (err error) {
	if strings.HasPrefix(name, "next-") && h.Next == nil {
		h.Next = &KeyForm{}
	}
	switch name {
	case "volume":
		h.Volume, err = ParseID(value)
	case "generation":
		h.Generation, err = strconv.ParseUint(value, 10, 64)
	case "ownership":
		if value != ownershipSealed {
			return fmt.Errorf("%w: ownership %.20q in the volume header", ErrUnknownVersion, value)
		}
		h.SealedOwnership = true
	case "key":
		h.KeyARN = value
	case "binding":
		k, v, _ := strings.Cut(value, "=")
		h.Binding[k] = v
	case "root":
		h.WrappedRoot, err = base64.StdEncoding.DecodeString(value)
	case "probe":
		h.Probe, err = base64.StdEncoding.DecodeString(value)
	case "next-key":
		h.Next.KeyARN = value
	case "next-root":
		h.Next.WrappedRoot, err = base64.StdEncoding.DecodeString(value)
	case "next-probe":
		h.Next.Probe, err = base64.StdEncoding.DecodeString(value)
	case "mac":
		h.MAC, err = base64.StdEncoding.DecodeString(value)
	default:
		return fmt.Errorf("%w: volume header field %.20q", ErrTampered, name)
	}
	if err != nil {
		return fmt.Errorf("%w: volume header field %q", ErrTampered, name)
	}
	return nil
}
