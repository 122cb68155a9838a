//go:build linux

package powercut

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// sector is the piece that a power cut leaves whole: the block of the lower
// filesystems, and a page.
const sector = 4096

// event is one entry of a disk's log.
type event struct {
	flush bool
	off   int64
	n     int64  // length of a write
	data  []byte // nil for zeros
}

// disk is a medium that remembers what was written to it, as a file of a FUSE
// mount that a process of its own serves: a filesystem on it must be able to
// come to rest whatever becomes of the test.
type disk struct {
	dir    string
	server *exec.Cmd
	life   io.Closer // the server ends when this is closed
	file   *os.File  // the log, in memory, as diskServer writes it
	head   []byte    // its first page, mapped
}

const (
	diskName     = "disk"
	diskVariable = "BYOKD_POWERCUT_DISK" // tells this program to serve one: its directory
	sizeVariable = "BYOKD_POWERCUT_SIZE"

	aboveVariable = "BYOKD_POWERCUT_ABOVE" // where something on the disk is mounted, the uppermost first
	logSize       = 8 << 30                // of memory that is there when written
)

// startDisk mounts a disk of zeros at dir; the file is dir/disk. What will be
// mounted on it is at above, the uppermost first.
func startDisk(dir string, above []string, size int64) (*disk, error) {
	fd, err := unix.MemfdCreate("powercut-log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	d := &disk{dir: dir, file: os.NewFile(uintptr(fd), "powercut-log")}
	if err := d.file.Truncate(logSize); err != nil {
		return nil, err
	}
	if d.head, err = unix.Mmap(fd, 0, sector, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d.server = exec.Command(program)
	d.server.Env = append(os.Environ(), diskVariable+"="+dir, sizeVariable+"="+strconv.FormatInt(size, 10), aboveVariable+"="+strings.Join(above, ":"))
	d.server.ExtraFiles = []*os.File{d.file} // descriptor 3
	d.server.Stderr = os.Stderr
	d.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what kills the test's process group leaves it to tidy up
	input, err := d.server.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := d.server.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.server.Start(); err != nil {
		return nil, err
	}
	d.life = input
	if line, err := bufio.NewReader(output).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, errors.Join(fmt.Errorf("the disk's server says %q: %w", line, err), d.stop())
	}
	return d, nil
}

// stop ends the server, which unmounts the disk. The log stays.
func (d *disk) stop() error {
	d.life.Close()
	return d.server.Wait()
}

// close forgets the log.
func (d *disk) close() error {
	return errors.Join(unix.Munmap(d.head), d.file.Close())
}

// counters are at the beginning of the log's file. The first two are written by
// the server alone, the others by the test.
type counters struct {
	events atomic.Int64 // in the log: what is acknowledged by the disk is counted
	bytes  atomic.Int64 // of the log, from the second page on

	failReads, failWrites atomic.Int64 // of a thousand
	slow                  atomic.Int64 // of a thousand, answered late
	failed                atomic.Int64 // by the server: what it has failed
}

// slowness is how late a slow request is answered.
const slowness = 20 * time.Millisecond

// fails says whether a request that fails so often of a thousand fails now, and
// makes it late where it is to be.
func (c *counters) fails(rate *atomic.Int64) bool {
	if rand.Int64N(1000) < c.slow.Load() {
		time.Sleep(slowness)
	}
	if rand.Int64N(1000) >= rate.Load() {
		return false
	}
	c.failed.Add(1)
	return true
}

func countersOf(page []byte) *counters { return (*counters)(unsafe.Pointer(&page[0])) }

// now is the place in the log where what happens next will stand.
func (d *disk) now() int { return int(countersOf(d.head).events.Load()) }

// events reads the log; the events point into the mapping all, which is the
// caller's.
func (d *disk) events() (all []byte, events []event, err error) {
	c := countersOf(d.head)
	count, length := c.events.Load(), c.bytes.Load()
	if length == 0 {
		return nil, nil, nil
	}
	all, err = unix.Mmap(int(d.file.Fd()), sector, int(length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	events = make([]event, 0, count)
	for log := all; len(log) > 0; {
		kind := binary.LittleEndian.Uint64(log)
		e := event{flush: kind == kindFlush, off: int64(binary.LittleEndian.Uint64(log[8:])), n: int64(binary.LittleEndian.Uint64(log[16:]))}
		log = log[entryHead:]
		if kind == kindData {
			e.data, log = log[:e.n:e.n], log[e.n:]
		}
		events = append(events, e)
	}
	if int64(len(events)) != count {
		return nil, nil, fmt.Errorf("the disk's log has %d entries and counts %d", len(events), count)
	}
	return all, events, nil
}

// An entry of the log: kind, offset and length, and the data of kindData.
const (
	entryHead = 24
	kindData  = 1
	kindZeros = 2
	kindFlush = 3
)

// diskServer serves a disk. A write is in the log before it is answered; a flush
// is in the log when it arrives. So what stands before a flush is what the flush
// makes durable.
type diskServer struct {
	fuse.RawFileSystem
	size int64
	log  *os.File
	head *counters

	mu      sync.Mutex
	content []byte // guarded by mu
}

const diskNode = 2

// serveDisk is the whole of the process of a disk: it serves until its standard
// input ends.
func serveDisk() error {
	dir := os.Getenv(diskVariable)
	size, err := strconv.ParseInt(os.Getenv(sizeVariable), 10, 64)
	if err != nil {
		return err
	}
	content, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	const log = 3
	unix.CloseOnExec(log)
	head, err := unix.Mmap(log, 0, sector, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	d := &diskServer{RawFileSystem: fuse.NewDefaultRawFileSystem(), size: size, log: os.NewFile(log, "log"), head: countersOf(head), content: content}
	server, err := fuse.NewServer(d, dir, &fuse.MountOptions{DirectMountStrict: true, MaxWrite: 1 << 20, ExtraCapabilities: fuse.CAP_ASYNC_DIO, FsName: "powercut", Name: "powercut"})
	if err != nil {
		return err
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return err
	}
	fmt.Println("ready")
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	parent := os.Getppid()
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-ended:
			return leave(server)
		case <-tick.C: // a test that was killed may hang in what lies on this disk, with its end of the pipe open
			if dead(parent) {
				return leave(server)
			}
		}
	}
}

// dead tells whether a process has ended or is to end by SIGKILL, be it that
// threads of it still hang.
func dead(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch name {
		case "State":
			if strings.HasPrefix(value, "Z") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if pending, err := strconv.ParseUint(value, 16, 64); err == nil && pending&(1<<(unix.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return false
}

// leave ends the mount of a disk. After a test that was killed there is still a
// filesystem on it, which is detached first: its threads come to rest only while
// it is served, and the loop device goes with it (LO_FLAGS_AUTOCLEAR).
func leave(server *fuse.Server) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		for _, dir := range strings.Split(os.Getenv(aboveVariable), ":") { // EINVAL where the test has done it
			_ = unix.Unmount(dir, unix.MNT_FORCE) // ends a volume whose server is gone, and who waits for it
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if err := server.Unmount(); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// record writes an entry of the log and does what it says; mu is held.
func (d *diskServer) record(kind uint64, off, n int64, data []byte) error {
	entry := make([]byte, entryHead, entryHead+len(data))
	binary.LittleEndian.PutUint64(entry, kind)
	binary.LittleEndian.PutUint64(entry[8:], uint64(off))
	binary.LittleEndian.PutUint64(entry[16:], uint64(n))
	entry = append(entry, data...)
	end := d.head.bytes.Load()
	if _, err := d.log.WriteAt(entry, sector+end); err != nil {
		return err
	}
	switch kind {
	case kindData:
		copy(d.content[off:], data)
	case kindZeros:
		clear(d.content[off : off+n])
	}
	d.head.bytes.Store(end + int64(len(entry)))
	d.head.events.Add(1)
	return nil
}

func (d *diskServer) attr(out *fuse.Attr) {
	*out = fuse.Attr{Ino: diskNode, Size: uint64(d.size), Blocks: uint64(d.size / 512), Mode: unix.S_IFREG | 0o600, Nlink: 1, Blksize: sector}
}

func (d *diskServer) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != diskName {
		return fuse.ENOENT
	}
	out.NodeId = diskNode
	d.attr(&out.Attr)
	return fuse.OK
}

func (d *diskServer) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == fuse.FUSE_ROOT_ID {
		out.Attr = fuse.Attr{Ino: fuse.FUSE_ROOT_ID, Mode: unix.S_IFDIR | 0o700, Nlink: 2}
		return fuse.OK
	}
	d.attr(&out.Attr)
	return fuse.OK
}

func (d *diskServer) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO // every request of the loop device arrives as it is made
	return fuse.OK
}

func (d *diskServer) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if d.head.fails(&d.head.failReads) {
		return nil, fuse.EIO
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(buf, d.content[min(int64(in.Offset), d.size):])
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (d *diskServer) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	off, n := int64(in.Offset), int64(len(data))
	if off+n > d.size {
		return 0, fuse.Status(unix.ENOSPC)
	}
	if d.head.fails(&d.head.failWrites) {
		return 0, fuse.EIO
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint32(n), fuse.ToStatus(d.record(kindData, off, n, data))
}

func (d *diskServer) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fuse.ToStatus(d.record(kindFlush, 0, 0, nil))
}

// Fallocate is how a loop device passes on discards and the writing of zeros.
func (d *diskServer) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const known = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_ZERO_RANGE
	if in.Mode == 0 || in.Mode&^known != 0 || in.Offset+in.Length > uint64(d.size) {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return fuse.ToStatus(d.record(kindZeros, int64(in.Offset), int64(in.Length), nil))
}

func (d *diskServer) String() string { return "powercut" }
