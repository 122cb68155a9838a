package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// Each row prepares a site that byokd must refuse, with its own exit code and words.
func TestRefusals(t *testing.T) {
	needMounts(t)
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, s *site)
		code    int
		want    []string
	}{
		{"configuration", func(t *testing.T, s *site) { s.configure(t, map[string]string{"holdFor": "holdfor"}) }, exitConfig, []string{"byokd.yaml:7: objects.holdfor: unknown field; did you mean holdFor?"}},
		{"no configuration", func(t *testing.T, s *site) { s.config = "/nowhere.yaml" }, exitConfig, []string{"/nowhere.yaml"}},
		{"credentials that everybody may read", func(t *testing.T, s *site) {
			if err := os.Chmod(s.credentials, 0o644); err != nil {
				t.Fatal(err)
			}
		}, exitConfig, []string{"chmod 600"}},
		{"credentials that are none", func(t *testing.T, s *site) { s.write(t, s.credentials, "hunter2\n", 0o600) }, exitConfig, []string{"line 1 is not ACCESS_KEY_ID:SECRET_ACCESS_KEY"}},
		{"audit file", func(t *testing.T, s *site) {
			s.configure(t, map[string]string{"stopTimeout: 30s": "audit: {file: /nowhere/audit}"})
		}, exitConfig, []string{"/nowhere/audit", "type: mkdir -p /nowhere"}},
		{"foreign files", func(t *testing.T, s *site) { s.write(t, filepath.Join(s.lower, "precious.db"), "x", 0o600) }, exitLower, []string{"precious.db"}},
		{"damaged header", func(t *testing.T, s *site) { s.write(t, filepath.Join(s.lower, "byokd.volume"), "x", 0o600) }, exitLower, []string{"byokd.volume"}},
		{"no volume", func(t *testing.T, s *site) {
			s.configure(t, map[string]string{"volume: {": "volume: {create: never, "})
		}, exitLower, []string{"no volume is to be made in it", "findmnt --target "}},
		{"another key", func(t *testing.T, s *site) {
			s.makeVolume(t)
			other, err := s.kms.CreateKey("", "", "", false)
			if err != nil {
				t.Fatal(err)
			}
			s.configure(t, map[string]string{s.arn: other})
		}, exitLower, []string{"type: byokd key rewrap --config FILE --to", "key/"}},
		{"another cluster", func(t *testing.T, s *site) {
			s.makeVolume(t)
			s.configure(t, map[string]string{"test-cluster": "other-cluster"})
		}, exitLower, []string{`"test-cluster"`, `"other-cluster"`}},
		{"no such key", func(t *testing.T, s *site) {
			s.configure(t, map[string]string{s.arn: s.arn[:len(s.arn)-4] + "0000"})
		}, exitMisconfigured, []string{"External encryption key is not ready"}},
		{"mount point not empty", func(t *testing.T, s *site) { s.write(t, filepath.Join(s.mount, "x"), "x", 0o600) }, exitMount, []string{"is not empty (x"}},
		{"no mount point", func(t *testing.T, s *site) { // nor a directory in which it could be made
			if err := os.Remove(s.mount); err != nil {
				t.Fatal(err)
			}
			s.configure(t, map[string]string{s.mount: s.mount + "/below"})
		}, exitMount, []string{"mkdir -p"}},
		{"port in use", func(t *testing.T, s *site) {
			s.configure(t, map[string]string{"localhost:0": busy.Addr().String()})
		}, exitListen, []string{"admin.listen", "ss -ltnp"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			c.prepare(t, s)
			p := s.start(t)
			p.awaitEnd(t, c.code)
			for _, want := range c.want {
				if !strings.Contains(p.text(), want) {
					t.Errorf("%q is missing in what it says", want)
				}
			}
			if strings.Contains(p.text(), "hunter2") || strings.Contains(p.text(), kmstest.TenantSecret) {
				t.Error("it tells a secret")
			}
			if mountedOn(t, s.mount) {
				t.Error("it left a mount")
			}
		})
	}
}

// makeVolume runs a byokd until it has made its volume.
func (s *site) makeVolume(t *testing.T) {
	t.Helper()
	p := s.start(t)
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		out  string
	}{
		{[]string{"version"}, exitOK, "key erasure: "},
		{[]string{}, exitOK, "Available Commands"},
		{[]string{"config", "reference"}, exitOK, "probeInterval: 1s"},
		{[]string{"bogus"}, exitUsage, ""},
		{[]string{"run"}, exitUsage, ""},
		{[]string{"run", "--config"}, exitUsage, ""},
		{[]string{"key", "bogus"}, exitUsage, ""},
		{[]string{"status", "-o", "xml"}, exitUsage, ""},
		{[]string{"status", "extra"}, exitUsage, ""},
		{[]string{"seal", "--bucket", "documents", "--config", "reference.yaml", "--workers", "0"}, exitUsage, ""},
		{[]string{"seal", "--bucket", "documents", "--config", "reference.yaml", "--workers", "100000"}, exitUsage, ""},
		{[]string{"render", "--filename", "/dev/null", "--image", "x", "--restart-all-containers", "auto"}, exitUsage, ""},
		{[]string{"config", "check", "--config", "/nowhere"}, exitConfig, ""},
		{[]string{"config", "check", "--config", "reference.yaml"}, exitOK, "is sound"},
		{[]string{"status", "--admin", "127.0.0.1:9"}, exitNoAnswer, ""},
	} {
		var out, stderr strings.Builder
		if code := run(context.Background(), c.args, nil, &out, &stderr); code != c.code || !strings.Contains(out.String(), c.out) {
			t.Errorf("%v: exit code %d, want %d\n%s%s", c.args, code, c.code, out.String(), stderr.String())
		}
		if c.code != exitOK && !strings.HasPrefix(stderr.String(), "byokd: ") {
			t.Errorf("%v: says %q", c.args, stderr.String())
		}
		if _, try, told := strings.Cut(stderr.String(), "\nTry: "); told && try != strings.Join(append([]string{"byokd"}, command(c.args)...), " ")+" --help\n" {
			t.Errorf("%v: whoever types it is told to try %q", c.args, try)
		}
	}
}

// command is the part of a command line that names a command.
func command(args []string) []string {
	if i := slices.IndexFunc(args, func(a string) bool { return a == "bogus" || a == "extra" || strings.HasPrefix(a, "-") }); i >= 0 {
		return args[:i]
	}
	return args
}

// Every exit code stands in docs/OPERATIONS.md.
func TestExitCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	codes := []int{exitOK, exitFailure, exitUsage, exitConfig, exitLower, exitMisconfigured, exitMount, exitListen, exitForced, exitDamaged,
		exitFrozen, exitWaiting, exitDegraded, exitStopping, exitFinal, exitRecorded, exitStillNeeded, exitChecks, exitNoAnswer}
	slices.Sort(codes)
	if len(slices.Compact(slices.Clone(codes))) != len(codes) {
		t.Error("two exit codes are the same")
	}
	for _, code := range codes {
		if !strings.Contains(string(text), fmt.Sprintf("\n| %d |", code)) {
			t.Errorf("exit code %d is not in docs/OPERATIONS.md", code)
		}
	}
}
