package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/volumeread"
)

// restoring is a `byokd decrypt` of a volume: its plain files go into a directory that gets its name when
// everything is there. It implements volumeread.Visitor.
type restoring struct {
	*decryption
	root     *os.Root
	progress *progress
	owner    bool // may give files to other users

	links    map[uint64]string // first name of an inode with several
	files    int64
	bytes    int64
	faults   int
	skipped  int // files left out for a fault
	complain func(format string, args ...any)
}

// volume restores a volume into d.output.
func (d *decryption) volume(ctx context.Context) error {
	if d.output == "" {
		return exitWith(exitUsage, errors.New("a volume is restored into a directory: -o OUTPUT"))
	}
	if _, err := os.Lstat(d.output); err == nil {
		return fmt.Errorf("%s exists already; byokd decrypt writes over nothing", d.output)
	}
	v, err := openOffline(ctx, d.source, &d.from)
	if err != nil {
		return err
	}
	defer v.Close()
	partial := d.output + partialSuffix
	if err := os.Mkdir(partial, 0o700); err != nil {
		return fmt.Errorf("%w; if it is left of a run that was ended, remove it", err)
	}
	root, err := os.OpenRoot(partial)
	if err != nil {
		return err
	}
	defer root.Close()
	r := &restoring{decryption: d, root: root, owner: os.Geteuid() == 0, links: map[uint64]string{},
		progress: newProgress(d.stderr, "restoring", sizeBelow(d.source)),
		complain: func(format string, args ...any) { fmt.Fprintf(d.stderr, "byokd: "+format+"\n", args...) }}
	err = v.Walk(ctx, r)
	r.progress.finish()
	if err != nil {
		return fmt.Errorf("%w; what was restored so far is in %s", err, partial)
	}
	return r.conclude(partial)
}

// conclude makes what was restored durable and gives it its name.
func (r *restoring) conclude(partial string) error {
	dir, err := os.Open(partial)
	if err != nil {
		return err
	}
	err = errors.Join(unix.Syncfs(int(dir.Fd())), dir.Close())
	if err == nil {
		err = os.Rename(partial, r.output)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(r.stderr, "%d files, %s, restored into %s\n", r.files, bytesInWords(r.bytes), r.output)
	if !r.owner {
		r.complain("owners and groups are not restored: only root can give files away")
	}
	if r.faults > 0 {
		return exitWith(exitDamaged, fmt.Errorf("faults: %d; files that were left out: %d", r.faults, r.skipped))
	}
	return nil
}

// Enter implements volumeread.Visitor.
func (r *restoring) Enter(e *volumeread.Entry) error {
	if e.Path == "." {
		return nil
	}
	return r.root.Mkdir(e.Path, 0o700)
}

// Leave implements volumeread.Visitor: what is written into a directory changes its time, so that comes last.
func (r *restoring) Leave(e *volumeread.Entry) error {
	dir, err := r.root.Open(e.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return r.dress(dir, e)
}

// File implements volumeread.Visitor.
func (r *restoring) File(e *volumeread.Entry, f *volumeread.File) error {
	if first, found := r.links[e.Stat.Ino]; found {
		if first == "" {
			return nil // it was left out
		}
		return r.root.Link(first, e.Path)
	}
	out, err := r.root.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(f.Size()); err != nil {
		return err
	}
	faulty, err := f.Blocks(func(off int64, plain []byte) error {
		r.bytes += int64(len(plain))
		r.progress.tell(r.bytes)
		_, err := out.WriteAt(plain, off)
		return err
	})
	if err != nil {
		return err
	}
	name := e.Path
	if faulty > 0 && !r.zeroDamaged {
		r.skipped++
		r.complain("%q is left out: %d of its bytes are damaged (--zero-damaged restores it with zeros there)", e.Path, faulty)
		name, err = "", r.root.Remove(e.Path)
	} else {
		r.files++
		err = r.dress(out, e)
	}
	if e.Stat.Nlink > 1 {
		r.links[e.Stat.Ino] = name
	}
	return err
}

// dress gives a file or directory the attributes, owner, mode and times of the sealed one.
func (r *restoring) dress(f *os.File, e *volumeread.Entry) error {
	for _, a := range e.Attrs {
		if err := unix.Fsetxattr(int(f.Fd()), a.Name, a.Value, 0); err != nil {
			r.complain("%q: attribute %s is not restored: %v", e.Path, a.Name, err)
		}
	}
	if r.owner {
		if err := f.Chown(int(e.Stat.Uid), int(e.Stat.Gid)); err != nil {
			return err
		}
	}
	if err := unix.Fchmod(int(f.Fd()), e.Stat.Mode&0o7777); err != nil {
		return err
	}
	return r.root.Chtimes(e.Path, time.Unix(e.Stat.Atim.Unix()), time.Unix(e.Stat.Mtim.Unix()))
}

// Other implements volumeread.Visitor.
func (r *restoring) Other(e *volumeread.Entry) error {
	switch {
	case e.Is(unix.S_IFLNK) && e.Target == "":
		return nil // a Fault was told
	case e.Is(unix.S_IFLNK):
		if err := r.root.Symlink(e.Target, e.Path); err != nil {
			return err
		}
	case e.Is(unix.S_IFIFO):
		dir, err := r.root.Open(filepath.Dir(e.Path))
		if err != nil {
			return err
		}
		defer dir.Close()
		if err := unix.Mknodat(int(dir.Fd()), filepath.Base(e.Path), e.Stat.Mode, 0); err != nil {
			return err
		}
	default: // a socket is its server's to make; a device is not for a restore to make
		r.complain("%q is a socket or device and is not restored", e.Path)
		return nil
	}
	if !r.owner {
		return nil
	}
	return r.root.Lchown(e.Path, int(e.Stat.Uid), int(e.Stat.Gid))
}

// Fault implements volumeread.Visitor.
func (r *restoring) Fault(f volumeread.Fault) error {
	r.faults++
	r.complain("%s", checkFault{f, nextStep(f.Reason)}.text())
	return nil
}
