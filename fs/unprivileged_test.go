package fs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/handover"
	"github.com/byokd/byokd/keyguard"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// What an unprivileged byokd serves: a process of nobody, without any capability,
// with a mount that root passes to it, as in Kubernetes. Those who use the mount are
// of several users.

// unprivilegedVariable names, for the process that serves, the directory of all that
// it needs.
const unprivilegedVariable = "BYOKD_TEST_UNPRIVILEGED"

const (
	nobody  = 65534
	fsGroup = 2000
)

// serveUnprivileged makes the volume if need be, serves it until SIGTERM, and says on standard output what becomes of
// the gate.
func serveUnprivileged(dir string) int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM)
	err := func() error {
		log, err := zap.NewDevelopment(zap.IncreaseLevel(zap.WarnLevel))
		if err != nil {
			return err
		}
		guard, err := keyguard.New(fileKMS{dir + "/kms"}, keyguard.Options{Name: "test", ProbeBinding: testBinding, ProbeInterval: 100 * time.Millisecond, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		go func() { _ = guard.Run(ctx) }()
		o := Options{Logger: log}
		if os.Getenv(unprivilegedVariable+"_CACHE") == Writethrough.String() {
			o.Cache = Writethrough
		}
		f, err := OpenLocked(dir+"/lower", guard, o)
		if err != nil {
			return err
		}
		client, device, held, err := handover.Take(ctx, os.Getenv(unprivilegedVariable+"_SOCKET"), log, func(error) {})
		if err != nil {
			return err
		}
		if err := f.Serve(Passed{Device: device, Held: held, Services: client}); err != nil {
			return err
		}
		go client.Stay(ctx)
		go tellInherited(ctx, f)
		if _, err := ReadHeader(dir + "/lower"); errors.Is(err, ErrNotInitialised) {
			if _, err := f.Create(ctx, testBinding, OwnershipSealed); err != nil {
				return err
			}
		}
		if err := f.Unlock(ctx, testBinding); err != nil {
			return err
		}
		go tellGate(guard)
		<-signals
		limit, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		return errors.Join(f.Unmount(limit), f.Close())
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "unprivileged:", err)
		return 1
	}
	return 0
}

// tellGate prints a line each time the gate has opened or closed for good.
func tellGate(guard *keyguard.Guard) {
	for told := ""; ; {
		changed := guard.Changed()
		now := told
		switch s := guard.Status(); {
		case s.Gate == keyguard.Open:
			now = "open"
		case s.Gate == keyguard.Frozen && s.Erased:
			now = "frozen"
		}
		if now != told {
			fmt.Println(now)
			told = now
		}
		<-changed
	}
}

// tellInherited prints a line when nothing is left of what a predecessor has had the
// kernel cache.
func tellInherited(ctx context.Context, f *Filesystem) {
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for f.inherited.count() > 0 {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
	fmt.Println("nothing inherited")
}

// unprivileged is the test's side of it.
type unprivileged struct {
	t      *testing.T
	dir    string
	mount  string
	socket string
	cache  CacheMode
	cmd    *exec.Cmd
	lines  chan string
}

func newUnprivileged(t *testing.T, cache CacheMode) *unprivileged {
	t.Helper()
	requireFUSE(t)
	u := &unprivileged{t: t, dir: t.TempDir(), cache: cache}
	u.mount = filepath.Join(u.dir, "mount")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(filepath.Dir(u.dir), 0o755)) // the test's own, which is nobody's business otherwise
	for _, d := range []string{"lower", "mount", "kms"} {
		must(os.Mkdir(filepath.Join(u.dir, d), 0o755))
	}
	m := newMounter(t, u.mount)
	u.socket = m.socket
	must(os.Chmod(filepath.Dir(filepath.Dir(u.socket)), 0o755))
	must(os.Chmod(u.socket, 0o666))
	must(filepath.WalkDir(u.dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path == u.mount {
			return filepath.SkipDir // nobody serves it yet
		}
		return errors.Join(err, os.Chown(path, nobody, nobody))
	}))
	// As kubelet leaves a claim: root's, and writable by a group that the process is given.
	lower := filepath.Join(u.dir, "lower")
	must(errors.Join(os.Chown(lower, 0, fsGroup), os.Chmod(lower, 0o777|os.ModeSetgid)))
	u.start()
	t.Cleanup(u.stop)
	v := &volume{t: t, mount: u.mount}
	v.settlePoll()
	return u
}

func (u *unprivileged) start() {
	u.t.Helper()
	u.begin()
	u.await("open")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", u.cmd.Process.Pid))
	if err != nil || !strings.Contains(string(status), "\nCapPrm:\t0000000000000000\n") {
		u.t.Fatalf("it has capabilities, %v\n%s", err, status)
	}
}

// begin starts the process, and waits for nothing.
func (u *unprivileged) begin() {
	u.t.Helper()
	u.cmd = exec.Command("/proc/self/exe")
	u.cmd.Dir = u.dir
	u.cmd.Env = append(os.Environ(), unprivilegedVariable+"="+u.dir, unprivilegedVariable+"_SOCKET="+u.socket, unprivilegedVariable+"_CACHE="+u.cache.String())
	u.cmd.Stderr = os.Stderr
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{fsGroup}}}
	out, err := u.cmd.StdoutPipe()
	if err != nil {
		u.t.Fatal(err)
	}
	if err := u.cmd.Start(); err != nil {
		u.t.Fatal(err)
	}
	lines := make(chan string, 16)
	u.lines = lines
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
}

// await waits until the gate is so.
func (u *unprivileged) await(gate string) {
	u.t.Helper()
	limit := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-u.lines:
			if !ok {
				u.t.Fatalf("it ended before it was %s", gate)
			}
			if line == gate {
				return
			}
		case <-limit:
			u.t.Fatalf("it does not become %s", gate)
		}
	}
}

func (u *unprivileged) stop() {
	u.t.Helper()
	if err := u.cmd.Process.Signal(unix.SIGTERM); err != nil {
		u.t.Error(err)
	}
	if err := u.cmd.Wait(); err != nil {
		u.t.Error(err)
	}
}

// restart replaces the process: nothing is answered from its memory.
func (u *unprivileged) restart() {
	u.t.Helper()
	u.stop()
	u.start()
}

// kill ends the process at once.
func (u *unprivileged) kill() {
	u.t.Helper()
	if err := u.cmd.Process.Kill(); err != nil {
		u.t.Fatal(err)
	}
	_ = u.cmd.Wait() // that it was killed
}

// disable and enable are about the key.
func (u *unprivileged) disable() {
	u.t.Helper()
	if err := os.WriteFile(u.dir+"/kms/disabled", nil, 0o644); err != nil {
		u.t.Fatal(err)
	}
}

func (u *unprivileged) enable() {
	u.t.Helper()
	if err := os.Remove(u.dir + "/kms/disabled"); err != nil {
		u.t.Fatal(err)
	}
	u.await("open")
}

// syncFile leaves nothing dirty of a file.
func syncFile(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestPassedFreezeAfterKill: what the kernel has cached for a byokd that was killed is
// taken away by the next one, which was asked for nothing of it: by its freeze, and
// where the key was refused while nobody was there.
func TestPassedFreezeAfterKill(t *testing.T) {
	for when, freeze := range map[string]func(u *unprivileged){
		"freezes": func(u *unprivileged) {
			u.start()
			u.disable()
			u.await("frozen")
		},
		"never had the key": func(u *unprivileged) {
			u.disable()
			u.begin()
			u.await("nothing inherited")
		},
	} {
		t.Run(when, func(t *testing.T) {
			u := newUnprivileged(t, Writeback)
			var victims []*victim
			for _, op := range []string{"read", "load-shared", "load-private", "sendfile", "stat", "open", "readdir"} {
				file := filepath.Join(u.mount, "file-"+op)
				writePattern(t, file, 16*pageSize)
				syncFile(t, file) // what is dirty waits for the key, and stays
				victims = append(victims, newVictim(t, op, u.mount, file))
			}
			t.Cleanup(func() { _ = os.Remove(u.dir + "/kms/disabled") }) // or a test that fails hangs
			u.kill()
			freeze(u)
			for _, p := range victims {
				p.start()
			}
			for _, p := range victims {
				p.hangs()
			}
			u.enable()
			for _, p := range victims {
				p.finishes(10 * time.Second)
			}
		})
	}
}

// freeze and thaw it: nothing is answered from the kernel's memory.
func (u *unprivileged) freeze() {
	u.t.Helper()
	u.disable()
	u.await("frozen")
	u.enable()
}

// TestDifferentialUsers is the differential test with operations of several users
// over a byokd that has no privilege: what a plain directory refuses them, and what
// owner, group and mode it gives their files, is right.
//
// BYOKD_OPS and BYOKD_SEED are those of TestDifferential.
func TestDifferentialUsers(t *testing.T) {
	seed, ops := numberFrom(seedEnv, rand.Uint64()), numberFrom(opsEnv, 10_000)
	t.Logf("%s=%d %s=%d", seedEnv, seed, opsEnv, ops)
	t.Setenv(seedEnv, strconv.FormatUint(seed, 10))
	t.Setenv(opsEnv, strconv.FormatUint(ops, 10))
	t.Setenv(usersEnv, "1")
	for _, cache := range []CacheMode{Writeback, Writethrough} {
		t.Run(cache.String(), func(t *testing.T) {
			u := newUnprivileged(t, cache)
			plain := t.TempDir()
			if err := os.Chmod(filepath.Dir(plain), 0o755); err != nil {
				t.Fatal(err)
			}
			p := newVictim(t, "differential", u.mount, plain)
			p.start()
			freezes := 0
			freeze := time.NewTimer(freezeAfter())
			defer freeze.Stop()
			for {
				select {
				case line := <-p.lines:
					if line == "remount" {
						u.restart()
						if _, err := p.stdin.Write([]byte("\n")); err != nil {
							t.Fatal(err)
						}
						continue
					}
					if !strings.HasPrefix(line, "done ") {
						t.Fatalf("%s=%d: %q", seedEnv, seed, line)
					}
					t.Logf("%s operations, %d freezes", strings.TrimPrefix(line, "done "), freezes)
					u.onlyOurs()
					return
				case <-freeze.C:
					u.freeze()
					freezes++
					freeze.Reset(freezeAfter())
				}
			}
		})
	}
}

// onlyOurs looks at the lower files: all are nobody's, and none of another kind or
// mode than a volume with sealed ownership has.
func (u *unprivileged) onlyOurs() {
	u.t.Helper()
	lower := filepath.Join(u.dir, "lower")
	err := filepath.WalkDir(lower, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err = errors.Join(err, unix.Lstat(path, &st)); err != nil {
			return err
		}
		kind, mode := st.Mode&unix.S_IFMT, st.Mode&0o7777
		right := kind == unix.S_IFDIR && mode&^unix.S_ISGID == lowerDirMode || kind == unix.S_IFREG && mode&^lowerSpecial == lowerMode
		if path != lower && (!right || st.Uid != nobody || st.Gid != fsGroup) {
			u.t.Errorf("%s: mode %o of %d:%d", path, st.Mode, st.Uid, st.Gid)
		}
		return nil
	})
	if err != nil {
		u.t.Error(err)
	}
}
