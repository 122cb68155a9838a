//go:build linux

package test

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestSeccompProfile looks at the published profile: that what attacks processes and
// kernels is not in it. That it suffices, the pods show that run under it.
func TestSeccompProfile(t *testing.T) {
	profile := readProfile(t, "../deploy/seccomp/byokd.json")
	if profile.DefaultAction != specs.ActErrno || profile.DefaultErrnoRet == nil || *profile.DefaultErrnoRet != 1 {
		t.Errorf("what is not listed ends in %s, %v, not EPERM", profile.DefaultAction, profile.DefaultErrnoRet)
	}
	if want := []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64}; !slices.Equal(profile.Architectures, want) {
		t.Errorf("architectures %v: the images are of %v", profile.Architectures, want)
	}
	filtered := map[string]bool{}
	allowed := map[string]bool{}
	for _, rule := range profile.Syscalls {
		for _, name := range rule.Names {
			switch {
			case rule.Action != specs.ActAllow && name != "clone3":
				t.Errorf("%s: %s", name, rule.Action)
			case len(rule.Args) > 0:
				filtered[name] = true
			case rule.Action == specs.ActAllow:
				if allowed[name] {
					t.Errorf("%s is listed twice", name)
				}
				allowed[name] = true
			}
		}
	}
	for _, name := range []string{"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp", "bpf", "perf_event_open",
		"keyctl", "add_key", "request_key", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "kexec_load", "kexec_file_load",
		"init_module", "finit_module", "delete_module", "setns", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount",
		"mount_setattr", "personality", "reboot", "swapon", "swapoff", "syslog", "quotactl", "acct", "iopl", "ioperm", "modify_ldt", "settimeofday",
		"clock_settime", "clock_adjtime", "sethostname", "vhangup", "seccomp", "landlock_create_ruleset", "migrate_pages", "move_pages"} {
		if allowed[name] || filtered[name] {
			t.Errorf("%s is allowed", name)
		}
	}
	for _, name := range []string{"clone", "unshare", "socket"} { // without their dangerous arguments only
		if allowed[name] || !filtered[name] {
			t.Errorf("%s is allowed whatever its arguments", name)
		}
	}
}
