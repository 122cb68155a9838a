package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFewDescriptors: the limit of open files is raised where that is allowed, and told where not; one that
// byokd itself cannot work with is refused.
func TestFewDescriptors(t *testing.T) {
	for _, program := range []string{"setpriv", "prlimit"} {
		if _, err := exec.LookPath(program); err != nil {
			skipUnlessRequired(t, err.Error())
		}
	}
	if os.Geteuid() != 0 {
		skipUnlessRequired(t, "capabilities can be given and taken by root only")
	}
	config := filepath.Join(t.TempDir(), "byokd.yaml")
	// The lower directory is missing, so that nothing starts once the limit has been looked at.
	text := "cluster: {id: test, region: eu-central-1}\nkeys:\n  primary: {arn: \"arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000001\"}\n" +
		"volume: {role: orchestration, lower: /nonexistent/lower, mount: /nonexistent/mount}\nadmin: {listen: \"127.0.0.1:0\"}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	without := []string{"setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"}
	for _, c := range []struct {
		name, limit string
		launch      []string
		want        string
		code        int // 0 for any
	}{
		{"refused", "200", without, "too few files may be open at once", exitConfig},
		{"told", "1024", without, "few files may be open at once: under load", 0},
		{"raised", "1024", nil, "\"descriptors\":131072", 0},
	} {
		if c.launch == nil && exec.Command("prlimit", "--nofile=1024:1024", "prlimit", "--nofile=131072:131072", "true").Run() != nil {
			t.Logf("%s: not tried, for want of CAP_SYS_RESOURCE", c.name)
			continue
		}
		args := append([]string{"prlimit", "--nofile=" + c.limit + ":" + c.limit}, c.launch...)
		cmd := exec.Command(args[0], append(args[1:], os.Args[0], "run", "--config", config)...)
		cmd.Env = append(os.Environ(), asByokd+"=1")
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		err := cmd.Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || c.code != 0 && exit.ExitCode() != c.code || !strings.Contains(said.String(), c.want) {
			t.Errorf("%s: %v, want %d and %q:\n%s", c.name, err, c.code, c.want, &said)
		}
	}
}

// skipUnlessRequired skips a test for what a laptop may lack; where BYOKD_REQUIRE is set nothing may be lacking.
func skipUnlessRequired(t *testing.T, missing string) {
	t.Helper()
	if os.Getenv("BYOKD_REQUIRE") != "" {
		t.Fatalf("BYOKD_REQUIRE is set: %s", missing)
	}
	t.Skip(missing)
}
