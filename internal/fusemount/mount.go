package fusemount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// Type is what /proc/mounts shows.
	Type = "fuse.byokd"

	// MaxRead is the largest READ: what the kernel takes without a raised
	// max_pages_limit.
	MaxRead = 1 << 20
)

// Open opens the FUSE device.
func Open() (int, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("open /dev/fuse: %w: byokd must run as root or with CAP_SYS_ADMIN to mount (in a container: --device /dev/fuse --cap-add SYS_ADMIN)", err)
	}
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w (is the fuse module loaded, and the device in this container?)", err)
	}
	return dev, nil
}

// Mount mounts the connection of the device dev at dir, which needs
// CAP_SYS_ADMIN. It does not wait for whoever serves dev. Permissions are checked
// by the kernel, for every user.
func Mount(dev int, dir string) error {
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions,allow_other,max_read=%d",
		dev, unix.S_IFDIR, os.Geteuid(), os.Getegid(), MaxRead)
	err := unix.Mount("byokd", dir, Type, unix.MS_NOSUID|unix.MS_NODEV, options)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount at %s: %w: byokd must run as root or with CAP_SYS_ADMIN to mount", dir, err)
	}
	if err != nil {
		return fmt.Errorf("mount at %s: %w", dir, err)
	}
	return nil
}

// End aborts the connection mounted at dir, so that whoever waits for an answer
// gets an error, and takes the mount away. The processes that serve or hold it need
// not run. Nothing mounted there is no error.
func End(dir string) error {
	err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// Mounted is one mount of ours.
type Mounted struct {
	Dir    string
	Device uint64 // st_dev of what is in it
}

// List returns the mounts of ours in this mount namespace, the last mounted last.
// It touches none of them.
func List() ([]Mounted, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMountinfo(string(text)), nil
}

// At returns the mount of ours at dir, if there is one: the topmost.
func At(dir string) (Mounted, bool, error) {
	all, err := List()
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].Dir == dir {
			return all[i], true, nil
		}
	}
	return Mounted{}, false, err
}

func parseMountinfo(text string) []Mounted {
	var all []Mounted
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(line, " - ")
		fields, about := strings.Fields(before), strings.Fields(after)
		var major, minor uint32
		if !ok || len(fields) < 5 || len(about) < 1 || about[0] != Type {
			continue
		}
		if _, err := fmt.Sscanf(fields[2], "%d:%d", &major, &minor); err != nil {
			continue
		}
		all = append(all, Mounted{Dir: unescape(fields[4]), Device: unix.Mkdev(major, minor)})
	}
	return all
}

// unescape undoes what the kernel does to blanks and backslashes in mountinfo.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}
