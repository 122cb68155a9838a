package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/internal/volumeread"
)

// volumeSite is a site whose volume holds a file of every kind; no byokd runs.
type volumeSite struct {
	*site
	plain map[string]string // what describe says of the tree through the mount
}

// ownerships runs a test with volumes of either kind.
func ownerships(t *testing.T, test func(t *testing.T, ownership string)) {
	for _, ownership := range []string{ownershipLower, ownershipSealed} {
		t.Run(ownership, func(t *testing.T) { test(t, ownership) })
	}
}

func newVolumeSite(t *testing.T, ownership string) *volumeSite {
	t.Helper()
	needMounts(t)
	setTenant(t)
	s := &volumeSite{site: newSite(t)}
	s.configure(t, map[string]string{"volume: {": "volume: {ownership: " + ownership + ", "})
	p := s.start(t)
	p.awaitState(t, exitOK)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(s.mount, name) }
	must(os.MkdirAll(at("dir/below"), 0o750))
	for name, size := range map[string]int{"empty": 0, "one": 1, "dir/journal": 50_000, "dir/below/large": 3 << 20, "to-damage": 40_000} {
		must(os.WriteFile(at(name), bytes.Repeat([]byte(name), size/len(name)+1)[:size], 0o640))
	}
	must(os.WriteFile(at("sparse"), []byte("beginning"), 0o600))
	must(os.Truncate(at("sparse"), 1<<20))
	must(os.Symlink("../somewhere/else", at("link")))
	must(os.Link(at("one"), at("dir/same")))
	must(unix.Setxattr(at("one"), "user.note", []byte("remember"), 0))
	must(unix.Mkfifo(at("pipe"), 0o600))
	must(os.Chown(at("dir/below"), 1001, 1000))
	must(os.Chmod(at("dir/below"), 0o750|os.ModeSetgid))
	must(os.Chown(at("one"), 1<<32-2, 7))
	must(os.Lchown(at("link"), 5, 6))
	must(os.Chmod(at("one"), 0o750|os.ModeSetuid))
	for i, name := range []string{"empty", "one", "dir/journal", "dir/below/large", "to-damage", "sparse"} {
		must(os.Chtimes(at(name), time.Unix(1e9, 5), time.Unix(1e9+int64(i), 7)))
	}
	if text := s.check(t, nil, exitLower); !strings.Contains(text, "stop it first") || !strings.Contains(text, "--socket") {
		t.Errorf("while it is mounted, by a byokd that has no socket, check says %s", text)
	}
	s.plain = describe(t, s.mount)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	return s
}

// describe tells all that a restore has to bring back, by path.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		text := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
		switch d.Type() {
		case 0:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			note := make([]byte, 100)
			n, _ := unix.Getxattr(path, "user.note", note)
			text += fmt.Sprintf(" %d names, %d.%09d, note %q, %d bytes: %x", st.Nlink, st.Mtim.Sec, st.Mtim.Nsec, note[:max(0, n)], len(content), content)
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " " + target
		}
		tree[name] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func differences(want, got map[string]string) (names []string) {
	for name := range want {
		if got[name] != want[name] {
			names = append(names, fmt.Sprintf("%s: %.200s instead of %.200s", name, got[name], want[name]))
		}
	}
	for name := range got {
		if _, found := want[name]; !found {
			names = append(names, name+" should not be there")
		}
	}
	return names
}

// check runs the command and returns all it said; with a report, as JSON into that.
func (s *volumeSite) check(t *testing.T, report *checkReport, code int) string {
	t.Helper()
	args := []string{"check", "--config", s.config}
	if report != nil {
		args = append(args, "-o", "json")
	}
	var out, messages strings.Builder
	if got := run(t.Context(), args, nil, &out, &messages); got != code {
		t.Errorf("byokd check ends with %d, want %d\n%s%s", got, code, &out, &messages)
	}
	if report != nil {
		*report = checkReport{}
		if err := json.Unmarshal([]byte(out.String()), report); err != nil {
			t.Fatal(err)
		}
	}
	return out.String() + messages.String()
}

// lowerOf returns the lower path of the file with this many lower blocks.
func (s *volumeSite) lowerOf(t *testing.T, plainSize int64) string {
	t.Helper()
	return lowerOfSize(t, s.lower, plainSize)
}

func lowerOfSize(t *testing.T, lower string, plainSize int64) string {
	t.Helper()
	found := ""
	err := filepath.WalkDir(lower, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil && info.Size() == seal.SealedFileSize(plainSize) {
				found = path
			}
		}
		return err
	})
	if err != nil || found == "" {
		t.Fatalf("no lower file of %d plain bytes: %v", plainSize, err)
	}
	return found
}

func TestRestoreVolume(t *testing.T) { ownerships(t, testRestoreVolume) }

func testRestoreVolume(t *testing.T, ownership string) {
	s := newVolumeSite(t, ownership)
	var report checkReport
	s.check(t, &report, exitOK)
	if !report.Sound || report.Files != 6 || report.Directories != 3 || report.Others != 2 || report.FaultyBytes != 0 || len(report.Faults) != 0 {
		t.Errorf("%+v", report)
	}
	if text := s.check(t, nil, exitOK); !strings.Contains(text, "is sound") {
		t.Error(text)
	}
	out := filepath.Join(t.TempDir(), "restored")
	restore := func(code int, args ...string) string {
		t.Helper()
		var messages strings.Builder
		if got := run(t.Context(), append([]string{"decrypt", s.lower, "--config", s.config}, args...), nil, &messages, &messages); got != code {
			t.Errorf("byokd decrypt %v ends with %d, want %d\n%s", args, got, code, &messages)
		}
		return messages.String()
	}
	restore(exitUsage)
	restore(exitOK, "-o", out)
	if wrong := differences(s.plain, describe(t, out)); len(wrong) > 0 {
		t.Errorf("restored differently: %s", strings.Join(wrong, "\n"))
	}
	restore(exitFailure, "-o", out) // writes over nothing

	// A damaged block: the file is left out, or has zeros there; the rest comes back.
	flip(t, s.lowerOf(t, 40_000), 3*seal.BlockSize+100)
	partly, zeroed := out+"-partly", out+"-zeroed"
	if text := restore(exitDamaged, "-o", partly); !strings.Contains(text, `"to-damage" is left out`) {
		t.Error(text)
	}
	want := map[string]string{}
	for name, text := range s.plain {
		want[name] = text
	}
	delete(want, "to-damage")
	if wrong := differences(want, describe(t, partly)); len(wrong) > 0 {
		t.Errorf("restored differently: %s", strings.Join(wrong, "\n"))
	}
	restore(exitDamaged, "-o", zeroed, "--zero-damaged")
	got, err := os.ReadFile(filepath.Join(zeroed, "to-damage"))
	expect := bytes.Repeat([]byte("to-damage"), 40_000/9+1)[:40_000]
	clear(expect[seal.BlockStart(3):seal.BlockStart(4)])
	if err != nil || !bytes.Equal(got, expect) {
		t.Errorf("with zeros: equal %v, %v", bytes.Equal(got, expect), err)
	}

	s.underAnotherKey(t)
	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	if text := restore(exitFrozen, "-o", out+"-disabled"); !strings.Contains(text, "enable-key") {
		t.Error(text)
	}
	s.check(t, nil, exitFrozen)
}

// underAnotherKey: a volume whose key is not the one that is given ends as an object does, and says which key it names; so
// does one that names the given key in its header but was wrapped under another.
func (s *volumeSite) underAnotherKey(t *testing.T) {
	t.Helper()
	other, err := s.kms.CreateKey("", "", "", false)
	must(t, err)
	text, err := os.ReadFile(s.config)
	must(t, err)
	config := filepath.Join(t.TempDir(), "other.yaml")
	s.write(t, config, strings.ReplaceAll(string(text), s.arn, other), 0o600)
	header := filepath.Join(s.lower, seal.VolumeHeaderName)
	sealed, err := os.ReadFile(header)
	must(t, err)
	lies := filepath.Join(t.TempDir(), "lies")
	must(t, os.Mkdir(lies, 0o700))
	s.write(t, filepath.Join(lies, seal.VolumeHeaderName), strings.ReplaceAll(string(sealed), s.arn, other), 0o600)
	for lower, says := range map[string]string{s.lower: "--key " + s.arn, lies: "belong to another key"} {
		for _, args := range [][]string{{"check", lower}, {"decrypt", lower, "-o", filepath.Join(t.TempDir(), "out")}} {
			for _, key := range [][]string{{"--config", config}, {"--key", other, "--kms-endpoint", s.endpoint}} {
				args := append(slices.Clone(args), key...)
				if code, out, errs := byokd(t, nil, args...); code != exitDamaged || !strings.Contains(errs, says) {
					t.Errorf("byokd %v ends with %d, want %d\n%s%s", args, code, exitDamaged, out, errs)
				}
			}
		}
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// TestCheckFindsDamage: each kind of damage is told with the file, the place and the reason, and nothing else is.
func TestCheckFindsDamage(t *testing.T) { ownerships(t, testCheckFindsDamage) }

func testCheckFindsDamage(t *testing.T, ownership string) {
	s := newVolumeSite(t, ownership)
	target, large := s.lowerOf(t, 40_000), s.lowerOf(t, 3<<20)
	var whole checkReport
	s.check(t, &whole, exitOK)
	for _, c := range []struct {
		name   string
		damage func()
		want   checkFault
	}{
		{"two blocks flipped", func() {
			flip(t, target, 3*seal.BlockSize+100)
			flip(t, target, 4*seal.BlockSize)
		}, checkFault{Fault: volumeread.Fault{Path: "to-damage", Offset: seal.BlockStart(3), Length: 2 * seal.BlockPayload, Reason: volumeread.Damaged}}},
		{"last block of a large file", func() {
			flip(t, large, seal.SealedFileSize(3<<20)-1)
		}, checkFault{Fault: volumeread.Fault{Path: "dir/below/large", Offset: seal.BlockStart(seal.SealedFileSize(3<<20)/seal.BlockSize - 1), Length: seal.BlockPayload, Reason: volumeread.Damaged}}},
		{"id lost", func() {
			if err := unix.Removexattr(target, "user.byokd.id"); err != nil {
				t.Fatal(err)
			}
			flip(t, target, 0)
		}, checkFault{Fault: volumeread.Fault{Path: "to-damage", Reason: volumeread.NoFileID}}},
		{"another file's first block", func() {
			block := make([]byte, seal.BlockSize)
			f, err := os.Open(large)
			if err == nil {
				_, err = f.ReadAt(block, 0)
				f.Close()
			}
			if err == nil {
				f, err = os.OpenFile(target, os.O_WRONLY, 0)
			}
			if err == nil {
				_, err = f.WriteAt(block, 0)
				f.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}, checkFault{Fault: volumeread.Fault{Path: "to-damage", Reason: volumeread.IDMismatch}}},
		{"foreign symlink", func() {
			if err := os.Symlink("/etc/passwd", filepath.Join(s.lower, "innocent")); err != nil {
				t.Fatal(err)
			}
		}, checkFault{Fault: volumeread.Fault{Path: ".", Lower: "innocent", Reason: volumeread.Foreign}}},
		{"attribute", func() {
			one := s.lowerOf(t, 1)
			if err := unix.Setxattr(one, "user.note", []byte("changed by somebody else"), 0); err != nil {
				t.Fatal(err)
			}
		}, checkFault{Fault: volumeread.Fault{Path: "dir/same", Reason: volumeread.Damaged}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			saved := filepath.Join(t.TempDir(), "saved")
			copyTree(t, s.lower, saved)
			c.damage()
			var report checkReport
			s.check(t, &report, exitDamaged)
			found := false
			for _, f := range report.Faults {
				found = found || f.Path == c.want.Path && f.Offset == c.want.Offset && f.Length == c.want.Length && f.Reason == c.want.Reason && (c.want.Lower == "" || c.want.Lower == f.Lower)
				if f.Detail == "" || f.Next == "" || f.Path != c.want.Path && c.name != "attribute" {
					t.Errorf("an incomplete or strange fault: %+v", f)
				}
			}
			if !found || report.Sound {
				t.Errorf("%+v is not among %+v", c.want.Fault, report.Faults)
			}
			if report.Holes > whole.Holes {
				t.Errorf("what is damaged counts as a hole: %d bytes of them, %d before", report.Holes, whole.Holes)
			}
			copyTree(t, saved, s.lower)
		})
	}
	s.check(t, nil, exitOK)
}

// TestCheckFindsLostOwners: owners and modes that are sealed are checked, too, and damaged ones cost nothing else.
func TestCheckFindsLostOwners(t *testing.T) {
	s := newVolumeSite(t, ownershipSealed)
	one, link := s.lowerOf(t, 1), ""
	must(t, filepath.WalkDir(s.lower, func(path string, d fs.DirEntry, err error) error {
		if _, noTarget := unix.Lgetxattr(path, seal.TargetAttribute, nil); noTarget == nil {
			link = path
		}
		return err
	}))
	value := func(path, name string) []byte {
		b := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, b)
		must(t, err)
		return b[:n]
	}
	set := func(path, name string, value []byte) { must(t, unix.Lsetxattr(path, name, value, 0)) }
	large, below := s.lowerOf(t, 3<<20), filepath.Dir(s.lowerOf(t, 3<<20))
	for _, c := range []struct {
		name, path string // the first of the file's names
		reason     volumeread.Reason
		damage     func()
	}{
		{"lost", "dir/same", volumeread.NoOwner, func() { must(t, unix.Removexattr(one, seal.IDAttribute)) }},
		{"changed", "dir/same", volumeread.NoOwner, func() {
			changed := value(one, seal.IDAttribute)
			changed[30] ^= 1
			set(one, seal.IDAttribute, changed)
		}},
		{"another file's", "dir/same", volumeread.NoOwner, func() {
			set(one, seal.IDAttribute, append(value(one, seal.IDAttribute)[:seal.IDSize], value(large, seal.IDAttribute)[seal.IDSize:]...))
		}},
		{"another file's, with its id", "dir/same", volumeread.IDMismatch, func() { set(one, seal.IDAttribute, value(large, seal.IDAttribute)) }},
		{"a directory's", "dir/same", volumeread.NoOwner, func() { set(one, seal.IDAttribute, value(below, seal.IDAttribute)) }},
		{"of a directory", "dir/below", volumeread.NoOwner, func() { must(t, unix.Removexattr(below, seal.IDAttribute)) }},
		{"of the root", ".", volumeread.NoOwner, func() { must(t, unix.Removexattr(s.lower, seal.IDAttribute)) }},
		{"target", "link", volumeread.Damaged, func() { set(link, seal.TargetAttribute, value(large, seal.IDAttribute)) }},
		{"no target", "link", volumeread.Damaged, func() { must(t, unix.Removexattr(link, seal.TargetAttribute)) }},
		{"a lower symlink", "dir/below", volumeread.Foreign, func() { must(t, os.Symlink("/etc/passwd", filepath.Join(below, "innocent"))) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			saved := filepath.Join(t.TempDir(), "saved")
			copyTree(t, s.lower, saved)
			c.damage()
			var report checkReport
			s.check(t, &report, exitDamaged)
			found := false
			for _, f := range report.Faults {
				found = found || f.Path == c.path && f.Reason == c.reason
				if f.Detail == "" || f.Next == "" {
					t.Errorf("an incomplete fault: %+v", f)
				}
			}
			if !found {
				t.Errorf("%s of %s is not among %+v", c.reason, c.path, report.Faults)
			}
			if c.reason == volumeread.NoOwner && report.FaultyBytes > 0 && c.name != "a directory's" {
				t.Errorf("%d bytes are faulty", report.FaultyBytes)
			}
			copyTree(t, saved, s.lower)
		})
	}
	s.check(t, nil, exitOK)
}

// TestOwnershipIsSettled: a volume keeps the ownership it was made with, and another one is refused with the way out.
func TestOwnershipIsSettled(t *testing.T) {
	for _, c := range [][2]string{{ownershipLower, ownershipSealed}, {ownershipSealed, ownershipLower}} {
		s := newVolumeSite(t, c[0])
		s.configure(t, map[string]string{"volume: {": "volume: {ownership: " + c[1] + ", "})
		p := s.start(t)
		p.awaitEnd(t, exitLower)
		if text := p.text(); !strings.Contains(text, "was made with ownership "+c[0]) || !strings.Contains(text, "set "+c[0]+" or auto") {
			t.Errorf("it says %s", text)
		}
		s.configure(t, nil)
		p = s.start(t)
		p.awaitState(t, exitOK)
		if wrong := differences(s.plain, describe(t, s.mount)); len(wrong) > 0 {
			t.Errorf("with auto: %s", strings.Join(wrong, "\n"))
		}
		p.signal(t, unix.SIGTERM)
		p.awaitEnd(t, exitOK)
	}
}

// copyTree makes to equal to from, with hard links, holes and attributes.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	script := `rm -rf "$2" && cp -a "$1" "$2"`
	if text, err := runShell(script, from, to); err != nil {
		t.Fatalf("copy: %v\n%s", err, text)
	}
}

func runShell(script string, args ...string) ([]byte, error) {
	return exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...).CombinedOutput()
}
