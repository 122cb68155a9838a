package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// frozenAdmin answers like a byokd whose key is disabled.
func frozenAdmin(t *testing.T) string {
	t.Helper()
	report := metrics.Report{Version: "v1", Cluster: "acme", Erasure: "guaranteed", Time: time.Now(), State: metrics.StateFrozen,
		Headline: "External encryption key is not ready", Cause: "The AWS KMS key is disabled.", NextStep: "aws kms enable-key",
		History: []metrics.Event{{At: time.Now(), Guard: "primary", Gate: keyguard.Frozen, Key: keyguard.Disabled, Reason: keyguard.ReasonKeyDisabled},
			{At: time.Now().Add(-time.Hour), Guard: "primary", Gate: keyguard.Open, Key: keyguard.Enabled}},
		Keys: []metrics.KeyReport{{Name: "primary", KeyARN: "arn:primary", Key: keyguard.Disabled, Gate: keyguard.Frozen, Waiting: 17, LastSuccess: time.Now().Add(-90 * time.Second)},
			{Name: "backup", KeyARN: "arn:backup", Key: keyguard.Enabled, Gate: keyguard.Open}},
		Resources: []metrics.ResourceReport{{Name: "orchestration disk", State: metrics.StateFrozen, Key: "primary", Where: "/data"},
			{Name: "backups", State: metrics.StateReady, Key: "backup", Where: "s3://backups"}}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := json.Marshal(report)
		if err != nil {
			t.Error(err)
		}
		if r.URL.Path == "/v1/events" {
			fmt.Fprintf(w, "event: status\ndata: %s\n\n", text)
			return
		}
		w.Write(text)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// terminal opens a pseudo terminal: what is written to tty is read from the other side.
func terminal(t *testing.T) (tty *os.File, read func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	return tty, func() string {
		tty.Close()
		text, _ := io.ReadAll(master) // ends with EIO: the other side is closed
		return strings.ReplaceAll(string(text), "\r\n", "\n")
	}
}

var escape = regexp.MustCompile("\x1b\\[[0-9;]*m")

func TestColoursAreForTerminals(t *testing.T) {
	admin := frozenAdmin(t)
	var plain bytes.Buffer
	if code := run(context.Background(), []string{"status", "--admin", admin}, nil, &plain, io.Discard); code != exitFrozen {
		t.Fatalf("exit code %d", code)
	}
	for _, want := range []string{"last successful probe 1m30s ago", "17 operations wait", "primary: gate Frozen, key Disabled (key_disabled)"} {
		if !strings.Contains(plain.String(), want) {
			t.Errorf("%q is not in\n%s", want, plain.String())
		}
	}
	if escape.MatchString(plain.String()) {
		t.Errorf("colours without a terminal: %q", plain.String())
	}
	for _, c := range []struct {
		environ  []string
		coloured bool
	}{{nil, true}, {[]string{"NO_COLOR="}, true}, {[]string{"NO_COLOR=1"}, false}, {[]string{"TERM=dumb"}, false}} {
		tty, read := terminal(t)
		code := run(context.Background(), []string{"status", "--admin", admin}, c.environ, tty, io.Discard)
		text := read()
		if code != exitFrozen || escape.MatchString(text) != c.coloured {
			t.Errorf("%v: exit code %d, %q", c.environ, code, text)
		}
		if c.coloured && !strings.Contains(text, "\x1b[1;31mExternal encryption key is not ready") {
			t.Errorf("a frozen key is not red: %q", text)
		}
		// Colours change no column.
		if got := escape.ReplaceAllString(text, ""); got != plain.String() {
			t.Errorf("%v: without its colours\n%s\nwant\n%s", c.environ, got, plain.String())
		}
	}
	tty, read := terminal(t)
	run(context.Background(), []string{"status", "--watch", "--admin", admin}, nil, tty, io.Discard)
	if text := read(); !strings.Contains(text, "\x1b[1;31mFROZEN") {
		t.Errorf("--watch: %q", text)
	}
}

func TestStatusFormats(t *testing.T) {
	admin := frozenAdmin(t)
	for _, args := range [][]string{{"-o", "json"}, {"-o", "yaml"}, {"-o", "json", "--watch"}, {"-o", "yaml", "--watch"}} {
		var out bytes.Buffer
		var messages strings.Builder
		code := run(context.Background(), append([]string{"status", "--admin", admin}, args...), nil, &out, &messages)
		if watching := args[len(args)-1] == "--watch"; watching != strings.Contains(messages.String(), "the last state seen was frozen") {
			t.Errorf("%v: it says %q", args, messages.String())
		}
		var report map[string]any
		err := yaml.Unmarshal(out.Bytes(), &report) // JSON is YAML
		if args[1] == "json" && err == nil {
			err = json.Unmarshal(out.Bytes(), &report)
		}
		if code != exitFrozen || err != nil || report["state"] != "frozen" || len(report["resources"].([]any)) != 2 {
			t.Errorf("%v: exit code %d, %v, %s", args, code, err, out.String())
		}
		if args[1] == "yaml" && strings.Contains(out.String(), "{") {
			t.Errorf("%v: not YAML as people write it: %s", args, out.String())
		}
	}
}

// What is said of one resource does not push the columns of those below it out of line.
func TestStatusTableIsAligned(t *testing.T) {
	report := metrics.Report{State: metrics.StateWaiting, Resources: []metrics.ResourceReport{
		{Name: "orchestration disk", State: metrics.StateWaiting, Key: "primary", Where: "/data", Note: "waits for the key primary", Next: "mend it"},
		{Name: "documents", State: metrics.StateReady, Key: "primary", Where: "s3://documents"}}}
	var table bytes.Buffer
	must(t, writeReport(&table, report, false))
	for _, want := range []string{
		"\norchestration disk  waiting  primary  /data\ndocuments           ready    primary  s3://documents\n",
		"\n  orchestration disk: waits for the key primary\n", "\n  orchestration disk: next step: mend it\n"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, &table)
		}
	}
}
