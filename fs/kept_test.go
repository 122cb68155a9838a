package fs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/keeper"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A mount that outlives who serves it: the worker is this test binary, told by its
// environment what to do, and the keeper runs in the test.

const keptVariable = "BYOKD_FS_WORKER" // the directory of a kept volume

// fileKMS is a KMS key that processes share: what it has wrapped lies in a
// directory, and a file there disables it. It protects nothing.
type fileKMS struct{ dir string }

func (k fileKMS) may(op string) error {
	if _, err := os.Stat(k.dir + "/disabled"); err == nil {
		return &keyguard.KMSError{Op: op, State: keyguard.Disabled, Reason: keyguard.ReasonKeyDisabled, Err: errors.New("disabled")}
	}
	return nil
}

func (k fileKMS) ARN() string { return testARN }

func (k fileKMS) GenerateProbe(context.Context, keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	return []byte("probe"), keyguard.Receipt{}, k.may("GenerateDataKeyWithoutPlaintext")
}

func (k fileKMS) Probe(context.Context, []byte, keyguard.Binding) (keyguard.Receipt, error) {
	return keyguard.Receipt{KeyARN: testARN}, k.may("Decrypt")
}

func (k fileKMS) GenerateDataKey(_ context.Context, _ keyguard.Binding, use func([]byte) error) ([]byte, keyguard.Receipt, error) {
	if err := k.may("GenerateDataKey"); err != nil {
		return nil, keyguard.Receipt{}, err
	}
	key, wrapped := make([]byte, 32), make([]byte, 16)
	rand.Read(key)
	rand.Read(wrapped)
	if err := os.WriteFile(k.dir+"/"+hex.EncodeToString(wrapped), key, 0o600); err != nil {
		return nil, keyguard.Receipt{}, err
	}
	var err error
	seal.Do(func() { err = use(bytes.Clone(key)) })
	return wrapped, keyguard.Receipt{KeyARN: testARN}, err
}

func (k fileKMS) Unwrap(_ context.Context, wrapped []byte, _ keyguard.Binding, use func([]byte) error) (keyguard.Receipt, error) {
	if err := k.may("Decrypt"); err != nil {
		return keyguard.Receipt{}, err
	}
	key, err := os.ReadFile(k.dir + "/" + hex.EncodeToString(wrapped))
	if err != nil {
		return keyguard.Receipt{}, err
	}
	seal.Do(func() { err = use(key) })
	return keyguard.Receipt{KeyARN: testARN}, err
}

func (k fileKMS) Describe(context.Context) (keyguard.Description, error) {
	if k.may("") != nil {
		return keyguard.Description{State: keyguard.Disabled, Reason: keyguard.ReasonKeyDisabled, Raw: "Disabled"}, nil
	}
	return keyguard.Description{State: keyguard.Enabled, Raw: "Enabled"}, nil
}

// serveKept is the worker: it serves the volume in dir until SIGTERM.
func serveKept(dir string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	w, _, err := keeper.Connect(os.Environ())
	if err != nil || w == nil {
		return fail(fmt.Errorf("no keeper: %w", err))
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM)
	if err := w.Ready(); err != nil {
		return fail(err)
	}
	log, err := zap.NewDevelopment(zap.IncreaseLevel(zap.WarnLevel))
	if err != nil {
		return fail(err)
	}
	guard, err := keyguard.New(fileKMS{dir + "/kms"}, keyguard.Options{Name: "test", ProbeBinding: testBinding, ProbeInterval: 100 * time.Millisecond, Logger: log})
	if err != nil {
		return fail(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { _ = guard.Run(ctx) }()
	o := Options{Logger: log, Keep: &Keep{Device: w.Take("device"), Journal: w.Take("journal"),
		Hold: w.Hold, Release: func(n uint64) { _ = w.Release(n) }, Held: w.Held, Faulted: w.Cause == keeper.Fault,
		Deposit: func(device, journal int) error {
			return errors.Join(w.Deposit("device", device), w.Deposit("journal", journal))
		}}}
	if text := os.Getenv(keptVariable + "_STALLS"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return fail(err)
		}
		generation := uint64(0)
		for _, n := range w.Restarts {
			generation += n
		}
		o.Keep.stall = stalls(seed, generation)
	}
	if os.Getenv(keptVariable+"_DIES") != "" { // having done what it was asked to, before it can say so
		o.Keep.stall = func(at step) {
			if at == stepDone && os.Remove(dir+"/die") == nil {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
				select {} // until it has
			}
		}
	}
	o.Keep.forgetful = os.Getenv(keptVariable+"_FORGETFUL") != ""
	if os.Getenv(keptVariable+"_CACHE") == Writethrough.String() {
		o.Cache = Writethrough
	}
	f, err := OpenLocked(dir+"/lower", guard, o)
	if err != nil {
		return fail(err)
	}
	if os.Getenv(keptVariable+"_CRASHES") != "" {
		f.nodes.fault = func(op string, length int) (int, error) {
			if op == "fallocate" {
				_ = unix.Kill(os.Getpid(), unix.SIGABRT)
				select {} // until it has
			}
			return length, nil
		}
	}
	if os.Getenv(keptVariable+"_FAILS") != "" {
		f.nodes.fault = faultFunc("sync", func() error {
			if _, err := os.Stat(dir + "/fail"); err == nil {
				return unix.EIO
			}
			return nil
		})
	}
	if !o.Keep.resumes() {
		if err := f.Unlock(ctx, testBinding); err != nil {
			return fail(err)
		}
	}
	if err := f.Mount(dir + "/mount"); err != nil {
		_ = w.Farewell(1)
		return fail(err)
	}
	if err := w.Serving(); err != nil {
		return fail(err)
	}
	if o.Keep.resumes() {
		go func() {
			if err := f.Unlock(ctx, testBinding); err != nil {
				fail(err)
			}
		}()
	}
	<-signals
	limit, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := errors.Join(f.Unmount(limit), f.Close()); err != nil {
		_ = w.Farewell(1)
		return fail(err)
	}
	_ = w.Farewell(0)
	return 0
}

// keepKept is the keeper. It is no part of the test's process: a child begins with
// copies of its parent's descriptors, and to close those of files on the mount waits
// for the worker that the child is to become.
func keepKept() int {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGHUP)
	if os.Getenv(keptVariable+"_UNABLE") != "" { // the worker's capabilities are those that its parent's thread may pass on
		runtime.LockOSThread()
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_DAC_READ_SEARCH, 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "keeper:", err)
			return 1
		}
	}
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, keptVariable+"_KEEPER=") })
	code, err := keeper.Run(keeper.Options{Program: "/proc/self/exe", Args: []string{"fs.test"}, Env: env,
		Files: [3]*os.File{nil, os.Stderr, os.Stderr}, Signals: signals, Log: zap.NewNop(),
		Started: func(pid int) { fmt.Println(pid) }})
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
		return 1
	}
	return code
}

// keptVolume is a volume under test whose worker may be killed.
type keptVolume struct {
	t      testing.TB
	dir    string
	keeper *exec.Cmd
	pid    atomic.Int64 // of the present worker
	count  atomic.Int64 // of workers so far
	said   lockedBuffer // standard error of keeper and workers
	ended  chan error
}

// lockedBuffer collects what processes say.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func newKeptVolume(t testing.TB, env ...string) *keptVolume {
	t.Helper()
	return newKeptVolumeIn(t, t.TempDir(), env...)
}

func newKeptVolumeIn(t testing.TB, dir string, env ...string) *keptVolume {
	t.Helper()
	requireFUSE(t)
	k := &keptVolume{t: t, dir: dir, ended: make(chan error, 1)}
	for _, d := range []string{"lower", "mount", "kms"} {
		if err := os.Mkdir(filepath.Join(k.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k.create()
	k.keeper = exec.Command("/proc/self/exe")
	k.keeper.Env = append(append(os.Environ(), keptVariable+"="+k.dir, keptVariable+"_KEEPER=1"), env...)
	k.keeper.Stderr = &k.said
	k.keeper.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := k.keeper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.keeper.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if pid, err := strconv.Atoi(lines.Text()); err == nil {
				k.pid.Store(int64(pid))
				k.count.Add(1)
			}
		}
		k.ended <- k.keeper.Wait()
	}()
	t.Cleanup(k.close)
	k.awaitMount()
	return k
}

// create makes the volume.
func (k *keptVolume) create() {
	k.t.Helper()
	guard, err := keyguard.New(fileKMS{k.dir + "/kms"}, keyguard.Options{Name: "test", ProbeBinding: testBinding})
	if err != nil {
		k.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan struct{})
	go func() { defer close(ended); _ = guard.Run(ctx) }()
	if _, err := CreateVolume(ctx, k.dir+"/lower", guard, testBinding, ownershipUnderTest()); err != nil {
		k.t.Fatal(err)
	}
	stop()
	<-ended
}

func (k *keptVolume) awaitMount() {
	k.t.Helper()
	await(k.t, func() string { return "the worker does not mount" }, func() bool {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			k.t.Fatal(err)
		}
		return strings.Contains(string(mounts), " "+k.dir+"/mount fuse.byokd ")
	})
	var st unix.Statfs_t
	if err := unix.Statfs(k.dir+"/mount", &st); err != nil {
		k.t.Fatal(err)
	}
}

// kill kills the worker and returns when the keeper has started another.
func (k *keptVolume) kill(s syscall.Signal) {
	k.t.Helper()
	before := k.count.Load()
	if err := unix.Kill(int(k.pid.Load()), s); err != nil {
		k.t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for k.count.Load() == before {
		if time.Now().After(deadline) {
			k.t.Fatal("no worker follows")
		}
		time.Sleep(100 * time.Microsecond) // the pace of looking, quicker than await's: figures begin where this ends
	}
}

func (k *keptVolume) path(name string) string { return filepath.Join(k.dir, "mount", name) }

func (k *keptVolume) disable() {
	k.t.Helper()
	if err := os.WriteFile(k.dir+"/kms/disabled", nil, 0o600); err != nil {
		k.t.Fatal(err)
	}
}

func (k *keptVolume) enable() {
	k.t.Helper()
	if err := os.Remove(k.dir + "/kms/disabled"); err != nil {
		k.t.Fatal(err)
	}
}

func (k *keptVolume) close() {
	_ = k.keeper.Process.Signal(unix.SIGTERM)
	select {
	case err := <-k.ended:
		if err != nil {
			k.t.Errorf("the worker ended with %v", err)
		}
	case <-time.After(30 * time.Second):
		k.t.Error("the keeper does not stop")
		_ = k.keeper.Process.Kill() // and the worker with it
	}
	if err := unix.Unmount(k.dir+"/mount", unix.MNT_FORCE|unix.MNT_DETACH); err == nil {
		k.t.Error("a mount was left")
	}
	if k.t.Failed() {
		said := k.said.String()
		k.t.Logf("keeper and workers said:\n%s", said[max(0, len(said)-8000):])
	}
}
