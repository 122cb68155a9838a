package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/control"
)

// loopDisk mounts an ext4 disk made of a file at dir, until the test ends. The file holds what is on the
// disk, and nothing that is only in the page cache above it.
func loopDisk(t *testing.T, image, dir string) {
	t.Helper()
	out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput()
	if err != nil {
		if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
			t.Fatalf("no loop device: %v: %s", err, out)
		}
		t.Skipf("no loop device: %v: %s", err, out)
	}
	t.Cleanup(func() { unmountDisk(t, dir) })
}

func unmountDisk(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil && err != unix.EINVAL {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

func newImage(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(96 << 20)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
}

// TestQuiesce: a copy of the disk taken after `freeze --quiesce` holds every write that had returned before,
// synced or not, stored through a mapping or not, while others go on writing.
func TestQuiesce(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	dir := t.TempDir()
	image, snapshot := filepath.Join(dir, "disk"), filepath.Join(dir, "snapshot")
	newImage(t, image)
	loopDisk(t, image, s.lower)
	if err := os.Chmod(s.lower, 0o700); err != nil {
		t.Fatal(err)
	}
	socket, _ := s.withSocket(t, nil)
	p := s.start(t)
	p.awaitState(t, exitOK)

	want := map[string][]byte{}
	for i := range 200 {
		name := fmt.Sprintf("small-%d", i)
		want[name] = bytes.Repeat([]byte{byte(i)}, 100+37*i)
		if err := os.WriteFile(filepath.Join(s.mount, name), want[name], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want["mapped"] = storeThroughMapping(t, filepath.Join(s.mount, "mapped"))
	acknowledged, stopWriter := appendOn(t, filepath.Join(s.mount, "log"))
	p.await(t, "the writer to be under way", func() bool { return acknowledged.Load() > 1000 })

	before := acknowledged.Load()
	code, out, errs := byokd(t, nil, "freeze", "--quiesce", "--socket", socket)
	if code != exitOK || !strings.Contains(out, "the snapshot may be taken") {
		t.Fatalf("%d %s %s", code, out, errs)
	}
	copyDisk(t, image, snapshot)
	if code, _, errs := byokd(t, nil, "thaw", "--socket", socket); code != exitOK {
		t.Fatal(errs)
	}
	now := acknowledged.Load()
	p.await(t, "the writer to go on", func() bool { return acknowledged.Load() > now })
	stopWriter()
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
	unmountDisk(t, s.lower)

	loopDisk(t, snapshot, s.lower)
	p = s.start(t)
	p.awaitState(t, exitOK)
	for name, data := range want {
		if got, err := os.ReadFile(filepath.Join(s.mount, name)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s in the snapshot: %d bytes of %d, %v", name, len(got), len(data), err)
		}
	}
	checkLog(t, filepath.Join(s.mount, "log"), before)
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// storeThroughMapping dirties pages that no write call announces.
func storeThroughMapping(t *testing.T, path string) []byte {
	t.Helper()
	content := bytes.Repeat([]byte("mapped.."), 64<<10)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	pages, err := unix.Mmap(int(f.Fd()), 0, len(content), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	copy(pages, content)
	if err := unix.Munmap(pages); err != nil {
		t.Fatal(err)
	}
	return content
}

const logLine = "%09d\n"

// appendOn appends numbered lines, never synced, and counts those whose write has returned.
func appendOn(t *testing.T, path string) (acknowledged *atomic.Int64, stop func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	acknowledged = new(atomic.Int64)
	var stopped atomic.Bool
	ended := make(chan error, 1)
	go func() {
		for n := int64(0); !stopped.Load(); n++ {
			if _, err := fmt.Fprintf(f, logLine, n); err != nil {
				ended <- err
				return
			}
			acknowledged.Store(n + 1)
		}
		ended <- f.Close()
	}()
	return acknowledged, func() {
		stopped.Store(true)
		if err := <-ended; err != nil {
			t.Errorf("the writer: %v", err)
		}
	}
}

// checkLog expects whole lines in order, at least as many as were acknowledged.
func checkLog(t *testing.T, path string, atLeast int64) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := int64(len(text)) / 10
	if lines < atLeast || int64(len(text))%10 != 0 {
		t.Errorf("%d bytes in the snapshot, %d lines were acknowledged", len(text), atLeast)
	}
	for n := range lines {
		if got := string(text[10*n : 10*n+10]); got != fmt.Sprintf(logLine, n) {
			t.Fatalf("line %d is %q", n, got)
		}
	}
}

// copyDisk copies what the disk holds.
func copyDisk(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestQuiesceOfAnotherKey: a freeze that leaves the volume out says nothing of its disk, and freezes nothing.
func TestQuiesceOfAnotherKey(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	second, err := s.kms.CreateKey("", "", "", false)
	must(t, err)
	socket, _ := s.withSocket(t, map[string]string{
		"probeInterval: 100ms}}": fmt.Sprintf("probeInterval: 100ms}, second: {arn: %q, endpoint: %q, probeInterval: 100ms}}", second, s.endpoint),
		"mount: ":                "key: primary, mount: ", "documents: {upstream: ": "documents: {key: second, upstream: ",
	})
	p := s.start(t)
	p.awaitState(t, exitOK)
	code, out, errs := byokd(t, nil, "freeze", "--quiesce", "--key", "second", "--socket", socket)
	if code != exitUsage || strings.Contains(out, "snapshot") || !strings.Contains(errs, "--key primary") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	p.awaitState(t, exitOK)
	if code, out, errs := byokd(t, nil, "freeze", "--quiesce", "--key", "second", "--key", "primary", "--socket", socket); code != exitOK || !strings.Contains(out, "the snapshot may be taken") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}

// TestQuiesceWhileTakingOver: a worker that waits for its key to go on with the mount of the one before cannot tell what
// the kernel holds of it, and does not call the disk consistent.
func TestQuiesceWhileTakingOver(t *testing.T) {
	needMounts(t)
	s := newSite(t)
	socket, _ := s.withSocket(t, map[string]string{"mount: ": "keeper: on, mount: "})
	p := s.start(t)
	p.awaitState(t, exitOK)
	worker := func() (r workerReport) {
		text, err := control.NewClient(socket).Call(t.Context(), "worker", nil, func(json.RawMessage) {})
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err != nil {
			return workerReport{}
		}
		return r
	}
	must(t, os.WriteFile(filepath.Join(s.mount, "a"), []byte("acknowledged"), 0o600))
	must(t, s.kms.Disable(s.arn))
	p.await(t, "the gate to be closed", func() bool { return strings.Contains(p.awaitState(t, exitFrozen), "Frozen") })
	killed := worker().PID
	must(t, unix.Kill(killed, unix.SIGKILL))
	p.await(t, "another worker", func() bool { pid := worker().PID; return pid != 0 && pid != killed })
	code, out, errs := byokd(t, nil, "freeze", "--quiesce", "--socket", socket)
	if code != exitFailure || strings.Contains(out, "snapshot") || !strings.Contains(errs, "nothing is frozen on request") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	must(t, s.kms.Enable(s.arn))
	p.awaitState(t, exitOK)
	if code, out, errs := byokd(t, nil, "freeze", "--quiesce", "--socket", socket); code != exitOK || !strings.Contains(out, "the snapshot may be taken") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}
