package seal

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

const (
	// KeyringMax bounds a keyring in bytes: read no more of the object.
	KeyringMax = 32 << 20
	// MaxKeyringKeys bounds the data keys of one keyring: almost four years of
	// one an hour without a pause.
	MaxKeyringKeys = 1 << 15
	// MaxKeyringKMS bounds the KMS keys that wrap them: one, and two or more only
	// while a bucket moves from one to another.
	MaxKeyringKMS = 8

	keyringMagic   = "byokd keyring "
	keyringVersion = 1
)

// Keyring lists the data keys of a bucket in their wrapped forms. It is a text of
// lines, authenticated under its own key, which is Ring, so not before that was
// unwrapped.
type Keyring struct {
	Version    int               // format; 0 stands for the current one
	Generation uint64            // grows with each write
	Binding    map[string]string // KMS encryption context of all forms
	Ring       KeyringKey        // authenticates the keyring
	Keys       []KeyringKey      // in the order in which they were added
	MAC        []byte            // set by SignKeyring
}

// KeyringKey is one data key of a bucket.
type KeyringKey struct {
	ID      KeyID
	Created int64             // seconds since 1970, of the clock of the byokd that made it
	Check   []byte            // Root.KeyringCheck of the key: tells whether a form is of this key
	Forms   map[string][]byte // the wrapped key by the ARN of the KMS key that wraps it
}

// KeyringCheck returns what KeyringKey.Check holds for this key: CommitmentSize
// bytes that commit to key, id and time, and tell nothing of the key.
func (r *Root) KeyringCheck(created int64) ([]byte, error) {
	check := make([]byte, CommitmentSize)
	err := r.derive(check, labelKeyringCheck, binary.BigEndian.AppendUint64(nil, uint64(created)))
	return check, err
}

// VerifyKeyringKey returns ErrWrongKey if r is not the key that k lists.
func (r *Root) VerifyKeyringKey(k KeyringKey) error {
	check, err := r.KeyringCheck(k.Created)
	if err != nil {
		return err
	}
	if r.id != k.ID || !hmac.Equal(check, k.Check) {
		return fmt.Errorf("%w: keyring entry %s", ErrWrongKey, k.ID)
	}
	return nil
}

// SignKeyring returns k with the MAC under r, which must be the key of k.Ring.
func (r *Root) SignKeyring(k Keyring) (Keyring, error) {
	k.Version = keyringVersion
	mac, err := r.keyringMAC(k)
	if err != nil {
		return Keyring{}, err
	}
	k.MAC = mac
	return k, nil
}

// VerifyKeyring returns ErrTampered if k is not as SignKeyring saw it, and
// ErrWrongKey if r is not the key of k.Ring.
func (r *Root) VerifyKeyring(k Keyring) error {
	mac, err := r.keyringMAC(k)
	if err != nil {
		return err
	}
	if !hmac.Equal(mac, k.MAC) {
		return fmt.Errorf("%w: the keyring was changed", ErrTampered)
	}
	return nil
}

func (r *Root) keyringMAC(k Keyring) ([]byte, error) {
	if err := r.VerifyKeyringKey(k.Ring); err != nil {
		return nil, err
	}
	text, err := k.body()
	if err != nil {
		return nil, err
	}
	var key [keySize]byte
	defer clear(key[:])
	if err := r.derive(key[:], labelKeyring); err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, key[:])
	mac.Write(text)
	return mac.Sum(nil), nil
}

// Marshal returns the text of a signed keyring.
func (k Keyring) Marshal() ([]byte, error) {
	if len(k.MAC) != macSize {
		return nil, fmt.Errorf("seal: the keyring is not signed: see SignKeyring")
	}
	text, err := k.body()
	if err != nil {
		return nil, err
	}
	text = appendField(text, "mac", encodeBinary(k.MAC))
	if len(text) > KeyringMax {
		return nil, fmt.Errorf("%w: a keyring of %d bytes", ErrTooLong, len(text))
	}
	return text, nil
}

// KMS returns the ARNs of the KMS keys that wrap any of the keys, sorted.
func (k Keyring) KMS() []string {
	arns := map[string]bool{}
	for arn := range k.Ring.Forms {
		arns[arn] = true
	}
	for i := range k.Keys {
		for arn := range k.Keys[i].Forms {
			arns[arn] = true
		}
	}
	return slices.Sorted(maps.Keys(arns))
}

// body returns the lines that the MAC covers: all but its own.
func (k Keyring) body() ([]byte, error) {
	arns := k.KMS()
	if err := k.check(arns); err != nil {
		return nil, err
	}
	b := []byte(keyringMagic + strconv.Itoa(keyringVersion) + "\n")
	b = appendField(b, "generation", strconv.FormatUint(k.Generation, 10))
	for _, name := range slices.Sorted(maps.Keys(k.Binding)) {
		b = appendField(b, "binding", name+"="+k.Binding[name])
	}
	for _, arn := range arns {
		b = appendField(b, "kms", arn)
	}
	b = appendField(b, "ring", k.Ring.line(arns))
	for i := range k.Keys {
		b = appendField(b, "key", k.Keys[i].line(arns))
	}
	return b, nil
}

// check refuses what would not come back from ParseKeyring.
func (k Keyring) check(arns []string) error {
	switch {
	case k.Version != 0 && k.Version != keyringVersion:
		return fmt.Errorf("%w: keyring %d", ErrUnknownVersion, k.Version)
	case len(k.Keys) > MaxKeyringKeys, len(arns) > MaxKeyringKMS, len(k.Binding) > maxBindings:
		return fmt.Errorf("%w: keyring", ErrTooLong)
	}
	for _, arn := range arns {
		if arn == "" || len(arn) > maxARN || !isLine(arn) {
			return fmt.Errorf("seal: a key ARN of the keyring is not one short line of text")
		}
	}
	for name, value := range k.Binding {
		if name == "" || strings.Contains(name, "=") || !isLine(name) || !isLine(value) || len(name)+len(value) > maxBinding {
			return fmt.Errorf("seal: the keyring's binding %q is not one short line of text", name)
		}
	}
	ids := make(map[KeyID]bool, len(k.Keys)+1)
	if err := k.Ring.check(ids); err != nil {
		return err
	}
	for i := range k.Keys {
		if err := k.Keys[i].check(ids); err != nil {
			return err
		}
	}
	return nil
}

// check refuses an entry that cannot be written, or whose id is in ids already.
func (e *KeyringKey) check(ids map[KeyID]bool) error {
	switch {
	case ids[e.ID]:
		return fmt.Errorf("%w: keyring entry %s stands twice", ErrTampered, e.ID)
	case e.Created < 0:
		return fmt.Errorf("%w: keyring entry of before 1970", ErrTampered)
	case len(e.Check) != CommitmentSize:
		return fmt.Errorf("%w: check of keyring entry %s", ErrTampered, e.ID)
	case len(e.Forms) == 0:
		return fmt.Errorf("%w: keyring entry %s has no form", ErrTampered, e.ID)
	}
	for _, wrapped := range e.Forms {
		if len(wrapped) == 0 || len(wrapped) > maxWrapped {
			return fmt.Errorf("%w: a wrapped key of %d bytes in keyring entry %s", ErrTooLong, len(wrapped), e.ID)
		}
	}
	ids[e.ID] = true
	return nil
}

// line writes an entry: id, time, check, and each form after the number of its
// kms line.
func (e *KeyringKey) line(arns []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %d %s", e.ID, e.Created, encodeBinary(e.Check))
	for i, arn := range arns {
		if wrapped, ok := e.Forms[arn]; ok {
			fmt.Fprintf(&b, " %d=%s", i, encodeBinary(wrapped))
		}
	}
	return b.String()
}

// ParseKeyring reads what Marshal wrote, and only that: the same bytes come out
// of Marshal again. The content is not authenticated before VerifyKeyring.
func ParseKeyring(text []byte) (Keyring, error) {
	if len(text) > KeyringMax {
		return Keyring{}, fmt.Errorf("%w: a keyring of %d bytes", ErrNotSealed, len(text))
	}
	rest, ok := strings.CutPrefix(string(text), keyringMagic)
	if !ok {
		return Keyring{}, fmt.Errorf("%w: no keyring", ErrNotSealed)
	}
	version, rest, ok := strings.Cut(rest, "\n")
	if !ok {
		return Keyring{}, fmt.Errorf("%w: keyring", ErrTruncated)
	}
	if version != strconv.Itoa(keyringVersion) {
		return Keyring{}, fmt.Errorf("%w: keyring %.20q", ErrUnknownVersion, version)
	}
	k := Keyring{Version: keyringVersion, Binding: map[string]string{}}
	var arns []string
	for line := range strings.Lines(rest) {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		if !ok {
			return Keyring{}, fmt.Errorf("%w: keyring line without a name", ErrTampered)
		}
		if err := k.set(name, value, &arns); err != nil {
			return Keyring{}, err
		}
	}
	if len(k.MAC) != macSize {
		return Keyring{}, fmt.Errorf("%w: the keyring does not end in its mac", ErrTruncated)
	}
	// Order, repetition, spelling and line ends are all settled by one question.
	again, err := k.Marshal()
	if err != nil || !bytes.Equal(again, text) {
		return Keyring{}, fmt.Errorf("%w: the keyring is not spelt as byokd does", ErrTampered)
	}
	return k, nil
}

// set takes one line. Repetitions and wrong order are left to the caller.
func (k *Keyring) set(name, value string, arns *[]string) (err error) {
	switch name {
	case "generation":
		k.Generation, err = strconv.ParseUint(value, 10, 64)
	case "binding":
		n, v, _ := strings.Cut(value, "=")
		k.Binding[n] = v
	case "kms":
		*arns = append(*arns, value)
	case "ring":
		k.Ring, err = parseKeyringKey(value, *arns)
	case "key":
		var e KeyringKey
		if e, err = parseKeyringKey(value, *arns); err == nil {
			k.Keys = append(k.Keys, e)
		}
	case "mac":
		k.MAC, err = base64.StdEncoding.DecodeString(value)
	default:
		return fmt.Errorf("%w: keyring field %.20q", ErrTampered, name)
	}
	if err != nil {
		return fmt.Errorf("%w: keyring field %q", ErrTampered, name)
	}
	return nil
}

func parseKeyringKey(value string, arns []string) (KeyringKey, error) {
	fields := strings.Split(value, " ")
	if len(fields) < 4 || len(fields) > 3+MaxKeyringKMS {
		return KeyringKey{}, ErrTampered
	}
	e := KeyringKey{Forms: make(map[string][]byte, len(fields)-3)}
	var err error
	if e.ID, err = ParseID(fields[0]); err != nil {
		return KeyringKey{}, err
	}
	if e.Created, err = strconv.ParseInt(fields[1], 10, 64); err != nil {
		return KeyringKey{}, err
	}
	if e.Check, err = base64.StdEncoding.DecodeString(fields[2]); err != nil {
		return KeyringKey{}, err
	}
	for _, form := range fields[3:] {
		number, wrapped, _ := strings.Cut(form, "=")
		i, err := strconv.Atoi(number)
		if err != nil || i < 0 || i >= len(arns) {
			return KeyringKey{}, ErrTampered
		}
		if e.Forms[arns[i]], err = base64.StdEncoding.DecodeString(wrapped); err != nil {
			return KeyringKey{}, err
		}
	}
	return e, nil
}
