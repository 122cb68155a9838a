package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/objstore/s3test"
)

// The whole life: a fresh volume, a freeze, a stop while frozen, a start while the key is still away, a thaw.
func TestLifeOfADaemon(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	if err := os.WriteFile(filepath.Join(s.mount, "a"), []byte("acknowledged"), 0o600); err != nil {
		t.Fatal(err)
	}

	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	table := ""
	p.await(t, "the gate to be closed", func() bool { // the exit code says frozen from the drain on
		table = p.awaitState(t, exitFrozen)
		return strings.Contains(table, "Frozen")
	})
	if !strings.HasPrefix(table, "External encryption key is not ready\n") || !strings.Contains(table, "enable-key") || !strings.Contains(table, s.arn) {
		t.Errorf("status says:\n%s", table)
	}
	for path, want := range map[string]int{"/livez": 200, "/readyz": 503, "/startupz": 200, "/metrics": 200, "/": 200} {
		code, body := p.probe(t, path)
		if code != want {
			t.Errorf("%s: %d while frozen, want %d", path, code, want)
		}
		if path == "/metrics" && !strings.Contains(body, `byokd_gate_state{guard="primary",state="frozen"} 1`) {
			t.Error("byokd_gate_state does not say frozen")
		}
	}
	hanging := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(s.mount, "a"))
		hanging <- err
	}()
	p.await(t, "the read to hang", func() bool {
		_, body := p.probe(t, "/metrics")
		return strings.Contains(body, "\nbyokd_fs_parked_calls 1\n")
	})
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if mountedOn(t, s.mount) {
		t.Error("it is still mounted")
	}
	if err := <-hanging; err == nil {
		t.Error("a read that hung at the freeze was answered by the stop")
	}

	p = s.start(t)
	table = p.awaitState(t, exitWaiting)
	p.await(t, "the reason", func() bool { return strings.Contains(p.awaitState(t, exitWaiting), "enable-key") })
	if mountedOn(t, s.mount) {
		t.Errorf("mounted without a key; status:\n%s", table)
	}
	for path, want := range map[string]int{"/livez": 200, "/readyz": 503, "/startupz": 503} {
		if code, _ := p.probe(t, path); code != want {
			t.Errorf("%s: %d while waiting, want %d", path, code, want)
		}
	}
	if err := s.kms.Enable(s.arn); err != nil {
		t.Fatal(err)
	}
	p.awaitState(t, exitOK)
	if got, err := os.ReadFile(filepath.Join(s.mount, "a")); string(got) != "acknowledged" {
		t.Errorf("read %q, %v", got, err)
	}
	p.signal(t, unix.SIGINT)
	p.awaitEnd(t, exitOK)
	if mountedOn(t, s.mount) {
		t.Error("it is still mounted")
	}
}

// A policy that lets byokd ask for its key but make no data key is named as the cause, with what to do about it.
func TestStartWithoutGenerateDataKey(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	must(t, s.kms.Deny(s.arn, "GenerateDataKey", kmstest.TenantRole))
	p := s.start(t)
	table := ""
	p.await(t, "the cause", func() bool {
		table = p.awaitState(t, exitWaiting)
		return strings.Contains(table, "kms:GenerateDataKey is refused")
	})
	if !strings.HasPrefix(table, "The orchestration disk is not ready\n") || !strings.Contains(table, "\nNext step: Allow byokd's role") || !strings.Contains(table, "put-key-policy --key-id "+s.arn) {
		t.Errorf("status says:\n%s", table)
	}
	if code, body := p.probe(t, "/readyz"); code != 503 || !strings.Contains(body, "kms:GenerateDataKey is refused") {
		t.Errorf("readyz %d %s", code, body)
	}
	must(t, s.kms.Allow(s.arn, "GenerateDataKey", kmstest.TenantRole))
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// Volume and bucket under keys of their own: losing one does not touch the other, and is not hidden by it.
func TestTwoKeysFreezeApart(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	second, err := s.kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	audit := filepath.Join(filepath.Dir(s.config), "audit.jsonl")
	s.configure(t, map[string]string{
		"probeInterval: 100ms}}": fmt.Sprintf("probeInterval: 100ms}, second: {arn: %q, endpoint: %q, probeInterval: 100ms}}", second, s.endpoint),
		"mount: ":                "key: primary, mount: ",
		"documents: {upstream: ": "documents: {key: second, upstream: ",
		"stopTimeout: 30s":       fmt.Sprintf("audit: {file: %q}", audit),
	})
	p := s.start(t)
	p.awaitState(t, exitOK)
	if err := s.kms.Disable(second); err != nil {
		t.Fatal(err)
	}
	table := p.awaitState(t, exitFrozen)
	for _, want := range []string{"External encryption key is not ready", second, "orchestration disk  ready ", "documents           frozen"} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in:\n%s", want, table)
		}
	}
	if err := os.WriteFile(filepath.Join(s.mount, "a"), []byte("x"), 0o600); err != nil {
		t.Errorf("the volume under the other key: %v", err)
	}
	if code, body := p.probe(t, "/readyz"); code != 503 || !strings.Contains(body, second) {
		t.Errorf("readyz: %d %s", code, body)
	}
	if err := s.kms.Enable(second); err != nil {
		t.Fatal(err)
	}
	p.awaitState(t, exitOK)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	checkAudit(t, audit, second)
}

// checkAudit expects the freeze and the thaw of one key in a file for nobody else's eyes.
func checkAudit(t *testing.T, name, arn string) {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		var r struct{ Event, KeyArn, RequestID string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if r.KeyArn == arn {
			seen[r.Event] = true
			if r.Event == "refusal" && r.RequestID == "" {
				t.Error("a refusal without its KMS request id")
			}
		}
	}
	for _, event := range []string{"refusal", "freeze", "erase", "thaw", "stop"} {
		if !seen[event] {
			t.Errorf("no %s in the audit file:\n%s", event, text)
		}
	}
}

func TestStopWhileWaiting(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	p := s.start(t)
	p.awaitState(t, exitWaiting)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	if entries, err := os.ReadDir(s.lower); err != nil || len(entries) != 0 {
		t.Errorf("the lower directory holds %v, %v", entries, err)
	}
}

// Of two byokds that start on one empty directory while the key is away, one makes the volume. The other is refused
// at once: were it to make one, too, its header would replace the key under which the files of the first are sealed.
func TestTwoStartOnOneDirectory(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	must(t, s.kms.Disable(s.arn))
	p := s.start(t)
	p.await(t, "the first to make a volume", func() bool { return strings.Contains(p.awaitState(t, exitWaiting), "to make a new volume") })
	other := *s
	other.mount, other.config = s.mount+"-2", s.config+"-2"
	must(t, os.Mkdir(other.mount, 0o755))
	other.configure(t, nil)
	other.start(t).awaitEnd(t, exitLower)
	must(t, s.kms.Enable(s.arn))
	p.awaitState(t, exitOK)
	must(t, os.WriteFile(filepath.Join(s.mount, "a"), []byte("acknowledged"), 0o600))
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	p = s.start(t)
	p.awaitState(t, exitOK)
	if got, err := os.ReadFile(filepath.Join(s.mount, "a")); err != nil || string(got) != "acknowledged" {
		t.Errorf("read %q, %v", got, err)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

func TestDeadMountIsClearedAway(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	for _, pid := range p.children(t) { // the sentinel dies too, as when a machine's memory runs out
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	p.signal(t, unix.SIGKILL)
	<-p.ended
	var unused unix.Statfs_t
	if err := unix.Statfs(s.mount, &unused); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("the mount of a killed daemon: %v, want ENOTCONN", err)
	}
	p = s.start(t)
	p.awaitState(t, exitOK)
	if !strings.Contains(p.text(), "a dead mount of a killed byokd is cleared away") {
		t.Error("it does not say that it cleared a mount away")
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// children returns the processes that the daemon has started.
func (p *process) children(t *testing.T) []int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for _, word := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(word)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		t.Fatal("the daemon has started no sentinel")
	}
	return pids
}

// TestSentinelEndsTheMount: nothing is left mounted after a kill -9, and the sentinel goes too.
func TestSentinelEndsTheMount(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	sentinels := p.children(t)
	p.signal(t, unix.SIGKILL)
	<-p.ended
	gone := func() bool {
		for _, pid := range sentinels {
			if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
				return false // a zombie waits for init, which is not our concern
			}
		}
		return fuseDeviceAt(s.mount) == ""
	}
	for deadline := time.Now().Add(20 * time.Second); !gone(); {
		if time.Now().After(deadline) {
			t.Fatal("the mount or its sentinel is left behind")
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}

func TestForeignUnmountEndsTheDaemon(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	p := s.start(t)
	p.awaitState(t, exitOK)
	if err := unix.Unmount(s.mount, 0); err != nil {
		t.Fatal(err)
	}
	p.awaitEnd(t, exitMount)
}

// An upload under way keeps the stop waiting; the second signal does not wait for it. One that follows on
// the heels of the first is not meant so: timeout(1) signals a process and then its group.
func TestSecondSignalForces(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	up := s3test.New("sealed-documents")
	t.Cleanup(up.Close)
	s.configure(t, map[string]string{"stopTimeout: 30s": "stopTimeout: 1h", "http://127.0.0.1:9": up.URL()})
	p := s.start(t)
	p.awaitState(t, exitOK)
	_, endpoint := p.addresses()
	client := s3.New(s3.Options{BaseEndpoint: aws.String(endpoint), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("id", "secret", "")})
	signed, err := s3.NewPresignClient(client).PresignPutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("documents"), Key: aws.String("k")})
	must(t, err)
	body, sender := io.Pipe()
	defer sender.Close()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, signed.URL, body)
	must(t, err)
	request.ContentLength = 1 << 30
	asked := make(chan error, 1)
	go func() {
		answer, err := http.DefaultClient.Do(request)
		if err == nil {
			answer.Body.Close()
		}
		asked <- err
	}()
	if _, err := sender.Write(make([]byte, 32<<20)); err != nil { // more than sockets hold: byokd reads it
		t.Fatal(err)
	}
	p.signal(t, unix.SIGTERM)
	p.await(t, "the stop to begin", func() bool { return strings.Contains(p.text(), `"stopping"`) })
	stopping := time.Now()
	p.signal(t, unix.SIGTERM)
	p.await(t, "the same signal to be taken for the first", func() bool { return strings.Contains(p.text(), "stopping already") })
	p.await(t, "the time of one signal to be over", func() bool { return time.Since(stopping) > oneSignal })
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitForced)
	sender.Close() // the client's transport waits for its body
	if text := p.text(); !strings.Contains(text, "no volume was mounted any more") || strings.Contains(text, "everything flushed") {
		t.Errorf("it says:\n%s", text)
	}
	if err := <-asked; err == nil {
		t.Error("the upload was answered")
	}
	if mountedOn(t, s.mount) {
		t.Error("it is still mounted")
	}
}
