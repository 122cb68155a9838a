package seal

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
)

const (
	// VolumeMarkName is the file at the root of the lower directory that remembers
	// the newest generation of the volume header. No sealed name can equal it.
	VolumeMarkName = "byokd.generation"

	// VolumeMarkMax bounds that file in bytes.
	VolumeMarkMax = 512

	markMagic = "byokd generation 1\n"
)

// VolumeMark tells which generation of a volume's header was seen last, so that
// an older header put back by itself is noticed. It is authenticated under the
// volume's root key.
type VolumeMark struct {
	Volume     VolumeID
	Generation uint64
	MAC        []byte // set by SignVolumeMark
}

// SignVolumeMark returns m with the MAC under r, the volume's root key.
func (r *Root) SignVolumeMark(m VolumeMark) (VolumeMark, error) {
	mac, err := r.markMAC(m)
	m.MAC = mac
	return m, err
}

// VerifyVolumeMark returns ErrTampered if m is not as SignVolumeMark saw it, and
// ErrWrongKey if it belongs to another volume.
func (r *Root) VerifyVolumeMark(m VolumeMark) error {
	mac, err := r.markMAC(m)
	if err != nil {
		return err
	}
	if !hmac.Equal(mac, m.MAC) {
		return fmt.Errorf("%w: the record of the header's generation was changed", ErrTampered)
	}
	return nil
}

func (r *Root) markMAC(m VolumeMark) ([]byte, error) {
	if m.Volume != r.id {
		return nil, fmt.Errorf("%w: record of volume %s, key of %s", ErrWrongKey, m.Volume, r.id)
	}
	var key [keySize]byte
	defer clear(key[:])
	if err := r.derive(key[:], labelMark, m.Volume[:]); err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, key[:])
	mac.Write(m.body())
	return mac.Sum(nil), nil
}

func (m VolumeMark) body() []byte {
	b := []byte(markMagic)
	b = appendField(b, "volume", m.Volume.String())
	return appendField(b, "generation", strconv.FormatUint(m.Generation, 10))
}

// Marshal returns the text of a signed mark.
func (m VolumeMark) Marshal() []byte {
	if len(m.MAC) != macSize {
		panic("seal: an unsigned volume mark")
	}
	return appendField(m.body(), "mac", encodeBinary(m.MAC))
}

// ParseVolumeMark reads what Marshal wrote, and only that. The content is not
// authenticated before VerifyVolumeMark.
func ParseVolumeMark(text []byte) (VolumeMark, error) {
	rest, ok := strings.CutPrefix(string(text), markMagic)
	if !ok || len(text) > VolumeMarkMax {
		return VolumeMark{}, fmt.Errorf("%w: no record of a header's generation", ErrNotSealed)
	}
	var m VolumeMark
	for line := range strings.Lines(rest) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		var err error
		switch name {
		case "volume":
			m.Volume, err = ParseID(value)
		case "generation":
			m.Generation, err = strconv.ParseUint(value, 10, 64)
		case "mac":
			m.MAC, err = base64.StdEncoding.DecodeString(value)
		}
		if err != nil {
			return VolumeMark{}, fmt.Errorf("%w: record of the header's generation, field %.20q", ErrTampered, name)
		}
	}
	if len(m.MAC) != macSize || !bytes.Equal(m.Marshal(), text) {
		return VolumeMark{}, fmt.Errorf("%w: the record of the header's generation is not spelt as byokd does", ErrTampered)
	}
	return m, nil
}
