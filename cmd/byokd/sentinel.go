package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The sentinel is a process of ours that outlives the daemon by a moment. When the daemon dies without
// unmounting, it ends the mount by force.
//
// The kernel ends a connection by itself when the last descriptor of it is closed, but a thread of the
// daemon that hangs in a notification or in syncfs, which happens in a freeze that could not flush
// everything, keeps one, and it hangs until the connection ends (fs/apart.go). Without the sentinel a
// daemon killed in such a freeze could neither go nor be waited for, and who uses the mount could not
// be killed.

const sentinelCommand = "mount-sentinel"

func newSentinelCommand() *cobra.Command {
	return &cobra.Command{
		Use:    sentinelCommand + " DIR",
		Short:  "end the mount at DIR when standard input ends (started by byokd run)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			// Its end is the daemon's end, not the terminal's.
			signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			device := fuseDeviceAt(args[0])
			if _, err := io.Copy(io.Discard, cmd.InOrStdin()); err != nil {
				return err
			}
			if device == "" || fuseDeviceAt(args[0]) != device {
				return nil // unmounted as it should be
			}
			return unix.Unmount(args[0], unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		},
	}
}

// startSentinel starts the sentinel of a mount. It ends when this process does, or when stop is called.
func startSentinel(dir string) (stop func(), err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir)) // mountinfo has the real path; the mount itself is not touched
	if err != nil {
		return nil, err
	}
	if parent, err = filepath.Abs(parent); err != nil {
		return nil, err
	}
	cmd := exec.Command(program, sentinelCommand, filepath.Join(parent, filepath.Base(dir)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is not for it
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the mount's sentinel: %w", err)
	}
	return func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	}, nil
}

// fuseDeviceAt returns the device number of byokd's mount at dir, or nothing, without touching the mount.
func fuseDeviceAt(dir string) string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	device := ""
	for line := range strings.Lines(string(mounts)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, about := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) >= 5 && len(about) >= 1 && about[0] == "fuse.byokd" && unescapeMount(fields[4]) == dir {
			device = fields[2]
		}
	}
	return device
}
