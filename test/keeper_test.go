//go:build linux

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// alone has byokd be one process.
func alone(s *stack) { s.alone = true }

// workerPid is the process that has the keys and serves the mount.
func (s *stack) workerPid() int {
	s.t.Helper()
	if !s.keeper {
		return s.daemon.pid()
	}
	worker := 0
	s.await("a worker", s.daemon, func() bool {
		for _, pid := range children(s.t, s.daemon.pid()) {
			command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && bytes.Contains(command, []byte("\x00run\x00")) && alive(pid) {
				worker = pid
			}
		}
		return worker != 0
	})
	return worker
}

// children are the processes that one has started, whichever of its threads did.
func children(t *testing.T, pid int) (all []int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // gone with its thread
		for _, word := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, child)
		}
	}
	return all
}

// scanJournal looks for the needles in what the keeper holds in memory.
func (s *stack) scanJournal(n *needles, f *findings) {
	s.t.Helper()
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.daemon.pid()))
	if err != nil {
		s.t.Fatal(err)
	}
	journals := 0
	for _, path := range descriptors {
		if target, _ := os.Readlink(path); !strings.HasPrefix(target, "/memfd:byokd-journal") {
			continue
		}
		journals++
		file, err := os.Open(path)
		if err != nil {
			s.t.Fatal(err)
		}
		window := make([]byte, 1<<20)
		for at := int64(0); ; {
			from, err := unix.Seek(int(file.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				break
			}
			if err != nil {
				s.t.Fatal(err)
			}
			to, err := unix.Seek(int(file.Fd()), from, unix.SEEK_HOLE)
			if err != nil {
				s.t.Fatal(err)
			}
			n.scanRange(file, addressRange{uint64(from), uint64(to)}, window, "the journal", f)
			at = to
		}
		file.Close()
	}
	if journals != 1 {
		s.t.Errorf("the keeper holds %d journals", journals)
	}
}

// killWorker kills the worker, and returns how long it took until another served.
func (s *stack) killWorker(signal syscall.Signal) time.Duration {
	s.t.Helper()
	probe, pid := s.mount+"/"+s.canary, s.workerPid()
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		s.t.Fatal(err)
	}
	began := time.Now()
	if err := syscall.Kill(pid, signal); err != nil {
		s.t.Fatal(err)
	}
	s.await("the end of a worker", nil, func() bool { return !alive(pid) })
	// The kernel does not remember attributes, so it asks.
	if _, err := unix.Getxattr(probe, "user.none", nil); !errors.Is(err, unix.ENODATA) {
		s.t.Errorf("the first call after a kill: %v", err)
	}
	return time.Since(began)
}

// keeperKills is how many kills TestWorkerKilled makes; BYOKD_KILLS says otherwise.
func keeperKills(t *testing.T) int {
	if text := os.Getenv("BYOKD_KILLS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 12
}

// TestWorkerKilled kills the worker at random moments under the whole load on the
// mount, and under SQLite with synchronous=FULL: no call fails, nothing is lost.
func TestWorkerKilled(t *testing.T) {
	s := newStack(t, shipped)
	d := &sqlite{database: &database{s}, program: requireProgram(t, "sqlite3"), journal: "DELETE", file: s.mount + "/bank.db"}
	requireProgram(t, "stdbuf")
	d.setUp()
	if err := s.newClient("seed").put(t.Context(), "object", object{1, 10 << 20}); err != nil {
		t.Fatal(err)
	}
	d.ledgers = append(d.ledgers, d.ledger(0), d.ledger(1))
	l := load{workers: s.workers(slices.Concat(readers(), writers())...)}
	s.awaitProgress(l)
	var took []time.Duration
	for range keeperKills(t) {
		time.Sleep(rand.N(300 * time.Millisecond)) // the random moment
		took = append(took, s.killWorker(syscall.SIGKILL))
		l.assertUnharmed(t, "after a kill")
	}
	s.awaitProgress(l)
	d.awaitProgress(d.ledgers...)
	d.end(d.ledgers...)
	d.verify("after the kills")
	slices.Sort(took)
	t.Logf("%d kills; from the kill to the first reply p50 %v, max %v", len(took), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	_, text := s.get("/metrics")
	if want := fmt.Sprintf("byokd_worker_restarts_total{cause=\"killed\"} %d\n", len(took)); !strings.Contains(string(text), want) {
		t.Errorf("the series do not tell %q", want)
	}
	s.retire(l.workers)
	s.once(task{Role: "verify", Claims: claims(l.workers)})
	s.stopDaemon()
	s.assertSealed()
}

// TestWorkerKilledWhileFrozen kills the worker in every state of the gate, and when
// KMS cannot be asked. Callers wait for the key, whatever becomes of the worker; no
// key is in any memory meanwhile.
func TestWorkerKilledWhileFrozen(t *testing.T) {
	s := newStack(t, shipped)
	seed := s.newClient("seed")
	if err := seed.put(t.Context(), "object", object{1, 10 << 20}); err != nil {
		t.Fatal(err)
	}
	// Without the reader of what another writes: what was dirty when nobody was there for the drain stays with the kernel
	// until there is a key to seal it with (docs/THREAT_MODEL.md).
	clean := slices.DeleteFunc(readers(), func(role string) bool { return role == "beside" })
	l := load{workers: s.workers(slices.Concat(clean, writers())...)}
	s.awaitProgress(l)
	root, data := s.secrets()

	states := []struct {
		name string
		kill func()
	}{
		{"draining", func() {
			s.key(kmstest.KeyCommand{Do: "disable"})
			s.await("the drain", s.daemon, func() bool {
				r, ok := s.report()
				return ok && r.Keys[0].Gate != keyguard.Open
			})
			s.killOnly()
		}},
		{"frozen", func() {
			s.freezeUnder(l)
			s.killOnly()
		}},
		{"frozen while nobody is there", func() {
			s.killOnly()
			s.key(kmstest.KeyCommand{Do: "disable"})
		}},
		{"twice", func() {
			s.key(kmstest.KeyCommand{Do: "disable"})
			s.killOnly()
			s.killOnly()
		}},
	}
	for _, state := range states {
		state.kill()
		s.awaitKey(keyguard.Disabled)
		time.Sleep(freezeLimit + settle) // nothing can be waited for: nothing happens
		s.assertHangs(l, settle)
		if r, ok := s.report(); !ok || !strings.Contains(r.Cause, "All reads and writes of what is mounted wait") {
			t.Errorf("killed while %s, the status says: %s", state.name, r.Cause)
		}
		s.assertErased(root, data)
		s.key(kmstest.KeyCommand{Do: "enable"})
		if state.name == "frozen" { // thawing
			s.killOnly()
		}
		s.awaitProgress(l)
		t.Logf("killed while %s: went on", state.name)
	}

	s.cutOff()
	s.killOnly()
	time.Sleep(freezeLimit + settle)
	s.assertHangs(l, settle)
	s.reconnect()
	s.awaitProgress(l)
	s.retire(l.workers)
	s.once(task{Role: "verify", Claims: claims(l.workers)})
	s.stopDaemon()
	s.assertSealed()
}

// killOnly kills the worker and returns when there is another.
func (s *stack) killOnly() {
	s.t.Helper()
	pid := s.workerPid()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	s.await("another worker", s.daemon, func() bool { return s.workerPid() != pid })
}

// TestWorkerUpgraded replaces the worker under load, on SIGHUP, and refuses a binary
// that does not suit. S3 clients of every SDK's patience notice nothing either.
func TestWorkerUpgraded(t *testing.T) {
	s := newStack(t, shipped)
	l := load{workers: s.workers(slices.Concat(readers(), writers())...)}
	s.awaitProgress(l)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.patientClient(ctx) }()
	for range 3 {
		pid := s.workerPid()
		s.daemon.signal(syscall.SIGHUP)
		s.await("another worker", s.daemon, func() bool { return s.workerPid() != pid })
		s.awaitProgress(l)
	}
	s.awaitState(metrics.StateReady)
	_, text := s.get("/metrics")
	if want := "byokd_worker_restarts_total{cause=\"upgraded\"} 3\n"; !strings.Contains(string(text), want) {
		t.Errorf("the series do not tell %q", want)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	s.retire(l.workers)
	s.once(task{Role: "verify", Claims: claims(l.workers)})
	s.stopDaemon()
}

// patientClient puts and gets objects with the retries that the SDK has by itself.
func (s *stack) patientClient(ctx context.Context) error {
	options := s.s3Client().Options()
	options.Retryer = retry.NewStandard()
	client := s3.New(options)
	for i := 0; ctx.Err() == nil; i++ {
		key, body := aws.String(fmt.Sprint("patient-", i%4)), object{uint64(i), 200_000}.content(s.canary)
		_, err := client.PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String(bucketName), Key: key, Body: bytes.NewReader(body)})
		var got *s3.GetObjectOutput
		if err == nil {
			got, err = client.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucketName), Key: key})
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("a client that retries: %w", err)
		}
		text, err := io.ReadAll(got.Body)
		got.Body.Close()
		if err == nil && !bytes.Equal(text, body) { // a broken stream is told, and read again
			return errors.New("another object was read")
		}
	}
	return nil
}
