package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/awskey"
	"github.com/byokd/byokd/internal/seal"
)

// The first Linux that takes all cached names back in one stroke (FUSE_NOTIFY_INC_EPOCH) is 6.16.
const epochMajor, epochMinor = 6, 16

// machineGroup checks this machine.
func machineGroup(cfg Config) checkGroup {
	g := checkGroup{Name: "machine", Checks: []awskey.Check{erasureCheck(), clockCheck(), descriptorsCheck()}}
	if cfg.Volume != nil {
		g.Checks = append(g.Checks, kernelCheck(), timeoutsCheck(), fuseCheck())
	}
	if cfg.Objects != nil {
		g.Checks = append(g.Checks, outcome("S3 credentials", "readable", "", func() error {
			_, err := readCredentials(cfg.Objects.Credentials.File)
			return err
		}()))
	}
	if path := cfg.Audit.File; path != "" {
		g.Checks = append(g.Checks, directoryCheck("audit file", path))
	}
	return g
}

// directoryCheck tells whether a file can be made at path.
func directoryCheck(name, path string) awskey.Check {
	dir := filepath.Dir(path)
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return outcome(name, "", "mkdir -p "+dir, fmt.Errorf("%s: %w", dir, err))
	}
	return awskey.Check{Name: name, Result: awskey.Pass, Detail: "its directory can be written"}
}

// descriptorsCheck tells whether enough files may be open at once.
func descriptorsCheck() awskey.Check {
	if err := fewDescriptorsError(); err != nil {
		return awskey.Check{Name: "open files", Result: awskey.Warn, Detail: err.Error(), NextStep: "raise the limit of open files where byokd is started"}
	}
	return awskey.Check{Name: "open files", Result: awskey.Pass, Detail: fmt.Sprintf("%d at once", descriptorLimit())}
}

// outcome makes a check of an error.
func outcome(name, detail, nextStep string, err error) awskey.Check {
	if err != nil {
		return awskey.Check{Name: name, Result: awskey.Fail, Detail: oneLine(err.Error()), NextStep: nextStep}
	}
	return awskey.Check{Name: name, Result: awskey.Pass, Detail: detail}
}

func erasureCheck() awskey.Check {
	if erasureGuaranteed {
		return awskey.Check{Name: "key erasure", Result: awskey.Pass, Detail: "guaranteed"}
	}
	return awskey.Check{Name: "key erasure", Result: awskey.Warn, Detail: "best effort: this build or platform lacks Go's runtimesecret (make build has it on linux/amd64 and arm64)"}
}

// clockCheck asks the kernel whether something keeps its clock.
func clockCheck() awskey.Check {
	var state unix.Timex
	_, err := unix.Adjtimex(&state)
	if err != nil || state.Status&unix.STA_UNSYNC == 0 {
		return awskey.Check{Name: "time service", Result: awskey.Pass, Detail: "the clock is synchronised"}
	}
	return awskey.Check{Name: "time service", Result: awskey.Warn, Detail: "the kernel says that nothing synchronises the clock; AWS refuses requests that are 5 minutes off",
		NextStep: "Run chrony or another NTP service on the machine"}
}

func kernelCheck() awskey.Check {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return outcome("kernel", "", "", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return awskey.Check{Name: "kernel", Result: awskey.Warn, Detail: "Linux " + release + ": unknown version"}
	}
	if major < epochMajor || major == epochMajor && minor < epochMinor {
		return awskey.Check{Name: "kernel", Result: awskey.Warn,
			Detail:   fmt.Sprintf("Linux %s: while frozen, names that the kernel has cached may still be answered (data is not); %d.%d and later take them back", release, epochMajor, epochMinor),
			NextStep: fmt.Sprintf("Use Linux %d.%d or later", epochMajor, epochMinor)}
	}
	return awskey.Check{Name: "kernel", Result: awskey.Pass, Detail: "Linux " + release}
}

func timeoutsCheck() awskey.Check {
	return outcome("fs.fuse timeouts", "none", "", refuseRequestTimeouts(fuseSysctls))
}

func fuseCheck() awskey.Check {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		next := "modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN"
		if errors.Is(err, os.ErrPermission) {
			next = "Run byokd as root or with CAP_SYS_ADMIN; in a container: --device /dev/fuse --cap-add SYS_ADMIN"
		}
		return outcome("/dev/fuse", "", next, err)
	}
	f.Close()
	if unix.Geteuid() != 0 {
		return awskey.Check{Name: "/dev/fuse", Result: awskey.Warn, Detail: "can be opened, but this is not root: the mount is for this user only, unless fuse.conf says user_allow_other"}
	}
	return awskey.Check{Name: "/dev/fuse", Result: awskey.Pass, Detail: "can be opened"}
}

// volumeGroup checks the directories of the volume.
func volumeGroup(cfg Config) checkGroup {
	if cfg.Volume == nil {
		return checkGroup{}
	}
	lower := cfg.Volume.Lower
	g := checkGroup{Name: "volume", About: lower}
	if err := outsideMounts(lower); err != nil { // which may not answer, so nothing more is asked
		g.Checks = append(g.Checks, outcome("lower directory", "", "", err))
		return g
	}
	header, err := fs.ReadHeader(lower)
	v := &volume{cfg: cfg}
	ownership := v.ownership()
	switch {
	case errors.Is(err, fs.ErrNotInitialised) && cfg.Volume.Create == createNever:
		g.Checks = append(g.Checks, outcome("lower directory", "", "", errNoneToBeMade(lower)))
		return g
	case errors.Is(err, fs.ErrNotInitialised):
		g.Checks = append(g.Checks, awskey.Check{Name: "lower directory", Result: awskey.Pass, Detail: fmt.Sprintf("empty: a new volume will be made, with ownership %s", ownership)})
	case err != nil:
		g.Checks = append(g.Checks, outcome("lower directory", "", "", err))
		return g
	default:
		v.remember(header)
		ownership = fs.OwnershipOf(header)
		g.Checks = append(g.Checks, outcome("lower directory", fmt.Sprintf("a volume, header generation %d", header.Generation), "", v.belongsOrBusy()))
	}
	g.Checks = append(g.Checks, blocksCheck(lower), attributesCheck(lower, ownership))
	if cfg.Volume.MountSocket == "" {
		g.Checks = append(g.Checks, mountCheck(cfg.Volume.Mount, lower))
	}
	return g
}

func blocksCheck(lower string) awskey.Check {
	var st unix.Statfs_t
	if err := unix.Statfs(lower, &st); err != nil {
		return outcome("lower filesystem", "", "", err)
	}
	if st.Bsize < seal.BlockSize {
		return awskey.Check{Name: "lower filesystem", Result: awskey.Fail, Detail: fmt.Sprintf("has blocks of %d bytes: a power cut could tear a sealed block of %d", st.Bsize, seal.BlockSize),
			NextStep: fmt.Sprintf("Make it with blocks of %d bytes: mkfs.ext4 -b %d, mkfs.xfs -b size=%d", seal.BlockSize, seal.BlockSize, seal.BlockSize)}
	}
	return awskey.Check{Name: "lower filesystem", Result: awskey.Pass, Detail: fmt.Sprintf("blocks of %d bytes, %.1f GiB free", st.Bsize, float64(st.Bavail)*float64(st.Frsize)/(1<<30))}
}

// attributesCheck tries, on a file without a name, what byokd does with each file below.
func attributesCheck(lower string, ownership fs.Ownership) awskey.Check {
	const name = "lower files"
	fd, err := unix.Open(lower, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return awskey.Check{Name: name, Result: awskey.Skip, Detail: "this filesystem has no files without a name to try it on"}
	}
	if err != nil {
		return outcome(name, "", "", fmt.Errorf("nothing can be written in %s: %w", lower, err))
	}
	defer unix.Close(fd)
	err = unix.Fsetxattr(fd, "user.byokd.preflight", []byte("x"), 0)
	if err != nil && ownership == fs.OwnershipSealed {
		return outcome(name, "", "Use ext4 or XFS below", fmt.Errorf("no extended attributes, and owners and modes are to be sealed in them: %w", err))
	}
	if err != nil {
		return awskey.Check{Name: name, Result: awskey.Warn, Detail: fmt.Sprintf("no extended attributes (%v): a file whose first block is damaged is then lost altogether", err),
			NextStep: "Use ext4 or XFS below"}
	}
	return awskey.Check{Name: name, Result: awskey.Pass, Detail: "can be written, with extended attributes"}
}

func mountCheck(dir, lower string) awskey.Check {
	const name = "mount point"
	if err := apartFromLower(dir, lower); err != nil {
		return outcome(name, "", "", err)
	}
	if servedAt(dir) {
		return awskey.Check{Name: name, Result: awskey.Pass, Detail: dir + ": a byokd serves there"}
	}
	err := statWithin(dir, statTimeout)
	if errors.Is(err, errNoDirectory) {
		parent := filepath.Dir(dir)
		if err := unix.Access(parent, unix.W_OK); err != nil {
			return outcome(name, "", "mkdir -p "+dir, fmt.Errorf("%s cannot be made: %s: %w", dir, parent, err))
		}
		return awskey.Check{Name: name, Result: awskey.Pass, Detail: dir + ": will be made"} // as prepareMountPoint does
	}
	if err == nil {
		err = emptyMountPoint(dir)
	}
	return outcome(name, dir+": an empty directory", "", err)
}

// servedAt reports whether a byokd has mounted something at dir.
func servedAt(dir string) bool {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	return err == nil && mountedAt(string(mounts), dir) == "fuse.byokd"
}

// belongsOrBusy checks a lower directory with a volume in it: that it is this configuration's, and that no byokd has it but the
// one that serves at the mount point. A mount that comes from a node driver does not tell who that is.
func (v *volume) belongsOrBusy() error {
	if err := v.belongs(); err != nil {
		return err
	}
	if v.cfg.Volume.MountSocket != "" || servedAt(v.cfg.Volume.Mount) {
		return nil
	}
	fd, err := unix.Open(v.cfg.Volume.Lower, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: v.cfg.Volume.Lower, Err: err}
	}
	defer unix.Close(fd) // takes the lock back
	if errors.Is(unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return fmt.Errorf("%w, which mounts it elsewhere than at %s; stop that one first. To see where: findmnt -t fuse.byokd", fs.ErrBusy, v.cfg.Volume.Mount)
	}
	return nil
}
