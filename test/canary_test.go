//go:build linux

package test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The plaintext detector. Every file, name, link target, attribute, object and
// metadata entry that the test writes holds the canary; below the seal it must
// be found nowhere, in no usual encoding.

// forms are the canary as it is, in hexadecimal, and in base64 at each of the
// three alignments.
func forms(canary string) [][]byte {
	all := [][]byte{[]byte(canary), []byte(hex.EncodeToString([]byte(canary)))}
	for shift := range 3 {
		text := base64.RawURLEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + canary))
		all = append(all, []byte(text[4:len(text)-4])) // what depends on neighbours is cut off
	}
	return all
}

// plaintext returns where below dir the canary is found, in contents, names,
// link targets and attributes, and how many bytes were looked at.
func plaintext(dir, canary string) (where []string, looked int64, err error) {
	wanted := forms(canary)
	err = filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		note := func(what string, text []byte) {
			looked += int64(len(text))
			if contains(text, wanted) {
				where = append(where, fmt.Sprintf("%s of %s", what, path))
			}
		}
		note("name", []byte(d.Name()))
		if d.Type()&iofs.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			note("target", []byte(target))
			return err
		}
		attributes, err := attributesOf(path)
		note("attributes", attributes)
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		note("content", text)
		return err
	})
	return where, looked, err
}

// attributesOf returns the names and values of a file's extended attributes.
func attributesOf(path string) ([]byte, error) {
	buf, value := make([]byte, 64<<10), make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return nil, fmt.Errorf("attributes of %s: %w", path, err)
	}
	all := buf[:n:n]
	for name := range bytes.SplitSeq(buf[:n], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		got, err := unix.Lgetxattr(path, string(name), value)
		if err != nil {
			return nil, fmt.Errorf("attribute %s of %s: %w", name, path, err)
		}
		all = append(all, value[:got]...)
	}
	return all, nil
}

// assertSealed looks for the canary in everything that byokd has written: the
// lower directory, the objects, its log and its audit trail.
func (s *stack) assertSealed() {
	s.t.Helper()
	for _, dir := range []string{s.lower, s.dir + "/cloud"} {
		where, looked, err := plaintext(dir, s.canary)
		if err != nil {
			s.t.Error(err)
		}
		if len(where) > 0 {
			s.t.Errorf("plaintext in %d places below the seal: %s", len(where), strings.Join(where[:min(10, len(where))], ", "))
		}
		if looked < 1<<20 {
			s.t.Errorf("only %d bytes in %s: this proves nothing", looked, dir)
		}
	}
	audit, err := os.ReadFile(s.dir + "/audit.jsonl")
	if err != nil {
		s.t.Error(err)
	}
	if contains(audit, forms(s.canary)) || contains([]byte(s.daemon.output()), forms(s.canary)) {
		s.t.Error("plaintext in the log or in the audit trail")
	}
}

// The detector finds the canary wherever it is hidden.
func TestDetectorFindsPlaintext(t *testing.T) {
	dir, canary := t.TempDir(), newCanary()
	hide := map[string]func(path string) error{
		"content":    func(path string) error { return os.WriteFile(path, []byte("...."+canary+"...."), 0o600) },
		"hex":        func(path string) error { return os.WriteFile(path, []byte(hex.EncodeToString([]byte(canary))), 0o600) },
		"base64 0":   func(path string) error { return os.WriteFile(path, encoded(canary), 0o600) },
		"base64 1":   func(path string) error { return os.WriteFile(path, encoded("a"+canary), 0o600) },
		"base64 2":   func(path string) error { return os.WriteFile(path, encoded("ab"+canary), 0o600) },
		"name":       func(path string) error { return os.WriteFile(path+canary, nil, 0o600) },
		"target":     func(path string) error { return os.Symlink("/to/"+canary, path) },
		"attributes": func(path string) error { return attribute(path, canary) },
	}
	for name, f := range hide {
		if err := f(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	where, _, err := plaintext(dir, canary)
	if err != nil || len(where) != len(hide) {
		t.Errorf("found %v, %v", where, err)
	}
	if where, _, err := plaintext(dir, newCanary()); err != nil || len(where) > 0 {
		t.Errorf("found what is not there: %v, %v", where, err)
	}
}

func encoded(text string) []byte { return []byte(base64.StdEncoding.EncodeToString([]byte(text))) }

func attribute(path, value string) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return unix.Setxattr(path, "user.x", []byte(value), 0)
}
