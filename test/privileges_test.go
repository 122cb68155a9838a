//go:build linux

package test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/byokd/byokd/metrics"
)

// volumeCapabilities are what byokd with a volume needs, each with a call through the
// mount that fails without it. The calls are made by uid 1000, who has no capability,
// or by root.
var volumeCapabilities = []struct{ name, as, script string }{
	{"chown", "1000", `: > of-1000 && [ "$(stat -c %u of-1000)" = 1000 ]`},
	{"dac_override", "1000", `(umask 077; mkdir private && echo x > private/file && cat private/file)`},
	{"fowner", "1000", `echo x > moded && chmod 0640 moded`},
	{"fsetid", "1000", `: > setgid && chmod 2755 setgid && [ "$(stat -c %a setgid)" = 2755 ]`},
	{"mknod", "0", `mknod device c 1 3`},
}

// confined starts byokd as root with these capabilities and no others, which it can
// never get back.
func confined(names ...string) option {
	return func(s *stack) {
		s.launch = []string{"setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"}
		for _, name := range names {
			s.launch[3] += ",+" + name
		}
	}
}

// lowerOwners has the volume keep owners on its lower files, which takes privileges.
func lowerOwners(s *stack) { s.ownership = "lower" }

// sealedOwners has it keep them in attributes, which takes none.
func sealedOwners(s *stack) { s.ownership = "sealed" }

// needing runs the calls in the mount and returns the names of those that fail.
func (s *stack) needing() (failed []string) {
	s.t.Helper()
	if err := os.Chmod(s.mount, 0o777); err != nil {
		s.t.Fatal(err)
	}
	for _, c := range volumeCapabilities {
		cmd := exec.Command("setpriv", "--reuid="+c.as, "--regid="+c.as, "--clear-groups", "sh", "-ec", c.script)
		cmd.Dir = s.mount
		if text, err := cmd.CombinedOutput(); err != nil {
			s.t.Logf("%s: %v: %s", c.name, err, text)
			failed = append(failed, c.name)
		}
	}
	return failed
}

// TestCapabilities runs byokd with exactly the capabilities that the manual names,
// under no_new_privs, and once without each of them.
func TestCapabilities(t *testing.T) {
	requireProgram(t, "setpriv")
	all := []string{"sys_admin"}
	for _, c := range volumeCapabilities {
		all = append(all, c.name)
	}
	t.Run("all", func(t *testing.T) {
		s := newStack(t, shipped, lowerOwners, confined(all...))
		assertPrivileges(s, len(all))
		if failed := s.needing(); len(failed) > 0 {
			t.Errorf("with all of %v these fail: %v", all, failed)
		}
		s.assertServes("with few capabilities")
		s.stopDaemon()
	})
	t.Run("sealed owners", func(t *testing.T) {
		s := newStack(t, shipped, confined("sys_admin")) // to mount
		assertPrivileges(s, 1)
		if failed := s.needing(); len(failed) > 0 {
			t.Errorf("with owners that are sealed these fail: %v", failed)
		}
		s.assertServes("with sealed owners")
		s.stopDaemon()
	})
	for _, c := range volumeCapabilities {
		t.Run("without "+c.name, func(t *testing.T) {
			s := newStack(t, shipped, lowerOwners, confined(slices.DeleteFunc(slices.Clone(all), func(name string) bool { return name == c.name })...))
			if failed := s.needing(); !slices.Contains(failed, c.name) {
				t.Errorf("it is not needed")
			}
			s.stopDaemon()
		})
	}
}

// assertPrivileges checks what the running byokd has.
func assertPrivileges(s *stack, capabilities int) {
	s.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.workerPid()))
	if err != nil {
		s.t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	var effective uint64
	if _, err := fmt.Sscanf(fields["CapEff"], "%x", &effective); err != nil {
		s.t.Fatal(err)
	}
	n := 0
	for ; effective != 0; effective &= effective - 1 {
		n++
	}
	if n != capabilities || fields["CapBnd"] != fields["CapEff"] || fields["NoNewPrivs"] != "1" {
		s.t.Errorf("%d capabilities, effective %s, bounding %s, no_new_privs %s", n, fields["CapEff"], fields["CapBnd"], fields["NoNewPrivs"])
	}
}

// TestUnprivilegedProxy runs a byokd with buckets only as a user without any
// capability.
func TestUnprivilegedProxy(t *testing.T) {
	requireProgram(t, "setpriv")
	s := newStack(t, shipped, func(s *stack) {
		s.launch = []string{"setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--regid=65534", "--clear-groups"}
		s.volumeless = true
	})
	assertPrivileges(s, 0)
	honest := s.newClient("honest")
	o := object{1 << 50, 3_000_000}
	if err := honest.put(t.Context(), "honest", o); err != nil {
		t.Error(err)
	}
	if err := honest.get(t.Context(), "honest", o, 0, o.size); err != nil {
		t.Error(err)
	}
	s.awaitState(metrics.StateReady)
	s.stopDaemon()
}
