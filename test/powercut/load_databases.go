//go:build linux

package powercut

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// commits counts what a database has acknowledged, by place in the log.
type commits struct {
	mu sync.Mutex
	at []int // guarded by mu
}

func (c *commits) add(at int) {
	c.mu.Lock()
	c.at = append(c.at, at)
	c.mu.Unlock()
}

// by returns how many commits were acknowledged at a cut.
func (c *commits) by(cut int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for n < len(c.at) && c.at[n] <= cut {
		n++
	}
	return n
}

// feed gives a program one statement after the other and counts the lines of its
// output that acknowledge one. The program ends when ctx does, killed: what it
// leaves is what a power cut leaves.
func (c *commits) feed(ctx context.Context, w *world, cmd *exec.Cmd, statement func(n int) string, acknowledges func(line string) bool) error {
	input, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var complaints strings.Builder
	cmd.Stderr = &complaints
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	lines := bufio.NewScanner(output)
	for n := 1; ctx.Err() == nil; n++ { // one at a time: what was given but not answered is not counted
		if _, err := io.WriteString(input, statement(n)); err != nil {
			break
		}
		answered := false
		for !answered && lines.Scan() {
			answered = acknowledges(lines.Text())
		}
		if !answered {
			break
		}
		c.add(w.now())
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%s ended by itself: %v\n%s", cmd.Path, err, complaints.String())
}

// output runs a program and returns what it says.
func output(cmd *exec.Cmd) (string, error) {
	text, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%.2000s", filepath.Base(cmd.Path), err, text)
	}
	return string(text), nil
}

// sqliteLoad is SQLite with synchronous=EXTRA: with FULL, and a journal that is
// deleted, it does not sync the directory, so that a power cut may bring the
// journal of the last transaction back and undo it, on every filesystem.
type sqliteLoad struct {
	commits
	journal string // DELETE or WAL
}

func (l *sqliteLoad) name() string { return "sqlite-" + strings.ToLower(l.journal) }

func (l *sqliteLoad) run(ctx context.Context, w *world) error {
	file := w.dir + "/bank.db"
	setUp := exec.Command("sqlite3", "-batch", "-bail", file, "PRAGMA journal_mode="+l.journal+"; CREATE TABLE entry(n INTEGER PRIMARY KEY, payload BLOB); CREATE TABLE total(sum INTEGER); INSERT INTO total VALUES(0);")
	if _, err := output(setUp); err != nil {
		return err
	}
	if err := syncPath(w.dir); err != nil {
		return err
	}
	cmd := exec.Command("stdbuf", "-oL", "sqlite3", "-batch", "-bail", file)
	return l.feed(ctx, w, cmd, func(n int) string {
		begin := ""
		if n == 1 {
			begin = "PRAGMA synchronous=EXTRA; PRAGMA wal_autocheckpoint=50;\n"
		}
		return begin + fmt.Sprintf("BEGIN; INSERT INTO entry VALUES(%d, randomblob(%d)); UPDATE total SET sum=sum+%d; COMMIT; SELECT 'ACK';\n", n, n*97%3000, n)
	}, func(line string) bool { return line == "ACK" })
}

func (l *sqliteLoad) check(dir string, cut int) error {
	acked := l.by(cut)
	if acked == 0 {
		return nil // it may not have been made yet
	}
	text, err := output(exec.Command("sqlite3", "-batch", "-bail", dir+"/bank.db", "PRAGMA integrity_check; SELECT count(*), max(n), sum(n) FROM entry; SELECT sum FROM total;"))
	if err != nil {
		return err
	}
	var count, last, sum, total int
	if _, err := fmt.Sscanf(text, "ok\n%d|%d|%d\n%d", &count, &last, &sum, &total); err != nil {
		return fmt.Errorf("the database says %.300q", text)
	}
	if count < acked || last != count || sum != total {
		return fmt.Errorf("%d transactions up to number %d, sums %d and %d; %d were acknowledged", count, last, sum, total, acked)
	}
	return nil
}

// rocksLoad is RocksDB, whose db_bench fills in order, each write with a synced
// log, and tells how far it is.
type rocksLoad struct{ commits }

func (*rocksLoad) name() string { return "rocksdb" }

const rocksKeys = 1 << 20 // more than it gets to

func (l *rocksLoad) run(ctx context.Context, w *world) error {
	cmd := exec.Command("db_bench", "--benchmarks=fillseq", "--db="+w.dir+"/db", "--sync=1", "--num="+strconv.Itoa(rocksKeys), "--value_size=400",
		"--write_buffer_size=131072", "--compression_type=none", "--stats_interval=1", "--verify_checksum=1", "--disable_wal=0", "--open_files=20")
	// One line for each write, on the error stream.
	errors, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	lines := bufio.NewScanner(errors)
	for last := ""; ; {
		if !lines.Scan() {
			err := cmd.Wait()
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("db_bench ended by itself: %v, after %q", err, last)
		}
		if last = lines.Text(); strings.Contains(last, ") ops and (") {
			l.add(w.now())
		}
	}
}

func (l *rocksLoad) check(dir string, cut int) error {
	acked := l.by(cut)
	if acked == 0 {
		return nil
	}
	text, err := output(exec.Command("ldb", "--db="+dir+"/db", "dump", "--count_only"))
	if err != nil {
		return err
	}
	var keys int
	_, rest, _ := strings.Cut(text, "Keys in range: ")
	if _, err := fmt.Sscan(rest, &keys); err != nil {
		return fmt.Errorf("ldb says %.300q", text)
	}
	if keys < acked {
		return fmt.Errorf("%d keys; %d were acknowledged", keys, acked)
	}
	return nil
}

// postgresLoad is PostgreSQL with synchronous_commit.
type postgresLoad struct {
	commits
	bin string // directory of its programs
	out string // directory for its socket, not on the volume; of user postgres
}

func (*postgresLoad) name() string { return "postgres" }

// as prepares a program to run as the user postgres, who alone may.
func (l *postgresLoad) as(name string, args ...string) (*exec.Cmd, error) {
	uid, gid, err := postgresUser()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(l.bin, name), args...)
	cmd.Dir = l.out
	cmd.Env = append(os.Environ(), "PGHOST="+l.out, "PGDATABASE=postgres", "PGUSER=postgres")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	return cmd, nil
}

func postgresUser() (uid, gid uint32, err error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		return 0, 0, err
	}
	number := func(text string) uint32 {
		n, parseErr := strconv.ParseUint(text, 10, 32)
		err = errors.Join(err, parseErr)
		return uint32(n)
	}
	return number(u.Uid), number(u.Gid), err
}

func (l *postgresLoad) output(input, name string, args ...string) (string, error) {
	cmd, err := l.as(name, args...)
	if err != nil {
		return "", err
	}
	cmd.Stdin = strings.NewReader(input)
	return output(cmd)
}

func (l *postgresLoad) run(ctx context.Context, w *world) error {
	uid, gid, err := postgresUser()
	if err != nil {
		return err
	}
	data := w.dir + "/pg"
	if err := errors.Join(os.Mkdir(data, 0o700), os.Chown(data, int(uid), int(gid))); err != nil {
		return err
	}
	if _, err := l.output("", "initdb", "-D", data, "--auth=trust", "--locale=C", "--encoding=UTF8", "--data-checksums", "--wal-segsize=1"); err != nil {
		return err
	}
	server, err := l.as("postgres", "-D", data, "-c", "listen_addresses=", "-c", "unix_socket_directories="+l.out, "-c", "shared_buffers=4MB",
		"-c", "max_wal_size=4MB", "-c", "min_wal_size=2MB", "-c", "checkpoint_timeout=30s", "-c", "max_connections=5", "-c", "fsync=on")
	if err != nil {
		return err
	}
	if err := server.Start(); err != nil {
		return err
	}
	defer server.Wait()
	// SIGQUIT: every process of it ends at once, without tidying up.
	defer server.Process.Signal(syscall.SIGQUIT)
	for {
		if _, err := l.output("", "pg_isready", "-q"); err == nil {
			break
		} else if ctx.Err() != nil {
			return fmt.Errorf("PostgreSQL does not answer: %w", err)
		}
	}
	if _, err := l.output("CREATE TABLE entry(n int PRIMARY KEY, payload text);", "psql", "-q"); err != nil {
		return err
	}
	client, err := l.as("psql", "-v", "ON_ERROR_STOP=1")
	if err != nil {
		return err
	}
	return l.feed(ctx, w, client, func(n int) string {
		return fmt.Sprintf("INSERT INTO entry VALUES(%d, repeat(md5('%d'), %d));\n", n, n, n%50)
	}, func(line string) bool { return line == "INSERT 0 1" })
}

// check lets PostgreSQL recover, in one process and without a socket.
func (l *postgresLoad) check(dir string, cut int) error {
	acked := l.by(cut)
	if acked == 0 {
		return nil
	}
	data := dir + "/pg"
	if err := os.Remove(data + "/postmaster.pid"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text, err := l.output("SELECT count(*) AS n FROM entry WHERE payload = repeat(md5(n::text), n % 50); SELECT max(n) AS last FROM entry;\n", "postgres", "--single", "-D", data, "-c", "shared_buffers=4MB", "postgres")
	if err != nil {
		return err
	}
	count, err := singleValue(text, `n = "`)
	if err != nil {
		return err
	}
	last, err := singleValue(text, `last = "`)
	if err != nil {
		return err
	}
	if count < acked || last != count {
		return fmt.Errorf("%d rows up to number %d; %d were acknowledged", count, last, acked)
	}
	return nil
}

// singleValue finds a value in what PostgreSQL prints without a server.
func singleValue(text, before string) (n int, err error) {
	_, rest, _ := strings.Cut(text, before)
	if _, err := fmt.Sscanf(rest, `%d"`, &n); err != nil {
		return 0, fmt.Errorf("PostgreSQL says %.1000q", text)
	}
	return n, nil
}
