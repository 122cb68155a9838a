package fs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// copyCommands copy $FROM to $TO in a directory, each asking in its own way where
// data is: SEEK_DATA, FIEMAP, copy_file_range, or looking for zeros.
var copyCommands = map[string]string{
	"cp":        "cp $FROM $TO",
	"cp sparse": "cp --sparse=always $FROM $TO",
	"cp dense":  "cp --sparse=never --reflink=never $FROM $TO",
	"tar":       "mkdir out && tar -cSf - $FROM | tar -xSf - -C out && mv out/$FROM $TO",
	"qemu-img":  "qemu-img convert -f raw -O raw $FROM $TO",
	"qcow2":     "qemu-img convert -f raw -O qcow2 $FROM disk.qcow2 && qemu-img convert -f qcow2 -O raw disk.qcow2 $TO",
	"dd":        "dd if=$FROM of=$TO bs=64k conv=sparse,fsync status=none",
}

// TestCopiesOfDirtyFiles: tools that copy sparse files find all data, also what
// the kernel has not flushed yet.
func TestCopiesOfDirtyFiles(t *testing.T) {
	cacheModes(t, func(t *testing.T, o Options) {
		v := newVolume(t, o)
		for name, command := range copyCommands {
			t.Run(name, func(t *testing.T) {
				if tool := strings.Fields(command)[0]; tool == "qemu-img" {
					if _, err := exec.LookPath(tool); err != nil {
						lacks(t, "%v", err)
					}
				}
				dir := v.path(strings.ReplaceAll(name, " ", "-"))
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				maker := newVictim(t, "make-sparse", dir, dir+"/from")
				maker.start()
				maker.finishes(30 * time.Second)
				cmd := exec.Command("bash", "-euo", "pipefail", "-c", command)
				cmd.Dir, cmd.Env = dir, append(os.Environ(), "FROM=from", "TO=to")
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				got, err := os.ReadFile(dir + "/to")
				if want := sparseContent(); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the copy has %d bytes, the first difference at %d, %v", len(got), firstDifference(got, want), err)
				}
			})
		}
	})
}

const sparseSize = 8<<20 + 3*512 // qemu-img knows whole sectors only

// sparseParts are written to the file of holes: the first is flushed, the others
// stay dirty, the last through a mapping.
var sparseParts = [][2]int{{1 << 20, 100_000}, {1<<20 + 200_000, 5000}, {5<<20 - 3, 7}, {sparseSize - 1, 1}, {3<<20 + 500_000, 50}}

// sparseContent is what the file then holds.
func sparseContent() []byte {
	b := make([]byte, sparseSize)
	for _, part := range sparseParts {
		for i := part[0]; i < part[0]+part[1]; i++ {
			b[i] = byte(i%251) + 1
		}
	}
	return b
}

// makeSparse makes the file and keeps it open and mapped.
func makeSparse(_, file string) (func() (string, error), error) {
	return func() (string, error) {
		fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT, 0o644)
		if err != nil {
			return "", err
		}
		content, last := sparseContent(), len(sparseParts)-1
		err = unix.Ftruncate(fd, sparseSize)
		for i, part := range sparseParts[:last] {
			_, werr := unix.Pwrite(fd, content[part[0]:][:part[1]], int64(part[0]))
			err = errors.Join(err, werr)
			if i == 0 {
				err = errors.Join(err, unix.Fsync(fd))
			}
		}
		memory, merr := unix.Mmap(fd, 0, sparseSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err = errors.Join(err, merr); err != nil {
			return "", err
		}
		copy(memory[sparseParts[last][0]:], content[sparseParts[last][0]:][:sparseParts[last][1]])
		return "made", nil
	}, nil
}
