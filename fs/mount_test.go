package fs

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"
)

func cacheModes(t *testing.T, run func(t *testing.T, o Options)) {
	for _, mode := range []CacheMode{Writeback, Writethrough} {
		t.Run(mode.String(), func(t *testing.T) { run(t, Options{Cache: mode}) })
	}
}

func TestPosix(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		for name, f := range posixtest.All {
			if name == "FcntlFlockLocksFile" {
				continue // wants locks of one process to exclude each other, which no local filesystem does
			}
			t.Run(name, func(t *testing.T) {
				v := newVolume(t, o)
				f(t, v.mount)
			})
		}
	})
}

// TestPosixWithSealedOwners runs where owners and modes are attributes.
func TestPosixWithSealedOwners(t *testing.T) {
	t.Setenv(ownershipVariable, OwnershipSealed.String())
	TestPosix(t)
}

// TestPosixOnTmpfs runs on a lower filesystem whose file handles do not fit a
// node id, so that inodes are held in a table.
func TestPosixOnTmpfs(t *testing.T) {
	requireFUSE(t)
	for name, f := range posixtest.All {
		if name == "FcntlFlockLocksFile" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("byokd-test", dir, "tmpfs", 0, "size=256m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, 0); err != nil { // busy if a descriptor was leaked
					t.Errorf("a lower descriptor is left open: %v", err)
					_ = unix.Unmount(dir, unix.MNT_DETACH)
				}
			})
			v := newVolumeIn(t, dir, Options{})
			if _, ok := v.fs.nodes.ids.(*tableIDs); !ok {
				t.Fatalf("tmpfs gives %T", v.fs.nodes.ids)
			}
			f(t, v.mount)
		})
	}
}

func TestWriteReadRemount(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		if o.Cache == Writeback && !v.fs.Stats().Writeback {
			t.Fatal("the kernel did not grant the writeback cache")
		}
		r := rand.New(rand.NewPCG(1, 2))
		want := map[string][]byte{}
		for _, size := range []int{0, 1, seal.FirstPayload - 1, seal.FirstPayload, seal.FirstPayload + 1, 4096, seal.FirstPayload + seal.BlockPayload, 100_000, 3 << 20} {
			data := make([]byte, size)
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			name := "file-" + string(rune('a'+len(want)))
			want[name] = data
			if err := os.WriteFile(v.path(name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		check := func() {
			t.Helper()
			for name, data := range want {
				got, err := os.ReadFile(v.path(name))
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d bytes of %d, equal %v, %v", name, len(got), len(data), bytes.Equal(got, data), err)
				}
			}
		}
		check()
		v.remount()
		check()
		v.freeze()
		v.thaw()
		check()
	})
}

// TestRandomWrites compares a file with a model under writes, truncations and
// remounts at odd offsets.
func TestRandomWrites(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		f, err := os.Create(v.path("f"))
		if err != nil {
			t.Fatal(err)
		}
		var model []byte
		for step := range 2000 {
			switch r.IntN(20) {
			case 0:
				n := r.IntN(60_000)
				if err := f.Truncate(int64(n)); err != nil {
					t.Fatal(err)
				}
				model = append(model[:min(n, len(model))], make([]byte, max(0, n-len(model)))...)
			case 1:
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			case 2:
				if step%7 == 0 {
					f.Close()
					v.remount()
					if f, err = os.OpenFile(v.path("f"), os.O_RDWR, 0); err != nil {
						t.Fatal(err)
					}
				}
			default:
				off, data := r.IntN(50_000), make([]byte, r.IntN(9000))
				for i := range data {
					data[i] = byte(r.Uint32())
				}
				if _, err := f.WriteAt(data, int64(off)); err != nil {
					t.Fatal(err)
				}
				if len(data) > 0 {
					model = append(model, make([]byte, max(0, off+len(data)-len(model)))...)
					copy(model[off:], data)
				}
			}
			if step%10 == 0 {
				got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, model) {
					t.Fatalf("step %d: %d bytes, want %d; first difference at %d", step, len(got), len(model), firstDifference(got, model))
				}
			}
		}
		f.Close()
		v.remount()
		got, err := os.ReadFile(v.path("f"))
		if err != nil || !bytes.Equal(got, model) {
			t.Fatalf("after the last remount: %d bytes, want %d, %v", len(got), len(model), err)
		}
	})
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestUnmountBusy: a mount that is in use is taken away all the same, and what
// was written is not lost, synced or not.
func TestUnmountBusy(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		f, err := os.Create(v.path("f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		want := bytes.Repeat([]byte("0123456789abcdef"), 2<<20)
		if _, err := f.Write(want); err != nil {
			t.Fatal(err)
		}
		v.remount() // f is open
		got, err := os.ReadFile(v.path("f"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
		}
	})
}

// TestUnmountHeldElsewhere: a copy of the mount in another mount namespace, as a
// container runtime makes it, neither holds an unmount up nor costs data.
func TestUnmountHeldElsewhere(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		holder := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo held; read line")
		stdin, err := holder.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := holder.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { stdin.Close(); _ = holder.Wait() }()
		if _, err := io.ReadFull(stdout, make([]byte, len("held\n"))); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte("0123456789abcdef"), 2<<16)
		if err := os.WriteFile(v.path("f"), want, 0o644); err != nil {
			t.Fatal(err)
		}
		v.remount()
		got, err := os.ReadFile(v.path("f"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
		}
	})
}
