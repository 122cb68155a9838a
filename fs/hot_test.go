package fs

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// hotPath serves READ and WRITE requests to a file as the loop does, without
// the kernel.
type hotPath struct {
	loop *loop
	slot *slot
	node uint64
}

func newHotPath(t testing.TB, v *volume, name string) *hotPath {
	t.Helper()
	l := v.fs.loop.Load()
	var st unix.Stat_t
	if err := unix.Stat(v.path(name), &st); err != nil {
		t.Fatal(err)
	}
	for _, n := range v.fs.nodes.all() {
		n.content.RLock()
		found := n.known && n.size == st.Size && n.id != fuse.FUSE_ROOT_ID
		n.content.RUnlock()
		if found {
			slot, err := l.newSlot()
			if err != nil {
				t.Fatal(err)
			}
			return &hotPath{loop: l, slot: slot, node: n.id}
		}
	}
	t.Fatal("the node is not known")
	return nil
}

func (h *hotPath) read(t testing.TB, off, size int) {
	in := (*fuse.ReadIn)(unsafe.Pointer(&h.slot.in[0]))
	*in = fuse.ReadIn{InHeader: fuse.InHeader{Opcode: opRead, NodeId: h.node, Unique: 2}, Offset: uint64(off), Size: uint32(size)}
	h.serve(t, int(unsafe.Sizeof(*in)), outHeaderSize+size)
}

func (h *hotPath) write(t testing.TB, off, size int) {
	in := (*fuse.WriteIn)(unsafe.Pointer(&h.slot.in[0]))
	*in = fuse.WriteIn{InHeader: fuse.InHeader{Opcode: opWrite, NodeId: h.node, Unique: 2}, Offset: uint64(off), Size: uint32(size), WriteFlags: fuse.WRITE_CACHE}
	h.serve(t, int(unsafe.Sizeof(*in))+size, outHeaderSize+int(unsafe.Sizeof(fuse.WriteOut{})))
}

func (h *hotPath) serve(t testing.TB, length, want int) {
	header := (*fuse.InHeader)(unsafe.Pointer(&h.slot.in[0]))
	h.slot.call.begin(header)
	reply, _ := h.loop.handle(h.slot, ruleOf(header.Opcode), h.slot.in[:length])
	if len(reply) != want {
		t.Fatalf("%s: %d bytes of reply, want %d", h.slot.call.name(), len(reply), want)
	}
	h.slot.call.end()
}

const hotFile = 32 << 20

func newHotFile(t testing.TB) *hotPath {
	v := newVolume(t, Options{})
	writePattern(t, v.path("hot"), hotFile)
	f, err := os.Open(v.path("hot"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return newHotPath(t, v, "hot")
}

// TestHotPathAllocations holds the steady path to no allocation per request.
func TestHotPathAllocations(t *testing.T) {
	h := newHotFile(t)
	for _, size := range []int{4096, 65536, maxWrite} {
		if n := fewestAllocations(func() { h.read(t, 8192, size) }); n != 0 {
			t.Errorf("read of %d: %v allocations", size, n)
		}
		if n := fewestAllocations(func() { h.write(t, 8192, size) }); n != 0 {
			t.Errorf("write of %d: %v allocations", size, n)
		}
	}
}

// fewestAllocations measures a few times: what allocates beside f, such as the key's
// probes, is counted with it.
func fewestAllocations(f func()) float64 {
	n := testing.AllocsPerRun(100, f)
	for range 4 {
		if n == 0 {
			break
		}
		n = min(n, testing.AllocsPerRun(100, f))
	}
	return n
}

// ask serves a request of an opcode about the node, with what follows the header.
func (h *hotPath) ask(t testing.TB, opcode uint32, node uint64, body []byte) {
	in := (*fuse.InHeader)(unsafe.Pointer(&h.slot.in[0]))
	length := inHeaderSize + copy(h.slot.in[inHeaderSize:], body)
	*in = fuse.InHeader{Length: uint32(length), Opcode: opcode, NodeId: node, Unique: 2}
	h.slot.call.begin(in)
	reply, _ := h.loop.handle(h.slot, ruleOf(opcode), h.slot.in[:length])
	if len(reply) <= outHeaderSize {
		t.Fatalf("opcode %d: %x", opcode, reply)
	}
	h.slot.call.end()
}

func (h *hotPath) getattr(t testing.TB) { h.ask(t, opGetattr, h.node, make([]byte, 16)) }

func (h *hotPath) lookup(t testing.TB) {
	const opLookup = 1
	h.ask(t, opLookup, fuse.FUSE_ROOT_ID, []byte("hot\x00"))
	h.loop.fs.nodes.forget(h.node, 1, nil, 0) // as the kernel would, which has asked for none
}

// TestAttributeAllocations bounds what LOOKUP and GETATTR allocate. They pass go-fuse's
// protocol server, which takes two pieces for each request; one more is the sealed
// name with its terminator, for the system call.
func TestAttributeAllocations(t *testing.T) {
	h := newHotFile(t)
	for _, c := range []struct {
		name   string
		budget float64
		run    func()
	}{
		{"GETATTR", 3, func() { h.getattr(t) }},
		{"LOOKUP", 11, func() { h.lookup(t) }},
	} {
		n := fewestAllocations(c.run)
		t.Logf("%s: %v allocations", c.name, n)
		if n > c.budget {
			t.Errorf("%s: %v allocations, at most %v are meant", c.name, n, c.budget)
		}
	}
}

func BenchmarkGetattr(b *testing.B) {
	h := newHotFile(b)
	b.ReportAllocs()
	for b.Loop() {
		h.getattr(b)
	}
}

func BenchmarkLookup(b *testing.B) {
	h := newHotFile(b)
	b.ReportAllocs()
	for b.Loop() {
		h.lookup(b)
	}
}

func BenchmarkRead(b *testing.B) {
	h := newHotFile(b)
	for _, size := range []int{4096, 131072, maxWrite} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for i := 0; b.Loop(); i++ {
				h.read(b, i*size%(hotFile-size), size)
			}
		})
	}
}

func BenchmarkOverwrite(b *testing.B) {
	h := newHotFile(b)
	for _, size := range []int{4096, 131072, maxWrite} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for i := 0; b.Loop(); i++ {
				h.write(b, i*size%(hotFile-size), size)
			}
		})
	}
}

// TestHotBlocksOfAnother: a file that has the inode number of one that is gone has
// nothing else of it, where the number is all that names it.
func TestHotBlocksOfAnother(t *testing.T) {
	v := newVolume(t, Options{tableOfIDs: true, Cache: Writethrough})
	old := bytes.Repeat([]byte("old"), 4000)
	reused := 0
	for round := range 20 {
		if err := os.WriteFile(v.path("old"), old, 0o600); err != nil {
			t.Fatal(err)
		}
		inode := inodeOf(t, v.path("old"))
		known := v.fs.Stats().Inodes
		if err := os.Remove(v.path("old")); err != nil {
			t.Fatal(err)
		}
		await(t, func() string { return "the kernel remembers the file" }, func() bool { return v.fs.Stats().Inodes < known })
		f := v.create(fmt.Sprint("new-", round))
		for _, off := range []int64{20_000, 9_000} { // a hole between, a part of which is then written
			if _, err := f.WriteAt([]byte("n"), off); err != nil {
				t.Fatal(err)
			}
		}
		if inodeOf(t, f.Name()) == inode {
			reused++
		}
		v.dropPages(f)
		got := make([]byte, 20_001)
		if _, err := f.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 20_001)
		want[9_000], want[20_000] = 'n', 'n'
		if !bytes.Equal(got, want) {
			t.Fatalf("round %d: %.40q at %d", round, got[firstDifference(got, want):], firstDifference(got, want))
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if reused == 0 {
		t.Skip("the lower filesystem gave no inode number twice")
	}
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// BenchmarkMount is what a program sees of a request to the mount: the page cache of the
// kernel has no part in it.
func BenchmarkMount(b *testing.B) {
	v := newVolume(b, Options{})
	writePattern(b, v.path("hot"), 1<<20)
	fd, err := unix.Open(v.path("hot"), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(page)
	for _, c := range []struct {
		name string
		op   func(fd int, b []byte, off int64) (int, error)
	}{{"read", unix.Pread}, {"write", unix.Pwrite}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := c.op(fd, page, int64(i%200)*pageSize); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
