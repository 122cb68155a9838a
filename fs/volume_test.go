package fs

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"
)

// memoryKMS is a KMS key in memory that can be disabled. The real client over
// HTTP is tested in keyguard/awskms and in the whole-system tests.
type memoryKMS struct {
	mu       sync.Mutex
	disabled bool
	keys     map[string][]byte // by wrapped form and binding
}

const testARN = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000001"

func newMemoryKMS() *memoryKMS { return &memoryKMS{keys: map[string][]byte{}} }

func (m *memoryKMS) disable(off bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.disabled = off
}

func (m *memoryKMS) may(op string) error {
	if m.disabled {
		return &keyguard.KMSError{Op: op, State: keyguard.Disabled, Reason: keyguard.ReasonKeyDisabled, Err: errors.New("disabled")}
	}
	return nil
}

func (m *memoryKMS) ARN() string { return testARN }

func (m *memoryKMS) GenerateProbe(context.Context, keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return []byte("probe"), keyguard.Receipt{}, m.may("GenerateDataKeyWithoutPlaintext")
}

func (m *memoryKMS) Probe(context.Context, []byte, keyguard.Binding) (keyguard.Receipt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return keyguard.Receipt{KeyARN: testARN}, m.may("Decrypt")
}

func (m *memoryKMS) GenerateDataKey(_ context.Context, b keyguard.Binding, use func([]byte) error) ([]byte, keyguard.Receipt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.may("GenerateDataKey"); err != nil {
		return nil, keyguard.Receipt{}, err
	}
	key, wrapped := make([]byte, 32), make([]byte, 16)
	rand.Read(key)
	rand.Read(wrapped)
	m.keys[string(wrapped)+b.Resource] = key
	var err error
	seal.Do(func() { err = use(bytes.Clone(key)) })
	return wrapped, keyguard.Receipt{KeyARN: testARN}, err
}

func (m *memoryKMS) Unwrap(_ context.Context, wrapped []byte, b keyguard.Binding, use func([]byte) error) (keyguard.Receipt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.may("Decrypt"); err != nil {
		return keyguard.Receipt{}, err
	}
	key, ok := m.keys[string(wrapped)+b.Resource]
	if !ok {
		return keyguard.Receipt{}, &keyguard.KMSError{Op: "Decrypt", State: keyguard.Misconfigured, Reason: keyguard.ReasonInvalidCiphertext, Err: errors.New("invalid ciphertext")}
	}
	var err error
	seal.Do(func() { err = use(bytes.Clone(key)) })
	return keyguard.Receipt{KeyARN: testARN}, err
}

func (m *memoryKMS) Describe(context.Context) (keyguard.Description, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.disabled {
		return keyguard.Description{State: keyguard.Disabled, Reason: keyguard.ReasonKeyDisabled, Raw: "Disabled"}, nil
	}
	return keyguard.Description{State: keyguard.Enabled, Raw: "Enabled"}, nil
}

// volume is a volume under test.
type volume struct {
	t      testing.TB
	kms    *memoryKMS
	guard  *keyguard.Guard
	lower  string
	mount  string
	fs     *Filesystem
	stop   context.CancelFunc
	ended  chan struct{}
	option Options

	ownership Ownership
}

var testBinding = keyguard.Binding{Cluster: "test", Resource: "volume"}

// requireFUSE skips on a machine without FUSE, and fails where the machine is
// said to have it.
func requireFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil && os.Geteuid() == 0 {
		f.Close()
		return
	}
	lacks(t, "root and /dev/fuse: %v", err)
}

// lacks skips a test for what the machine has not, and fails it where the machine
// is said to have all that FUSE tests use.
func lacks(t testing.TB, format string, args ...any) {
	t.Helper()
	if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "fuse") {
		t.Fatalf("BYOKD_REQUIRE names fuse, but this is missing: "+format, args...)
	}
	t.Skipf("needs "+format, args...)
}

// CreateVolume makes a volume in an empty directory.
func CreateVolume(ctx context.Context, lower string, g *keyguard.Guard, b keyguard.Binding, o Ownership) (header seal.VolumeHeader, err error) {
	f, err := OpenLocked(lower, g, Options{})
	if err != nil {
		return header, err
	}
	header, err = f.Create(ctx, b, o)
	return header, errors.Join(err, f.Close())
}

// Open opens a volume.
func Open(ctx context.Context, lower string, g *keyguard.Guard, o Options, b keyguard.Binding) (*Filesystem, error) {
	f, err := OpenLocked(lower, g, o)
	if err != nil {
		return nil, err
	}
	if err := f.Unlock(ctx, b); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// newVolume starts a guard and mounts a fresh volume.
func newVolume(t testing.TB, o Options) *volume {
	t.Helper()
	requireFUSE(t)
	return newVolumeIn(t, t.TempDir(), o)
}

func newVolumeIn(t testing.TB, dir string, o Options) *volume {
	t.Helper()
	v := &volume{t: t, kms: newMemoryKMS(), lower: filepath.Join(dir, "lower"), mount: filepath.Join(dir, "mount"), option: o, ownership: ownershipUnderTest()}
	for _, d := range []string{v.lower, v.mount} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	v.start()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := CreateVolume(ctx, v.lower, v.guard, testBinding, v.ownership); err != nil {
		t.Fatal(err)
	}
	v.open()
	t.Cleanup(v.close)
	return v
}

// start runs a guard.
func (v *volume) start() {
	v.t.Helper()
	log := zaptest.NewLogger(v.t, zaptest.Level(zap.ErrorLevel))
	guard, err := keyguard.New(v.kms, keyguard.Options{Name: "test", ProbeBinding: testBinding, ProbeInterval: 100 * time.Millisecond, Logger: log})
	if err != nil {
		v.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	v.guard, v.stop, v.ended = guard, stop, make(chan struct{})
	go func() {
		defer close(v.ended)
		_ = guard.Run(ctx)
	}()
	v.option.Logger = log
	if os.Getenv(journalVariable) != "" {
		v.option.Keep = &Keep{Device: -1, Journal: -1, Deposit: func(int, int) error { return nil },
			Hold: func(uint64, int) error { return nil }, Release: func(uint64) {}}
	}
}

// journalVariable has every volume under test keep a journal, though nobody will
// ever go on with it.
const journalVariable = "BYOKD_TEST_JOURNAL"

// ownershipVariable has every volume under test made with that ownership.
const ownershipVariable = "BYOKD_TEST_OWNERSHIP"

func ownershipUnderTest() Ownership {
	if os.Getenv(ownershipVariable) == OwnershipSealed.String() {
		return OwnershipSealed
	}
	return OwnershipLower
}

// open mounts the volume.
func (v *volume) open() {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	f, err := Open(ctx, v.lower, v.guard, v.option, testBinding)
	if err != nil {
		v.t.Fatal(err)
	}
	if err := f.Mount(v.mount); err != nil {
		v.t.Fatal(err)
	}
	v.fs = f
	v.settlePoll()
}

// settlePoll lets the kernel learn that we do not serve POLL. Go's runtime asks
// it of each file it opens, with a system call during which the goroutine keeps
// its processor; a process that serves the mount it uses, as tests do, would
// stop for want of processors. go-fuse answers this name for the purpose.
func (v *volume) settlePoll() {
	fd, err := unix.Open(v.path(".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	defer unix.Close(fd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
}

func (v *volume) unmountOnly() {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := v.fs.Unmount(ctx); err != nil {
		v.t.Errorf("unmount: %v", err)
	}
}

func (v *volume) unmount() {
	v.t.Helper()
	v.unmountOnly()
	if err := v.fs.Close(); err != nil {
		v.t.Errorf("close: %v", err)
	}
	v.fs = nil
}

// remount unmounts and mounts again, so that nothing is answered from memory.
func (v *volume) remount() {
	v.t.Helper()
	v.unmount()
	v.open()
}

func (v *volume) close() {
	if v.fs != nil {
		v.unmount()
	}
	v.stop()
	<-v.ended
}

func (v *volume) path(name string) string { return filepath.Join(v.mount, name) }

// freeze disables the key and waits until the guard has erased it.
func (v *volume) freeze() {
	v.t.Helper()
	v.kms.disable(true)
	v.await("freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen && s.Erased })
}

func (v *volume) thaw() {
	v.t.Helper()
	v.kms.disable(false)
	v.await("thaw", func(s keyguard.Status) bool { return s.Gate == keyguard.Open })
}

func (v *volume) await(what string, ok func(keyguard.Status) bool) {
	v.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := v.guard.Changed()
		if ok(v.guard.Status()) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			v.t.Fatalf("%s: the guard stays %+v", what, v.guard.Status())
		}
	}
}
