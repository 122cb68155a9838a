//go:build linux

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// toolchainBench is a machine for deploy/toolchain.sh: a copy of it, and a path with nothing on it but what it uses.
type toolchainBench struct {
	t         *testing.T
	dir, path string
}

func newToolchainBench(t *testing.T) *toolchainBench {
	t.Helper()
	dir, err := os.MkdirTemp("", "toolchain") // not below t.TempDir(), where other users may not look
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &toolchainBench{t, dir, filepath.Join(dir, "path")}
	script, err := os.ReadFile("../deploy/toolchain.sh")
	if err != nil {
		t.Fatal(err)
	}
	b.write("deploy/toolchain.sh", string(script))
	b.write("go.mod", "module example\n\ngo 1.26.0\n\ntoolchain go1.26.3\n")
	for _, tool := range strings.Fields("awk bash cat chmod dirname find ln mkdir mktemp readlink rm sed sort tail uname") {
		at, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		b.write("path/"+tool, "#!/bin/sh\nexec "+at+" \"$@\"\n")
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *toolchainBench) write(name, text string) {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

// theGo is a script that says it is a version of Go, and does one thing more.
func theGo(version, more string) string {
	return "#!/bin/sh\n[ \"$1 $2\" = \"env GOVERSION\" ] && echo " + version + " && exit\n" + more + "\nexit 1\n"
}

// fetches is what a Go does that gives a module in a directory.
func fetches(dir string) string {
	return `[ "$1 $2 $3" = "mod download -json" ] && { case "$4" in
  golang.org/toolchain@v0.0.1-go1.26.3.linux-*) printf '{\n\t"Path": "golang.org/toolchain",\n\t"Dir": "` + dir + `",\n\t"Sum": "x"\n}\n'; exit;;
  esac; }`
}

func (b *toolchainBench) run(user uint32) (said string, ok bool) {
	b.t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		b.t.Fatal(err)
	}
	cmd := exec.Command(bash, filepath.Join(b.dir, "deploy/toolchain.sh"))
	cmd.Env = []string{"PATH=" + b.path, "HOME=" + b.dir, "GOEXPERIMENT=runtimesecret"}
	if user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	}
	text, err := cmd.CombinedOutput()
	return string(text), err == nil
}

// TestToolchain: make finds a Go that is new enough, or gets one, or says what to do.
func TestToolchain(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("BYOKD_REQUIRE") != "" {
			t.Fatal("not root, which installs packages and becomes another user")
		}
		t.Skip("needs root, which installs packages and becomes another user")
	}
	const old, newer = "go1.19.8", "go1.26.3"
	for _, c := range []struct {
		name string
		user uint32
		set  func(b *toolchainBench)
		ok   bool
		says []string // all it says, in order
	}{
		{"new enough", 0, func(b *toolchainBench) { b.write("path/go", theGo("go1.26.8", "")) }, true, nil},
		{"newer", 0, func(b *toolchainBench) { b.write("path/go", theGo("go1.100.1", "")) }, true, nil},
		{"one that fetches newer ones itself", 0, func(b *toolchainBench) {
			b.write("path/go", theGo("go1.24.4", `[ "$1 $2" = "list -m" ] && exit`))
		}, true, nil},
		{"none, not root", 65534, func(*toolchainBench) {}, false, []string{"needs Go 1.26.0", "there is none here", `sudo env "PATH=$PATH" make`}},
		{"none, not Debian", 0, func(*toolchainBench) {}, false, []string{"there is none here. Install it"}},
		{"none, and not to be had", 0, func(b *toolchainBench) {
			b.write("path/apt-get", "#!/bin/sh\necho E: no network; exit 100\n")
		}, false, []string{"installing for the build: golang-go", "E: no network", "golang-go cannot be installed"}},
		{"Debian's, which is old", 0, func(b *toolchainBench) {
			b.write("old", theGo(old, fetches(b.dir+"/module")))
			b.write("path/apt-get", "#!/bin/sh\n[ \"$1\" = install ] || exit 0\ncat "+b.dir+"/old >"+b.path+"/go; chmod +x "+b.path+"/go\n")
			b.write("module/bin/go", theGo(newer, ""))
			b.write("module/pkg/tool/linux/compile", "")
			for _, name := range []string{"module/bin/go", "module/pkg/tool/linux/compile"} { // as a module's files are
				if err := os.Chmod(filepath.Join(b.dir, name), 0o444); err != nil {
					b.t.Fatal(err)
				}
			}
		}, true, []string{"installing for the build: golang-go", "fetching go1.26.3: there is go1.19.8 here"}},
		{"old, no network", 0, func(b *toolchainBench) {
			b.write("path/go", theGo(old, `echo '{"Error": "dial tcp: no route"}'`))
		}, false, []string{"fetching go1.26.3", "it cannot be fetched", "no route"}},
		{"what comes does not run", 0, func(b *toolchainBench) {
			b.write("path/go", theGo(old, fetches(b.dir+"/module")))
			b.write("module/bin/go", "#!/bin/sh\nexit 1\n")
			b.write("module/pkg/tool/compile", "")
		}, false, []string{"fetching go1.26.3", "does not run"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newToolchainBench(t)
			c.set(b)
			said, ok := b.run(c.user)
			if ok != c.ok {
				t.Errorf("success %v, want %v", ok, c.ok)
			}
			if len(c.says) == 0 && said != "" {
				t.Error("it has something to say")
			}
			rest := said
			for _, want := range c.says {
				var found bool
				if _, rest, found = strings.Cut(rest, want); !found {
					t.Errorf("it does not say %q, or not there", want)
				}
			}
			if t.Failed() {
				t.Logf("it said:\n%s", said)
			}
			if again, ok := b.run(c.user); c.ok && (!ok || again != "") {
				t.Errorf("the second time: success %v, %q", ok, again)
			}
		})
	}
}
