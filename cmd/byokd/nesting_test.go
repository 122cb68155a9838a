package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/awskey"
)

// A lower directory in another byokd's mount is refused by whatever name, at the start and by preflight, also while that mount
// is frozen, when every question to it would hang.
func TestLowerInAMountIsRefused(t *testing.T) {
	needMounts(t)
	outer := newSite(t)
	p := outer.start(t)
	p.awaitState(t, exitOK)
	inside := filepath.Join(outer.mount, "below", "sealed")
	must(t, os.MkdirAll(inside, 0o755))
	link, bound := filepath.Join(t.TempDir(), "link"), filepath.Join(t.TempDir(), "bound")
	must(t, os.Symlink(inside, link))
	must(t, os.Mkdir(bound, 0o755))
	must(t, unix.Mount(inside, bound, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(bound, unix.MNT_DETACH) })
	must(t, outer.kms.Disable(outer.arn))
	p.awaitState(t, exitFrozen)

	inner := preflightSite(t)
	beside, config := inner.lower, readFile(t, inner.config)
	for name, lower := range map[string]string{"as it is": inside, "by a symlink": link, "by a bind mount": bound, "the mount itself": outer.mount, "to be made": inside + "/new"} {
		t.Run(name, func(t *testing.T) {
			inner.write(t, inner.config, strings.Replace(config, beside, lower, 1), 0o600)
			at := outer.mount
			if lower == bound {
				at = bound
			}
			want := "lies in what byokd has mounted at " + at
			run := inner.start(t)
			run.awaitEnd(t, exitLower)
			if said := run.text(); !strings.Contains(said, want) || !strings.Contains(said, "findmnt -t fuse.byokd") {
				t.Errorf("it says %s", said)
			}
			if c := inner.checks(t, exitChecks)["volume/lower directory"]; c.Result != awskey.Fail || !strings.Contains(c.Detail, want) {
				t.Errorf("preflight: %+v", c)
			}
		})
	}
	// Beside that mount there is nothing to refuse.
	inner.write(t, inner.config, config, 0o600)
	if c := inner.checks(t, exitOK)["volume/lower directory"]; c.Result != awskey.Pass {
		t.Errorf("beside it: %+v", c)
	}
	must(t, outer.kms.Enable(outer.arn))
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	must(t, err)
	return string(text)
}

// Mount point and lower directory one inside the other are found also where their paths do not show it.
func TestApartFromLower(t *testing.T) {
	needMounts(t)
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	for _, dir := range []string{"disk/sealed/inner", "disk/data", "bound"} {
		must(t, os.MkdirAll(at(dir), 0o755))
	}
	must(t, os.Symlink("disk", at("link")))
	must(t, os.Symlink(at("disk/sealed/inner"), at("into")))
	must(t, unix.Mount(at("disk/sealed"), at("bound"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(at("bound"), unix.MNT_DETACH) })
	for _, c := range []struct{ mount, lower, says string }{
		{"disk/data", "disk/sealed", ""},
		{"link/data", "disk/sealed", ""},
		{"disk/sealed2", "disk/sealed", ""}, // to be made
		{"disk/data", "disk/sealed/inner", ""},
		{"link/sealed", "disk/sealed", "lies in volume.lower"},
		{"link/sealed/data", "disk/sealed", "lies in volume.lower"}, // to be made
		{"into", "disk/sealed", "lies in volume.lower"},
		{"bound", "disk/sealed", "lies in volume.lower"},
		{"bound/inner", "link/sealed", "lies in volume.lower"},
		{"disk", "link/sealed", "would be hidden"},
		{"bound", "into", "would be hidden"},
	} {
		err := apartFromLower(at(c.mount), at(c.lower))
		if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, errMountPoint) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("mount %s, lower %s: %v, want %q", c.mount, c.lower, err, c.says)
		}
	}
	s := preflightSite(t)
	lower := s.lower
	must(t, os.Symlink(lower, s.mount+"-link"))
	s.write(t, s.config, strings.Replace(readFile(t, s.config), s.mount, s.mount+"-link/data", 1), 0o600)
	p := s.start(t)
	p.awaitEnd(t, exitMount)
	if !strings.Contains(p.text(), "lies in volume.lower") {
		t.Errorf("it says %s", p.text())
	}
	if left, err := os.ReadDir(lower); err != nil || len(left) > 0 {
		t.Errorf("it made %v in the lower directory, %v", left, err)
	}
	if c := s.checks(t, exitChecks)["volume/mount point"]; c.Result != awskey.Fail || !strings.Contains(c.Detail, "lies in volume.lower") {
		t.Errorf("preflight: %+v", c)
	}
}
