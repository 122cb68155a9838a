//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// load is one thing to measure. run does what needs no measuring, then measures.
type load struct {
	name, unit string
	goals      map[string]float64 // by peer: byokd's rate in parts of the peer's
	program    string             // that must be installed, if any
	needs      need
	run        func(dir string) (rate float64, err error)
}

func (l load) possible() bool {
	if l.program == "" {
		return true
	}
	_, err := exec.LookPath(l.program)
	return err == nil
}

func goals(raw, loopback, gocryptfs float64) map[string]float64 {
	return map[string]float64{"raw": raw, "loopback": loopback, "gocryptfs": gocryptfs}
}

// need is what must be there before a load runs; it is made where it is not.
type need struct {
	path func(dir string) string
	make func(dir string) (float64, error)
}

var (
	nothing    = need{}
	bigFile    = need{big, sequentialWrite}
	smallFiles = need{func(dir string) string { return little(dir, files-1) }, create}
)

// loads in the order of the table.
var loads = []load{
	{"sequential write 1 MiB + fdatasync", "MiB/s", goals(0.5, 0.9, 1.5), "", nothing, sequentialWrite},
	{"sequential read 1 MiB, cold", "MiB/s", goals(0.9, 0.9, 1.5), "", bigFile, cold(sequentialRead)},
	{"sequential read 1 MiB, warm", "MiB/s", goals(0.95, 1, 6), "", bigFile, warm(sequentialRead)},
	{"random read 4 KiB, cold, 1 job", "op/s", goals(0.55, 0.9, 1.1), "", bigFile, cold(randomRead(1))},
	{"random read 4 KiB, cold, 4 jobs", "op/s", goals(0.3, 0.9, 1.1), "", bigFile, cold(randomRead(4))},
	{"random read 4 KiB, warm", "op/s", goals(0.95, 1, 6), "", bigFile, warm(randomRead(1))},
	{"random write 4 KiB + final fsync", "op/s", goals(0.4, 0.9, 3), "", bigFile, randomWrite},
	{"append 512 B, unsynced", "op/s", goals(0.8, 1, 20), "", nothing, appends(false)},
	{"append 512 B + fdatasync", "op/s", goals(0.65, 0.9, 1.3), "", nothing, appends(true)},
	{"mmap store + msync", "op/s", goals(0.3, 0.9, 1.3), "", nothing, mapped},
	{"create + write 1 KiB", "files/s", goals(0.3, 0.9, 1.3), "", nothing, create},
	{"stat, cold", "files/s", goals(0.1, 0.9, 1.3), "", smallFiles, cold(statFiles)},
	{"stat, warm", "files/s", nil, "", smallFiles, warm(statFiles)},
	{"open + read, cold", "files/s", nil, "", smallFiles, cold(openRead)},
	{"open + read, warm", "files/s", goals(0.2, 0.9, 1.3), "", smallFiles, warm(openRead)},
	{"unlink", "files/s", goals(0.12, 0.9, 1.3), "", smallFiles, unlink},
	{"SQLite FULL, DELETE", "tx/s", goals(0.65, 0.9, 1.3), "sqlite3", nothing, sqlite("DELETE")},
	{"SQLite FULL, WAL", "tx/s", goals(0.65, 0.9, 1.3), "sqlite3", nothing, sqlite("WAL")},
	{"db_bench fillseq", "op/s", goals(0.95, 1, 10), "db_bench", nothing, rocks("fillseq")},
	{"db_bench fillrandom", "op/s", goals(0.95, 1, 10), "db_bench", nothing, rocks("fillrandom")},
	{"fio write 1 MiB, fsync at the end", "MiB/s", goals(0.5, 0.9, 1.5), "fio", nothing, fio("write", "--bs=1M", "--end_fsync=1")},
	{"fio read 1 MiB, cold", "MiB/s", goals(0.9, 0.9, 1.5), "fio", fioWritten, cold(fio("read", "--bs=1M"))},
	{"fio randread 4 KiB, cold, 1 job", "op/s", goals(0.55, 0.9, 1.1), "fio", fioWritten, cold(fio("randread", "--bs=4k", "--io_size=32M"))},
	{"fio randread 4 KiB, cold, 4 jobs", "op/s", goals(0.3, 0.9, 1.1), "fio", fioWritten, cold(fio("randread", "--bs=4k", "--io_size=8M", "--numjobs=4"))},
	{"fio randwrite 4 KiB, fsync at the end", "op/s", goals(0.4, 0.9, 3), "fio", fioWritten, fio("randwrite", "--bs=4k", "--io_size=32M", "--end_fsync=1")},
	{"fio append 512 B, fdatasync each", "op/s", goals(0.65, 0.9, 1.3), "fio", nothing, fio("write", "--bs=512", "--fdatasync=1")},
}

// runLoad is the child's side of a measurement.
func runLoad(name, dir string, stdout io.Writer) error {
	for _, l := range loads {
		if l.name == name {
			if l.needs.path != nil {
				if _, err := os.Stat(l.needs.path(dir)); errors.Is(err, os.ErrNotExist) {
					if _, err := l.needs.make(dir); err != nil {
						return err
					}
				}
			}
			rate, err := l.run(dir)
			if err == nil {
				_, err = fmt.Fprintln(stdout, rate)
			}
			return err
		}
	}
	return fmt.Errorf("there is no load %q", name)
}

const (
	fileSize = 128 << 20
	large    = 1 << 20
	small    = 4096
	files    = 1500
	// limit bounds the measured part of a load; the rate is of what was done.
	limit = 1500 * time.Millisecond
)

func big(dir string) string           { return filepath.Join(dir, "big") }
func little(dir string, i int) string { return filepath.Join(dir, "little", strconv.Itoa(i)) }

// cold drops every page, name and inode that the kernel has cached, of all
// filesystems.
func cold(run func(string) (float64, error)) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		if err := forget(dir, filepath.Join(dir, "../..")); err != nil {
			return 0, err
		}
		return run(dir)
	}
}

// forget makes the kernel forget every page, name and inode. Only what is clean can
// be dropped, so what the filesystems of the directories hold dirty is written back
// before: first the peer's, then the one below.
func forget(peer, lower string) error {
	for _, of := range []string{peer, lower} {
		f, err := os.Open(of)
		if err != nil {
			return err
		}
		// The error is that of any file since the last call: go-fuse's loopback says
		// ENOENT for the times of files that were unlinked.
		_ = unix.Syncfs(int(f.Fd()))
		f.Close()
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// warm runs twice and measures the second.
func warm(run func(string) (float64, error)) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		if _, err := run(dir); err != nil {
			return 0, err
		}
		return run(dir)
	}
}

// timed calls op(i) for i < n and returns calls per second; it stops at limit.
func timed(n int, op func(i int) error) (float64, error) {
	began := time.Now()
	i := 0
	for ; i < n && (i&15 != 0 || time.Since(began) < limit); i++ {
		if err := op(i); err != nil {
			return 0, err
		}
	}
	return float64(i) / time.Since(began).Seconds(), nil
}

func filled(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func sequentialWrite(dir string) (float64, error) {
	if err := os.Remove(big(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	f, err := os.Create(big(dir))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	data := filled(large)
	began := time.Now()
	for range fileSize / large {
		if _, err := f.Write(data); err != nil {
			return 0, err
		}
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return 0, err
	}
	return fileSize / large / time.Since(began).Seconds(), nil
}

func sequentialRead(dir string) (float64, error) {
	f, err := os.Open(big(dir))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	data := make([]byte, large)
	began := time.Now()
	for range fileSize / large {
		if _, err := io.ReadFull(f, data); err != nil {
			return 0, err
		}
	}
	return fileSize / large / time.Since(began).Seconds(), nil
}

// randomRead reads half of the blocks, each once, in the same random order in each
// round: what is cold stays cold until it is read.
func randomRead(jobs int) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		f, err := os.Open(big(dir))
		if err != nil {
			return 0, err
		}
		defer f.Close()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
			return 0, err
		}
		order := rand.New(rand.NewPCG(2, 3)).Perm(fileSize / small)[:fileSize/small/2]
		var done atomic.Int64
		failures := make(chan error, jobs)
		var all sync.WaitGroup
		began := time.Now()
		for part := range slices.Chunk(order, len(order)/jobs) {
			all.Go(func() {
				data := make([]byte, small)
				for i := 0; i < len(part) && (i&15 != 0 || time.Since(began) < limit); i++ {
					if _, err := f.ReadAt(data, int64(part[i])*small); err != nil {
						failures <- err
						return
					}
					done.Add(1)
				}
			})
		}
		all.Wait()
		select {
		case err := <-failures:
			return 0, err
		default:
			return float64(done.Load()) / time.Since(began).Seconds(), nil
		}
	}
}

func randomWrite(dir string) (float64, error) {
	f, err := os.OpenFile(big(dir), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	data := filled(small)
	r := rand.New(rand.NewPCG(7, 8))
	const writes = 8000
	began := time.Now()
	for range writes {
		if _, err := f.WriteAt(data, r.Int64N(fileSize/small)*small); err != nil {
			return 0, err
		}
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	return writes / time.Since(began).Seconds(), nil
}

func appends(synced bool) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		f, err := os.OpenFile(filepath.Join(dir, "journal"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		data := filled(512)
		n := 100_000
		if synced {
			n = 4000
		}
		return timed(n, func(int) error {
			if _, err := f.Write(data); err != nil {
				return err
			}
			if synced {
				return unix.Fdatasync(int(f.Fd()))
			}
			return nil
		})
	}
}

// mapped stores to a random page of a mapping and makes it durable, each time.
func mapped(dir string) (float64, error) {
	const size = 16 << 20
	f, err := os.OpenFile(filepath.Join(dir, "segment"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := f.WriteAt(filled(size), 0); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(memory) }()
	r := rand.New(rand.NewPCG(9, 10))
	return timed(4000, func(i int) error {
		page := r.IntN(size/small) * small
		memory[page+i%small]++
		return unix.Msync(memory[page:page+small], unix.MS_SYNC)
	})
}

func create(dir string) (float64, error) {
	if err := os.RemoveAll(filepath.Join(dir, "little")); err != nil {
		return 0, err
	}
	if err := os.Mkdir(filepath.Join(dir, "little"), 0o755); err != nil {
		return 0, err
	}
	data := filled(1024)
	began := time.Now()
	for i := range files {
		if err := os.WriteFile(little(dir, i), data, 0o644); err != nil {
			return 0, err
		}
	}
	return files / time.Since(began).Seconds(), nil
}

func statFiles(dir string) (float64, error) {
	return timed(files, func(i int) error {
		_, err := os.Lstat(little(dir, i))
		return err
	})
}

func openRead(dir string) (float64, error) {
	return timed(files, func(i int) error {
		_, err := os.ReadFile(little(dir, i))
		return err
	})
}

func unlink(dir string) (float64, error) {
	began := time.Now()
	for i := range files {
		if err := os.Remove(little(dir, i)); err != nil {
			return 0, err
		}
	}
	return files / time.Since(began).Seconds(), nil
}

// sqlite measures small transactions of the sqlite3 program.
func sqlite(journal string) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		const transactions = 400
		file := filepath.Join(dir, "sqlite-"+journal)
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			if err := os.Remove(file + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				return 0, err
			}
		}
		var script strings.Builder
		fmt.Fprintf(&script, "PRAGMA journal_mode=%s; PRAGMA synchronous=FULL; CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);\n", journal)
		for i := range transactions {
			fmt.Fprintf(&script, "INSERT INTO t VALUES(%d, randomblob(500));\n", i)
		}
		cmd := exec.Command("sqlite3", "-batch", "-bail", file)
		cmd.Stdin = strings.NewReader(script.String())
		began := time.Now()
		if text, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("sqlite3: %w: %s", err, text)
		}
		return transactions / time.Since(began).Seconds(), nil
	}
}

// rocks runs RocksDB's own benchmark with its defaults: an unsynced write-ahead
// log, which is what tells filesystems apart.
func rocks(benchmark string) func(string) (float64, error) {
	return func(dir string) (float64, error) {
		db := filepath.Join(dir, "rocksdb")
		defer os.RemoveAll(db)
		text, err := exec.Command("db_bench", "--db="+db, "--benchmarks="+benchmark, "--num=60000", "--compression_type=none",
			"--write_buffer_size=2097152", "--seed=1").CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("db_bench: %w: %s", err, text)
		}
		_, rest, ok := strings.Cut(string(text), "\n"+benchmark)
		fields := strings.Fields(rest) // : 5.477 micros/op 182545 ops/sec …
		if !ok || len(fields) < 5 || fields[4] != "ops/sec" {
			return 0, fmt.Errorf("db_bench said: %s", text)
		}
		return strconv.ParseFloat(fields[3], 64)
	}
}
