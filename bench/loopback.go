//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	loopfs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// loopbackNode is go-fuse's passthrough filesystem with what byokd's settings
// ask of it: with the writeback cache the kernel reads through descriptors that
// were opened for writing only.
type loopbackNode struct{ loopfs.LoopbackNode }

func newLoopbackNode(root *loopfs.LoopbackRoot) *loopbackNode {
	return &loopbackNode{loopfs.LoopbackNode{RootData: root}}
}

// WrapChild makes the nodes below ours, too.
func (n *loopbackNode) WrapChild(context.Context, loopfs.InodeEmbedder) loopfs.InodeEmbedder {
	return newLoopbackNode(n.RootData)
}

func readWrite(flags uint32) uint32 {
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	return flags &^ unix.O_DIRECT
}

func (n *loopbackNode) Open(ctx context.Context, flags uint32) (loopfs.FileHandle, uint32, syscall.Errno) {
	f, _, errno := n.LoopbackNode.Open(ctx, readWrite(flags))
	return f, fuse.FOPEN_KEEP_CACHE, errno
}

func (n *loopbackNode) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*loopfs.Inode, loopfs.FileHandle, uint32, syscall.Errno) {
	inode, f, _, errno := n.LoopbackNode.Create(ctx, name, readWrite(flags), mode, out)
	return inode, f, fuse.FOPEN_KEEP_CACHE, errno
}

// serveLoopback mounts and serves until SIGTERM.
func serveLoopback(lower, mount string) error {
	root := &loopfs.LoopbackRoot{Path: lower}
	var st unix.Stat_t
	if err := unix.Stat(lower, &st); err != nil {
		return err
	}
	root.Dev = st.Dev
	root.RootNode = newLoopbackNode(root)
	day := 24 * time.Hour
	const handleKillprivV2 = 1 << 28 // include/uapi/linux/fuse.h
	server, err := loopfs.Mount(mount, root.RootNode, &loopfs.Options{AttrTimeout: &day, EntryTimeout: &day, MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "loopback", Name: "loopback", Options: []string{"default_permissions"}, AllowOther: true,
		MaxWrite: 1 << 20, MaxBackground: 1024, ExplicitDataCacheControl: true,
		ExtraCapabilities: fuse.CAP_WRITEBACK_CACHE | handleKillprivV2, DisabledCapabilities: fuse.CAP_PASSTHROUGH,
	}})
	if err != nil {
		return err
	}
	if err := readAhead(mount); err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	<-signals
	if err := server.Unmount(); err != nil {
		return err
	}
	server.Wait()
	return nil
}

// readAhead sets the window that byokd sets.
func readAhead(mount string) error { return setBDI(mount, "read_ahead_kb", "1024") }

// limitDirty bounds what the kernel may hold dirty of a mount, in bytes, as byokd does.
func limitDirty(mount string, bytes int64) error {
	return setBDI(mount, "max_bytes", strconv.FormatInt(bytes, 10))
}

// boundDevice bounds what the kernel may hold dirty of the device that dir lies on, and
// returns what puts the old settings back.
func boundDevice(dir string, bytes int64) (restore func() error, err error) {
	name, err := bdiOf(dir)
	if err != nil {
		return nil, err
	}
	old := map[string][]byte{}
	restore = func() (all error) {
		for setting, value := range old {
			all = errors.Join(all, os.WriteFile(filepath.Join(name, setting), value, 0))
		}
		return all
	}
	for _, setting := range []string{"strict_limit", "max_ratio_fine"} { // the latter is what max_bytes sets
		if old[setting], err = os.ReadFile(filepath.Join(name, setting)); err != nil {
			return nil, err
		}
	}
	if err = setBDI(dir, "strict_limit", "1"); err == nil {
		err = limitDirty(dir, bytes)
	}
	if err != nil {
		return nil, errors.Join(err, restore())
	}
	return restore, nil
}

// setBDI writes a setting of the backing device of a mount.
func setBDI(mount, setting, value string) error {
	name, err := bdiOf(mount)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(name, setting), []byte(value), 0)
}

// bdiOf returns the directory of the settings of a mount's backing device.
func bdiOf(mount string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(mount, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("/sys/class/bdi/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), nil
}
