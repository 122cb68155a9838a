package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/byokd/byokd/internal/fusemount"
	"github.com/byokd/byokd/internal/handover"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"
)

// mounter mounts for a volume under test and passes the device over a socket, as the
// node driver does.
type mounter struct {
	t      *testing.T
	server *handover.Server
	socket string
}

// newMounter mounts at dir. The mount is gone when the test ends.
func newMounter(t *testing.T, dir string) *mounter {
	t.Helper()
	dev, err := fusemount.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := fusemount.Mount(dev, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fusemount.End(dir); err != nil {
			t.Error(err)
		}
	})
	mount, found, err := fusemount.At(dir)
	if err != nil || !found {
		t.Fatalf("no mount at %s: %v", dir, err)
	}
	m := &mounter{t: t, server: handover.NewServer(dir, mount, dev), socket: filepath.Join(t.TempDir(), "mount.sock")}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: m.socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); m.server.Close() })
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() { _ = m.server.Serve(c) }() // a successor may be refused while its predecessor leaves
		}
	}()
	return m
}

// serve opens the volume locked and serves the mount.
func (v *volume) serve(m *mounter) (leave func()) {
	v.t.Helper()
	f, err := OpenLocked(v.lower, v.guard, v.option)
	if err != nil {
		v.t.Fatal(err)
	}
	client, device, held, err := handover.Take(v.t.Context(), m.socket, zaptest.NewLogger(v.t, zaptest.Level(zap.WarnLevel)), func(error) {})
	if err != nil {
		v.t.Fatal(err)
	}
	if err := f.Serve(Passed{Device: device, Held: held, Services: client}); err != nil {
		v.t.Fatal(err)
	}
	v.fs = f
	ctx, cancel := context.WithCancel(context.Background())
	stayed := make(chan struct{})
	go func() { defer close(stayed); client.Stay(ctx) }()
	return func() {
		v.t.Helper()
		v.unmount()
		cancel()
		<-stayed
	}
}

func (v *volume) unlock() {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := v.fs.Unlock(ctx, testBinding); err != nil {
		v.t.Fatal(err)
	}
}

// newPassedVolume makes a volume that is not served yet, and a mount for it.
func newPassedVolume(t *testing.T, o Options) (*volume, *mounter) {
	t.Helper()
	v := newVolume(t, o)
	v.unmount()
	return v, newMounter(t, v.mount)
}

// TestPassedBeforeTheKey: a passed mount answers for itself at once, and everything
// else waits for the key.
func TestPassedBeforeTheKey(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v, m := newPassedVolume(t, o)
		v.kms.disable(true)
		leave := v.serve(m)
		defer leave()
		var st unix.Statfs_t
		if err := unix.Statfs(v.mount, &st); err != nil || st.Bsize != block {
			t.Errorf("statfs: %v, blocks of %d", err, st.Bsize)
		}
		if info, err := os.Stat(v.mount); err != nil || !info.IsDir() {
			t.Errorf("stat of the root: %v, %v", info, err)
		}
		made := make(chan error, 1)
		go func() { made <- os.Mkdir(v.path("d"), 0o755) }() // not a file: see settlePoll
		await(t, func() string { return "nothing waits" }, func() bool { return v.fs.Stats().Parked > 0 })
		v.kms.disable(false)
		v.unlock()
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(v.path("d")); err != nil || !info.IsDir() {
			t.Errorf("%v, %v", info, err)
		}
	})
}

// TestPassedOver: one byokd after the other serves a mount that lives on; files stay
// open over it, also those without a name, and calls made meanwhile wait.
func TestPassedOver(t *testing.T) {
	for _, ids := range []string{"handles", "table"} {
		t.Run(ids, func(t *testing.T) {
			v, m := newPassedVolume(t, Options{tableOfIDs: ids == "table"})
			leave := v.serve(m)
			v.unlock()
			v.settlePoll()
			if err := os.MkdirAll(v.path("a/b"), 0o755); err != nil {
				t.Fatal(err)
			}
			named, nameless := v.create("a/b/named"), v.create("nameless")
			fd, err := unix.Open(v.mount, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			tmpfile := os.NewFile(uintptr(fd), "a file made without a name")
			want := bytes.Repeat([]byte("0123456789"), 1000)
			for _, f := range []*os.File{named, nameless, tmpfile} {
				if _, err := f.WriteAt(want, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Remove(v.path("nameless")); err != nil {
				t.Fatal(err)
			}
			dir, err := os.Open(v.path("a"))
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			for round := range 3 {
				leave()
				waits := make(chan error, 1)
				go func() { waits <- os.Mkdir(v.path(fmt.Sprint("while-away-", round)), 0o755) }()
				leave = v.serve(m)
				v.unlock()
				if err := <-waits; err != nil {
					t.Errorf("round %d: a call made while nobody served: %v", round, err)
				}
				for _, f := range []*os.File{named, nameless, tmpfile} {
					v.dropPages(f)
					got := make([]byte, len(want))
					if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
						t.Errorf("round %d: %s reads %v, as it was: %v", round, f.Name(), err, bytes.Equal(got, want))
					}
					if _, err := f.WriteAt(want, int64(round)); err != nil {
						t.Error(err)
					}
					if err := f.Sync(); err != nil {
						t.Errorf("round %d: fsync of %s: %v", round, f.Name(), err)
					}
					if _, err := f.WriteAt(want, 0); err != nil {
						t.Error(err)
					}
				}
				if names, err := dir.Readdirnames(1); err != nil || names[0] != "b" {
					t.Errorf("round %d: an open directory lists %v, %v", round, names, err)
				}
				if _, err := dir.Seek(0, 0); err != nil {
					t.Error(err)
				}
			}
			if err := errors.Join(named.Close(), nameless.Close(), tmpfile.Close()); err != nil {
				t.Error(err)
			}
			v.freeze()
			v.thaw()
			leave()
		})
	}
}

// TestPassedOverNamesGo: a file that somebody has open since before a byokd took over
// loses its name there, before anything else was asked of it. It stays, also over the
// next byokd.
func TestPassedOverNamesGo(t *testing.T) {
	for _, ids := range []string{"handles", "table"} {
		t.Run(ids, func(t *testing.T) {
			v, m := newPassedVolume(t, Options{tableOfIDs: ids == "table"})
			leave := v.serve(m)
			v.unlock()
			v.settlePoll()
			files := []*os.File{v.create("removed"), v.create("replaced")}
			v.create("other").Close()
			want := bytes.Repeat([]byte("0123456789"), 1000)
			for _, f := range files {
				if _, err := f.WriteAt(want, 0); err != nil {
					t.Fatal(err)
				}
				v.dropPages(f)
			}
			for round := range 3 {
				leave()
				leave = v.serve(m)
				v.unlock()
				if round == 0 {
					if err := errors.Join(os.Remove(v.path("removed")), os.Rename(v.path("other"), v.path("replaced"))); err != nil {
						t.Fatal(err)
					}
				}
				for _, f := range files {
					got := make([]byte, len(want))
					if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
						t.Errorf("round %d: %s reads %v, as it was: %v", round, f.Name(), err, bytes.Equal(got, want))
					}
					v.dropPages(f)
				}
			}
			if err := errors.Join(files[0].Close(), files[1].Close()); err != nil {
				t.Error(err)
			}
			leave()
		})
	}
}

// TestHandlesMadeAtOnce: of two calls that make a predecessor's handle anew, one gives
// up what it has made.
func TestHandlesMadeAtOnce(t *testing.T) {
	handles := newHandleTable()
	handles.resume()
	first, second := &handle{}, &handle{}
	var undone []*handle
	undo := func(h *handle) { undone = append(undone, h) }
	got, err := handles.getOf(7, func() (*handle, error) {
		if h, err := handles.getOf(7, func() (*handle, error) { return first, nil }, undo); err != nil || h != first {
			t.Errorf("%p, %v", h, err)
		}
		return second, nil
	}, undo)
	if err != nil || got != first || len(undone) != 1 || undone[0] != second {
		t.Errorf("%p (first %p, second %p), given up %v, %v", got, first, second, undone, err)
	}
}

func (v *volume) create(name string) *os.File {
	v.t.Helper()
	f, err := os.OpenFile(v.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { f.Close() })
	return f
}

// dropPages has the next read ask byokd.
func (v *volume) dropPages(f *os.File) {
	v.t.Helper()
	if err := f.Sync(); err != nil {
		v.t.Error(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		v.t.Error(err)
	}
}

// TestOrphanWhileMounterIsAway: what is to be kept for a successor while nobody can be
// told is let go of, too, when its last user has closed it, and its space with it.
func TestOrphanWhileMounterIsAway(t *testing.T) {
	v, m := newPassedVolume(t, Options{})
	leave := v.serve(m)
	defer leave()
	v.unlock()
	before := countBelow(t, v.lower)
	fd, err := unix.Open(v.path("f"), unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	m.server.Close()
	if err := errors.Join(unix.Unlink(v.path("f")), unix.Close(fd)); err != nil {
		t.Fatal(err)
	}
	await(t, func() string { return "a deleted file that nobody has open is held" }, func() bool { return countBelow(t, v.lower) <= before })
}
