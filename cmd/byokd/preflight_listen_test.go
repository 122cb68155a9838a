package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/awskey"
)

// What a byokd with this configuration has is in order beside it; for one of another cluster it is in the way, and is named.
func TestPreflightOfListenersInUse(t *testing.T) {
	needMounts(t)
	s := preflightSite(t)
	socket := filepath.Join(t.TempDir(), "control.sock")
	config := strings.Replace(readFile(t, s.config), `admin: {`, fmt.Sprintf("admin: {socket: %q, ", socket), 1)
	s.write(t, s.config, config, 0o600)
	p := s.start(t)
	p.awaitState(t, exitOK)
	admin, s3 := p.addresses()
	at := func(url string) string { return url[strings.Index(url, "//")+2:] }
	config = strings.NewReplacer("localhost:0", at(admin), "127.0.0.1:0", at(s3)).Replace(config)
	s.write(t, s.config, config, 0o600)
	expect := func(want awskey.Result, words map[string]string) {
		t.Helper()
		code := map[awskey.Result]int{awskey.Pass: exitOK, awskey.Fail: exitChecks}[want]
		found := s.checks(t, code)
		for name, word := range words {
			if c := found["listeners/"+name]; c.Result != want || !strings.Contains(c.Detail, word) || want == awskey.Fail && c.NextStep == "" {
				t.Errorf("%s: %+v, want %q", name, c, word)
			}
		}
	}
	comm := strings.TrimSpace(readFile(t, fmt.Sprintf("/proc/%d/comm", p.cmd.Process.Pid)))
	process := fmt.Sprintf("%s (pid %d)", comm, p.cmd.Process.Pid)
	const ours = "the byokd that runs with this configuration"
	expect(awskey.Pass, map[string]string{"admin": ours + ", " + process, "S3": process, "control socket": ours})

	s.write(t, s.config, strings.Replace(config, "test-cluster", "other-cluster", 1), 0o600)
	expect(awskey.Fail, map[string]string{"admin": `another byokd listens there, ` + process, "S3": "in use by " + process, "control socket": "in use by " + comm})
	if c := s.checks(t, exitChecks)["listeners/admin"]; !strings.Contains(c.Detail, `cluster "test-cluster" with `) || !strings.Contains(c.Detail, s.mount) {
		t.Errorf("which byokd it is: %+v", c)
	}

	s.write(t, s.config, config, 0o600)
	p.cmd.Process.Kill() // which leaves a socket
	<-p.ended
	awaitRefusal(t, "unix", socket) // its worker ends after it
	awaitRefusal(t, "tcp", at(admin))
	awaitRefusal(t, "tcp", at(s3))
	if _, err := os.Lstat(socket); err != nil {
		t.Fatal(err)
	}
	found := s.checks(t, exitOK)
	for _, name := range []string{"admin", "S3", "control socket"} {
		if c := found["listeners/"+name]; c.Result != awskey.Pass || strings.Contains(c.Detail, ours) {
			t.Errorf("after its death, %s: %+v", name, c)
		}
	}
}

// awaitRefusal waits until nobody listens at an address.
func awaitRefusal(t *testing.T, network, address string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // the pace of asking
		conn, err := net.Dial(network, address)
		if errors.Is(err, unix.ECONNREFUSED) {
			return
		}
		if err == nil {
			conn.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: somebody listens still: %v", address, err)
		}
	}
}

// Each thing that may be in the way fails by its name, with who it is and a next step.
func TestPreflightOfListenersFails(t *testing.T) {
	asTenant(t)
	web := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(web.Close)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { udp.Close() })
	dir := t.TempDir()
	taken := filepath.Join(dir, "taken.sock")
	l, err := net.Listen("unix", taken)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	busy, me := web.Listener.Addr().String(), fmt.Sprintf("(pid %d)", os.Getpid())
	everywhere := "0.0.0.0" + busy[strings.LastIndex(busy, ":"):]
	fleet := fmt.Sprintf("stopTimeout: 30s\nfleet: {peers: [\"localhost:9\"], listen: %q, secretFile: /nowhere}", udp.LocalAddr())
	for name, c := range map[string]struct{ old, new, check, words string }{
		"admin":                   {"localhost:0", busy, "admin", "in use by"},
		"admin at all addresses":  {`"localhost:0"`, fmt.Sprintf("%q, allowRemote: true", everywhere), "admin", me},
		"S3":                      {"listen: 127.0.0.1:0", "listen: " + busy, "S3", me},
		"fleet":                   {"stopTimeout: 30s", fleet, "fleet", me},
		"an address of others":    {"listen: 127.0.0.1:0", "allowRemote: true\n  listen: 192.0.2.1:9000", "S3", "ip address"},
		"a socket in use":         {`admin: {listen: "localhost:0"`, fmt.Sprintf("admin: {socket: %q", taken), "control socket", me},
		"no socket":               {"admin: {", fmt.Sprintf("admin: {socket: %q, ", dir+"/file"), "control socket", "is no socket; move it away"},
		"no directory for it":     {"admin: {", fmt.Sprintf("admin: {socket: %q, ", dir+"/none/x"), "control socket", "mkdir -p " + dir + "/none"},
		"a path that is too long": {"admin: {", fmt.Sprintf("admin: {socket: %q, ", dir+"/"+strings.Repeat("x", 108)), "control socket", "at most 107 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.withoutVolume(t, map[string]string{c.old: c.new})
			cfg, _, err := loadConfig(s.config, nil)
			must(t, err)
			for _, got := range listenersGroup(t.Context(), cfg).Checks {
				if got.Name != c.check {
					if got.Result != awskey.Pass && cfg.Admin.Listen != defaultAdminListen { // which anybody may have
						t.Errorf("%+v", got)
					}
				} else if said := got.Detail + got.NextStep; got.Result != awskey.Fail || !strings.Contains(said, c.words) {
					t.Errorf("%+v, want %q", got, c.words)
				}
			}
		})
	}
}
