package fs

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mtimeAlone sets mtime to a time long ago.
var mtimeAlone = []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: 1_000_000_000}}

// calls are victims that make one system call on an open file, a name or the
// directory, which must hang while frozen.
var calls = map[string]func(dir, file string, fd int) error{
	"allocate": func(_, _ string, fd int) error { return unix.Fallocate(fd, 0, 0, 1<<20) },
	"punch": func(_, _ string, fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, pageSize)
	},
	"ftruncate": func(_, _ string, fd int) error { return unix.Ftruncate(fd, 100) },
	"chmod":     func(_, file string, _ int) error { return unix.Chmod(file, 0o600) },
	"fchown":    func(_, _ string, fd int) error { return unix.Fchown(fd, 1, 1) },
	"utimens": func(_, file string, _ int) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, file, make([]unix.Timespec, 2), 0)
	},
	"touch": func(_, file string, _ int) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, file, mtimeAlone, 0)
	},
	"futimens": func(_, _ string, fd int) error {
		return unix.UtimesNanoAt(fd, "", mtimeAlone, unix.AT_EMPTY_PATH)
	},
	"fstat": func(_, _ string, fd int) error { return unix.Fstat(fd, &unix.Stat_t{}) },
	"statx": func(_, file string, _ int) error {
		return unix.Statx(unix.AT_FDCWD, file, unix.AT_STATX_FORCE_SYNC, unix.STATX_ALL, &unix.Statx_t{})
	},
	"access":   func(_, file string, _ int) error { return unix.Access(file, unix.R_OK) },
	"setxattr": func(_, file string, _ int) error { return unix.Setxattr(file, "user.x", []byte("x"), 0) },
	"getxattr": func(_, file string, _ int) error {
		_, err := unix.Getxattr(file, "user.there", make([]byte, 9))
		return err
	},
	"listxattr":   func(_, file string, _ int) error { _, err := unix.Listxattr(file, make([]byte, 99)); return err },
	"removexattr": func(_, file string, _ int) error { return unix.Removexattr(file, "user.there") },
	"link":        func(dir, file string, _ int) error { return unix.Link(file, dir+"/linked") },
	"symlink":     func(dir, _ string, _ int) error { return unix.Symlink("target", dir+"/symlinked") },
	"readlink": func(dir, _ string, _ int) error {
		_, err := unix.Readlink(dir+"/pointer", make([]byte, 99))
		return err
	},
	"unlink": func(dir, _ string, _ int) error { return unix.Unlink(dir + "/pointed") },
	"rmdir":  func(dir, _ string, _ int) error { return unix.Rmdir(dir + "/empty") },
	"mkfifo": func(dir, _ string, _ int) error { return unix.Mkfifo(dir+"/fifo", 0o600) },
	"tmpfile": func(dir, _ string, _ int) error {
		_, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		return err
	},
	"fdatasync": func(_, _ string, fd int) error {
		_, err := unix.Pwrite(fd, []byte("d"), 0)
		return firstOf(err, unix.Fdatasync(fd))
	},
	"fsync-dir": syncDirectory,
	"copy-range": func(dir, _ string, fd int) error {
		to, err := unix.Open(dir+"/pointed", unix.O_WRONLY, 0)
		if err == nil {
			_, err = unix.CopyFileRange(fd, nil, to, nil, pageSize, 0)
		}
		return err
	},
}

func syncDirectory(dir, _ string, _ int) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	return firstOf(err, unix.Fsync(fd))
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// prepareCall makes a victim of a call.
func prepareCall(op string) func(dir, file string) (func() (string, error), error) {
	return func(dir, file string) (func() (string, error), error) {
		fd, err := unix.Open(file, unix.O_RDWR, 0)
		err = firstOf(err, unix.Setxattr(file, "user.there", []byte("there"), 0), os.WriteFile(dir+"/pointed", nil, 0o644),
			unix.Symlink("pointed", dir+"/pointer"), unix.Mkdir(dir+"/empty", 0o755))
		return func() (string, error) {
			return fmt.Sprint(op, " made"), calls[op](dir, file, fd)
		}, err
	}
}
